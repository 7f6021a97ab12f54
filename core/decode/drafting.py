"""Drafting for several sequences at once: one forward pass of the head reads what was committed
to all of them, and one a level of depth grows all their trees.

Shapes: S sequences, N new positions of all, K top-k, P nodes proposed a sequence, W draft
vocabulary, H hidden.
Source: EAGLE-2 (Li et al. 2024), section 4: expansion by cumulative probability, then reranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from core.decode.acceptance import Floats
from core.decode.requests import DecodedSequence
from core.decode.rows import Stretch
from core.decode.tree import DraftTree, TreePlan
from core.draft.base import DraftBeams, DraftCache, DraftHead, DraftOutput, DraftPlace

GrowthRule = Callable[[Sequence[Floats], Floats], bool]
"""Whether trees grow by a level: given the log-probabilities of all nodes by level, [S, …] each,
and of those [S, K] that would be expanded."""


class Drafter(Protocol):
    """What proposes trees."""

    def feature_layers(self, num_layers: int) -> tuple[int, ...]:
        """What it wants to read of a target of so many layers, the final feature last."""

    def draft(
        self, sequences: Sequence[DecodedSequence], rule: GrowthRule | None = None
    ) -> list[DraftTree | None]:
        """A tree for each sequence that decodes; None for those that still read their prompt.

        What it needs of `unread` features it takes now. What a tree holds depends on the committed
        text alone, but for its depth where the sequence is adaptive and a rule decides on it.
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
            for rows in (self._cache.keys, self._cache.values):
                # Cloned first: the two may overlap.
                kept = rows[:, :, source.first : source.first + count].clone()
                rows[:, :, target.first : target.first + count] = kept


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
        rule: may end growth before the plans' depth.
    Returns:
        Trees of at most `total_tokens` nodes each, which depend on the committed text alone (and
        on the rule).
    """
    growth = _Growth(head, cache, places, roots, plans[0].top_k)
    for depth in range(1, plans[0].depth + 1):
        if rule is not None and not rule(*growth.log_probabilities()):
            break
        growth.expand(depth)
    return growth.rerank(root_ids, [plan.total_tokens for plan in plans])


class _Growth:
    """All nodes ever proposed, level by level, and the beams that are expanded next."""

    def __init__(
        self,
        head: DraftHead,
        cache: DraftCache,
        places: Sequence[DraftPlace],
        roots: DraftOutput,
        top_k: int,
    ) -> None:
        self.head, self.cache, self.places = head, cache, tuple(places)
        self.top_k = min(top_k, head.vocabulary.size)
        device = roots.logits_KW.device
        self.d2t_W = head.vocabulary.d2t_W.to(device)
        scores_SK, draft_ids_SK = _top(roots.logits_KW, self.top_k)
        # Per level: tokens, cumulative log-probabilities, and parents as indices into all nodes.
        self.tokens = [self.d2t_W[draft_ids_SK]]
        self.scores = [scores_SK]
        self.parents = [torch.zeros_like(draft_ids_SK)]
        self.count = 1 + self.top_k
        self.own_SKK = torch.eye(self.top_k, dtype=torch.bool, device=device)
        self.own_SKK = self.own_SKK.expand(len(places), -1, -1)
        self.beam_tokens, self.beam_scores = self.tokens[0], scores_SK
        self.beam_nodes = torch.arange(1, self.count, device=device).expand(len(places), -1)
        self.beam_hidden = roots.hidden_KH[:, None].expand(-1, self.top_k, -1)
        self.beam_sees = self.own_SKK

    def expand(self, depth: int) -> None:
        """Give each node of the beams its children; the best of those are the next beams."""
        beams = DraftBeams(self.places, self.beam_hidden, self.beam_tokens, depth, self.beam_sees)
        output = self.head.step_all(self.cache, beams)
        width = self.top_k
        log_probs_NK, draft_ids_NK = _top(output.logits_KW, width)
        shape = (len(self.places), width, width)
        scores_SP = (self.beam_scores[..., None] + log_probs_NK.view(shape)).flatten(1)
        tokens_SP = self.d2t_W[draft_ids_NK].view(shape).flatten(1)
        self.tokens.append(tokens_SP)
        self.scores.append(scores_SP)
        self.parents.append(self.beam_nodes.repeat_interleave(width, dim=1))
        best_SK = scores_SP.topk(width, dim=1).indices
        parent_SK = best_SK // width
        self.beam_scores = scores_SP.gather(1, best_SK)
        self.beam_tokens = tokens_SP.gather(1, best_SK)
        self.beam_nodes = self.count + best_SK
        hidden_SKH = output.hidden_KH.view(*shape[:2], -1)
        self.beam_hidden = _rows(hidden_SKH, parent_SK)
        self.beam_sees = torch.cat((_rows(self.beam_sees, parent_SK), self.own_SKK), dim=2)
        self.count += width * width

    def log_probabilities(self) -> tuple[list[Floats], Floats]:
        """Of all nodes, by level, and of the beams."""
        levels = [scores_SP.cpu().double().numpy() for scores_SP in self.scores]
        return levels, self.beam_scores.cpu().double().numpy()

    def rerank(self, root_ids: Sequence[int], sizes: Sequence[int]) -> list[DraftTree]:
        """Keep the best `size - 1` nodes of all levels of each sequence.

        The stable sort breaks ties in favour of the shallower node, and a child never scores
        above its parent, so what is kept is a tree.
        """
        scores_SP = torch.cat(self.scores, dim=1)
        order_SP = scores_SP.argsort(dim=1, descending=True, stable=True)
        order_SP, scores_SP = order_SP[:, : max(sizes) - 1].cpu(), scores_SP.cpu()
        tokens_SP, parents_SP = (torch.cat(x, dim=1).cpu() for x in (self.tokens, self.parents))
        return [
            _kept(
                order_SP[row, : size - 1], tokens_SP[row], parents_SP[row], scores_SP[row], root_id
            )
            for row, (root_id, size) in enumerate(zip(root_ids, sizes, strict=True))
        ]


def _kept(
    order_N: Tensor, tokens_P: Tensor, parents_P: Tensor, scores_P: Tensor, root_id: int
) -> DraftTree:
    """The tree of the nodes that `order_N` names, best first."""
    kept, place = order_N.sort()
    new_index = {0: 0} | {old + 1: new for new, old in enumerate(kept.tolist(), start=1)}
    return DraftTree(
        token_ids_N=torch.cat((torch.tensor([root_id]), tokens_P[kept])),
        parents=(-1, *(new_index[parent] for parent in parents_P[kept].tolist())),
        ranks=(0, *(rank + 1 for rank in place.tolist())),
        scores=(0.0, *scores_P[kept].tolist()),
    )


def _rows(x_SKX: Tensor, index_SK: Tensor) -> Tensor:
    """Of each sequence, the rows that the index names."""
    return x_SKX.gather(1, index_SK[..., None].expand(-1, -1, x_SKX.shape[2]))


def _top(logits_KW: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and draft ids [K, top_k] of the best tokens, best first."""
    logits_KW = logits_KW.float()
    best = logits_KW.topk(top_k, dim=-1)
    return best.values - logits_KW.logsumexp(-1, keepdim=True), best.indices
