"""The speculative decoder behind HTTP: a Ray Serve application, its protocol, page and chat."""
