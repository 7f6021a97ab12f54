"""Draft heads for tests of decoding: one of random weights, and one that guesses well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.config import DRAFT_CONFIGS
from core.config.draft.eagle1 import Eagle1Config
from core.draft.base import (
    DraftBeams,
    DraftCache,
    DraftHead,
    DraftOutput,
    DraftPlace,
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
        head.target, head.skill = target, skill
        head.known, head.trees = {}, {}
        return head

    target: Target
    skill: float
    first_id: int
    trees: dict[int, list[tuple[int, ...]]]
    known: dict[tuple[int, ...], Tensor]

    def start(self, first_id: int) -> None:
        """The first token of all prompts, which a head never gets to read."""
        self.first_id = first_id

    def new_cache(self, max_tokens: int) -> DraftCache:
        """Rows hold the tokens that were read."""
        return DraftCache(torch.zeros(2, max_tokens, 1))

    def extend_all(
        self,
        cache: DraftCache,
        places: Sequence[DraftPlace],
        counts: Sequence[int],
        features_NLH: Tensor,
        next_ids_N: Tensor,
    ) -> DraftOutput:
        texts = []
        for place, ids_T in zip(places, next_ids_N.split(list(counts)), strict=True):
            begin = place.first + place.committed
            cache.keys[0, begin : begin + len(ids_T), 0] = ids_T.float()
            texts.append(self._text(cache, place.first, place.committed + len(ids_T)))
            self.trees[place.first] = []
        return self._answer(texts)

    def _text(self, cache: DraftCache, first: int, committed: int) -> tuple[int, ...]:
        read = cache.keys[0, first : first + committed, 0].int().tolist()
        return (self.first_id, *read)

    def step_all(self, cache: DraftCache, beams: DraftBeams) -> DraftOutput:
        texts = []
        for row, place in enumerate(beams.places):
            tree = self.trees[place.first]
            first = beams.sees_SKT.shape[2] - beams.token_ids_SK.shape[1]
            del tree[first:]
            self._grow(tree, beams.token_ids_SK[row].tolist(), beams.sees_SKT[row])
            assert all(len(path) == beams.depth for path in tree[first:])
            text = self._text(cache, place.first, place.committed)
            texts += [(*text, *path) for path in tree[first:]]
        # Texts of one call must be equally long.
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for text in texts:
            by_length.setdefault(len(text), []).append(text)
        for group in by_length.values():
            self._learn(group)
        return self._answer(texts)

    def _grow(self, tree: list[tuple[int, ...]], tokens: list[int], sees_KT: Tensor) -> None:
        first = len(tree)
        for row, token in enumerate(tokens):
            seen = sees_KT[row].nonzero()[:, 0].tolist()
            assert seen[-1] == first + row, "a node sees itself last"
            ancestors = seen[:-1]
            parent = tree[ancestors[-1]] if ancestors else ()
            # Each ancestor is the parent of the next.
            assert [tree[a] for a in ancestors] == [parent[: d + 1] for d in range(len(parent))]
            tree.append((*parent, token))

    def _learn(self, texts: list[tuple[int, ...]]) -> None:
        new = [text for text in texts if text not in self.known]
        if new:
            features_BTH = self.target.features(torch.tensor(new))
            logits_BV = self.target.logits(features_BTH[:, -1])
            self.known.update(zip(new, logits_BV.clone(), strict=True))

    def _answer(self, texts: list[tuple[int, ...]]) -> DraftOutput:
        for text in texts:
            self._learn([text])
        logits_KW = torch.stack([self._guess(text) for text in texts])
        return DraftOutput(torch.zeros(len(texts), self.geometry.hidden_size), logits_KW)

    def _guess(self, text: tuple[int, ...]) -> Tensor:
        logits_V = self.known[text]
        draw = torch.Generator().manual_seed(hash(text) % 2**31)
        if float(torch.rand((), generator=draw)) < self.skill:
            return logits_V
        return logits_V[torch.randperm(len(logits_V), generator=draw)]
