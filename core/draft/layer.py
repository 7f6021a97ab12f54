"""The Llama decoder layer that draft heads are made of.

Shapes: B batch, T tokens, N packed tokens, M of them that ask, H hidden, I what attention reads,
A attention heads, G key/value heads, R heads that share a key (A = G · R), E head dimension,
S steps of a chain; in decoding N positions of several sequences, K of them that ask, Q = A.
Source: HF `LlamaDecoderLayer`; `tests/parity/test_layer.py` compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.draft.base import DraftCache, TargetGeometry
from core.draft.packing import Packing
from core.models.ragged import RaggedBatch


class RotaryEmbedding(nn.Module):
    """Rotary position embedding in Llama's half-split form."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        # Not a buffer: `head.to(bfloat16)` would round it, and far positions would be wrong.
        self.inverse_frequency = theta**-exponent
        self._table: tuple[Tensor, Tensor] | None = None

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, E] each, of integer positions [T]."""
        inverse_frequency = self.inverse_frequency.to(positions_T.device)
        angles = positions_T[:, None].float() * inverse_frequency[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def looked_up(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same on CPU, in another dtype, from a table: computing it takes longer."""
        most = int(positions_T.max())
        if self._table is None or self._table[0].dtype != dtype or len(self._table[0]) <= most:
            cos_TE, sin_TE = self(torch.arange(2 * max(most, 512)))
            self._table = cos_TE.to(dtype), sin_TE.to(dtype)
        cos_TE, sin_TE = self._table
        return cos_TE.index_select(0, positions_T), sin_TE.index_select(0, positions_T)


