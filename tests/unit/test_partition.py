"""Dividing a model's blocks among the stages of a pipeline."""

from __future__ import annotations

import itertools
import random

import pytest

from core.errors import ConfigError
from core.models.partition import (
    BlockCost,
    Topology,
    balance,
    check_parts,
    estimate_cost,
    stage_bytes,
)


def _blocks(*seconds: float) -> list[BlockCost]:
    return [BlockCost(f"block {i}", value) for i, value in enumerate(seconds)]


def test_a_topology_divides_the_workers():
    assert Topology.of(2, 4) == Topology(pipe=2, data=2)
    grid = Topology(pipe=2, data=3)
    assert [grid.stage_of(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [grid.data_rank_of(rank) for rank in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("pipe", "workers"), [(3, 4), (4, 2), (0, 2)])
def test_a_topology_that_does_not_divide_is_refused(pipe: int, workers: int):
    with pytest.raises(ConfigError, match=rf"pipeline_stages={pipe} does not divide .*={workers}"):
        Topology.of(pipe, workers)


def test_given_parts_become_bounds():
    assert check_parts([3, 3], num_layers=4, pipe=2) == [0, 3, 6]
    assert check_parts([6], num_layers=4, pipe=1) == [0, 6]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([2, 2, 2], r"names 3 stages, train.pipeline_stages=2"),
        ([6, 0], "has an empty stage"),
        ([2, 2], r"adds up to 4, the model has 6 blocks: its embedding, 4 layers and its head"),
    ],
)
def test_bad_parts_are_refused(parts: list[int], message: str):
    with pytest.raises(ConfigError, match=message):
        check_parts(parts, num_layers=4, pipe=2)


def test_a_heavy_head_gets_fewer_layers_beside_it():
    # A vocabulary as large as four layers.
    assert balance(_blocks(0, *[1] * 8, 4), 2) == [7, 3]
    assert balance(_blocks(0, *[1] * 8, 0), 2) == [5, 5]


def test_balancing_is_as_good_as_trying_all_divisions():
    draw = random.Random(0)
    for _ in range(30):
        costs = [
            BlockCost("", draw.randint(1, 9), draw.randint(1, 9), draw.randint(0, 3))
            for _ in range(draw.randint(4, 9))
        ]
        pipe, tied = draw.randint(1, 4), draw.choice([0.0, 5.0])

        def worst(bounds: tuple[int, ...], costs=costs, tied=tied) -> tuple[float, float]:
            parts = [stop - start for start, stop in itertools.pairwise(bounds)]
            times = [sum(c.seconds for c in costs[a:b]) for a, b in itertools.pairwise(bounds)]
            return max(times), max(stage_bytes(costs, parts, tied))

        divisions = [
            (0, *inner, len(costs))
            for inner in itertools.combinations(range(1, len(costs)), pipe - 1)
        ]
        found = balance(costs, pipe, tied_bytes=tied)
        bounds = tuple(itertools.accumulate(found, initial=0))
        assert worst(bounds) == min(worst(division) for division in divisions)
        limit = sorted(worst(division)[1] for division in divisions)[len(divisions) // 2]
        fitting = [division for division in divisions if worst(division)[1] <= limit]
        found = balance(costs, pipe, tied_bytes=tied, memory_bytes=limit)
        bounds = tuple(itertools.accumulate(found, initial=0))
        assert worst(bounds) == min(worst(division) for division in fitting)


def test_of_equally_fast_divisions_the_smaller_stage_wins():
    # The last block sets the pace wherever the others are.
    costs = [BlockCost("", 1, 1), BlockCost("", 1, 1), BlockCost("", 1, 8), BlockCost("", 9, 1)]
    assert balance(costs, 3) == [2, 1, 1]


def test_stages_ahead_hold_more_passes_and_the_last_a_tied_weight():
    costs = [BlockCost("", 1, held_bytes=10, pass_bytes=1)] * 4
    assert stage_bytes(costs, [1, 1, 2]) == [13, 12, 22]
    assert stage_bytes(costs, [1, 1, 2], tied_bytes=5) == [13, 12, 27]
    # Where all is on one worker, there is one of it.
    assert stage_bytes(costs, [4], tied_bytes=5) == [44]


def test_too_little_memory_says_what_is_needed():
    costs = [BlockCost("", 1, held_bytes=2.0 * 2**30)] * 4
    with pytest.raises(ConfigError, match=r"fits into 3.0 GiB a worker: the best needs 4.0 GiB"):
        balance(costs, 2, memory_bytes=3 * 2**30)
    assert balance(costs, 4, memory_bytes=3 * 2**30) == [1, 1, 1, 1]


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ConfigError, match="only 3 blocks"):
        balance(_blocks(1, 1, 1), 4)


def test_an_embedding_costs_little_and_a_layer_what_its_tokens_do():
    about = {"held_bytes": 0.0, "pass_bytes": 0.0}
    embedding = estimate_cost("embedding", trained=1000, active=0, tokens=500, **about)
    layer = estimate_cost("layer", trained=1000, active=1000, tokens=500, **about)
    longer = estimate_cost("layer", trained=1000, active=1000, tokens=5000, **about)
    assert embedding.seconds < layer.seconds / 20
    assert longer.seconds > 9 * layer.seconds
    attending = estimate_cost("layer", trained=0, active=0, tokens=1, attention=7, **about)
    assert attending.seconds == 21
