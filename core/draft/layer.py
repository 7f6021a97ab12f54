"""The Llama decoder layer that draft heads are made of.

Shapes: B batch, T tokens, H hidden, A attention heads, G key/value heads, E head dimension,
C cached positions.
Source: HF `LlamaDecoderLayer`; `tests/parity/test_layer.py` compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.draft.base import DraftCache, TargetGeometry
from core.draft.packing import Packing


class RotaryEmbedding(nn.Module):
    """Rotary position embedding in Llama's half-split form."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        # Not a buffer: `head.to(bfloat16)` would round it, and far positions would be wrong.
        self.inverse_frequency = theta**-exponent

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, E] each, of integer positions [T]."""
        inverse_frequency = self.inverse_frequency.to(positions_T.device)
        angles = positions_T[:, None].float() * inverse_frequency[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Apply rotary positions to [..., T, E]."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos_TE.to(x.dtype) + rotated * sin_TE.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention without biases."""

    def __init__(self, geometry: TargetGeometry, input_size: int) -> None:
        super().__init__()
        self.num_heads = geometry.num_attention_heads
        self.num_kv_heads = geometry.num_key_value_heads
        self.head_dim = geometry.head_dim
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, query, bias=False)
        self.k_proj = nn.Linear(input_size, key_value, bias=False)
        self.v_proj = nn.Linear(input_size, key_value, bias=False)
        self.o_proj = nn.Linear(query, geometry.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """Causal attention over whole sequences, for training; [B, T, H] in and out."""
        query, key, value = self._project(x_BTH)
        query, key = rotate(query, cos_TE, sin_TE), rotate(key, cos_TE, sin_TE)
        return self._output(self._causal(query, key, value))

    def packed(
        self, x_NH: Tensor, packing: Packing, wanted_M: Tensor, cos_NE: Tensor, sin_NE: Tensor
    ) -> Tensor:
        """Causal attention of each token to its own sequence, for training.

        Args:
            x_NH: [N, input size], packed tokens.
            packing: of them.
            wanted_M: int64 [M], which of them attend; the others are attended to alone.
            cos_NE: of their positions; so is `sin_NE`.
        Returns:
            [M, H].
        """
        x_MH, cos_ME, sin_ME = (t.index_select(0, wanted_M) for t in (x_NH, cos_NE, sin_NE))
        asking = Packing(packing.shape, packing.places_N.index_select(0, wanted_M))
        query = rotate(self._heads(self.q_proj(x_MH)), cos_ME[:, None], sin_ME[:, None])
        key = rotate(self._heads(self.k_proj(x_NH)), cos_NE[:, None], sin_NE[:, None])
        value = self._heads(self.v_proj(x_NH))
        out = self._causal(
            asking.unpack(query).transpose(1, 2),
            packing.unpack(key).transpose(1, 2),
            packing.unpack(value).transpose(1, 2),
        )
        result: Tensor = self.o_proj(asking.pack(out.transpose(1, 2)).flatten(1))
        return result

    def _heads(self, x_NH: Tensor) -> Tensor:
        return x_NH.unflatten(-1, (x_NH.shape[-1] // self.head_dim, self.head_dim))

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def cached(
        self,
        x_1TH: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        cache: DraftCache,
        sees_TC: Tensor | None,
    ) -> Tensor:
        """Append T positions to the cache and attend to all of it.

        Args:
            x_1TH: [1, T, input size].
            cos_TE: of the T positions; so is `sin_TE`.
            cache: grows by T rows.
            sees_TC: bool [T, C], C counting the new rows; None where every row is visible.
        """
        query, key, value = self._project(x_1TH)
        query, key = rotate(query, cos_TE, sin_TE), rotate(key, cos_TE, sin_TE)
        start, end = cache.length, cache.length + x_1TH.shape[1]
        cache.keys[:, :, start:end] = key
        cache.values[:, :, start:end] = value
        cache.length = end
        # The heads of a group become rows of one query, so that keys are not copied per head.
        groups, tokens = self.num_heads // self.num_kv_heads, x_1TH.shape[1]
        rows = query.reshape(1, self.num_kv_heads, groups * tokens, self.head_dim)
        mask = None if sees_TC is None else sees_TC.repeat(groups, 1)
        out = F.scaled_dot_product_attention(
            rows, cache.keys[:, :, :end], cache.values[:, :, :end], attn_mask=mask
        )
        return self._output(out.reshape(1, self.num_heads, tokens, self.head_dim))

    def _project(self, x_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x_BTH.shape
        query, key, value = (
            layer(x_BTH).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def _output(self, out_BATE: Tensor) -> Tensor:
        batch, _, tokens, _ = out_BATE.shape
        result: Tensor = self.o_proj(out_BATE.transpose(1, 2).reshape(batch, tokens, -1))
        return result


class FeedForward(nn.Module):
    """SwiGLU, as in Llama."""

    def __init__(self, geometry: TargetGeometry) -> None:
        super().__init__()
        hidden, intermediate = geometry.hidden_size, geometry.intermediate_size
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] in and out."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result
