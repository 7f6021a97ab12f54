"""Random access to the examples of a split, in bounded memory.

Example i is the same as that of a `FeatureDataset` made from the same folder, so that training
can go through either in one order. Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.data.examples import Example, example_shards, read_examples, read_footer

# 5 bytes each: some 170 MB for each split that a process reads.
CACHED_TOKENS = 2**25


class ExampleDataset:
    """The examples of one split; shards that were read last stay in memory. Can be pickled."""

    def __init__(self, folder: str | Path, split: str, cached_tokens: int = CACHED_TOKENS) -> None:
        """Look at the shards' footers.

        Args:
            folder: that prepare_data wrote.
            split: `train` or `held_out`.
            cached_tokens: of decoded shards kept in memory; the last one read always is.
        Raises:
            InputError: prepare_data has not finished in this folder, or a shard is damaged.
        """
        self.cached_tokens = cached_tokens
        self._shards = example_shards(Path(folder), split)
        rows = [read_footer(shard).num_rows for shard in self._shards]
        # Examples before each shard, for finding an example's shard by bisection.
        self._first: list[int] = np.cumsum([0, *rows]).tolist()
        self._decoded: OrderedDict[int, list[Example]] = OrderedDict()
        self._tokens: dict[int, int] = {}

    def __len__(self) -> int:
        """Number of examples."""
        return self._first[-1]

    def __getitem__(self, index: int) -> Example:
        """Example `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect.bisect_right(self._first, index) - 1
        return self._shard(number)[index - self._first[number]]

    def loss_mask(self, index: int) -> Tensor:
        """The loss mask of example `index`, bool [T]."""
        return torch.from_numpy(self[index].loss_mask_T.astype(bool))

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is supervised: int64 [vocab_size], for the draft vocabulary."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for index in range(len(self)):
            example = self[index]
            supervised = example.input_ids_T[example.loss_mask_T.astype(bool)]
            counts += np.bincount(supervised, minlength=vocab_size)
        return torch.from_numpy(counts)

    def _shard(self, number: int) -> list[Example]:
        if number in self._decoded:
            self._decoded.move_to_end(number)
            return self._decoded[number]
        examples = read_examples(self._shards[number])
        self._decoded[number] = examples
        self._tokens[number] = sum(example.num_tokens for example in examples)
        while sum(self._tokens.values()) > self.cached_tokens and len(self._decoded) > 1:
            oldest, _ = self._decoded.popitem(last=False)
            del self._tokens[oldest]
        return examples
