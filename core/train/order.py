"""Which sequences each optimizer step trains on, as a function of seed and step alone.

Neither the number of workers nor a restart changes the order: a run that goes on from a
checkpoint needs to know its step and nothing else. Shapes: N usable examples, G global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from core.config import TrainConfig
from core.errors import ConfigError, InputError

Indices = NDArray[np.int64]


class Example(Protocol):
    """One conversation with its features."""

    @property
    def input_ids(self) -> Tensor:
        """int64 [T]."""

    @property
    def loss_mask(self) -> Tensor:
        """bool [T], true where the assistant speaks."""

    @property
    def features(self) -> Tensor:
        """[T, L, H]."""


class MaskSource(Protocol):
    """Examples as far as a selection looks at them."""

    def __len__(self) -> int: ...

    def loss_mask(self, index: int) -> Tensor:
        """The example's mask alone, bool [T]."""


class FeatureSource(Protocol):
    """Examples with their features: read from shards, or streamed from the target as they come.

    `core.data.feature_shards.FeatureDataset` is the first kind.
    """

    def announce(self, passes: Iterable[Sequence[int]]) -> None:
        """Say which examples `take` will be asked for next, in order; drops an earlier plan."""

    def take(self, indices: Sequence[int]) -> Sequence[Example]:
        """The examples of one pass."""


@dataclass(frozen=True)
class Selection:
    """The examples of a source that training can learn from.

    Attributes:
        indices_N: int64 [N], positions in the source, ascending.
        lengths_N: int64 [N], tokens after cutting.
        supervised_N: int64 [N], positions that count in the loss, at least 1 each.
        left_out: examples without a supervised position.
    """

    indices_N: Indices
    lengths_N: Indices
    supervised_N: Indices
    left_out: int

    def __len__(self) -> int:
        """N."""
        return len(self.indices_N)

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return int(self.lengths_N.sum())


# Position i reads feature i and token i+1 to predict feature i+1, so the last position of a
# sequence has nothing to learn and does not count.
FEATURES_AHEAD = slice(None, -1)
# A language model says token i+1 at position i, so nobody predicts the first token.
TOKENS_AHEAD = slice(1, None)


def select_examples(
    source: MaskSource, max_length: int, learnt: slice = FEATURES_AHEAD
) -> Selection:
    """Look at every loss mask once.

    Args:
        source: of the examples.
        max_length: tokens behind it are cut.
        learnt: the part of a mask that counts: `FEATURES_AHEAD` or `TOKENS_AHEAD`.
    """
    found: list[tuple[int, int, int]] = []
    for index in range(len(source)):
        mask = source.loss_mask(index)[:max_length]
        supervised = int(mask[learnt].sum())
        if supervised:
            found.append((index, len(mask), supervised))
    table = np.array(found, dtype=np.int64).reshape(-1, 3)
    return Selection(table[:, 0], table[:, 1], table[:, 2], len(source) - len(found))


@dataclass(frozen=True)
class TrainingOrder:
    """The sequence of global batches.

    Every epoch is a permutation of its own; what is left over at its end, fewer sequences than a
    global batch, waits for another epoch.
    """

    selection: Selection
    global_batch_size: int
    epochs: int
    max_steps: int | None
    seed: int

    @classmethod
    def of(cls, selection: Selection, config: TrainConfig) -> TrainingOrder:
        """The order that a config asks for.

        Raises:
            InputError: nothing to learn from.
            ConfigError: fewer sequences than a global batch.
        """
        if not len(selection):
            raise InputError(
                f"none of the {selection.left_out} training examples has a "
                f"supervised token within train.max_length={config.max_length}; raise it, or "
                "prepare the data anew with answers that begin earlier"
            )
        if len(selection) < config.global_batch_size:
            raise ConfigError(
                f"train.global_batch_size={config.global_batch_size} sequences, but only "
                f"{len(selection)} training sequences are there; lower it or add data"
            )
        return cls(
            selection, config.global_batch_size, config.epochs, config.max_steps, config.seed
        )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in the data."""
        return len(self.selection) // self.global_batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(self.max_steps, steps)

    def global_batch(self, step: int) -> Indices:
        """Rows of the selection that step `step` (0 is the first) trains on, longest first.

        Similar lengths stand side by side, so that micro-batches cut from it carry little
        padding. [G]
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        rows = self._permutation(epoch)[start : start + self.global_batch_size]
        return rows[np.argsort(-self.selection.lengths_N[rows], kind="stable")]

    def micro_batches(
        self, step: int, rank: int, world_size: int, micro_batch_size: int
    ) -> list[Indices]:
        """One worker's part of a global batch, in passes of at most `micro_batch_size`.

        Every worker gets the same number of passes, and as many tokens as the others up to one
        sequence: the slowest worker sets the pace.
        """
        return split(self.global_batch(step)[rank::world_size], micro_batch_size)

    def passes(
        self, first_step: int, rank: int, world_size: int, micro_batch_size: int
    ) -> Iterator[Indices]:
        """One worker's passes from a step on to the end of the run, as they follow each other."""
        # A copy, so that looking ahead into the next epoch does not drop this one's permutation.
        ahead = replace(self)
        for step in range(first_step, self.total_steps):
            yield from ahead.micro_batches(step, rank, world_size, micro_batch_size)

    def supervised(self, step: int) -> int:
        """Supervised positions of the whole global batch: what its loss is divided by."""
        return int(self.selection.supervised_N[self.global_batch(step)].sum())

    def tokens(self, step: int) -> int:
        """Tokens of the whole global batch, without padding."""
        return int(self.selection.lengths_N[self.global_batch(step)].sum())

    @cached_property
    def _permutations(self) -> dict[int, Indices]:
        return {}

    def _permutation(self, epoch: int) -> Indices:
        if epoch not in self._permutations:
            self._permutations.clear()
            generator = np.random.default_rng((self.seed, epoch))
            self._permutations[epoch] = generator.permutation(len(self.selection))
        return self._permutations[epoch]


def evaluation_batches(
    selection: Selection,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    rows: Indices | None = None,
) -> list[Indices]:
    """One worker's part of these rows, or of all, longest first, in passes of at most so many."""
    rows = np.arange(len(selection)) if rows is None else rows
    order = rows[np.argsort(-selection.lengths_N[rows], kind="stable")]
    return split(order[rank::world_size], micro_batch_size)


def split(rows: Indices, size: int) -> list[Indices]:
    """Cut into runs of `size`; the last may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def seed_of(*parts: int) -> int:
    """A 64-bit seed that depends on all parts; `parts` must not be negative."""
    words: Sequence[int] = np.random.SeedSequence(parts).generate_state(2, np.uint32).tolist()
    return words[0] << 32 | words[1]
