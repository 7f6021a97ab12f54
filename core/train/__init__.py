"""Training of draft heads: data order, loss, DeepSpeed engine, loop. Nothing here knows Ray."""
