"""The tokens of a batch in one row, without padding.

Everything but attention looks at one token at a time, so that it need not see padding; attention
alone puts sequences below each other again, where a token sees its own sequence from its start.
That is a block-diagonal mask with positions that begin anew, without the blocks that are zero.
Shapes: B batch, T tokens of the longest sequence, N tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which places of a padded batch [B, T] are packed, row by row.

    Attributes:
        shape: B and T.
        places_N: int64 [N], each token's place among the B · T, ascending.
    """

    shape: tuple[int, int]
    places_N: Tensor

    @classmethod
    def of(cls, taken_BT: Tensor) -> Packing:
        """All places where `taken_BT`, bool [B, T], is true."""
        batch, tokens = taken_BT.shape
        return cls((batch, tokens), taken_BT.flatten().nonzero()[:, 0])

    def pack(self, x_BT: Tensor) -> Tensor:
        """[B, T, …] to [N, …]."""
        return x_BT.flatten(0, 1).index_select(0, self.places_N)

    def unpack(self, x_N: Tensor) -> Tensor:
        """[N, …] to [B, T, …], zero elsewhere."""
        batch, tokens = self.shape
        padded = x_N.new_zeros(batch * tokens, *x_N.shape[1:])
        return padded.index_copy(0, self.places_N, x_N).view(batch, tokens, *x_N.shape[1:])

    @property
    def positions_N(self) -> Tensor:
        """int64 [N], each token's position in its sequence."""
        return self.places_N % self.shape[1]
