"""One pass of the target over the new tokens of several sequences: trees and parts of prompts.

Shapes: N new tokens of a sequence, L feature layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from core.decode.rows import RowCache
from core.decode.tree import DraftTree
from core.models.ragged import RaggedBatch, Span
from core.models.target import Target


@dataclass(frozen=True, eq=False)
class Piece:
    """New tokens of one sequence.

    Attributes:
        first: cache row where the sequence begins.
        context: rows from there on that are filled, and seen by all new tokens.
        token_ids_N: int64 [N].
        depths_N: int64 [N], how far behind the context each stands.
        sees_NN: bool [N, N], which of the new tokens each sees; None for those up to itself.
        num_logits: of so many of them, from the end, logits are wanted.
    """

    first: int
    context: int
    token_ids_N: Tensor
    depths_N: Tensor
    sees_NN: Tensor | None
    num_logits: int

    @classmethod
    def of_tree(cls, first: int, context: int, tree: DraftTree) -> Piece:
        """A tree behind what is committed."""
        sees_NN = tree.sees_NN if tree.size > 1 else None
        return cls(first, context, tree.token_ids_N, tree.depths_N, sees_NN, tree.size)

    @classmethod
    def of_text(cls, first: int, context: int, ids: Sequence[int], num_logits: int) -> Piece:
        """Part of a prompt."""
        return cls(first, context, torch.tensor(ids), torch.arange(len(ids)), None, num_logits)

    @property
    def size(self) -> int:
        """N."""
        return len(self.token_ids_N)


@torch.inference_mode()
def target_pass(
    target: Target,
    cache: RowCache,
    pieces: Sequence[Piece],
    layers: Sequence[int] = (),
    *,
    dense: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Read pieces of different sequences; their rows come behind each one's context.

    Args:
        target: its attention takes ragged batches.
        cache: of all these sequences.
        pieces: one a sequence.
        layers: of the features, as in `Target.layer_features`; empty for the final one alone.
        dense: use transformers' own attention with a mask over the whole cache: the reference.
    Returns:
        Of each piece, features [N, L, H] and logits [num_logits, V].
    """
    sizes = [piece.size for piece in pieces]
    begins = torch.tensor([piece.first + piece.context for piece in pieces])
    counts = torch.tensor(sizes)
    ends = list(accumulate(sizes))
    # Of each new token, the row that it is written to.
    shifts = begins - torch.tensor(ends) + counts
    cache.will_write(torch.arange(ends[-1]) + shifts.repeat_interleave(counts))
    features_NLH = target.ragged_features(
        torch.cat([piece.token_ids_N for piece in pieces]),
        torch.cat([piece.depths_N + piece.context for piece in pieces]),
        cache,
        RaggedBatch(tuple(Span(p.first, p.context, p.size, p.sees_NN) for p in pieces)),
        layers,
        dense_rows=cache.num_rows if dense else None,
    )
    wanted = [
        torch.arange(end - piece.num_logits, end) for piece, end in zip(pieces, ends, strict=True)
    ]
    final_NH = features_NLH[:, -1]
    if any(piece.num_logits < piece.size for piece in pieces):
        final_NH = final_NH[torch.cat(wanted).to(final_NH.device)]
    logits = target.logits(final_NH).split([piece.num_logits for piece in pieces])
    return list(zip(features_NLH.split(sizes), logits, strict=True))
