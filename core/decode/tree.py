"""The draft tree: candidate continuations that the target verifies in one pass.

Shapes: N tree nodes (node 0, the root, is the last committed token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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
        scores: a head's cumulative log-probability of each node, 0 for the root, NaN for copied
            ones; None where no head was asked.
    """

    token_ids_N: Tensor
    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None

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

    def part(self, nodes: Sequence[int]) -> DraftTree:
        """The tree of some nodes, ascending, the root and all their ancestors among them."""
        if len(nodes) == self.size:
            return self
        index = {old: new for new, old in enumerate(nodes)}
        by_rank = sorted(nodes, key=lambda node: self.ranks[node])
        ranks = {old: rank for rank, old in enumerate(by_rank)}
        return DraftTree(
            token_ids_N=self.token_ids_N[torch.tensor(nodes)],
            parents=(-1, *(index[self.parents[node]] for node in nodes[1:])),
            ranks=tuple(ranks[node] for node in nodes),
            scores=None if self.scores is None else tuple(self.scores[node] for node in nodes),
        )

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
