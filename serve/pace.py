"""How fast a decoder commits tokens, and how much it has to do: what autoscaling goes by."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

# Seconds of rounds after which an earlier measurement counts for a third.
MEMORY_S = 20.0
# Ended answers of which it is remembered how much of their limit they took.
MEMORY_ANSWERS = 64


@dataclass
class _Rate:
    """Tokens and seconds, of which older ones count for less."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        fade = math.exp(-seconds / MEMORY_S)
        self.tokens = self.tokens * fade + tokens
        self.seconds = self.seconds * fade + seconds

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Pace:
    """Measured in the decoder's own thread, of the time in which it works.

    The time for reading prompts is part of it, so where prompts are long, fewer tokens come a
    second, and the same number of tokens is more work.

    Attributes:
        tokens: committed since the start.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.tokens = 0
        self._latest = _Rate()
        # By the most requests that a round had, as a power of two: batches are faster.
        self._by_size: dict[int, _Rate] = {}
        self._shares: deque[float] = deque(maxlen=MEMORY_ANSWERS)

    def note(self, requests: int, tokens: int, seconds: float) -> None:
        """A round of so many requests has committed so many tokens."""
        self.tokens += tokens
        self._latest.add(tokens, seconds)
        if requests:
            size = 1 << (requests - 1).bit_length()
            self._by_size.setdefault(size, _Rate()).add(tokens, seconds)

    def ended(self, length: int, limit: int) -> None:
        """An answer came to so many tokens, of which it might have had more."""
        self._shares.append(length / limit)

    @property
    def tokens_per_second(self) -> float:
        """Of the latest rounds; 0 before there are any."""
        return self._latest.value

    @property
    def full_tokens_per_second(self) -> float:
        """Of the rounds that had most requests, of all that were seen."""
        return self._by_size[max(self._by_size)].value if self._by_size else 0.0

    def left(self, done: int, limit: int) -> int:
        """Tokens that an answer will likely still have, at least one.

        It takes as much of its limit as those before did of theirs: lengths themselves would say
        nothing where clients begin to ask for longer answers.

        Args:
            done: that it has.
            limit: that it may have.
        """
        share = sum(self._shares) / len(self._shares) if self._shares else 1.0
        return max(1, round(share * (limit - done)))


@dataclass(frozen=True)
class Load:
    """What a replica has to do, and how fast it does it.

    Attributes:
        running: requests that are decoded.
        waiting: those that wait for their turn.
        backlog_tokens: that all of them will likely still be given.
        tokens: committed since the start.
        refused: requests that found the queue full, since the start.
        tokens_per_second: of the latest rounds.
        full_tokens_per_second: of the fullest ones.
    """

    running: int
    waiting: int
    backlog_tokens: int
    tokens: int
    refused: int
    tokens_per_second: float
    full_tokens_per_second: float
