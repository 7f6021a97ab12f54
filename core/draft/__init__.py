"""Draft heads: the trained modules that guess tokens from the target's features."""
