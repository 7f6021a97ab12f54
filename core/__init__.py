"""Aerie: train, measure and serve EAGLE-style speculative decoders on Ray."""

__version__ = "0.1.0"
