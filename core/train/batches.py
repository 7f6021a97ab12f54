"""Batches of training sequences: cut, pad, noise.

Shapes: B batch, T tokens, L feature layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from core.draft.base import DraftBatch
from core.train.order import Example, FeatureSource, Indices, Selection, seed_of

NOISE_LENGTH = 512
"""EAGLE scales its noise by 512 / sequence length (reference: `AddUniformNoise`)."""


@dataclass(frozen=True)
class BatchMaker:
    """Makes batches of one split.

    Attributes:
        source: where examples come from.
        selection: which of them, and how long.
        dtype: of the features, as the head computes.
        device: where batches go.
        noise: half-width of the uniform noise, times 512 / length.
        seed: of the noise.
    """

    source: FeatureSource
    selection: Selection
    dtype: torch.dtype
    device: torch.device
    noise: float = 0.0
    seed: int = 0

    def announce(self, passes: Iterable[Indices]) -> None:
        """Say which rows `batch` will be asked for next, in order, so that they can be got ready.

        Passes are read lazily, as far ahead as the source wants to know.
        """
        self.source.announce(self.selection.indices_N[rows].tolist() for rows in passes)

    def batch(self, rows: Indices, step: int | None = None) -> DraftBatch:
        """The examples of these rows of the selection; with noise if a step is given.

        A sequence's noise depends on seed, step and the sequence alone, so that it is the same
        on any number of workers and in any micro-batch.
        """
        indices = self.selection.indices_N[rows].tolist()
        lengths = self.selection.lengths_N[rows].tolist()
        batch = collate(self.source.take(indices), lengths, self.dtype)
        if step is not None and self.noise > 0:
            seeds = [seed_of(self.seed, step, index) for index in indices]
            shape = batch.features_BTLH.shape
            batch.noise_BTLH = uniform_noise(shape, lengths, seeds, self.noise).to(self.dtype)
        return _to(batch, self.device)


def collate(examples: Sequence[Example], lengths: Sequence[int], dtype: torch.dtype) -> DraftBatch:
    """Cut examples to these lengths and pad them at the right to the longest."""
    size, longest = len(examples), max(lengths)
    layers, hidden = examples[0].features.shape[1:]
    input_ids_BT = torch.zeros(size, longest, dtype=torch.int64)
    loss_mask_BT = torch.zeros(size, longest, dtype=torch.bool)
    features_BTLH = torch.zeros(size, longest, layers, hidden, dtype=dtype)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        input_ids_BT[row, :length] = example.input_ids[:length]
        loss_mask_BT[row, :length] = example.loss_mask[:length]
        features_BTLH[row, :length] = example.features[:length]
    return DraftBatch(input_ids_BT, features_BTLH, loss_mask_BT, torch.tensor(lengths))


def uniform_noise(
    shape: torch.Size, lengths: Sequence[int], seeds: Sequence[int], half_width: float
) -> Tensor:
    """U(-half_width, half_width) · 512 / length for every sequence; zero on padding. [B, T, L, H]

    Source: EAGLE (Li et al. 2024), section 4.1, and the reference's training code.
    """
    noise_BTLH = torch.zeros(shape)
    generator = torch.Generator()
    for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        generator.manual_seed(seed)
        scale = half_width * NOISE_LENGTH / length
        noise_BTLH[row, :length].uniform_(-scale, scale, generator=generator)
    return noise_BTLH


def _to(batch: DraftBatch, device: torch.device) -> DraftBatch:
    if device.type == "cpu":
        return batch
    moved: dict[str, Any] = {
        field.name: None if value is None else value.to(device)
        for field in fields(batch)
        for value in (getattr(batch, field.name),)
    }
    return DraftBatch(**moved)
