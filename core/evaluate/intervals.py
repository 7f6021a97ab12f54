"""Speeds and their ratios, with intervals that say how far chance reaches.

Every way does the same work several times, in turn with the others, so a ratio is taken within a
repeat, where a machine that drifts slows both of its sides; the figure is the median of these. Its
interval is a bootstrap's (Efron 1979): what the figure would have been with other prompts of the
same kind and other repeats, drawn from those that there are. Drawing both errs on the wide side.

Shapes: P pieces of work (prompts), R repeats, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Timings:
    """Tokens and seconds of one way.

    Attributes:
        tokens_PR: float [P, R].
        seconds_PR: float [P, R].
    """

    tokens_PR: Floats
    seconds_PR: Floats

    @classmethod
    def of(cls, measured: Sequence[Sequence[tuple[int, float]]]) -> Timings:
        """From (tokens, seconds) of each piece of work in each repeat."""
        both_PR2 = np.array(measured, dtype=np.float64)
        return cls(both_PR2[..., 0], both_PR2[..., 1])

    def speeds_R(self) -> Floats:
        """Tokens a second in each repeat, over all pieces."""
        return self.tokens_PR.sum(0) / self.seconds_PR.sum(0)

    def speed(self) -> float:
        """The median repeat's."""
        return float(np.median(self.speeds_R()))

    def drawn(self, weights_SP: Floats) -> Floats:
        """Speeds [S, R] of samples that hold each piece so many times."""
        return (weights_SP @ self.tokens_PR) / (weights_SP @ self.seconds_PR)


@dataclass(frozen=True)
class Ratio:
    """How much faster one way is than another.

    Attributes:
        value: median over repeats.
        interval: 95% of what other prompts and repeats would give; None of a single measurement.
    """

    value: float
    interval: tuple[float, float] | None


def speed_ratio(of: Timings, to: Timings, *, paired: bool = True) -> Ratio:
    """Speed of `of` over that of `to`, which did the same work as often.

    Args:
        of: the one.
        to: the other.
        paired: whether piece p is the same work in both, so that a sample holds it in both;
            otherwise, pieces are drawn for each.
    """
    value = float(np.median(of.speeds_R() / to.speeds_R()))
    num_pieces, repeats = of.tokens_PR.shape
    if num_pieces == repeats == 1:
        return Ratio(value, None)
    # The same seed for all: the interval of a report is a function of what was measured.
    random = np.random.default_rng(0)
    weights_SP = _weights(random, num_pieces)
    others_SP = weights_SP if paired else _weights(random, len(to.tokens_PR))
    ratios_SR = of.drawn(weights_SP) / to.drawn(others_SP)
    repeats_SR = random.integers(repeats, size=(SAMPLES, repeats))
    medians_S = np.median(np.take_along_axis(ratios_SR, repeats_SR, axis=1), axis=1)
    low, high = np.quantile(medians_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(value, (float(low), float(high)))


def _weights(random: np.random.Generator, num_pieces: int) -> Floats:
    """How often each piece is drawn, [S, P]."""
    drawn = random.multinomial(num_pieces, np.full(num_pieces, 1 / num_pieces), size=SAMPLES)
    return drawn.astype(np.float64)
