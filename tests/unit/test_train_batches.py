"""Cutting, padding and noise of training batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.data.feature_shards import FeatureDataset
from core.train.batches import BatchMaker
from core.train.order import select_examples
from tests.tiny_features import write_tiny_features

MAX_LENGTH = 24
NOISE = 0.1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> FeatureDataset:
    _, features = write_tiny_features(tmp_path_factory.mktemp("features"), examples=12)
    return FeatureDataset(features, "train")


def _maker(dataset: FeatureDataset, noise: float = NOISE, seed: int = 0) -> BatchMaker:
    return BatchMaker(
        source=dataset,
        selection=select_examples(dataset, MAX_LENGTH),
        dtype=torch.float32,
        device=torch.device("cpu"),
        noise=noise,
        seed=seed,
    )


def _noise(maker: BatchMaker, rows: list[int], step: int) -> torch.Tensor:
    noise = maker.batch(np.array(rows), step).noise_BTLH
    assert noise is not None
    return noise


def test_examples_are_cut_and_padded_at_the_right(dataset: FeatureDataset) -> None:
    maker = _maker(dataset)
    rows = np.arange(len(maker.selection))
    batch = maker.batch(rows)
    assert dataset.lengths.max() > MAX_LENGTH
    assert batch.input_ids_BT.shape == (len(rows), MAX_LENGTH)
    for row, length in enumerate(maker.selection.lengths_N.tolist()):
        example = dataset[int(maker.selection.indices_N[row])]
        assert batch.lengths_B[row] == length
        assert torch.equal(batch.input_ids_BT[row, :length], example.input_ids[:length])
        assert torch.equal(batch.features_BTLH[row, :length], example.features[:length])
        assert torch.equal(batch.loss_mask_BT[row, :length], example.loss_mask[:length])
        assert not batch.loss_mask_BT[row, length:].any()
        assert not batch.features_BTLH[row, length:].any()


def test_no_noise_in_evaluation(dataset: FeatureDataset) -> None:
    assert _maker(dataset).batch(np.arange(4)).noise_BTLH is None
    assert _maker(dataset, noise=0.0).batch(np.arange(4), step=1).noise_BTLH is None


def test_noise_belongs_to_the_sequence_and_the_step(dataset: FeatureDataset) -> None:
    maker = _maker(dataset)
    together = _noise(maker, [0, 1, 2, 3], step=5)
    for row in range(4):
        length = int(maker.selection.lengths_N[row])
        alone = _noise(maker, [row], step=5)[0, :length]
        assert torch.equal(together[row, :length], alone)
        assert not torch.equal(alone, _noise(maker, [row], step=6)[0, :length])
        assert not torch.equal(alone, _noise(_maker(dataset, seed=1), [row], 5)[0, :length])


def test_noise_is_uniform_and_scaled_by_length(dataset: FeatureDataset) -> None:
    maker = _maker(dataset)
    noise = _noise(maker, list(range(12)), step=0)
    for row, length in enumerate(maker.selection.lengths_N.tolist()):
        limit = NOISE * 512 / length
        drawn = noise[row, :length]
        assert drawn.abs().max() <= limit
        assert drawn.abs().max() > 0.9 * limit
        # Standard deviation of a uniform variable on ±limit.
        assert drawn.std() == pytest.approx(limit / 3**0.5, rel=0.1)
        assert not noise[row, length:].any()


def test_int8_features_come_as_training_computes(tmp_path: Path) -> None:
    made = {}
    for dtype in ("float32", "int8"):
        _, features = write_tiny_features(tmp_path / dtype, examples=4, seed=1, dtype=dtype)
        made[dtype] = _maker(FeatureDataset(features, "train"), noise=0.0).batch(np.arange(4))
    exact, found = made["float32"], made["int8"]
    assert found.features_BTLH.dtype == exact.features_BTLH.dtype
    assert torch.equal(found.input_ids_BT, exact.input_ids_BT)
    off = (found.features_BTLH - exact.features_BTLH).norm() / exact.features_BTLH.norm()
    # Of 127 steps to a group's largest value, a twelfth's root is off at the middle.
    assert 1e-4 < off < 0.01
