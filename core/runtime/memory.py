"""How much memory a run takes: this process, and all that it started."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

SECONDS_BETWEEN_LOOKS = 0.5


class PeakMemory:
    """Looks at the process tree twice a second while it is entered.

    Attributes:
        peak_mib: the largest sum of resident memory. A page that several processes share, such
            as Ray's object store, counts once for each of them, so the truth is below it. On a
            cluster, what runs under another node's Ray is not seen.
    """

    def __init__(self) -> None:
        self.peak_mib = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while True:
            self.peak_mib = max(self.peak_mib, _resident(this) >> 20)
            if self._done.wait(SECONDS_BETWEEN_LOOKS):
                return


def _resident(root: psutil.Process) -> int:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            # It ended since it was listed.
            continue
    return total
