"""Measuring a speculative decoder: accepted length, speedup, losslessness."""
