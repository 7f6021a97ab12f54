"""Drafting for several sequences at once: one forward pass of the head reads what was committed
to all of them, and one a level of depth grows all their trees.

Shapes: S sequences, N new positions of all, K top-k, B nodes expanded a sequence, P nodes
proposed a sequence, W draft vocabulary, H hidden.
Source: EAGLE-2 (Li et al. 2024), section 4: expansion by cumulative probability, then reranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.decode.acceptance import Floats
from core.decode.requests import DecodedSequence
from core.decode.rows import Stretch
from core.decode.tree import DraftTree, TreePlan
from core.draft.base import DraftBeams, DraftCache, DraftHead, DraftOutput, DraftPlace

# Tokens whose maximum is looked at together.
BLOCK = 64
Ids = NDArray[np.int64]
GrowthRule = Callable[[Sequence[Floats], Floats], int]
"""How many nodes of each tree are expanded, 0 to end growth: given the log-probabilities of all
nodes by level, [S, …] each, and of those [S, K] that may be expanded, best first."""


class Drafter(Protocol):
    """What proposes trees."""

    def feature_layers(self, num_layers: int) -> tuple[int, ...]:
        """What it wants to read of a target of so many layers, the final feature last."""

    def draft(
        self, sequences: Sequence[DecodedSequence], rule: GrowthRule | None = None
    ) -> list[DraftTree | None]:
        """A tree for each sequence that decodes; None for those that still read their prompt.

        What it needs of `unread` features it takes now. What a tree holds depends on the committed
        text alone, but for its size where the sequence is adaptive and a rule decides on it.
        """

    def move(self, source: Stretch, target: Stretch, count: int) -> None:
        """Copy what is known of a sequence's first `count` tokens to other rows."""


class HeadDrafter:
    """Drafts with a head, whose cache has a row for each of the target's."""

    def __init__(self, head: DraftHead, num_rows: int) -> None:
        """Reserve the rows.

        Args:
            head: with the target attached and prepared for inference.
            num_rows: of the target's cache.
        """
        self.head, self._num_rows = head, num_rows
        self._cache: DraftCache | None = None

    @property
    def cache(self) -> DraftCache:
        """Rows of all sequences; reserved when the first one drafts."""
        if self._cache is None:
            self._cache = self.head.new_cache(self._num_rows)
        return self._cache

    def feature_layers(self, num_layers: int) -> tuple[int, ...]:
        """See base class."""
        return self.head.feature_layers(num_layers)

    @torch.inference_mode()
    def draft(
        self, sequences: Sequence[DecodedSequence], rule: GrowthRule | None = None
    ) -> list[DraftTree | None]:
        """See base class."""
        readers = [sequence for sequence in sequences if sequence.unread]
        if not readers:
            return [None] * len(sequences)
        output = self._read(readers)
        trees: dict[int, DraftTree] = {}
        plans: dict[tuple[int, int, bool], list[int]] = {}
        for row, sequence in enumerate(readers):
            if not sequence.prefilling:
                plan = sequence.plan
                key = (plan.depth, plan.top_k, sequence.adaptive)
                plans.setdefault(key, []).append(row)
        for (_, _, adaptive), rows in plans.items():
            group = [readers[row] for row in rows]
            roots = DraftOutput(output.hidden_KH[rows], output.logits_KW[rows])
            places = [DraftPlace(sequence.first_row, sequence.read) for sequence in group]
            root_ids = [sequence.tokens[-1] for sequence in group]
            grown = draft_trees(
                self.head,
                self.cache,
                places,
                roots,
                root_ids,
                [one.plan for one in group],
                rule if adaptive else None,
            )
            trees.update(zip((sequence.id for sequence in group), grown, strict=True))
        return [trees.get(sequence.id) for sequence in sequences]

    def _read(self, readers: Sequence[DecodedSequence]) -> DraftOutput:
        """Let the head read what it has not; S rows out."""
        places = [DraftPlace(one.first_row, one.read) for one in readers]
        counts = [one.cached - one.read for one in readers]
        next_ids = [token for one in readers for token in one.tokens[one.read + 1 : one.cached + 1]]
        features_NLH = torch.cat([part for one in readers for part in one.unread])
        for one in readers:
            one.unread, one.read = [], one.cached
        next_ids_N = torch.tensor(next_ids, device=features_NLH.device)
        return self.head.extend_all(self.cache, places, counts, features_NLH, next_ids_N)

    def move(self, source: Stretch, target: Stretch, count: int) -> None:
        """See base class."""
        if self._cache is not None:
            rows = self._cache.joint
            # Cloned first: the two may overlap.
            kept = rows[:, source.first : source.first + count].clone()
            rows[:, target.first : target.first + count] = kept


