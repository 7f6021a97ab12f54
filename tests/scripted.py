"""A draft head whose guesses are a function of the path, so that any tree has one right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config.draft.eagle1 import Eagle1Config
from core.decode.drafting import draft_trees
from core.decode.tree import DraftTree, TreePlan
from core.draft.base import (
    DraftBatch,
    DraftBeams,
    DraftCache,
    DraftHead,
    DraftNodes,
    DraftOutput,
    DraftPlace,
    LossSums,
    TargetGeometry,
)
from core.draft.vocabulary import DraftVocabulary

GEOMETRY = TargetGeometry(100, 1, 1, 1, 1, 1, 1e-6, 1e4, 64)
ROOT_ID = 99
Path = tuple[int, ...]


class ScriptedHead(DraftHead):
    """Logits are a function of the path from the root; the hidden state tells the path.

    With few `levels` of logits there are many ties.
    """

    def __init__(self, vocab_size: int, seed: int, levels: int) -> None:
        # Target ids that are not the draft's own, as with a real draft vocabulary.
        super().__init__(
            Eagle1Config(), GEOMETRY, DraftVocabulary(torch.arange(vocab_size) * 3 + 1, 100)
        )
        self.seed, self.levels = seed, levels
        self.paths: list[Path] = [()]

    def logits(self, path: Path) -> Tensor:
        draw = torch.Generator().manual_seed(hash((self.seed, *path)) % 2**31)
        size = self.vocabulary.size
        if self.levels:
            return torch.randint(self.levels, (size,), generator=draw).float()
        return 3 * torch.randn(size, generator=draw)

    def root(self) -> DraftOutput:
        return DraftOutput(torch.zeros(1, 1), self.logits(())[None])

    def step_all(self, cache: DraftCache, beams: DraftBeams) -> DraftOutput:
        assert len(beams.places) == 1
        nodes = DraftNodes(
            beams.hidden_SKH[0], beams.token_ids_SK[0], beams.depth, beams.sees_SKT[0]
        )
        return self.step(cache, nodes)

    def step(self, cache: DraftCache, nodes: DraftNodes) -> DraftOutput:
        count = len(nodes.token_ids_K)
        # Rows of this tree: all levels before, then this one.
        assert nodes.sees_KT.shape == (count, count * nodes.depth)
        if nodes.depth == 1:
            self.paths = [()]
        rows = []
        for hidden_H, token in zip(nodes.hidden_KH, nodes.token_ids_K.tolist(), strict=True):
            path = (*self.paths[int(hidden_H[0])], token)
            assert len(path) == nodes.depth
            self.paths.append(path)
            rows.append(len(self.paths) - 1)
        for row, sees_T in zip(rows, nodes.sees_KT, strict=True):
            path = self.paths[row]
            seen = [self.paths[1 + column] for column in sees_T.nonzero()[:, 0].tolist()]
            assert seen == [path[: depth + 1] for depth in range(len(path))], "ancestors and itself"
        logits_KW = torch.stack([self.logits(self.paths[row]) for row in rows])
        return DraftOutput(torch.tensor(rows, dtype=torch.float32)[:, None], logits_KW)

    def tree(self, plan: TreePlan) -> DraftTree:
        """What it drafts."""
        place = DraftPlace(0, 0)
        cache = self.new_cache(64)
        (tree,) = draft_trees(self, cache, [place], self.root(), [ROOT_ID], [plan])
        return tree

    def attach_target(self, embedding_VH: Tensor, output_head_VH: Tensor) -> None:
        raise NotImplementedError

    def losses(self, batch: DraftBatch) -> LossSums:
        raise NotImplementedError

    def chain_hits(self, batch: DraftBatch, depth: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def new_cache(self, max_tokens: int) -> DraftCache:
        return DraftCache(torch.zeros(2, max_tokens, 1))

    def extend_all(
        self,
        cache: DraftCache,
        places: Sequence[DraftPlace],
        counts: Sequence[int],
        features_NLH: Tensor,
        next_ids_N: Tensor,
    ) -> DraftOutput:
        raise NotImplementedError

    def eagle_tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def load_eagle_tensors(self, tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Case:
    """A head and a plan."""

    vocab_size: int
    seed: int
    levels: int
    plan: TreePlan

    def head(self) -> ScriptedHead:
        return ScriptedHead(self.vocab_size, self.seed, self.levels)

    def tree(self, total_tokens: int | None = None) -> DraftTree:
        head = self.head()
        plan = self.plan
        if total_tokens is not None:
            plan = TreePlan(total_tokens, plan.depth, plan.top_k)
        return head.tree(plan)

    @property
    def width(self) -> int:
        return min(self.plan.top_k, self.vocab_size)

    @property
    def proposed(self) -> int:
        """All nodes that are ever proposed, the root included."""
        return 1 + self.width + self.plan.depth * self.width**2
