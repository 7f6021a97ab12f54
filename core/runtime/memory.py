"""How much memory a run takes: this process, and all that it started."""

from __future__ import annotations

import psutil

from core.runtime.watching import Watcher

SECONDS_BETWEEN_LOOKS = 0.5


class PeakMemory(Watcher):
    """Looks at the process tree twice a second while it is entered.

    Attributes:
        peak_mib: the largest sum of resident memory. A page that several processes share, such
            as Ray's object store, counts once for each of them, so the truth is below it. On a
            cluster, what runs under another node's Ray is not seen.
    """

    def __init__(self) -> None:
        super().__init__("peak memory", SECONDS_BETWEEN_LOOKS)
        self.peak_mib = 0
        self._this = psutil.Process()

    def look(self) -> None:
        """See `Watcher`."""
        self.peak_mib = max(self.peak_mib, _resident(self._this) >> 20)


def _resident(root: psutil.Process) -> int:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            # It ended since it was listed.
            continue
    return total