def rotate(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Apply rotary positions to [..., T, E]."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos_TE.to(x.dtype) + rotated * sin_TE.to(x.dtype)


@dataclass
class ChainKeys:
    """Keys and values of an unrolled pass; see `Attention.unrolled`.

    Attributes:
        asking: the M tokens that chains grow from.
        keys_BGTE: of the true positions [B, G, T, E]; so is `values_BGTE`.
        own_keys: of the chains' later steps so far, [M, G, E] each; so is `own_values`.
    """

    asking: Packing
    keys_BGTE: Tensor
    values_BGTE: Tensor
    own_keys: tuple[Tensor, ...] = field(default=())
    own_values: tuple[Tensor, ...] = field(default=())


class Attention(nn.Module):
    """Grouped-query self-attention; of biases only queries, keys and values may have some."""

    def __init__(self, geometry: TargetGeometry, input_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = geometry.num_attention_heads
        self.num_kv_heads = geometry.num_key_value_heads
        self.head_dim = geometry.head_dim
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, query, bias=bias)
        self.k_proj = nn.Linear(input_size, key_value, bias=bias)
        self.v_proj = nn.Linear(input_size, key_value, bias=bias)
        self.o_proj = nn.Linear(query, geometry.hidden_size, bias=False)

    def packed(
        self, x_NI: Tensor, packing: Packing, wanted_M: Tensor, cos_NE: Tensor, sin_NE: Tensor
    ) -> tuple[Tensor, ChainKeys]:
        """Causal attention of each token to its own sequence, for training.

        Args:
            x_NI: [N, I], packed tokens.
            packing: of them.
            wanted_M: int64 [M], which of them attend; the others are attended to alone.
            cos_NE: of their positions; so is `sin_NE`.
        Returns:
            [M, H], and what chains that grow from the M tokens attend to.
        """
        x_MI, cos_ME, sin_ME = (t.index_select(0, wanted_M) for t in (x_NI, cos_NE, sin_NE))
        asking = Packing(packing.shape, packing.places_N.index_select(0, wanted_M))
        query = rotate(self._heads(self.q_proj(x_MI)), cos_ME[:, None], sin_ME[:, None])
        key = rotate(self._heads(self.k_proj(x_NI)), cos_NE[:, None], sin_NE[:, None])
        key = packing.unpack(key).transpose(1, 2)
        value = packing.unpack(self._heads(self.v_proj(x_NI))).transpose(1, 2)
        groups = self.num_heads // self.num_kv_heads
        out = F.scaled_dot_product_attention(
            asking.unpack(query).transpose(1, 2),
            key.repeat_interleave(groups, 1),
            value.repeat_interleave(groups, 1),
            is_causal=True,
        )
        return self.o_proj(asking.pack(out.transpose(1, 2)).flatten(1)), ChainKeys(
            asking, key, value
        )

    def unrolled(
        self, x_MI: Tensor, chains: ChainKeys, cos_ME: Tensor, sin_ME: Tensor
    ) -> tuple[Tensor, ChainKeys]:
        """Attention of a chain's later step, for training.

        It attends to what the chain's first token saw, and to the chain's own later steps, this
        one included: one softmax over both, without a mask or keys for the pairs of chains that
        do not see each other.

        Args:
            x_MI: [M, I], this step's input of each chain.
            chains: as the step before gave it.
            cos_ME: of this step's positions; so is `sin_ME`.
        Returns:
            [M, H], and `chains` with this step.
        Source: EAGLE-3 (Li et al. 2025), figure 6; reference `eagle/traineagle3/cnets.py`.
        """
        query = rotate(self._heads(self.q_proj(x_MI)), cos_ME[:, None], sin_ME[:, None])
        key = rotate(self._heads(self.k_proj(x_MI)), cos_ME[:, None], sin_ME[:, None])
        chains = ChainKeys(
            chains.asking,
            chains.keys_BGTE,
            chains.values_BGTE,
            (*chains.own_keys, key),
            (*chains.own_values, self._heads(self.v_proj(x_MI))),
        )
        query_MGRE = query.unflatten(1, (self.num_kv_heads, -1)) * self.head_dim**-0.5
        own_keys_MGES = torch.stack(chains.own_keys, dim=-1)
        own_values_MGSE = torch.stack(chains.own_values, dim=2)
        own_MGRS = (query_MGRE @ own_keys_MGES).float()
        seen_MGRE, seen_sum_MGR, seen_most_MGR = self._seen(query_MGRE, chains)
        # The largest score only keeps exp from overflowing: it cancels, and needs no gradient.
        most_MGR = torch.maximum(own_MGRS.detach().amax(-1), seen_most_MGR)
        seen_scale_MGR1 = (seen_most_MGR - most_MGR).exp()[..., None]
        own_MGRS = (own_MGRS - most_MGR[..., None]).exp()
        total_MGR1 = seen_sum_MGR[..., None] * seen_scale_MGR1 + own_MGRS.sum(-1, keepdim=True)
        out = seen_MGRE * seen_scale_MGR1 + (own_MGRS.to(x_MI.dtype) @ own_values_MGSE).float()
        out_MA = (out / total_MGR1).to(x_MI.dtype).flatten(1)
        return self.o_proj(out_MA), chains

    def _seen(self, query_MGRE: Tensor, chains: ChainKeys) -> tuple[Tensor, Tensor, Tensor]:
        """The part of the softmax over true positions.

        Returns values weighted by exp(score - largest), float32 [M, G, R, E], the sum of these
        weights, and the largest score, [M, G, R] each.
        """
        asking = chains.asking
        tokens = asking.shape[1]
        query = asking.unpack(query_MGRE).permute(0, 2, 3, 1, 4)
        grouped = query.flatten(2, 3)
        scores = (grouped @ chains.keys_BGTE.transpose(2, 3)).float()
        scores = scores.unflatten(2, query.shape[2:4])
        later_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later_TT, float("-inf"))
        most = scores.detach().amax(-1)
        weights = (scores - most[..., None]).exp()
        out = weights.to(query.dtype).flatten(2, 3) @ chains.values_BGTE
        out = out.float().unflatten(2, query.shape[2:4])
        seen, total, largest = (asking.pack(x.movedim(3, 1)) for x in (out, weights.sum(-1), most))
        return seen, total, largest

    def cached(
        self,
        x_NI: Tensor,
        cos_NE: Tensor,
        sin_NE: Tensor,
        cache: DraftCache,
        rows_N: Tensor,
        ragged: RaggedBatch,
        asking_K: Tensor | None = None,
    ) -> Tensor:
        """Write positions of several sequences into a cache, and attend to it.

        The reference of `core.models.fused_layer`, which does this with packed layers.

        Args:
            x_NI: [N, I].
            cos_NE: of the N positions; so is `sin_NE`.
            cache: takes them in.
            rows_N: int64 [N], where.
            ragged: what those that ask see, whose keys are in the cache then.
            asking_K: int64 [K], which of the N ask; None for all.
        Returns:
            [K, H].
        """
        cos_N1E, sin_N1E = cos_NE[:, None], sin_NE[:, None]
        key_NGE = rotate(self._heads(self.k_proj(x_NI)), cos_N1E, sin_N1E)
        cache.keys.index_copy_(1, rows_N, key_NGE.transpose(0, 1))
        cache.values.index_copy_(1, rows_N, self._heads(self.v_proj(x_NI)).transpose(0, 1))
        if asking_K is not None:
            x_NI, cos_N1E, sin_N1E = x_NI[asking_K], cos_N1E[asking_K], sin_N1E[asking_K]
        query_KQE = rotate(self._heads(self.q_proj(x_NI)), cos_N1E, sin_N1E)
        scale = self.head_dim**-0.5
        out_KQE = ragged.attend(query_KQE.transpose(0, 1), cache.keys, cache.values, scale)
        result: Tensor = self.o_proj(out_KQE.flatten(1))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        """[..., heads · E] to [..., heads, E]."""
        return x.unflatten(-1, (x.shape[-1] // self.head_dim, self.head_dim))


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


class Layer(nn.Module):
    """A decoder layer without its input norm: what attention reads is the head's own affair."""

    def __init__(self, geometry: TargetGeometry, input_size: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.self_attn = Attention(geometry, input_size, bias=qkv_bias)
        self.mlp = FeedForward(geometry)
        self.post_attention_layernorm = nn.RMSNorm(geometry.hidden_size, geometry.rms_norm_eps)

    def after_attention(self, residual: Tensor, attention: Tensor) -> Tensor:
        """Residual additions, norm and feed-forward; [..., H] in and out."""
        x = residual + attention
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result
