"""Whether a new draft head stays: its accepted length against that of the head in use."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Rounds after which a head that is worse beyond doubt has been seen enough of.
LEAST_ROUNDS = 50
STANDARD_ERRORS = 4.0


@dataclass(frozen=True)
class Tally:
    """What a head has brought.

    Attributes:
        rounds: target passes after those of prompts.
        tokens: that they committed.
        squares: sum over the rounds of their tokens' squares.
        failures: requests that the decoder could not finish.
    """

    rounds: int = 0
    tokens: int = 0
    squares: int = 0
    failures: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.rounds + other.rounds,
            self.tokens + other.tokens,
            self.squares + other.squares,
            self.failures + other.failures,
        )

    @classmethod
    def of_round(cls, tokens: int) -> Tally:
        """One round."""
        return cls(1, tokens, tokens * tokens)

    @property
    def accepted_length(self) -> float:
        """τ, tokens a round; 0 before there is one."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def standard_error(self) -> float:
        """Of the accepted length."""
        if self.rounds < 2:
            return math.inf
        variance = max(0.0, self.squares / self.rounds - self.accepted_length**2)
        return math.sqrt(variance / (self.rounds - 1))


@dataclass(frozen=True)
class Verdict:
    """Whether a head is kept, and why."""

    keep: bool
    reason: str


def judge(old: Tally, new: Tally, *, rounds: int, gain: float) -> Verdict | None:
    """Compare a head on trial with the one in use; None where it is too early to say.

    Args:
        old: of the head in use, since the trial began.
        new: of the head on trial.
        rounds: that each must have had.
        gain: by how much the accepted length has to be longer, as a share of the old one's.
    """
    if new.failures:
        return Verdict(False, f"{new.failures} requests failed on it")
    if min(old.rounds, new.rounds) < min(LEAST_ROUNDS, rounds):
        return None
    figures = (
        f"accepted length {new.accepted_length:.3f} in {new.rounds} rounds, against "
        f"{old.accepted_length:.3f} in {old.rounds}"
    )
    wanted = old.accepted_length * (1 + gain)
    doubt = STANDARD_ERRORS * math.hypot(old.standard_error * (1 + gain), new.standard_error)
    if new.accepted_length + doubt < wanted:
        return Verdict(False, f"{figures}: too short beyond doubt")
    if min(old.rounds, new.rounds) < rounds:
        return None
    needed = f"{wanted:.3f} is asked for"
    return Verdict(new.accepted_length >= wanted, f"{figures}; {needed}")
