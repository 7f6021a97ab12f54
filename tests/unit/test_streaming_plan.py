"""Streaming without Ray: what is asked for when, and that both sources agree on the examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import Config, FeaturesConfig
from core.data.example_dataset import ExampleDataset
from core.data.examples import Example, ExampleMetadata, shard_name, write_examples
from core.data.feature_manifest import Manifest
from core.errors import ConfigError
from core.models.target import Target
from core.runtime import training
from core.runtime.resources import _fits
from core.runtime.streaming import _from_wire, _to_wire, compute_features
from core.train.order import Selection, TrainingOrder
from core.train.prefetch import Prefetch


def _order(count: int = 20, epochs: int = 3) -> TrainingOrder:
    lengths = np.random.default_rng(0).integers(5, 50, count)
    selection = Selection(np.arange(count), lengths, lengths - 1, 0)
    return TrainingOrder(selection, 6, epochs, None, seed=1)


def test_at_most_so_many_requests_are_open() -> None:
    asked: list[list[int]] = []

    def request(indices) -> str:
        asked.append(list(indices))
        return f"result of {indices}"

    prefetch = Prefetch(request, ahead=3)
    passes = [[n, n + 1] for n in range(7)]
    plan = iter(passes)
    prefetch.announce(plan)
    assert asked == passes[:3] and len(prefetch) == 3
    for taken, indices in enumerate(passes, start=1):
        assert prefetch.take(indices) == f"result of {indices}"
        assert asked == passes[: taken + 3]
        assert len(prefetch) <= 3
    with pytest.raises(AssertionError, match="more was taken"):
        prefetch.take([0])


def test_another_order_than_announced_is_noticed() -> None:
    prefetch = Prefetch(list, ahead=2)
    prefetch.announce([[1], [2]])
    with pytest.raises(AssertionError, match="announced"):
        prefetch.take([2])


def test_a_new_plan_replaces_the_old_one() -> None:
    prefetch = Prefetch(list, ahead=2)
    prefetch.announce([[1], [2], [3]])
    prefetch.announce([[4]])
    assert prefetch.take([4]) == [4]
    assert len(prefetch) == 0


@pytest.mark.parametrize("first_step", [0, 2, 5])
def test_the_plan_is_what_the_loop_asks_for(first_step: int) -> None:
    """Also across epochs, each of a permutation of its own."""
    order = _order()
    assert order.total_steps == 9
    for rank in range(2):
        wanted = [
            rows.tolist()
            for step in range(first_step, order.total_steps)
            for rows in order.micro_batches(step, rank, 2, 2)
        ]
        ahead = order.passes(first_step, rank, 2, 2)
        # The loop goes on asking the same object in between.
        found = []
        for rows in ahead:
            order.supervised(first_step)
            found.append(rows.tolist())
        assert found == wanted


def test_examples_are_read_through_a_bounded_cache(tmp_path: Path) -> None:
    metadata = ExampleMetadata("train", "tokenizer", "template", 99, {})
    generator = np.random.default_rng(0)
    wanted: list[Example] = []
    for number in range(3):
        part = []
        for i in range(5):
            length = int(generator.integers(4, 20))
            ids = generator.integers(0, 30, length, dtype=np.int32)
            mask = generator.integers(0, 2, length, dtype=np.uint8)
            part.append(Example(f"{number}-{i}", ids, mask, "made", 2))
        write_examples(tmp_path / "train" / shard_name(number), part, metadata)
        wanted += part
    dataset = ExampleDataset(tmp_path, "train", cached_tokens=1)
    assert len(dataset) == 15
    for index in generator.permutation(15).tolist():
        assert dataset[index].id == wanted[index].id
        assert np.array_equal(dataset[index].input_ids_T, wanted[index].input_ids_T)
        assert np.array_equal(dataset.loss_mask(index).numpy(), wanted[index].loss_mask_T == 1)
        assert len(dataset._decoded) == 1
    spoken = np.concatenate([e.input_ids_T[e.loss_mask_T == 1] for e in wanted])
    assert dataset.token_counts(30).tolist() == np.bincount(spoken, minlength=30).tolist()
    with pytest.raises(IndexError):
        dataset[15]


@pytest.mark.parametrize(
    ("nodes", "fits"),
    [
        ([(4, 0)], False),
        ([(6, 2)], False),
        ([(8, 4)], True),
        ([(4, 2), (4, 2)], True),
        ([(7, 3), (1, 1)], False),  # enough in all, but a replica's CPUs lie on two nodes
    ],
)
def test_replicas_and_workers_must_fit_at_the_same_time(
    nodes: list[tuple[float, float]], fits: bool
) -> None:
    assert _fits([(2, 1)] * 4, nodes) is fits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_features_survive_being_sent(dtype: torch.dtype) -> None:
    features = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    sent = _to_wire(features)
    sent.flags.writeable = False  # as Ray hands it out
    received = _from_wire(sent)
    assert received.dtype == dtype and torch.equal(received, features)
    received += 1


def test_what_is_computed_for_a_pass_is_each_sequences_own(tiny_target: Target) -> None:
    """Of mixed lengths, in target passes of few tokens, in the order in which they were asked."""
    generator = np.random.default_rng(0)
    sequences = [generator.integers(3, 250, n, dtype=np.int32) for n in (31, 4, 17, 30, 5)]
    manifest = Manifest(
        target="", feature_layers=(2,), final_norm=True, dtype="float32", hidden_size=32,
        vocab_size=259, max_length=40, tokenizer_hash="", template_hash="", shards={},
    )  # fmt: skip
    found = compute_features(tiny_target, sequences, manifest, FeaturesConfig(batch_tokens=64))
    for ids, part in zip(sequences, found.split([len(ids) for ids in sequences]), strict=True):
        alone = tiny_target.features(torch.from_numpy(ids.astype(np.int64))[None])[0]
        torch.testing.assert_close(part[:, 0], alone, rtol=1e-4, atol=1e-5)
    stored_only = dataclasses.replace(manifest, dtype="int8")
    with pytest.raises(ConfigError, match=r"set features\.dtype to one of them"):
        compute_features(tiny_target, sequences, stored_only, FeaturesConfig())


def test_streaming_takes_examples_and_counts_what_makes_features(tmp_path: Path) -> None:
    config = Config().replace(features={"mode": "stream"})
    with pytest.raises(ConfigError, match=r"data\.examples is not set"):
        training.training_inputs(config)
    assert training.counted_sections(config) == ("target", "features", "draft", "train")
    assert training.counted_sections(Config()) == ("draft", "train")
