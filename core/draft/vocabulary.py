"""The draft vocabulary: the target's tokens that a draft head may propose.

A head's output layer costs V·H multiplications a node; the W most frequent tokens cover nearly
all that the target says at a fraction of it. Tokens outside are never drafted, so the target's
own pass produces them: output stays exact, only fewer guesses succeed.
Shapes: V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """A subset of the target's tokens.

    Attributes:
        d2t_W: int64 [W], the target id of each draft id, ascending.
        target_size: V.
    """

    d2t_W: Tensor
    target_size: int

    @property
    def size(self) -> int:
        """W."""
        return self.d2t_W.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether it is the target's whole vocabulary."""
        return self.size == self.target_size

    @cached_property
    def t2d_V(self) -> Tensor:
        """int64 [V], the draft id of each target id; -1 where there is none."""
        t2d_V = torch.full((self.target_size,), -1, dtype=torch.int64)
        t2d_V[self.d2t_W] = torch.arange(self.size)
        return t2d_V

    def rows(self, matrix_VH: Tensor) -> Tensor:
        """The rows of these tokens: [V, H] → [W, H]."""
        if matrix_VH.shape[0] < self.target_size:
            raise ShapeError(
                f"{matrix_VH.shape[0]} rows for a target vocabulary of {self.target_size}"
            )
        return matrix_VH[: self.target_size] if self.is_whole else matrix_VH[self.d2t_W]

    @classmethod
    def whole(cls, target_size: int) -> DraftVocabulary:
        """All V tokens."""
        return cls(torch.arange(target_size), target_size)

    @classmethod
    def from_counts(cls, counts_V: Tensor, size: int) -> DraftVocabulary:
        """The `size` most frequent tokens; ties go to the lower id. 0 means all.

        Args:
            counts_V: [V] how often each token was seen.
            size: W, or 0 for V.
        """
        target_size = counts_V.shape[0]
        if size < 0:
            raise ConfigError(f"draft.vocab_size={size} is negative; 0 means all tokens")
        if size == 0 or size >= target_size:
            return cls.whole(target_size)
        order = torch.argsort(counts_V, descending=True, stable=True)
        return cls(order[:size].sort().values, target_size)

    def grown(self, counts_V: Tensor, size: int) -> DraftVocabulary:
        """All of these tokens and the most frequent others, `size` in all; 0 means all V.

        Args:
            counts_V: [V] how often each token was seen.
            size: as of `from_counts`; below W, nothing is added.
        """
        if 0 < size <= self.size:
            return self
        kept_V = counts_V.clone()
        kept_V[self.d2t_W] = torch.iinfo(kept_V.dtype).max
        return self.from_counts(kept_V, size)

    def coverage(self, counts_V: Tensor) -> float:
        """Share of the counted tokens that are in the vocabulary, 0..1."""
        return float(counts_V[self.d2t_W].sum() / counts_V.sum().clamp(min=1))
