"""Batches by token budget: which examples go through the target together.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A further pass costs about as much as this share of a full one, whatever is in it (launching
# the operators, reading the weights): fewer, fuller passes win until padding costs more.
PASS_COST_SHARE = 1 / 32


@dataclass(frozen=True)
class BatchPlan:
    """Which examples make up each batch.

    Attributes:
        batches: indices of examples, every example once; shortest first.
        tokens: all examples' tokens.
        padded_tokens: tokens that the target computes, padding included.
    """

    batches: tuple[tuple[int, ...], ...]
    tokens: int
    padded_tokens: int

    @property
    def waste(self) -> float:
        """The share of computed tokens that is padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


def plan_batches(lengths: Sequence[int] | NDArray[np.int64], max_tokens: int) -> BatchPlan:
    """Group examples of similar length so that no batch exceeds a budget with its padding.

    The examples are sorted by length and cut where the sum of padded tokens and of the cost of
    each pass is least, so that the plan depends on the lengths and the budget alone.

    Args:
        lengths: tokens of each example.
        max_tokens: most tokens a batch, padding included; a longer example goes alone.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(sizes, kind="stable")
    cost_of_pass = max_tokens * PASS_COST_SHARE
    # best[j]: the least cost of the j shortest examples; start[j]: where its last batch begins.
    best, start = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = max(1, int(sizes[order[end - 1]]))
        widest = max(1, max_tokens // longest)
        costs = {
            begin: best[begin] + cost_of_pass + longest * (end - begin)
            for begin in range(max(0, end - widest), end)
        }
        begin = min(costs, key=lambda candidate: costs[candidate])
        best.append(costs[begin])
        start.append(begin)
    batches: list[tuple[int, ...]] = []
    end = len(order)
    while end > 0:
        batches.append(tuple(int(index) for index in order[start[end] : end]))
        end = start[end]
    batches.reverse()
    padded = sum(len(batch) * int(sizes[list(batch)].max()) for batch in batches)
    return BatchPlan(tuple(batches), int(sizes.sum()), padded)


def pad_right(
    sequences: Sequence[NDArray[np.int32]], padding: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Stack token sequences, padded at the right.

    Returns:
        input_ids int64 [B, T] and attention_mask int64 [B, T], None where nothing is padded:
        without a mask the target may take a faster attention.
    """
    longest = max(len(sequence) for sequence in sequences)
    input_ids_BT = np.full((len(sequences), longest), padding, dtype=np.int64)
    mask_BT = np.zeros((len(sequences), longest), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        input_ids_BT[row, : len(sequence)] = sequence
        mask_BT[row, : len(sequence)] = 1
    mask = None if mask_BT.all() else torch.from_numpy(mask_BT)
    return torch.from_numpy(input_ids_BT), mask
