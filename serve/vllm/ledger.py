"""The answers that a replica has asked vLLM for, counted as `serve.autoscaling` wants it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.errors import BusyError
from serve.pace import Load, Pace


@dataclass(eq=False)
class Entry:
    """One answer: the tokens it may have, and those that have come."""

    limit: int
    tokens: int = 0


class Ledger:
    """Belongs to the replica's event loop."""

    def __init__(
        self, at_once: int, waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin empty.

        Args:
            at_once: answers that vLLM decodes at a time.
            waiting: those that may wait for their turn; vLLM itself would let any number.
            clock: in seconds.
        """
        self.most = at_once + waiting
        self._at_once, self._clock = at_once, clock
        self._open: list[Entry] = []
        self._pace = Pace()
        self._refused = 0
        # Since when the time has not been counted yet; it counts while there is work.
        self._since = 0.0

    def check_room(self, count: int) -> None:
        """Refuse early what `join` would refuse.

        Raises:
            BusyError: too many are at work or wait.
        """
        there = len(self._open)
        if there + count > self.most:
            self._refused += 1
            raise BusyError(
                f"{there} of at most {self.most} requests are decoded or wait already, and "
                f"{count} more do not fit; try again later"
            )

    def join(self, limits: Sequence[int]) -> list[Entry]:
        """Take answers in, all of them or none.

        Raises:
            BusyError: too many are at work or wait.
        """
        self.check_room(len(limits))
        if not self._open:
            self._since = self._clock()
        entries = [Entry(limit) for limit in limits]
        self._open += entries
        return entries

    def note(self, entry: Entry, tokens: int) -> None:
        """So many tokens have come."""
        now = self._clock()
        entry.tokens += tokens
        self._pace.note(self._running, tokens, now - self._since)
        self._since = now

    def leave(self, entry: Entry) -> None:
        """It has ended, or nobody waits for it; a second time changes nothing."""
        if entry not in self._open:
            return
        self._open.remove(entry)
        if entry.tokens:
            self._pace.ended(entry.tokens, entry.limit)

    def load(self) -> Load:
        """What is to be done, and how fast that goes."""
        pace = self._pace
        return Load(
            running=self._running,
            waiting=len(self._open) - self._running,
            backlog_tokens=sum(pace.left(one.tokens, one.limit) for one in self._open),
            tokens=pace.tokens,
            refused=self._refused,
            tokens_per_second=pace.tokens_per_second,
            full_tokens_per_second=pace.full_tokens_per_second,
        )

    @property
    def _running(self) -> int:
        """Those that vLLM is at: it does not say so, but takes as many as it may."""
        return min(len(self._open), self._at_once)
