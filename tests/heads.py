"""Draft heads for tests of decoding: one of random weights, and one that guesses well."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from core.config import DRAFT_CONFIGS
from core.config.draft.eagle1 import Eagle1Config
from core.draft.base import (
    DraftCache,
    DraftHead,
    DraftNodes,
    DraftOutput,
    TargetGeometry,
    build_head,
)
from core.draft.eagle1 import Eagle1Head
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target
from core.models.weights import load_embedding, load_output_head


def random_head(
    target: Target,
    folder: Path,
    *,
    vocabulary: DraftVocabulary | None = None,
    seed: int = 1,
    kind: str = "eagle1",
) -> DraftHead:
    """A head of random weights, ready to draft for the target of `folder`."""
    geometry = TargetGeometry.of(target.model.config)
    whole = DraftVocabulary.whole(geometry.vocab_size)
    config = DRAFT_CONFIGS[kind].model_validate({})
    head = build_head(config, geometry, vocabulary or whole, seed)
    head.attach_target(load_embedding(folder), load_output_head(folder))
    head.prepare_for_inference(packed=False)
    return head


@dataclass
class _Told:
    """What an oracle knows of a sequence."""

    tokens: list[int] = field(default_factory=list)
    tree: list[tuple[int, ...]] = field(default_factory=list)


class OracleHead(Eagle1Head):
    """Proposes the target's own next token with probability `skill`, else another one.

    It runs the target itself on the text that each tree node stands for, and tells nodes apart
    by the rows that they may attend to, so that it also notices a wrong tree mask. Whether it
    guesses right depends on that text alone, as a deterministic head's guess does.
    """

    @classmethod
    def of(cls, target: Target, folder: Path, skill: float) -> OracleHead:
        geometry = TargetGeometry.of(target.model.config)
        head = cls(Eagle1Config(), geometry, DraftVocabulary.whole(geometry.vocab_size))
        head.attach_target(load_embedding(folder), load_output_head(folder))
        head.prepare_for_inference(packed=False)
        head.target, head.skill, head.told = target, skill, _Told()
        head.known = {}
        return head

    target: Target
    skill: float
    told: _Told
    known: dict[tuple[int, ...], Tensor]

    def start(self, first_id: int) -> None:
        """The first prompt token, which a head never gets to read."""
        self.told = _Told([first_id])

    def extend(self, cache: DraftCache, features_TLH: Tensor, next_ids_T: Tensor) -> DraftOutput:
        del self.told.tokens[cache.committed + 1 :]
        self.told.tokens += next_ids_T.tolist()
        self.told.tree = []
        cache.committed = cache.length = cache.committed + len(next_ids_T)
        return self._answer([tuple(self.told.tokens)])

    def step(self, cache: DraftCache, nodes: DraftNodes) -> DraftOutput:
        tree = self.told.tree
        first = len(tree)
        for row, token in enumerate(nodes.token_ids_K.tolist()):
            seen = nodes.sees_KT[row].nonzero()[:, 0].tolist()
            assert seen[-1] == first + row, "a node sees itself last"
            ancestors = seen[:-1]
            assert len(ancestors) == nodes.depth - 1
            parent = tree[ancestors[-1]] if ancestors else ()
            # Each ancestor is the parent of the next.
            assert [tree[a] for a in ancestors] == [parent[: d + 1] for d in range(len(parent))]
            tree.append((*parent, token))
        prefix = tuple(self.told.tokens)
        return self._answer([(*prefix, *path) for path in tree[first:]])

    def _answer(self, texts: list[tuple[int, ...]]) -> DraftOutput:
        new = [text for text in texts if text not in self.known]
        if new:
            # Texts of one call are equally long.
            features_BTH = self.target.features(torch.tensor(new))
            logits_BV = self.target.logits(features_BTH[:, -1])
            self.known.update(zip(new, logits_BV.clone(), strict=True))
        logits_KW = torch.stack([self._guess(text) for text in texts])
        return DraftOutput(torch.zeros(len(texts), self.geometry.hidden_size), logits_KW)

    def _guess(self, text: tuple[int, ...]) -> Tensor:
        logits_V = self.known[text]
        draw = torch.Generator().manual_seed(hash(text) % 2**31)
        if float(torch.rand((), generator=draw)) < self.skill:
            return logits_V
        return logits_V[torch.randperm(len(logits_V), generator=draw)]
