"""Choosing the size of the draft tree by measurement.

A larger tree is accepted further but costs more to draft and to verify. What it costs is timed on
this machine; how far it is accepted is read off from rounds decoded with the largest tree, since
reranking tells which of its nodes a smaller tree would have held.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from core.decode.tree import PLAIN, DraftTree, TreePlan

SIZES = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 60)
# A tree must promise this much, or plain decoding, which has no risk, is kept.
WORTHWHILE = 1.02
TIMED_RUNS = 7
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class RoundRecord:
    """One round of the calibration: the accepted path in the largest tree.

    Attributes:
        ranks: reranking places of the accepted nodes, without the root, in order of depth.
    """

    ranks: tuple[int, ...]

    @classmethod
    def of(cls, tree: DraftTree, path: Sequence[int]) -> RoundRecord:
        """Look up the accepted path's ranks."""
        return cls(tuple(tree.ranks[node] for node in path[1:]))

    def accepted_length(self, plan: TreePlan) -> int:
        """Tokens that a smaller tree would have committed in this round, bonus included."""
        length = 1
        for depth, rank in enumerate(self.ranks):
            if rank >= plan.total_tokens or depth > plan.depth:
                break
            length += 1
        return length


@dataclass(frozen=True)
class RoundCosts:
    """Seconds that the parts of a round take on this machine.

    Attributes:
        verify: tree size → seconds of a target pass; 1 is a plain step.
        extend: seconds of reading the committed tokens with the draft head.
        expand: seconds of one expansion of the tree.
    """

    verify: dict[int, float]
    extend: float
    expand: float

    def seconds(self, plan: TreePlan) -> float:
        """Expected seconds of a round; plain decoding does not touch the draft head."""
        if plan.total_tokens == 1:
            return self.verify[1]
        return self.verify[plan.total_tokens] + self.extend + plan.depth * self.expand


@dataclass(frozen=True)
class PlanEstimate:
    """What a plan promises: tokens a round, and speed relative to plain decoding."""

    plan: TreePlan
    accepted_length: float
    speedup: float


def candidate_plans(largest: TreePlan) -> list[TreePlan]:
    """All sizes and depths up to the largest plan's; plain decoding is not among them."""
    sizes = [size for size in SIZES if size <= largest.total_tokens]
    return [
        TreePlan(size, depth, largest.top_k)
        for size in sizes
        for depth in range(largest.depth + 1)
        if depth + 2 <= size <= 1 + largest.top_k + depth * largest.top_k**2
    ]


def estimate(
    plans: Iterable[TreePlan], records: Sequence[RoundRecord], costs: RoundCosts
) -> list[PlanEstimate]:
    """Expected accepted length and speedup of each plan, best first."""
    plain = costs.seconds(PLAIN)
    estimates = []
    for plan in plans:
        length = statistics.fmean(record.accepted_length(plan) for record in records)
        estimates.append(PlanEstimate(plan, length, length * plain / costs.seconds(plan)))
    return sorted(estimates, key=lambda one: -one.speedup)


def choose(estimates: Sequence[PlanEstimate]) -> TreePlan:
    """The plan of most tokens a second; plain decoding unless a tree is worthwhile."""
    if not estimates or estimates[0].speedup < WORTHWHILE:
        return PLAIN
    return estimates[0].plan


def median_seconds(
    works: Mapping[Name, Callable[[], object]], runs: int = TIMED_RUNS
) -> dict[Name, float]:
    """Median duration of each work after one run to warm up.

    The works take turns, so that a machine that is busy for a while is so for all of them.
    """
    for work in works.values():
        _finish(work)
    durations: dict[Name, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            started = time.perf_counter()
            _finish(work)
            durations[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in durations.items()}


def _finish(work: Callable[[], object]) -> None:
    """Do the work to its end: a GPU's kernels are only launched when a call returns."""
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
