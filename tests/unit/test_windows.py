"""Sequences that share a call of attention: what windows hold, and when they pay."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from core.decode.rows import ALIGNMENT, zero_rows
from core.models.windows import Windows, plan_windows


@dataclass(frozen=True)
class Rows:
    first: int
    end: int
    count: int = 1


def cost(rows: int, tokens: int) -> float:
    return rows * tokens


def plan(sequences: Sequence[Rows], num_rows: int = 10_000, start: float = 1e9) -> list[Windows]:
    return plan_windows(sequences, range(len(sequences)), num_rows, cost, start)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", [0.0, 300.0, 1e9])
def test_every_sequence_is_in_one_window_that_holds_it(seed: int, start: float) -> None:
    draw, sequences, first = random.Random(seed), [], 0
    for _ in range(17):
        size = draw.randint(1, 90)
        sequences.append(Rows(first, first + size, draw.choice((1, 1, 2, 8))))
        first += size + draw.choice((0, 3, 50))
    draw.shuffle(sequences)
    found = plan(sequences, first, start)
    assert sorted(n for one in found for n in one.members) == list(range(17))
    for one in found:
        assert one.end <= first
        for place, number in enumerate(one.members):
            member, begin = sequences[number], one.first + place * one.step
            assert begin == member.first and member.end <= begin + one.rows
            assert member.count <= one.tokens
    apart = sum(start + cost(one.end - one.first, one.count) for one in sequences)
    together = sum(start + len(one.members) * cost(one.rows, one.tokens) for one in found)
    assert together <= apart
    assert (len(found) < 17) == (start > 0)


def test_all_at_one_distance_are_read_in_one_call() -> None:
    sequences = [Rows(20 * n, 20 * n + 5 + n) for n in (3, 0, 2, 1)]
    assert plan(sequences) == [Windows((1, 3, 2, 0), 0, 20, 8, 1)]
    # The last window would end behind the cache.
    assert [sorted(one.members) for one in plan(sequences, num_rows=67)] != [[0, 1, 2, 3]]


def test_a_short_one_is_not_read_with_a_long_one_for_the_start_alone() -> None:
    sequences = [Rows(0, 500), Rows(600, 610)]
    assert len(plan(sequences, start=480.0)) == 2
    assert len(plan(sequences, start=500.0)) == 1


def test_a_long_one_does_not_keep_the_others_apart() -> None:
    sequences = [Rows(1000 * n, 1000 * n + (900 if n == 5 else 50)) for n in range(8)]
    found = plan(sequences, start=100.0)
    assert sorted(sorted(one.members) for one in found) == [[0, 1, 2, 3, 4], [5], [6, 7]]


def test_those_that_begin_in_the_same_row_are_apart() -> None:
    assert len(plan([Rows(5, 9), Rows(5, 9)])) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_cache_are_zeros_that_vector_units_can_load(dtype: torch.dtype) -> None:
    # What was freed before has other bits in it.
    freed = [np.full(24_000, np.nan, np.float32) for _ in range(50)]
    del freed
    rows = zero_rows(torch.empty(0, dtype=dtype), (4, 1000, 6))
    assert rows.shape == (4, 1000, 6) and rows.dtype == dtype and rows.is_contiguous()
    assert rows.data_ptr() % ALIGNMENT == 0
    assert not rows.any()
