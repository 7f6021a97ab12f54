"""Speculative decoding: draft tree, verification, KV cache, tree policy, engine."""
