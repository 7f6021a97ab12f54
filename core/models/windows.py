"""Which sequences' rows of a cache are read in one call of attention.

A call of torch's kernel costs more to start than a short text costs to attend to. Windows into the
cache that are of one size and stand at one distance are a strided view, which copies nothing. Any
two sequences are such windows, and further ones at the same distance join them; a mask hides the
rows behind those that are shorter than the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

# Sequences behind one that are tried as the next window.
NEIGHBOURS = 8


class Rows(Protocol):
    """A sequence in the cache."""

    @property
    def first(self) -> int:
        """Its first row."""

    @property
    def end(self) -> int:
        """The row behind its last one."""

    @property
    def count(self) -> int:
        """Its new tokens."""


Cost = Callable[[int, int], float]
"""What a window of so many rows and new tokens adds to a call."""


@dataclass(frozen=True)
class Windows:
    """Windows that are read in one call.

    Attributes:
        members: numbers of the sequences, one a window, in the order of their rows.
        first: row of the first window.
        step: rows from one window to the next.
        rows: of each window.
        tokens: most new tokens of a member.
    """

    members: tuple[int, ...]
    first: int
    step: int
    rows: int
    tokens: int

    @classmethod
    def of(cls, members: Sequence[int], sequences: Sequence[Rows]) -> Windows:
        """Of some sequences, whose first rows stand at one distance."""
        chosen = [sequences[number] for number in members]
        step = chosen[1].first - chosen[0].first if len(chosen) > 1 else 0
        rows, tokens = max(map(_size, chosen)), max(one.count for one in chosen)
        return cls(tuple(members), chosen[0].first, step, rows, tokens)

    @property
    def end(self) -> int:
        """The row behind the last window."""
        return self.first + (len(self.members) - 1) * self.step + self.rows


def plan_windows(
    sequences: Sequence[Rows], wanted: Sequence[int], num_rows: int, cost: Cost, start: float
) -> list[Windows]:
    """Divide sequences into calls, greedily.

    Args:
        sequences: in any order.
        wanted: numbers of those that are divided.
        num_rows: of the cache; no window ends behind it.
        cost: of a window.
        start: what a call costs besides, in the same unit.
    Returns:
        Windows in which each of them is once.
    """
    # Those of like size stand together: little is read in vain.
    left = sorted(wanted, key=lambda n: (sequences[n].count, _size(sequences[n])))
    at = {sequences[number].first: number for number in left}

    def saved(windows: Windows) -> float:
        """By one call in place of one each; nothing can be where the cache ends."""
        if windows.end > num_rows:
            return -math.inf
        chosen = [sequences[number] for number in windows.members]
        apart = sum(cost(_size(one), one.count) for one in chosen)
        more = len(chosen) * cost(windows.rows, windows.tokens) - apart
        return (len(chosen) - 1) * start - more

    def raster(pair: Sequence[int]) -> Windows:
        """Of two sequences, and of others at the same distance as long as they save something."""
        found = Windows.of(sorted(pair, key=lambda n: sequences[n].first), sequences)
        for behind in (False, True):
            while found.step:
                edge = sequences[found.members[-1 if behind else 0]].first
                number = at.get(edge + found.step if behind else edge - found.step)
                if number is None:
                    break
                members = [*found.members, number] if behind else [number, *found.members]
                wider = Windows.of(members, sequences)
                if saved(wider) < saved(found):
                    break
                found = wider
        return found

    plan = []
    while left:
        best = Windows.of(left[:1], sequences)
        for other in left[1 : 1 + NEIGHBOURS]:
            found = raster((left[0], other))
            if found.step and saved(found) > saved(best):
                best = found
        plan.append(best)
        for number in best.members:
            left.remove(number)
            at.pop(sequences[number].first, None)
    return plan


def _size(sequence: Rows) -> int:
    return sequence.end - sequence.first
