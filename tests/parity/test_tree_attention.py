"""The target on a draft tree in one pass, against one plain forward a root-to-leaf path."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from core.decode.cache import SequenceCache
from core.decode.tree import DraftTree
from core.errors import InputError
from core.models.target import Target

PROMPT = torch.tensor([1, 17, 80, 33, 200, 9, 54])
# float32, two layers of width 32 with logits of size about 10, and sums in another order.
TOLERANCE = 4e-5


def _random_tree(size: int, seed: int) -> DraftTree:
    draw = random.Random(seed)
    parents = (-1, *(draw.randrange(max(0, node - 6), node) for node in range(1, size)))
    tokens = torch.tensor([draw.randrange(3, 260) for _ in range(size)])
    return DraftTree(tokens, parents, tuple(range(size)))


def _prefilled(target: Target, max_tokens: int = 64) -> SequenceCache:
    cache = SequenceCache(target.model.config, max_tokens)
    target.cached_features(PROMPT, torch.arange(len(PROMPT)), cache)
    return cache


def _pass(target: Target, cache: SequenceCache, tree: DraftTree) -> torch.Tensor:
    start = cache.length
    before = torch.ones((tree.size, start), dtype=torch.bool)
    sees_NC = torch.cat((before, tree.sees_NN), dim=1)
    hidden_NH = target.cached_features(tree.token_ids_N, tree.depths_N + start, cache, sees_NC)[
        :, -1
    ]
    return target.logits(hidden_NH)


@pytest.mark.parametrize(("size", "seed"), [(2, 0), (9, 1), (9, 2), (40, 3)])
def test_tree_logits_are_those_of_every_path(tiny_target: Target, size: int, seed: int) -> None:
    tree = _random_tree(size, seed)
    logits_NV = _pass(tiny_target, _prefilled(tiny_target), tree)
    for path in tree.paths:
        ids_1T = torch.cat((PROMPT, tree.token_ids_N[path]))[None]
        with torch.inference_mode():
            wanted = tiny_target.model(ids_1T, use_cache=False).logits[0, len(PROMPT) :]
        torch.testing.assert_close(logits_NV[path], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(4))
def test_committing_a_path_is_having_read_the_path_alone(tiny_target: Target, seed: int) -> None:
    tree = _random_tree(12, seed)
    longest = max(tree.paths, key=lambda row: len(row))
    path = tuple(longest)
    cache = _prefilled(tiny_target)
    _pass(tiny_target, cache, tree)
    cache.commit(len(PROMPT), path)
    ids_T = torch.cat((PROMPT, tree.token_ids_N[list(path)]))
    plain = SequenceCache(tiny_target.model.config, 64)
    tiny_target.cached_features(ids_T, torch.arange(len(ids_T)), plain)
    assert cache.length == plain.length == len(ids_T)
    for mine, wanted in zip(cache.layers, plain.layers, strict=True):
        rows = len(ids_T)
        for name in ("keys", "values"):
            found = getattr(mine, name)[:, :, :rows]
            torch.testing.assert_close(
                found, getattr(wanted, name)[:, :, :rows], rtol=0, atol=TOLERANCE
            )
    # And the next round reads it so, tree rows that were dropped included.
    after = _random_tree(5, seed + 50)
    torch.testing.assert_close(
        _pass(tiny_target, cache, after),
        _pass(tiny_target, plain, after),
        rtol=0,
        atol=TOLERANCE,
    )


def test_commit_gathers_rows_in_the_order_of_the_path(tiny_target: Target) -> None:
    tree = DraftTree(torch.tensor([5, 6, 7, 8, 9]), (-1, 0, 0, 2, 2), tuple(range(5)))
    cache = _prefilled(tiny_target)
    _pass(tiny_target, cache, tree)
    start = len(PROMPT)
    rows = [layer.keys[:, :, [start, start + 2, start + 4]].clone() for layer in cache.layers]
    cache.commit(start, (0, 2, 4))
    for layer, wanted in zip(cache.layers, rows, strict=True):
        assert torch.equal(layer.keys[:, :, start : cache.length], wanted)


def test_rewinding_forgets_a_tree(tiny_target: Target) -> None:
    cache, fresh = _prefilled(tiny_target), _prefilled(tiny_target)
    _pass(tiny_target, cache, _random_tree(20, 0))
    cache.rewind(len(PROMPT))
    tree = _random_tree(6, 1)
    assert torch.equal(_pass(tiny_target, cache, tree), _pass(tiny_target, fresh, tree))


@pytest.mark.parametrize(
    ("config", "max_tokens", "said"),
    [
        (MistralConfig(sliding_window=100), 101, "window of 100"),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1),
            65,
            "window of 64",
        ),
        (
            LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"]),
            8,
            "linear_attention",
        ),
    ],
)
def test_attention_that_a_tree_mask_would_change_is_refused(config, max_tokens, said) -> None:
    with pytest.raises(InputError, match=said):
        SequenceCache(config, max_tokens)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(sliding_window=100, num_hidden_layers=2),
        MistralConfig(sliding_window=None, num_hidden_layers=2),
        Qwen2Config(num_hidden_layers=2),
    ],
)
def test_a_window_that_is_never_left_is_fine(config) -> None:
    assert SequenceCache(config, 100).max_tokens == 100


def test_keys_and_values_of_the_target_are_written_in_place(tiny_target: Target) -> None:
    cache = _prefilled(tiny_target)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    _pass(tiny_target, cache, _random_tree(9, 0))
    cache.commit(len(PROMPT), (0,))
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
