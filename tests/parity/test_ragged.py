"""Attention of several sequences in one pass, against transformers' own with a dense mask."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from core.config import DecodeConfig
from core.decode.engine import SpeculativeDecoder
from core.decode.forward import Piece, target_pass
from core.decode.requests import Request
from core.decode.rows import RowCache
from core.decode.tree import DraftTree, TreePlan
from core.models import ragged
from core.models.ragged import RaggedBatch, Span, _products_pay, use_ragged_attention
from core.models.target import Target
from tests.heads import random_head

# float32, layers of width 32, and sums in another order.
TOLERANCE = 4e-5
TREE = DraftTree(torch.tensor([7, 11, 12, 13, 14, 15]), (-1, 0, 0, 1, 1, 2), tuple(range(6)))


@pytest.mark.parametrize("heads", [2, 6])
def test_a_ragged_batch_attends_as_a_dense_mask_does(heads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 40, 8, generator=draw) for _ in range(2))
    spans = (
        Span(3, 9, 1),
        Span(20, 0, 4),
        Span(15, 2, 2),
        Span(25, 5, 6, TREE.sees_NN),
        # Nodes of a level: six rows behind the context, of which the last two are asking.
        Span(0, 2, 2, torch.tensor([[True, False, True, False], [False, True, False, True]])),
    )
    batch = RaggedBatch(spans)
    count = sum(span.count for span in spans)
    query = torch.randn(heads, count, 8, generator=draw)
    found = batch.attend(query, keys, values, 0.3)
    wanted = F.scaled_dot_product_attention(
        query[None],
        keys.repeat_interleave(heads // 2, 0)[None],
        values.repeat_interleave(heads // 2, 0)[None],
        attn_mask=batch.dense_mask(40),
        scale=0.3,
    )
    torch.testing.assert_close(found, wanted[0].transpose(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_sequences_that_share_a_call_attend_as_a_dense_mask_does(seed: int) -> None:
    """Some at one distance, of several lengths, with trees of several sizes beside each other."""
    choice, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    spans, first = [], 0
    for _ in range(12):
        context, count = choice.randint(0, 30), choice.choice((1, 1, 2, 6))
        sees = TREE.sees_NN[:count, :count] if count > 1 and choice.random() < 0.7 else None
        spans.append(Span(first, context, count, sees))
        first += choice.choice((40, 40, 57))
    choice.shuffle(spans)
    # What stands behind a sequence is not its own, and large.
    keys, values = (20 * torch.randn(2, first, 8, generator=draw) for _ in range(2))
    batch = RaggedBatch(tuple(spans))
    query = torch.randn(6, sum(span.count for span in spans), 8, generator=draw)
    found = batch.attend(query, keys, values, 0.3)
    ((calls, _),) = batch.plans.values()
    assert max(len(call.windows.members) for call in calls) > 2 and len(calls) < len(spans) / 2
    wanted = F.scaled_dot_product_attention(
        query[None],
        keys.repeat_interleave(3, 0)[None],
        values.repeat_interleave(3, 0)[None],
        attn_mask=batch.dense_mask(first),
        scale=0.3,
    )
    # Values are twenty times as large as those of the test above.
    torch.testing.assert_close(found, wanted[0].transpose(0, 1), rtol=0, atol=1e-4)


def test_values_may_be_smaller_than_keys() -> None:
    """As DeepSeek's, which are one tensor before they are split."""
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 60, 13, generator=draw).split((8, 5), dim=2)
    batch = RaggedBatch((Span(40, 19, 1), Span(0, 9, 2), Span(20, 4, 1)))
    query = torch.randn(6, 4, 8, generator=draw)
    wanted = F.scaled_dot_product_attention(
        query[None],
        keys.repeat_interleave(3, 0)[None],
        values.repeat_interleave(3, 0)[None],
        attn_mask=batch.dense_mask(60),
        scale=0.3,
    )
    found = batch.attend(query, keys, values, 0.3)
    torch.testing.assert_close(found, wanted[0].transpose(0, 1), rtol=0, atol=1e-6)


