"""The draft tree: candidate continuations that the target verifies in one pass.

Shapes: N tree nodes (node 0, the root, is the last committed token), K top-k, W draft vocabulary,
H hidden.
Source: EAGLE-2 (Li et al. 2024), section 4: expansion by cumulative probability, then reranking.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from core.draft.base import DraftCache, DraftHead, DraftNodes, DraftOutput
from core.errors import ShapeError


@dataclass(frozen=True)
class TreePlan:
    """How large a tree a round drafts.

    Attributes:
        total_tokens: N at most, the root included; 1 is plain decoding.
        depth: expansions after the root's.
        top_k: children an expansion, and nodes kept a level.
    """

    total_tokens: int
    depth: int
    top_k: int


PLAIN = TreePlan(total_tokens=1, depth=0, top_k=1)


@dataclass(frozen=True, eq=False)
class DraftTree:
    """N candidate tokens, parents before children, siblings in order of probability.

    Attributes:
        token_ids_N: int64 [N], target ids.
        parents: the parent's index of each node; -1 for the root.
        ranks: place of each node in the order of reranking, 0 for the root: the tree of n
            nodes that the same draft would have given holds the nodes with rank < n.
    """

    token_ids_N: Tensor
    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.parents) == len(self.ranks) == self.token_ids_N.shape[0]:
            raise ShapeError(
                f"{self.token_ids_N.shape[0]} tokens, {len(self.parents)} parents and "
                f"{len(self.ranks)} ranks do not make a tree"
            )

    @classmethod
    def root_only(cls, token_id: int) -> DraftTree:
        """A tree without guesses: verifying it is plain decoding."""
        return cls(torch.tensor([token_id]), (-1,), (0,))

    @property
    def size(self) -> int:
        """N."""
        return len(self.parents)

    @cached_property
    def depths_N(self) -> Tensor:
        """int64 [N], nodes between each node and the root; 0 for the root."""
        depths = [0] * self.size
        for node in range(1, self.size):
            depths[node] = depths[self.parents[node]] + 1
        return torch.tensor(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, in order of draft probability."""
        found: list[list[int]] = [[] for _ in range(self.size)]
        for node in range(1, self.size):
            found[self.parents[node]].append(node)
        return tuple(tuple(nodes) for nodes in found)

    @cached_property
    def sees_NN(self) -> Tensor:
        """bool [N, N], which nodes each node may attend to: its ancestors and itself."""
        sees = torch.eye(self.size, dtype=torch.bool)
        for node in range(1, self.size):
            sees[node] |= sees[self.parents[node]]
        return sees

    @property
    def paths(self) -> list[list[int]]:
        """Root-to-leaf rows of node indices."""
        rows = []
        for leaf in range(self.size):
            if self.children[leaf]:
                continue
            row = [leaf]
            while self.parents[row[-1]] >= 0:
                row.append(self.parents[row[-1]])
            rows.append(row[::-1])
        return rows


def draft_tree(
    head: DraftHead, cache: DraftCache, root: DraftOutput, root_id: int, plan: TreePlan
) -> DraftTree:
    """Expand a tree from what the head says after the last committed token.

    Args:
        head: drafts; its cache holds the committed positions and is left with tree rows, which
            the next `extend` drops.
        cache: of this sequence.
        root: hidden state and logits of the head at the root, one row.
        root_id: the last committed token.
        plan: size of the tree.
    Returns:
        A tree of at most `plan.total_tokens` nodes. It depends on the committed text alone.
    """
    growth = _Growth(head, root, plan.top_k)
    for depth in range(1, plan.depth + 1):
        growth.expand(cache, depth)
    return growth.rerank(root_id, plan.total_tokens)


class _Growth:
    """All nodes ever proposed, level by level, and the beam that is expanded next."""

    def __init__(self, head: DraftHead, root: DraftOutput, top_k: int) -> None:
        self.head, self.top_k = head, min(top_k, head.vocabulary.size)
        self.d2t_W = head.vocabulary.d2t_W.to(root.logits_KW.device)
        log_probs, draft_ids = _top(root.logits_KW, self.top_k)
        # Per level: tokens, cumulative log-probabilities, and parents as indices into all nodes.
        self.tokens = [self.d2t_W[draft_ids[0]]]
        self.scores = [log_probs[0]]
        self.parents = [torch.zeros_like(draft_ids[0])]
        self.count = 1 + self.top_k
        self.beam_tokens, self.beam_scores = self.tokens[0], self.scores[0]
        self.beam_nodes = torch.arange(1, self.count, device=self.d2t_W.device)
        self.beam_hidden = root.hidden_KH.expand(self.top_k, -1)
        self.beam_sees = torch.eye(self.top_k, dtype=torch.bool, device=self.d2t_W.device)

    def expand(self, cache: DraftCache, depth: int) -> None:
        """Give each node of the beam its children; the best of those are the next beam."""
        nodes = DraftNodes(self.beam_hidden, self.beam_tokens, depth, self.beam_sees)
        output = self.head.step(cache, nodes)
        log_probs_KK, draft_ids_KK = _top(output.logits_KW, self.top_k)
        scores = (self.beam_scores[:, None] + log_probs_KK).flatten()
        tokens = self.d2t_W[draft_ids_KK].flatten()
        self.tokens.append(tokens)
        self.scores.append(scores)
        self.parents.append(self.beam_nodes.repeat_interleave(self.top_k))
        best = scores.topk(self.top_k).indices
        parent = best // self.top_k
        self.beam_tokens, self.beam_scores = tokens[best], scores[best]
        self.beam_nodes = self.count + best
        self.beam_hidden = output.hidden_KH[parent]
        own = torch.eye(self.top_k, dtype=torch.bool, device=best.device)
        self.beam_sees = torch.cat((self.beam_sees[parent], own), dim=1)
        self.count += tokens.shape[0]

    def rerank(self, root_id: int, total_tokens: int) -> DraftTree:
        """Keep the best `total_tokens - 1` nodes of all levels.

        The stable sort breaks ties in favour of the shallower node, and a child never scores
        above its parent, so what is kept is a tree.
        """
        scores = torch.cat(self.scores)
        order = scores.argsort(descending=True, stable=True)[: total_tokens - 1]
        kept, place = order.sort()
        tokens = torch.cat(self.tokens)[kept]
        old_parents = torch.cat(self.parents)[kept].tolist()
        new_index = {0: 0} | {old + 1: new for new, old in enumerate(kept.tolist(), start=1)}
        return DraftTree(
            token_ids_N=torch.cat((tokens.new_tensor([root_id]), tokens)),
            parents=(-1, *(new_index[parent] for parent in old_parents)),
            ranks=(0, *(rank + 1 for rank in place.tolist())),
        )


def _top(logits_KW: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and draft ids [K, top_k] of the best tokens, best first."""
    logits_KW = logits_KW.float()
    best = logits_KW.topk(top_k, dim=-1)
    return best.values - logits_KW.logsumexp(-1, keepdim=True), best.indices
