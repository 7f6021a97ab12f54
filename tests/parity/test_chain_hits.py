"""Simulated chains against chains that are really drafted, step by step from a cache."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.config import DRAFT_CONFIGS, DecodeConfig
from core.decode.engine import SpeculativeDecoder
from core.draft.base import DraftBatch, DraftHead, DraftNodes, TargetGeometry, build_head
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target
from core.models.weights import load_embedding, load_output_head

DEPTH = 4
# The deep target's answer to it is varied: most of its answers repeat one token.
PROMPT = torch.randint(3, 259, (6,), generator=torch.Generator().manual_seed(5)).tolist()


def _head(target: Target, folder: Path, kind: str, draft_size: int) -> DraftHead:
    """A head of random weights that is right some of the time."""
    counts_V = torch.rand(target.vocab_size, generator=torch.Generator().manual_seed(1))
    vocabulary = DraftVocabulary.from_counts(counts_V, draft_size)
    geometry = TargetGeometry.of(target.model.config)
    head = build_head(DRAFT_CONFIGS[kind].model_validate({}), geometry, vocabulary, 3)
    head.attach_target(load_embedding(folder), load_output_head(folder))
    return head


def _fit(head: DraftHead, batch: DraftBatch, steps: int) -> None:
    """Learn the batch by heart, but not all of it."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        result = head.losses(batch)
        optimizer.zero_grad()
        (result.loss / result.num_tokens).backward()
        optimizer.step()
    head.eval()


def _batch(target: Target, head: DraftHead, ids: list[Tensor], masks: list[Tensor]) -> DraftBatch:
    """Texts with the target's features; garbage on padding."""
    longest = max(map(len, ids)) + 2
    layers = head.feature_layers(target.num_layers)
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(len(ids), longest, len(layers), target.hidden_size, generator=draw)
    ids_BT = torch.randint(3, 259, (len(ids), longest), generator=draw)
    mask_BT = torch.ones(len(ids), longest, dtype=torch.bool)
    for row, (ids_T, mask_T) in enumerate(zip(ids, masks, strict=True)):
        states = target.layer_features(ids_T[None], None, layers)
        features[row, : len(ids_T)] = torch.stack([s[0] for s in states], dim=1)
        ids_BT[row, : len(ids_T)] = ids_T
        mask_BT[row, : len(ids_T)] = mask_T
    return DraftBatch(ids_BT, features.clone(), mask_BT, torch.tensor([len(t) for t in ids]))


def _drafted(
    head: DraftHead, features_TLH: Tensor, ids_T: Tensor, i: int, feed: Tensor | None
) -> list[int]:
    """DEPTH tokens behind position i, from a cache; `feed` are the tokens read, else its own."""
    cache = head.new_cache(len(ids_T) + DEPTH)
    output = head.extend(cache, features_TLH[: i + 1], ids_T[1 : i + 2])
    guesses = []
    for step in range(1, DEPTH + 1):
        guesses.append(int(head.vocabulary.d2t_W[output.logits_KW[0].argmax()]))
        token = guesses[-1] if feed is None else int(feed[i + 1 + step])
        sees = torch.ones(1, step, dtype=torch.bool)
        output = head.step(cache, DraftNodes(output.hidden_KH, torch.tensor([token]), step, sees))
    return guesses


@pytest.mark.parametrize("draft_size", [0, 160])
@pytest.mark.parametrize("kind", DRAFT_CONFIGS)
def test_hits_are_those_of_chains_from_a_cache(
    deep_target: Target, deep_target_folder: Path, kind: str, draft_size: int
) -> None:
    """On any text: the true tokens are fed, the target's choice is wanted."""
    head = _head(deep_target, deep_target_folder, kind, draft_size)
    draw = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 259, (length,), generator=draw) for length in (17, 6, 12)]
    masks = [torch.arange(len(t)) % 9 != 4 for t in ids]
    batch = _batch(deep_target, head, ids, masks)
    _fit(head, batch, 80)
    # Which must not be read.
    batch.noise_BTLH = torch.full_like(batch.features_BTLH, 3.0)
    hits_D, positions = head.chain_hits(batch, DEPTH)

    output_VH = load_output_head(deep_target_folder)
    wanted, count = [0] * DEPTH, 0
    with torch.inference_mode():
        for row, (ids_T, mask_T) in enumerate(zip(ids, masks, strict=True)):
            features_TLH = batch.features_BTLH[row, : len(ids_T)]
            chosen = (features_TLH[:, -1] @ output_VH.T).argmax(-1).tolist()
            for i in range(len(ids_T)):
                if i + DEPTH >= len(ids_T) or not bool(mask_T[i : i + DEPTH].all()):
                    continue
                count += 1
                feed = torch.cat((ids_T, torch.zeros(1, dtype=torch.int64)))
                guesses = _drafted(head, features_TLH, ids_T, i, feed)
                for depth in range(DEPTH):
                    if guesses[depth] != chosen[i + 1 + depth]:
                        break
                    wanted[depth] += 1
    assert int(positions) == count > 0
    assert hits_D.tolist() == wanted
    assert 0 < wanted[-1] < wanted[0] < count, "too even to show anything"


@pytest.mark.parametrize("kind", DRAFT_CONFIGS)
def test_on_the_targets_own_text_hits_are_accepted_drafts(
    deep_target: Target, deep_target_folder: Path, kind: str
) -> None:
    """The estimate is exact there: what a drafted chain of its own tokens would have accepted."""
    rounds = SpeculativeDecoder(deep_target, None, DecodeConfig(max_context=256)).generate(
        PROMPT, max_new_tokens=24
    )
    ids_T = torch.tensor([*PROMPT, *itertools.chain.from_iterable(r.tokens for r in rounds)])
    head = _head(deep_target, deep_target_folder, kind, 0)
    # A position's logits choose the token behind it, so the last prompt token's is the answer's.
    mask_T = torch.arange(len(ids_T)) >= len(PROMPT) - 1
    batch = _batch(deep_target, head, [ids_T], [mask_T])
    _fit(head, batch, 30)
    hits_D, positions = head.chain_hits(batch, DEPTH)
    states_TH = batch.features_BTLH[0, :, -1]
    chosen = (states_TH @ load_output_head(deep_target_folder).T).argmax(-1).tolist()
    answer = range(len(PROMPT) - 1, len(ids_T) - 1)
    assert [chosen[i] for i in answer] == ids_T[len(PROMPT) :].tolist()
    accepted, starts = [0] * DEPTH, range(len(PROMPT) - 1, len(ids_T) - DEPTH)
    with torch.inference_mode():
        for i in starts:
            guesses = _drafted(head, batch.features_BTLH[0], ids_T, i, None)
            for depth in range(DEPTH):
                if guesses[depth] != chosen[i + 1 + depth]:
                    break
                accepted[depth] += 1
    assert int(positions) == len(starts)
    assert hits_D.tolist() == accepted
    assert accepted[2] < accepted[0] and accepted[1], "too even to show anything"


def test_without_a_whole_window_there_are_no_positions(
    deep_target: Target, deep_target_folder: Path
) -> None:
    head = _head(deep_target, deep_target_folder, "eagle1", 0)
    ids = [torch.arange(5, 5 + DEPTH)]
    batch = _batch(deep_target, head, ids, [torch.ones(DEPTH, dtype=torch.bool)])
    hits_D, positions = head.chain_hits(batch, DEPTH)
    assert int(positions) == 0 and hits_D.tolist() == [0] * DEPTH
    hits_D, positions = head.chain_hits(batch, DEPTH - 1)
    assert int(positions) == 1 and len(hits_D) == DEPTH - 1
