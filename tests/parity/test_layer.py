"""Our decoder layer against HF's `LlamaDecoderLayer`, weight for weight."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from core.draft.base import DraftCache, TargetGeometry
from core.draft.layer import Attention, FeedForward, Layer, RotaryEmbedding, rotate
from core.draft.packing import Packing
from core.models.ragged import RaggedBatch, Span

# float32 sums of at most 96 products of size about 1, in another order: about 96 · 2⁻²⁴ = 6e-6.
TOLERANCE = 1e-5
assert_near = functools.partial(torch.testing.assert_close, rtol=TOLERANCE, atol=TOLERANCE)
BATCH, TOKENS = 2, 11

CONFIG = LlamaConfig(
    hidden_size=48,
    intermediate_size=96,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    num_hidden_layers=1,
    vocab_size=32,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    rms_norm_eps=1e-4,
)
CONFIG._attn_implementation = "eager"
GEOMETRY = TargetGeometry.of(CONFIG)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _hf_rotary(positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = LlamaRotaryEmbedding(CONFIG)(torch.zeros(1), positions_T[None])
    return cos, sin


def _attentions() -> tuple[Attention, LlamaAttention]:
    ours, theirs = Attention(GEOMETRY, CONFIG.hidden_size), LlamaAttention(CONFIG, layer_idx=0)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def _layer() -> Layer:
    return Layer(GEOMETRY, CONFIG.hidden_size, qkv_bias=False)


def test_geometry_reads_the_config() -> None:
    assert (GEOMETRY.rope_theta, GEOMETRY.rms_norm_eps) == (5000.0, 1e-4)
    assert (GEOMETRY.num_attention_heads, GEOMETRY.num_key_value_heads) == (6, 2)
    assert GEOMETRY.head_dim == 8


def test_rotary_positions() -> None:
    """Angles reach 1e3 radians, where float32 itself is 6e-5 apart."""
    positions_T = torch.tensor([0, 1, 2, 17, 1000])
    ours = RotaryEmbedding(8, 5000.0)(positions_T)
    theirs = _hf_rotary(positions_T)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_packed_attention_of_some_positions() -> None:
    """Causal attention of two sequences; the second is shorter, and not all positions ask."""
    ours, theirs = _attentions()
    x_BTH = torch.randn(BATCH, TOKENS, CONFIG.hidden_size)
    causal = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    rotary = _hf_rotary(torch.arange(TOKENS))
    wanted, _ = theirs(x_BTH, position_embeddings=rotary, attention_mask=causal)
    lengths_B = torch.tensor([TOKENS, 6])
    packing = Packing.of(torch.arange(TOKENS)[None] < lengths_B[:, None])
    asking_M = torch.tensor([0, 3, TOKENS - 1, TOKENS, TOKENS + 5])
    cos_NE, sin_NE = RotaryEmbedding(8, 5000.0)(packing.positions_N)
    found, _ = ours.packed(packing.pack(x_BTH), packing, asking_M, cos_NE, sin_NE)
    assert_near(found, packing.pack(wanted)[asking_M])


@torch.no_grad()
def test_unrolled_attention_is_attention_with_an_explicit_mask() -> None:
    """Three steps of chains from each position, as one pass of HF's attention over all steps."""
    ours, theirs = _attentions()
    steps = 3
    x_STH = torch.randn(steps, TOKENS, CONFIG.hidden_size)
    # The softmax must not overflow where a chain's own score is far above the others.
    x_STH[2, 4] *= 40
    positions = torch.cat([torch.arange(TOKENS) + step for step in range(steps)])
    place, step = torch.arange(TOKENS).repeat(steps), torch.arange(steps).repeat_interleave(TOKENS)
    sees = (step[None, :] == 0) & (place[None, :] <= place[:, None])
    sees |= (place[None, :] == place[:, None]) & (step[None, :] <= step[:, None])
    mask = torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))[None, None]
    wanted, _ = theirs(
        x_STH.flatten(0, 1)[None], position_embeddings=_hf_rotary(positions), attention_mask=mask
    )
    packing = Packing.of(torch.ones(1, TOKENS, dtype=torch.bool))
    asking_M = torch.tensor([1, 4, 10])
    cos, sin = RotaryEmbedding(8, 5000.0)(torch.arange(TOKENS + steps))
    found, chains = ours.packed(x_STH[0], packing, asking_M, cos[:TOKENS], sin[:TOKENS])
    assert_near(found, wanted[0, asking_M])
    for number in (1, 2):
        at = asking_M + number
        found, chains = ours.unrolled(x_STH[number, asking_M], chains, cos[at], sin[at])
        assert_near(found, wanted[0, number * TOKENS + asking_M])


@torch.no_grad()
def test_cached_attention_with_a_mask_and_repeated_positions() -> None:
    """A tree's rows: two nodes share a position, and none sees its sibling."""
    ours, theirs = _attentions()
    x_1TH = torch.randn(1, 6, CONFIG.hidden_size)
    positions_T = torch.tensor([0, 1, 2, 3, 3, 4])
    sees = torch.ones(6, 6, dtype=torch.bool).tril()
    sees[4, 3] = sees[5, 3] = False
    mask = torch.zeros(6, 6).masked_fill(~sees, float("-inf"))[None, None]
    wanted, _ = theirs(x_1TH, position_embeddings=_hf_rotary(positions_T), attention_mask=mask)
    cache = DraftCache(torch.zeros(4, 9, 8))
    cos, sin = RotaryEmbedding(8, 5000.0)(positions_T)
    parts = [
        ours.cached(
            x_1TH[0, a:b],
            cos[a:b],
            sin[a:b],
            cache,
            torch.arange(a, b) + 2,
            RaggedBatch((Span(2, context, b - a, sees[a:b, context:b]),)),
        )
        for a, b, context in ((0, 3, 0), (3, 5, 3), (5, 6, 3))
    ]
    assert_near(torch.cat(parts)[None], wanted)