def draft_trees(
    head: DraftHead,
    cache: DraftCache,
    places: Sequence[DraftPlace],
    roots: DraftOutput,
    root_ids: Sequence[int],
    plans: Sequence[TreePlan],
    rule: GrowthRule | None = None,
) -> list[DraftTree]:
    """Grow a tree for each of S sequences from what the head says after their last tokens.

    Args:
        head: drafts; what its cache holds of the committed text stays.
        cache: of these sequences.
        places: where they stand in it; depth · top_k rows behind are written over.
        roots: hidden states and logits of the head at the roots, S rows.
        root_ids: the last committed tokens.
        plans: of equal depth and top-k.
        rule: may expand fewer nodes, and end growth before the plans' depth.
    Returns:
        Trees of at most `total_tokens` nodes each, which depend on the committed text alone (and
        on the rule).
    """
    growth = _Growth(head, cache, places, roots, plans[0].top_k)
    for depth in range(1, plans[0].depth + 1):
        width = growth.top_k if rule is None else rule(growth.scores, growth.beam_scores)
        if not width:
            break
        growth.expand(depth, width)
    return growth.rerank(root_ids, [plan.total_tokens for plan in plans])


class _Growth:
    """All nodes ever proposed, level by level, and the beams that are expanded next.

    The nodes are kept on the host: for so few numbers an operator's start is all that counts.
    """

    def __init__(
        self,
        head: DraftHead,
        cache: DraftCache,
        places: Sequence[DraftPlace],
        roots: DraftOutput,
        top_k: int,
    ) -> None:
        self.head, self.cache, self.places = head, cache, tuple(places)
        self.top_k = width = min(top_k, head.vocabulary.size)
        self.device = roots.logits_KW.device
        self.d2t_W = head.vocabulary.d2t_W.numpy()
        scores_SK, tokens_SK = self._best_tokens(roots.logits_KW)
        # Per level: tokens, cumulative log-probabilities, and parents as indices into all nodes.
        self.tokens, self.scores = [tokens_SK], [scores_SK]
        self.parents = [np.zeros_like(tokens_SK)]
        self.count = 1 + width
        count = len(self.places)
        self.beam_tokens, self.beam_scores = tokens_SK, scores_SK
        self.beam_nodes = np.broadcast_to(np.arange(1, self.count), (count, width))
        self.beam_hidden = roots.hidden_KH[:, None].expand(-1, width, -1)
        # Of the levels that the head has read, what each beam descends from.
        self.beam_sees = np.zeros((count, width, 0), dtype=bool)

    def expand(self, depth: int, width: int) -> None:
        """Give the best nodes of the beams their children; the best of those are the next beams.

        Args:
            depth: of the beams.
            width: B of them are expanded in each tree.
        """
        count, top_k = len(self.places), self.top_k
        own_SBB = np.broadcast_to(np.eye(width, dtype=bool), (count, width, width))
        sees_SBT = np.concatenate((self.beam_sees[:, :width], own_SBB), axis=2)
        beams = DraftBeams(
            self.places,
            self.beam_hidden[:, :width],
            torch.tensor(self.beam_tokens[:, :width], device=self.device),
            depth,
            torch.tensor(sees_SBT, device=self.device),
        )
        output = self.head.step_all(self.cache, beams)
        log_probs_NK, tokens_NK = self._best_tokens(output.logits_KW)
        scores_SBK = log_probs_NK.reshape(count, width, top_k)
        scores_SP = (scores_SBK + self.beam_scores[:, :width, None]).reshape(count, -1)
        tokens_SP = tokens_NK.reshape(count, -1)
        self.tokens.append(tokens_SP)
        self.scores.append(scores_SP)
        self.parents.append(self.beam_nodes[:, :width].repeat(top_k, axis=1))
        best_SK = (-scores_SP).argsort(axis=1, kind="stable")[:, :top_k]
        parent_SK = best_SK // top_k
        self.beam_scores = np.take_along_axis(scores_SP, best_SK, 1)
        self.beam_tokens = np.take_along_axis(tokens_SP, best_SK, 1)
        self.beam_nodes = self.count + best_SK
        self.beam_sees = np.take_along_axis(sees_SBT, parent_SK[..., None], 1)
        rows_N = (parent_SK + width * np.arange(count)[:, None]).ravel()
        hidden_NH = output.hidden_KH.index_select(0, torch.tensor(rows_N, device=self.device))
        self.beam_hidden = hidden_NH.view(count, top_k, -1)
        self.count += width * top_k

    def _best_tokens(self, logits_NW: Tensor) -> tuple[Floats, Ids]:
        """Log-probabilities and target ids [N, K] of the likeliest tokens, best first."""
        best = top_tokens(logits_NW, self.top_k)
        return best[0].double().cpu().numpy(), self.d2t_W[best[1].cpu().numpy()]

    def rerank(self, root_ids: Sequence[int], sizes: Sequence[int]) -> list[DraftTree]:
        """Keep the best `size - 1` nodes of all levels of each sequence.

        The stable sort breaks ties in favour of the shallower node, and a child never scores
        above its parent, so what is kept is a tree.
        """
        scores_SP, tokens_SP, parents_SP = (
            np.concatenate(levels, axis=1) for levels in (self.scores, self.tokens, self.parents)
        )
        order_SP = (-scores_SP).argsort(axis=1, kind="stable")
        return [
            _kept(
                order_SP[row, : size - 1], tokens_SP[row], parents_SP[row], scores_SP[row], root_id
            )
            for row, (root_id, size) in enumerate(zip(root_ids, sizes, strict=True))
        ]


