"""Memory that is free is given back, so that a replica's size is what it uses.

The C library keeps what was freed for the next time. Passes are never of one size, so between
blocks that live there come to be gaps which no later one fills: SmolLM2 with 16 requests at a time
grew from 2.2 to 2.5 GB in five minutes, of which all but 5 MB was such gaps.
"""

from __future__ import annotations

import ctypes
import time

# A call takes some milliseconds.
EVERY_S = 10.0


class Trimmer:
    """Has the C library give memory back, now and then."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        """Remember how often."""
        # Of glibc; others do not keep that much.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._every_s, self._last = every_s, time.monotonic()

    def look(self) -> None:
        """Call it often: it does something once the time has come."""
        now = time.monotonic()
        if self._trim is not None and now - self._last >= self._every_s:
            self._trim(ctypes.c_size_t(0))
            self._last = now
