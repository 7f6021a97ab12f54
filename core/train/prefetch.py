"""Asking for batches ahead of their use, a bounded number at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

Handle = TypeVar("Handle")


class Prefetch(Generic[Handle]):
    """Keeps requests open for the passes that come next.

    The bound is the back-pressure: a request is only made when an earlier one was taken, so that
    no more than `ahead` results wait anywhere, besides the one that is in use.
    """

    def __init__(self, request: Callable[[Sequence[int]], Handle], ahead: int) -> None:
        """Nothing is requested before `announce`.

        Args:
            request: starts the work on a pass and returns at once.
            ahead: open requests at one time, at least 1.
        """
        assert ahead >= 1
        self._request, self.ahead = request, ahead
        self._plan: Iterator[Sequence[int]] = iter(())
        self._open: deque[tuple[list[int], Handle]] = deque()

    def announce(self, passes: Iterable[Sequence[int]]) -> None:
        """Start on a new plan; what was open of an earlier one is forgotten."""
        self._open.clear()
        self._plan = iter(passes)
        self._fill()

    def take(self, indices: Sequence[int]) -> Handle:
        """The next request of the plan, which must be for these indices; asks for one more."""
        assert self._open, "more was taken than announced"
        expected, handle = self._open.popleft()
        assert expected == list(indices), f"took {list(indices)}, announced {expected}"
        self._fill()
        return handle

    def __len__(self) -> int:
        """Open requests."""
        return len(self._open)

    def _fill(self) -> None:
        while len(self._open) < self.ahead:
            following = next(self._plan, None)
            if following is None:
                return
            self._open.append((list(following), self._request(following)))