@torch.no_grad()
def test_cached_attention_of_several_sequences_last_positions() -> None:
    ours, theirs = _attentions()
    lengths, firsts = (6, 2, 4), (3, 12, 15)
    x = [torch.randn(length, CONFIG.hidden_size) for length in lengths]
    cache = DraftCache(torch.full((4, 20, 8), 9.0))
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    rows_N = torch.cat([torch.arange(n) + f for n, f in zip(lengths, firsts, strict=True)])
    cos, sin = RotaryEmbedding(8, 5000.0)(positions_N)
    spans = tuple(Span(f, n - 1, 1) for n, f in zip(lengths, firsts, strict=True))
    found = ours.cached(
        torch.cat(x), cos, sin, cache, rows_N, RaggedBatch(spans), torch.tensor([5, 7, 11])
    )
    for row, x_TH in enumerate(x):
        count = len(x_TH)
        causal = torch.full((count, count), float("-inf")).triu(1)[None, None]
        wanted, _ = theirs(
            x_TH[None], position_embeddings=_hf_rotary(torch.arange(count)), attention_mask=causal
        )
        assert_near(found[row], wanted[0, -1])


@torch.no_grad()
def test_biases_of_queries_keys_and_values() -> None:
    """As Qwen-2's attention has them; the output has none."""
    config = Qwen2Config(**{**CONFIG.to_dict(), "model_type": "qwen2"})
    config._attn_implementation = "eager"
    theirs = Qwen2Attention(config, layer_idx=0).eval()
    ours = Attention(GEOMETRY, CONFIG.hidden_size, bias=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x_BTH = torch.randn(1, TOKENS, CONFIG.hidden_size)
    causal = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    positions_T = torch.arange(TOKENS)
    wanted, _ = theirs(x_BTH, position_embeddings=_hf_rotary(positions_T), attention_mask=causal)
    packing = Packing.of(torch.ones(1, TOKENS, dtype=torch.bool))
    cos, sin = RotaryEmbedding(8, 5000.0)(positions_T)
    found, _ = ours.packed(x_BTH[0], packing, positions_T, cos, sin)
    assert_near(found, wanted[0])


@torch.no_grad()
def test_feed_forward() -> None:
    ours, theirs = FeedForward(GEOMETRY), LlamaMLP(CONFIG)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(BATCH, TOKENS, CONFIG.hidden_size)
    assert_near(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bfloat16 keeps 8 bits; the two round once or twice on the way: 2 · 2⁻⁸.
    [(torch.float32, TOLERANCE), (torch.bfloat16, 8e-3)],
)
@torch.no_grad()
def test_norm(dtype: torch.dtype, tolerance: float) -> None:
    ours = _layer().post_attention_layernorm.to(dtype)
    theirs = LlamaRMSNorm(CONFIG.hidden_size, CONFIG.rms_norm_eps).to(dtype)
    weight = torch.rand(CONFIG.hidden_size) + 0.5
    ours.weight.copy_(weight)
    theirs.weight.copy_(weight)
    # Small enough that epsilon counts.
    x = (0.02 * torch.randn(BATCH, TOKENS, CONFIG.hidden_size)).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_whole_layer_without_input_norm() -> None:
    layer = _layer().eval()
    attention, norm, mlp = (
        LlamaAttention(CONFIG, layer_idx=0).eval(),
        LlamaRMSNorm(CONFIG.hidden_size, CONFIG.rms_norm_eps),
        LlamaMLP(CONFIG),
    )
    layer.self_attn.load_state_dict(attention.state_dict())
    layer.mlp.load_state_dict(mlp.state_dict())
    x_BTH = torch.randn(BATCH, TOKENS, CONFIG.hidden_size)
    positions_T = torch.arange(TOKENS)
    causal = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    out, _ = attention(x_BTH, position_embeddings=_hf_rotary(positions_T), attention_mask=causal)
    wanted = x_BTH + out
    wanted = wanted + mlp(norm(wanted))
    cos, sin = RotaryEmbedding(8, 5000.0)(positions_T)
    packing = Packing.of(torch.ones(BATCH, TOKENS, dtype=torch.bool))
    x_NH, all_N = packing.pack(x_BTH), torch.arange(BATCH * TOKENS)
    attention_NH, _ = layer.self_attn.packed(
        x_NH, packing, all_N, cos.repeat(BATCH, 1), sin.repeat(BATCH, 1)
    )
    assert_near(packing.unpack(layer.after_attention(x_NH, attention_NH)), wanted)


def test_rotation_keeps_length_and_tells_distance_alone() -> None:
    cos, sin = RotaryEmbedding(8, 5000.0)(torch.tensor([3, 8, 13, 18]))
    query, key = torch.randn(8), torch.randn(8)
    q = rotate(query.expand(4, 8), cos, sin)
    k = rotate(key.expand(4, 8), cos, sin)
    assert_near(q.norm(dim=-1), query.norm().expand(4))
    products = [q[i + 1] @ k[i] for i in range(3)]
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(products[1], products[2], rtol=0, atol=1e-4)


def test_positions_stay_exact_in_half_precision():
    """A head in bfloat16 must rotate far positions as one in float32 does."""
    rotary = RotaryEmbedding(8, 10000.0)
    expected, _ = rotary(torch.tensor([1, 1000]))
    cast, _ = RotaryEmbedding(8, 10000.0).to(torch.bfloat16)(torch.tensor([1, 1000]))
    torch.testing.assert_close(cast, expected, rtol=0, atol=0)
