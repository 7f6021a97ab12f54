"""What the parts of a round cost on this machine: measured at the start, and tracked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from core.decode.acceptance import Floats

# How much of a correction the latest measurement makes up.
NEWEST = 0.1
# No more is believed of one measurement: a part that was interrupted says nothing.
LARGEST_SURPRISE = 3.0


@dataclass(frozen=True)
class BatchCosts:
    """Seconds of the parts of a round, as measured at the start.

    Attributes:
        verify: new tokens → seconds of a target pass over a tree of one sequence; has 1.
        each_sequence: seconds that every further sequence adds to a pass, besides its tokens.
        read: sequences → seconds in which the head reads what was committed; has 1.
        expand: nodes of all trees → seconds of expanding them.
    """

    verify: Mapping[int, float]
    each_sequence: float
    read: Mapping[int, float]
    expand: Mapping[int, float]


@dataclass
class CostModel:
    """Expected seconds of any batch, corrected by what rounds took."""

    measured: BatchCosts
    _verify_factors: dict[int, float] = field(default_factory=dict)
    _draft_factor: float = 1.0

    def verify(self, tokens: int, sequences: int) -> float:
        """A target pass over so many new tokens of so many sequences."""
        return float(self.verify_up_to(tokens, 0, sequences)[0])

    def verify_up_to(self, base: int, extra: int, sequences: int) -> Floats:
        """Passes over `base`, `base + 1`, … `base + extra` tokens."""
        tokens = np.arange(base, base + extra + 1)
        factors = [self._verify_factors.get(size, self._overall) for size in self._sizes]
        nearest = np.abs(tokens[:, None] - np.array(self._sizes)).argmin(1)
        found: Floats = np.array(factors)[nearest] * self._as_measured(tokens, sequences)
        return found

    def draft(self, expanded: Sequence[int], sequences: int) -> float:
        """Reading what was committed, and expanding so many nodes of all trees, level by level."""
        read = float(_line(self.measured.read, np.array([sequences]))[0])
        levels = _line(self.measured.expand, np.array(expanded, dtype=np.int64))
        return self._draft_factor * (read + float(levels.sum()))

    def took_verify(self, tokens: int, sequences: int, seconds: float) -> None:
        """Note what a pass took."""
        nearest = min(self._sizes, key=lambda size: (abs(size - tokens), size))
        before = self._verify_factors.get(nearest, self._overall)
        expected = float(self._as_measured(np.array([tokens]), sequences)[0])
        self._verify_factors[nearest] = _corrected(before, seconds / expected)

    def took_draft(self, expanded: Sequence[int], sequences: int, seconds: float) -> None:
        """Note what drafting took."""
        expected = self.draft(expanded, sequences) / self._draft_factor
        if not expected:
            # Copying alone was not measured.
            return
        self._draft_factor = _corrected(self._draft_factor, seconds / expected)

    @property
    def _overall(self) -> float:
        """Of sizes that have not occurred: the machine is as much slower as for the others."""
        factors = self._verify_factors.values()
        return sum(factors) / len(factors) if factors else 1.0

    @property
    def _sizes(self) -> list[int]:
        return sorted(self.measured.verify)

    def _as_measured(self, tokens_X: NDArray[np.int64], sequences: int) -> Floats:
        seconds_X = _line(self.measured.verify, tokens_X)
        return seconds_X + (sequences - 1) * self.measured.each_sequence


def least_of_larger(seconds: Mapping[int, float]) -> dict[int, float]:
    """Of each number of tokens, the seconds of the fastest pass over as many or more.

    A pass does all that a smaller one does. Where the smaller one was measured as longer, something
    else had the machine, and believing it would rule its size out.
    """
    least, found = float("inf"), {}
    for size in sorted(seconds, reverse=True):
        found[size] = least = min(least, seconds[size])
    return dict(sorted(found.items()))


def _corrected(before: float, ratio: float) -> float:
    ratio = min(max(ratio, before / LARGEST_SURPRISE), before * LARGEST_SURPRISE)
    return before + NEWEST * (ratio - before)


def _line(points: Mapping[int, float], at_X: NDArray[np.int64]) -> Floats:
    """Between measured points; behind the last one as steep as between the last two."""
    sizes = sorted(points)
    found: Floats = np.interp(at_X, sizes, [points[size] for size in sizes])
    if len(sizes) > 1:
        before, last = sizes[-2:]
        slope = max(0.0, points[last] - points[before]) / (last - before)
        found = found + slope * np.maximum(at_X - last, 0)
    return found
