"""Data order, learning rate: functions of seed and step alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.config import TrainConfig
from core.errors import ConfigError, InputError
from core.train.evaluation import plan
from core.train.order import TrainingOrder, evaluation_batches, seed_of, select_examples
from core.train.schedule import learning_rate


@dataclass
class _Example:
    loss_mask: torch.Tensor

    @property
    def input_ids(self) -> torch.Tensor:
        return torch.zeros(len(self.loss_mask), dtype=torch.int64)

    @property
    def features(self) -> torch.Tensor:
        return torch.zeros(len(self.loss_mask), 1, 1)


class _Source(list[_Example]):
    def loss_mask(self, index: int) -> torch.Tensor:
        return self[index].loss_mask


def _source(masks: list[list[int]]) -> _Source:
    return _Source(_Example(torch.tensor(mask, dtype=torch.bool)) for mask in masks)


def _order(
    examples: int = 23, batch: int = 6, epochs: int = 3, seed: int = 0, max_steps: int | None = None
) -> TrainingOrder:
    source = _source([[0] + [1] * (3 + index % 7) for index in range(examples)])
    selection = select_examples(source, max_length=100)
    config = TrainConfig(
        global_batch_size=batch, num_workers=1, epochs=epochs, seed=seed, max_steps=max_steps
    )
    return TrainingOrder.of(selection, config)


def test_selection_counts_what_can_be_learned() -> None:
    # The last position predicts nothing, so a mask on it alone supervises nothing.
    source = _source([[0, 1, 1], [0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0]])
    selection = select_examples(source, max_length=4)
    assert selection.indices_N.tolist() == [0, 2]
    assert selection.lengths_N.tolist() == [3, 4]
    assert selection.supervised_N.tolist() == [1, 3]
    assert selection.left_out == 3
    assert selection.tokens == 7


def test_every_epoch_is_another_permutation() -> None:
    order = _order()
    assert order.steps_per_epoch == 3
    assert order.total_steps == 9
    epochs = [
        np.concatenate([order.global_batch(3 * epoch + step) for step in range(3)])
        for epoch in range(3)
    ]
    for rows in epochs:
        assert len(set(rows.tolist())) == 18
    assert sorted(epochs[0].tolist()) != sorted(epochs[1].tolist())


def test_order_depends_on_seed_and_step_alone() -> None:
    forward, backward = _order(), _order()
    steps = range(forward.total_steps)
    there = [forward.global_batch(step).tolist() for step in steps]
    back = [backward.global_batch(step).tolist() for step in reversed(steps)][::-1]
    assert there == back
    assert there != [_order(seed=1).global_batch(step).tolist() for step in steps]


def test_max_steps_ends_the_run() -> None:
    assert _order(max_steps=4).total_steps == 4
    assert _order(max_steps=400).total_steps == 9


@given(st.sampled_from([1, 2, 3, 6]), st.integers(1, 7), st.integers(0, 8))
def test_any_number_of_workers_trains_on_the_same_sequences(
    world_size: int, micro_batch_size: int, step: int
) -> None:
    order = _order()
    parts = [
        order.micro_batches(step, rank, world_size, micro_batch_size) for rank in range(world_size)
    ]
    rows = np.concatenate([rows for passes in parts for rows in passes])
    assert sorted(rows.tolist()) == sorted(order.global_batch(step).tolist())
    # The same number of passes everywhere, or the workers would wait for each other for ever.
    assert len({len(passes) for passes in parts}) == 1
    assert all(len(rows) <= micro_batch_size for passes in parts for rows in passes)
    supervised = order.selection.supervised_N
    assert sum(int(supervised[rows].sum()) for passes in parts for rows in passes) == (
        order.supervised(step)
    )


def test_workers_get_tokens_alike() -> None:
    order = _order(examples=64, batch=16)
    for step in range(order.total_steps):
        loads = [
            sum(
                int(order.selection.lengths_N[rows].sum())
                for rows in order.micro_batches(step, rank, 2, 4)
            )
            for rank in range(2)
        ]
        assert abs(loads[0] - loads[1]) <= order.selection.lengths_N.max()


def test_evaluation_takes_every_example_once() -> None:
    selection = _order().selection
    rows = [rows for rank in range(3) for rows in evaluation_batches(selection, rank, 3, 4)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(23))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_accepted_length_is_simulated_on_so_many_tokens(world_size: int) -> None:
    selection = _order().selection
    tokens = int(selection.lengths_N[:5].sum()) + 1
    config = TrainConfig(accepted_tokens=tokens, micro_batch_size=2)
    plans = [plan(selection, config, rank, world_size, equal=False) for rank in range(world_size)]
    chained = [row for own in plans for one in own if one.chained for row in one.rows]
    others = [row for own in plans for one in own if not one.chained for row in one.rows]
    assert sorted(chained) == [0, 1, 2, 3, 4]
    assert sorted(chained + others) == list(range(23))
    for own in plans:
        assert [one.chained for one in own] == sorted((one.chained for one in own), reverse=True)
    none = plan(selection, TrainConfig(accepted_tokens=0), 0, 1, equal=False)
    assert not any(one.chained for one in none)
    # Where the first example alone is longer, it is taken nevertheless.
    one, *_ = plan(selection, TrainConfig(accepted_tokens=1), 0, 1, equal=False)
    assert one.chained and one.rows.tolist() == [0]


def test_workers_that_must_keep_step_evaluate_alike() -> None:
    selection = _order().selection
    tokens = int(selection.lengths_N[:1].sum())
    config = TrainConfig(accepted_tokens=tokens, micro_batch_size=4)
    plans = [plan(selection, config, rank, 3, equal=True) for rank in range(3)]
    assert len({tuple(one.chained for one in own) for own in plans}) == 1
    counted = [row for own in plans for one in own if one.counts for row in one.rows]
    assert sorted(counted) == list(range(23))
    assert any(not one.counts for own in plans for one in own)


def test_too_few_sequences_are_named_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=24 .* only 23"):
        _order(batch=24)


def test_nothing_supervised_is_an_input_error() -> None:
    selection = select_examples(_source([[0, 0, 1]] * 5), max_length=10)
    with pytest.raises(InputError, match="none of the 5 training examples"):
        TrainingOrder.of(selection, TrainConfig())


def test_seeds_differ_by_every_part() -> None:
    seeds = {seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = TrainConfig(lr=1.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(step, 10, config) for step in range(11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(before > after for before, after in pairwise(rates[4:]))
    assert rates[7] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.0)


def test_constant_learning_rate_stays() -> None:
    config = TrainConfig(lr=0.5, warmup_steps=0, schedule="constant")
    assert {learning_rate(step, 10, config) for step in range(10)} == {0.5}


def test_a_warm_up_longer_than_the_run_stays_below_the_peak() -> None:
    config = TrainConfig(lr=1.0, warmup_steps=100)
    assert learning_rate(9, 10, config) == pytest.approx(0.1)
