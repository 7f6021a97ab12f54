"""Which blocks of a model each stage of a pipeline computes.

A model is a row of blocks: the embedding, the decoder layers one by one, and the head with the
final norm. A stage is some of them in a row. All stages work at the same time on different
micro-batches, so that the slowest sets the pace of all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.errors import ConfigError

MOVED = 100
"""Float operations in the time that one trained number, its gradient and its optimizer's state go
through memory once; what an embedding costs, which computes next to nothing."""


@dataclass(frozen=True)
class Topology:
    """`pipe` stages, each of them on `data` workers that share the batch.

    Workers are numbered stage by stage: those of the first stage come first.
    """

    pipe: int
    data: int

    @classmethod
    def of(cls, pipe: int, world_size: int) -> Topology:
        """That many stages on that many workers.

        Raises:
            ConfigError: the stages do not divide the workers.
        """
        if pipe < 1 or world_size % pipe:
            fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
            raise ConfigError(
                f"train.pipeline_stages={pipe} does not divide train.num_workers={world_size}; "
                f"choose one of {fitting}, or a number of workers that is a multiple of {pipe}"
            )
        return cls(pipe, world_size // pipe)

    def stage_of(self, rank: int) -> int:
        """The stage that a worker computes."""
        return rank // self.data

    def data_rank_of(self, rank: int) -> int:
        """Which share of the batch a worker computes it for."""
        return rank % self.data


@dataclass(frozen=True)
class BlockCost:
    """What a block costs the stage that has it.

    Attributes:
        name: for messages.
        seconds: of one micro-batch, forward and backward; any unit does.
        held_bytes: weights, gradients and optimizer's state.
        pass_bytes: kept from the forward to the backward pass of one micro-batch.
    """

    name: str
    seconds: float
    held_bytes: float = 0.0
    pass_bytes: float = 0.0


def estimate_cost(
    name: str,
    *,
    trained: int,
    active: int,
    held_bytes: float,
    pass_bytes: float,
    tokens: int,
    attention: float = 0.0,
) -> BlockCost:
    """A block's cost from its size, in float operations.

    Args:
        name: for messages.
        trained: weights with a gradient and optimizer's state.
        active: weights that each token is multiplied with: none of an embedding's, of experts
            those that a token is sent to.
        held_bytes: see `BlockCost`.
        pass_bytes: see `BlockCost`.
        tokens: of a micro-batch.
        attention: operations of one token's attention, forward.
    """
    # A multiplication and an addition a weight, once forward and twice backward.
    operations = 3 * tokens * (2 * active + attention) + MOVED * trained
    return BlockCost(name, operations, held_bytes, pass_bytes)


def check_parts(parts: Sequence[int], num_layers: int, pipe: int) -> list[int]:
    """Bounds of the stages from the numbers of their blocks: 0 first, the number of blocks last.

    Args:
        parts: blocks of each stage; the embedding and the head count as one each.
        num_layers: decoder layers of the model.
        pipe: stages.
    Raises:
        ConfigError: another number of stages or blocks than there are, or an empty stage.
    """
    shown, blocks = f"train.parts={list(parts)}", num_layers + 2
    if len(parts) != pipe:
        raise ConfigError(
            f"{shown} names {len(parts)} stages, train.pipeline_stages={pipe}; give one number of "
            "blocks for each stage"
        )
    if any(part < 1 for part in parts):
        raise ConfigError(f"{shown} has an empty stage; each needs at least one block")
    if sum(parts) != blocks:
        raise ConfigError(
            f"{shown} adds up to {sum(parts)}, the model has {blocks} blocks: its embedding, "
            f"{num_layers} layers and its head; change the parts, or leave them out to have them "
            "balanced"
        )
    return list(itertools.accumulate(parts, initial=0))


def balance(
    costs: Sequence[BlockCost],
    pipe: int,
    *,
    memory_bytes: float | None = None,
    tied_bytes: float = 0.0,
    layers_everywhere: bool = False,
) -> list[int]:
    """Blocks of each stage, so that the slowest stage takes as little time as possible.

    Of equally fast divisions, that whose largest stage needs least memory.

    Args:
        costs: of all blocks, in order.
        pipe: stages.
        memory_bytes: that a worker has; None for any amount.
        tied_bytes: what the last stage holds in addition where the head's weights are the
            embedding's and the embedding is elsewhere.
        layers_everywhere: whether no stage may be the embedding or the head alone.
    Raises:
        ConfigError: fewer blocks than stages, or no division fits into memory.
    """
    most = len(costs) - 2 if layers_everywhere else len(costs)
    if pipe > most:
        what = "layers" if layers_everywhere else "blocks, its embedding and head among them"
        raise ConfigError(
            f"train.pipeline_stages={pipe}, but the model has only {most} {what}; lower it"
        )
    need = _Need(costs, pipe, tied_bytes)

    def fits(stage: int, start: int, stop: int) -> bool:
        if layers_everywhere and (stop == 1 or start == len(costs) - 1):
            return False
        return memory_bytes is None or need.bytes(stage, start, stop) <= memory_bytes

    fastest = _least(need, lambda _, start, stop: need.seconds(start, stop), fits)
    if fastest is None:
        memory, memory_bytes = memory_bytes or 0, None
        smallest = _least(need, need.bytes, fits)
        assert smallest is not None
        raise ConfigError(
            f"no division of the model into train.pipeline_stages={pipe} fits into "
            f"{memory / 2**30:.1f} GiB a worker: the best needs "
            f"{smallest[0] / 2**30:.1f} GiB; raise train.pipeline_stages, lower "
            "train.micro_batch_size, or set train.gradient_checkpointing=true"
        )
    smallest = _least(
        need,
        need.bytes,
        lambda stage, start, stop: (
            fits(stage, start, stop) and need.seconds(start, stop) <= fastest[0]
        ),
    )
    assert smallest is not None, "the fastest is one of them"
    return [stop - start for start, stop in itertools.pairwise(smallest[1])]


def stage_bytes(
    costs: Sequence[BlockCost], parts: Sequence[int], tied_bytes: float = 0.0
) -> list[float]:
    """Memory that each stage needs; see `balance`."""
    bounds = list(itertools.accumulate(parts, initial=0))
    need = _Need(costs, len(parts), tied_bytes)
    return [need.bytes(stage, *bounds[stage : stage + 2]) for stage in range(len(parts))]


class _Need:
    """Time and memory of a stage that has blocks start to stop, without adding them up anew."""

    def __init__(self, costs: Sequence[BlockCost], pipe: int, tied_bytes: float) -> None:
        self.pipe, self.blocks, self.tied_bytes = pipe, len(costs), tied_bytes
        self._seconds, self._held, self._pass = (
            list(itertools.accumulate(values, initial=0.0))
            for values in (
                [cost.seconds for cost in costs],
                [cost.held_bytes for cost in costs],
                [cost.pass_bytes for cost in costs],
            )
        )

    def seconds(self, start: int, stop: int) -> float:
        return self._seconds[stop] - self._seconds[start]

    def bytes(self, stage: int, start: int, stop: int) -> float:
        # One forward, one backward: the first stage is as many micro-batches ahead as there are
        # stages.
        in_flight = self.pipe - stage
        passes = in_flight * (self._pass[stop] - self._pass[start])
        apart = self.tied_bytes if stop == self.blocks and start > 0 else 0.0
        return self._held[stop] - self._held[start] + passes + apart


def _least(
    need: _Need,
    cost: Callable[[int, int, int], float],
    allowed: Callable[[int, int, int], bool],
) -> tuple[float, list[int]] | None:
    """The division whose most costly stage costs least: that cost, and its bounds.

    Both functions are asked for a stage, its first block and the one behind its last. None where
    no division has allowed stages alone.
    """
    # What the worst of the stages so far costs, by the block behind the last of them.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for stage in range(need.pipe):
        reached: dict[int, tuple[float, list[int]]] = {}
        for start, (worst, bounds) in best.items():
            for stop in range(start + 1, need.blocks - (need.pipe - stage - 1) + 1):
                if allowed(stage, start, stop):
                    total = max(worst, cost(stage, start, stop))
                    if stop not in reached or total < reached[stop][0]:
                        reached[stop] = (total, [*bounds, stop])
        best = reached
    return best.get(need.blocks)