def _kept(order_N: Ids, tokens_P: Ids, parents_P: Ids, scores_P: Floats, root_id: int) -> DraftTree:
    """The tree of the nodes that `order_N` names, best first."""
    place = order_N.argsort()
    kept = order_N[place]
    new_index = {0: 0} | {old + 1: new for new, old in enumerate(kept.tolist(), start=1)}
    return DraftTree(
        token_ids_N=torch.tensor([root_id, *tokens_P[kept].tolist()]),
        parents=(-1, *(new_index[parent] for parent in parents_P[kept].tolist())),
        ranks=(0, *(rank + 1 for rank in place.tolist())),
        scores=(0.0, *scores_P[kept].tolist()),
    )


def top_tokens(logits_NW: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities, float32, and draft ids [N, K] of the K best tokens, best first.

    Of a large vocabulary, the tokens are looked for in the blocks with the largest maxima: as
    many blocks as tokens hold them all, and finding maxima is faster than sorting.
    """
    log_probs_NW = logits_NW.float().log_softmax(-1)
    size = log_probs_NW.shape[1]
    if size % BLOCK or size < 4 * BLOCK * count:
        best = log_probs_NW.topk(count, dim=-1)
        return best.values, best.indices
    blocks = log_probs_NW.unflatten(1, (-1, BLOCK))
    at_NK = blocks.amax(-1).topk(count, dim=-1).indices
    best = blocks.gather(1, at_NK[..., None].expand(-1, -1, BLOCK)).flatten(1).topk(count, dim=-1)
    block_NK = at_NK.gather(1, best.indices // BLOCK)
    return best.values, block_NK * BLOCK + best.indices % BLOCK
