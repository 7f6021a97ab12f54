"""A load generator for served models, and what is measured with it."""