def test_in_float16_nothing_of_other_sequences_is_read() -> None:
    """Where a text has led to more than the format holds, its rows are not numbers."""
    keys, values = (torch.randn(2, 60, 8).half() for _ in range(2))
    keys[:, 20:40], values[:, 20:40] = float("nan"), float("nan")
    batch = RaggedBatch((Span(0, 9, 1), Span(20, 19, 1), Span(40, 4, 1)))
    found = batch.attend(torch.randn(6, 3, 8).half(), keys, values, 0.3)
    assert found[[0, 2]].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("tokens", [1, 6, 24])
def test_attention_by_products_is_the_kernels(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """In bfloat16 and behind a long text, where scores are rounded to 8 bits, as HF's eager does.

    A score of 4 is rounded by 2⁻⁷ at most, and so is its weight, relative to its size.
    """
    draw = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(2, 900, 16, generator=draw).bfloat16() for _ in range(2))
    query = torch.randn(6, tokens, 16, generator=draw).bfloat16()
    sees_TT = torch.ones(tokens, tokens, dtype=torch.bool).tril() if tokens > 1 else None
    batch = RaggedBatch((Span(7, 850, tokens, sees_TT),))
    assert _products_pay(2, 3, Span(7, 1850, tokens), query)
    monkeypatch.setattr(ragged, "SCORES_AT_LEAST", 0)
    found = batch.attend(query, keys, values, 0.25)
    wanted = F.scaled_dot_product_attention(
        query.float()[None],
        keys.float().repeat_interleave(3, 0)[None],
        values.float().repeat_interleave(3, 0)[None],
        attn_mask=batch.dense_mask(900),
        scale=0.25,
    )
    torch.testing.assert_close(found.float(), wanted[0].transpose(0, 1), rtol=2**-7, atol=2**-9)


def test_a_pass_over_trees_and_prompts_is_the_dense_masks(deep_target: Target) -> None:
    use_ragged_attention(deep_target.model)
    layers = (2, 3, 7)
    results = []
    for dense in (False, True):
        cache = RowCache(deep_target.model.config, 64, 64)
        prompts = [
            Piece.of_text(30, 0, range(40, 52), 1),
            Piece.of_text(4, 0, [1, 9, 77], 0),
        ]
        passes = target_pass(deep_target, cache, prompts, layers, dense=dense)
        pieces = [
            Piece.of_tree(4, 3, TREE),
            Piece.of_text(50, 0, [1, 200, 201, 202], 2),
            Piece.of_tree(30, 12, DraftTree.root_only(9)),
        ]
        results.append([*passes, *target_pass(deep_target, cache, pieces, layers, dense=dense)])
    assert [len(logits) for _, logits in results[0]] == [1, 0, 6, 2, 1]
    for mine, wanted in zip(*results, strict=True):
        for found, other in zip(mine, wanted, strict=True):
            torch.testing.assert_close(found, other, rtol=0, atol=TOLERANCE)


def test_what_else_the_model_is_asked_for_stays_the_same(
    deep_target: Target, deep_target_folder: Path
) -> None:
    from core.config import TargetConfig
    from core.models.target import load_target

    plain = load_target(TargetConfig(path=str(deep_target_folder), dtype="float32"))
    use_ragged_attention(deep_target.model)
    ids_BT = torch.tensor([[1, 50, 60, 70, 80], [1, 9, 9, 0, 0]])
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found, wanted = (one.features(ids_BT, mask_BT) for one in (deep_target, plain))
    assert torch.equal(found, wanted)


def test_the_engine_says_the_same_with_the_dense_mask(
    deep_target: Target, deep_target_folder: Path
) -> None:
    head = random_head(deep_target, deep_target_folder)
    config = DecodeConfig(max_context=128, cache_tokens=200)
    found = []
    for dense in (False, True):
        decoder = SpeculativeDecoder(deep_target, head, config, dense_attention=dense)
        texts: dict[int, list[int]] = {}
        for prompt in ([1, 40, 41], [1, *range(60, 90)]):
            texts[decoder.submit(Request(prompt, 8, plan=TreePlan(7, 2, 3)))] = []
        while decoder.busy:
            for event in decoder.step():
                texts[event.request_id] += event.round.tokens
        found.append(list(texts.values()))
    assert found[0] == found[1]
