"""Looking at something every so often while other work goes on."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Watcher(ABC):
    """Calls `look` in a thread of its own while it is entered, first at once and last on leaving.

    What `look` raises ends the watching, not the work; Python prints it.
    """

    def __init__(self, name: str, seconds_between_looks: float) -> None:
        self._seconds = seconds_between_looks
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    @abstractmethod
    def look(self) -> None:
        """One look."""

    def __enter__(self) -> Self:
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
        self.look()
        while not self._done.wait(self._seconds):
            self.look()
        self.look()
