"""Metrics on held-out sequences; of a draft head, the accepted length among them.

Shapes: N usable examples, D depths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import TrainConfig
from core.train.engine import TrainingEngine
from core.train.order import Indices, Selection, evaluation_batches
from core.train.trainee import NUM_TOKENS, Batches

HELD_OUT = "held_out_"
ACCEPTED_LENGTH, ACCEPTED_DEPTH = f"{HELD_OUT}accepted_length", f"{HELD_OUT}accepted_depth_"


@dataclass(frozen=True)
class EvaluationPass:
    """One forward pass of one worker.

    Attributes:
        rows: of the selection.
        chained: whether the accepted length is simulated on them.
        counts: false where the worker only keeps step with the others.
    """

    rows: Indices
    chained: bool
    counts: bool = True


def evaluate_draft(
    engine: TrainingEngine, held_out: Batches, config: TrainConfig
) -> dict[str, float]:
    """Means over all held-out sequences, and the accepted length simulated on some of them.

    All workers call, each does its part, all get the result. `held_out_accepted_depth_<d>` is the
    share of positions where a chain of d drafted tokens is right (`DraftHead.chain_hits`), and
    `held_out_accepted_length` is 1 + their sum over depths: what a pass of the target would commit
    on average, its bonus token counted, if the head drafted one chain of `train.accepted_depth`.
    A tree of drafts accepts more.
    """
    passes = plan(
        held_out.selection, config, engine.rank, engine.world_size, equal=engine.equal_passes
    )
    chain = torch.zeros(1 + config.accepted_depth, dtype=torch.float64, device=held_out.device)

    def simulate(one: EvaluationPass, batch: Any) -> None:
        if one.chained:
            positions, hits_D = engine.compute(batch, config.accepted_depth)
            found = torch.cat((positions.to(hits_D.device)[None], hits_D)).double()
            chain.add_(found * one.counts)

    found = mean_statistics(engine, held_out, passes, simulate)
    torch.distributed.all_reduce(chain)
    return {**found, **(_accepted(chain.tolist()) if config.accepted_tokens else {})}


def mean_statistics(
    engine: TrainingEngine,
    held_out: Batches,
    passes: Sequence[EvaluationPass],
    also: Callable[[EvaluationPass, Any], None] = lambda one, batch: None,
) -> dict[str, float]:
    """Means of the engine's statistics over all workers' passes, of the averaged weights.

    Args:
        engine: of this worker.
        held_out: the sequences.
        passes: of this worker.
        also: what else is done with each pass's batch.
    """
    held_out.announce(one.rows for one in passes)
    sums = torch.zeros(len(engine.statistic_names), dtype=torch.float64, device=held_out.device)
    with engine.averaged():
        for one in passes:
            batch = held_out.batch(one.rows)
            sums += engine.evaluate(batch) * one.counts
            also(one, batch)
    torch.distributed.all_reduce(sums)
    found = means(engine.statistic_names, sums)
    return {f"{HELD_OUT}{name}": value for name, value in found.items()}


def means(names: tuple[str, ...], sums: Tensor) -> dict[str, float]:
    """Sums over tokens to means, without the number of tokens itself."""
    named = dict(zip(names, sums.tolist(), strict=True))
    tokens = max(named.pop(NUM_TOKENS), 1.0)
    return {name: value / tokens for name, value in named.items()}


def plan(
    selection: Selection,
    config: TrainConfig,
    rank: int,
    world_size: int,
    *,
    equal: bool,
    drafts: bool = True,
) -> list[EvaluationPass]:
    """One worker's passes; those whose accepted length is simulated come first.

    Args:
        selection: all held-out examples.
        config: `accepted_tokens` and `micro_batch_size` count.
        rank: of the worker.
        world_size: workers.
        equal: whether all workers must have as many passes.
        drafts: whether there is an accepted length to be simulated.
    """
    tokens = config.accepted_tokens if drafts else 0
    # Held-out examples stand in the order of their hashes: the first ones are a fair sample.
    ends_N = selection.lengths_N.cumsum()
    count = int(np.searchsorted(ends_N, tokens, side="right"))
    if tokens:
        count = max(count, 1)
    every = np.arange(len(selection))
    found = []
    for rows, chained in ((every[:count], True), (every[count:], False)):
        batches = evaluation_batches(selection, rank, world_size, config.micro_batch_size, rows)
        found += [EvaluationPass(batch, chained) for batch in batches]
        if equal:
            share = -(-len(rows) // world_size)
            lacking = -(-share // config.micro_batch_size) - len(batches)
            found += [EvaluationPass(rows[:1], chained, counts=False)] * lacking
    return found


def _accepted(chain: list[float]) -> dict[str, float]:
    positions, *hits_D = chain
    rates_D = [hits / max(positions, 1.0) for hits in hits_D]
    by_depth = {f"{ACCEPTED_DEPTH}{d}": rate for d, rate in enumerate(rates_D, start=1)}
    return {ACCEPTED_LENGTH: 1.0 + sum(rates_D), **by_depth}
