"""Our decoder layer against HF's `LlamaDecoderLayer`, weight for weight."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from core.draft.base import DraftCache, TargetGeometry
from core.draft.layer import Layer
from core.draft.layer import Attention, FeedForward, RotaryEmbedding, rotate

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
def _seed() -> None:
    torch.manual_seed(0)


def _hf_rotary(positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = LlamaRotaryEmbedding(CONFIG)(torch.zeros(1), positions_T[None])
    return cos, sin


def _attentions() -> tuple[Attention, LlamaAttention]:
    ours, theirs = Attention(GEOMETRY, CONFIG.hidden_size), LlamaAttention(CONFIG, layer_idx=0)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


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
def test_causal_attention() -> None:
    ours, theirs = _attentions()
    x_BTH = torch.randn(BATCH, TOKENS, CONFIG.hidden_size)
    positions_T = torch.arange(TOKENS)
    causal = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    wanted, _ = theirs(x_BTH, position_embeddings=_hf_rotary(positions_T), attention_mask=causal)
    found = ours(x_BTH, *RotaryEmbedding(8, 5000.0)(positions_T))
    assert_near(found, wanted)


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
    cache = DraftCache(torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9, 8))
    cos, sin = RotaryEmbedding(8, 5000.0)(positions_T)
    parts = [
        ours.cached(x_1TH[:, a:b], cos[a:b], sin[a:b], cache, sees[a:b, :b])
        for a, b in ((0, 3), (3, 5), (5, 6))
    ]
    assert_near(torch.cat(parts, dim=1), wanted)
    assert cache.length == 6


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
    ours = Layer(GEOMETRY).post_attention_layernorm.to(dtype)
    theirs = LlamaRMSNorm(CONFIG.hidden_size, CONFIG.rms_norm_eps).to(dtype)
    weight = torch.rand(CONFIG.hidden_size) + 0.5
    ours.weight.copy_(weight)
    theirs.weight.copy_(weight)
    # Small enough that epsilon counts.
    x = (0.02 * torch.randn(BATCH, TOKENS, CONFIG.hidden_size)).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_whole_layer_without_input_norm() -> None:
    layer = Layer(GEOMETRY).eval()
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
    found = layer.after_attention(x_BTH, layer.self_attn(x_BTH, cos, sin))
    assert_near(found, wanted)


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
