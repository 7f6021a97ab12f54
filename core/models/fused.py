"""A Llama-like model's pass over new tokens in few operators, on CPU, with packed weights.

For a few tokens, starting operators takes longer in transformers' own forward than reading the
weights. Here queries, keys and values are one product and one rotation, activation and residual
additions are done within products, and nothing is built for a mask. The model's modules stay as
they are and hold the weights; its own forward is the reference (`target.pack_linear=false`, and
`dense_attention` of the decoder), and decides at the start whether this pass computes the same.

Shapes: N new tokens, H hidden, L feature layers, Q query heads, G key heads, A = Q + 2G, E head
size, M rows of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from core.models.packed import PackedLinear, PartLinear
from core.models.ragged import RaggedBatch, Span

SILU = (nn.SiLU, SiLUActivation)
CHILDREN = {
    "layer": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
    "body": {"embed_tokens", "layers", "norm", "rotary_emb"},
}
# Of a layer's difference to the model's own, relative to the state's size.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
CHECKED_TOKENS = 24


class RowBuffers(Protocol):
    """A cache whose layers have keys and values in one buffer."""

    def joint(self, like: Tensor, heads: int, size: int) -> Sequence[Tensor]:
        """Of each layer the buffer [2G, M, E], keys first."""

    def writes_N(self, device: torch.device) -> Tensor:
        """int64 [N], the rows that the pass writes."""


@dataclass(frozen=True)
class _Norm:
    """Root mean square normalization."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class _Layer:
    """The weights of a decoder layer, as its modules hold them."""

    norm: _Norm
    projection: PackedLinear
    query_norm: _Norm | None
    key_norm: _Norm | None
    output: PackedLinear
    second_norm: _Norm
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    scale: float

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer | None:
        """Take the weights of a layer that looks as Llama's does."""
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if not (_has_only(layer, "layer") and _has_only(attention, "attention")):
            return None
        if not (_has_only(mlp, "mlp") and isinstance(cast(Any, mlp).act_fn, SILU)):
            return None
        attention, mlp = cast(Any, attention), cast(Any, mlp)
        packed = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if not isinstance(attention.q_proj, PartLinear):
            return None
        if not all(isinstance(part, PackedLinear) for part in packed):
            return None
        one = cast(Any, layer)
        norms = [_norm(one.input_layernorm), _norm(one.post_attention_layernorm)]
        heads = [_norm(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
        if norms[0] is None or norms[1] is None or (heads[0] is None) != (heads[1] is None):
            return None
        return cls(
            norm=norms[0],
            projection=attention.q_proj.shared.layer,
            query_norm=heads[0],
            key_norm=heads[1],
            output=attention.o_proj,
            second_norm=norms[1],
            gate=mlp.gate_proj,
            up=mlp.up_proj,
            down=mlp.down_proj,
            scale=attention.scaling,
        )


class FusedDecoder:
    """The pass of one model; see `of`."""

    def __init__(
        self, embedding: nn.Module, rotary: nn.Module, layers: Sequence[_Layer], norm: _Norm
    ) -> None:
        self._embedding, self._rotary = embedding, rotary
        self._layers, self._norm = tuple(layers), norm
        # Set by `of`.
        self.num_heads = self.num_key_heads = self.head_size = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> FusedDecoder | None:
        """The pass of a model with packed layers; None where it would not compute the same.

        What a model is made of is compared first, and then what it computes: an architecture
        that only looks like Llama's is found out by its features.
        """
        body, text = cast(Any, model.base_model), cast(Any, model.config.get_text_config())
        if not _has_only(body, "body"):
            return None
        layers, norm = [_Layer.of(layer) for layer in body.layers], _norm(body.norm)
        if norm is None or not layers or any(layer is None for layer in layers):
            return None
        found = [layer for layer in layers if layer is not None]
        fused = cls(body.embed_tokens, body.rotary_emb, found, norm)
        fused.num_heads = text.num_attention_heads
        fused.num_key_heads = text.num_key_value_heads
        fused.head_size = body.layers[0].self_attn.head_dim
        return fused if fused._computes_the_same(body) else None

    @torch.inference_mode()
    def __call__(
        self,
        input_ids_N: Tensor,
        positions_N: Tensor,
        cache: RowBuffers,
        ragged: RaggedBatch,
        layers: Sequence[int] = (),
    ) -> Tensor:
        """Features [N, L, H]; see `Target.ragged_features`."""
        x_NH = self._embedding(input_ids_N)
        buffers = cache.joint(x_NH, self.num_key_heads, self.head_size)
        rows_N = cache.writes_N(x_NH.device)
        turn = self._rotation(x_NH, positions_N)
        entering: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            if index in layers:
                entering[index] = x_NH
            x_NH = self._pass(layer, x_NH, turn, buffers[index], rows_N, ragged)
        final_NH = self._norm(x_NH)
        return torch.stack([*(entering[index] for index in layers[:-1]), final_NH], dim=1)

    def _pass(
        self,
        layer: _Layer,
        x_NH: Tensor,
        turn: tuple[Tensor, Tensor],
        buffer: Tensor,
        rows_N: Tensor,
        ragged: RaggedBatch,
    ) -> Tensor:
        """One decoder layer, [N, H] in and out."""
        queries, keys = self.num_heads, self.num_key_heads
        heads_NAE = layer.projection(layer.norm(x_NH)).view(len(x_NH), -1, self.head_size)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key, value = heads_NAE.split((queries, keys, keys), dim=1)
            heads_NAE = torch.cat((layer.query_norm(query), layer.key_norm(key), value), dim=1)
        halves = heads_NAE.view(*heads_NAE.shape[:2], 2, -1)
        cos_NAE, sin_NAE = turn
        heads_NAE = torch.addcmul(heads_NAE * cos_NAE, halves.flip(2).flatten(2), sin_NAE)
        buffer.index_copy_(1, rows_N, heads_NAE[:, queries:].transpose(0, 1))
        out_NQE = ragged.attend(
            heads_NAE[:, :queries].transpose(0, 1), buffer[:keys], buffer[keys:], layer.scale
        )
        x_NH = layer.output.plus(out_NQE.flatten(1), x_NH)
        normed_NH = layer.second_norm(x_NH)
        return layer.down.plus(layer.up.times(normed_NH, layer.gate.silu(normed_NH)), x_NH)

    def _rotation(self, x_NH: Tensor, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [N, A, E] each, that turn queries and keys and leave values alone.

        The sine's first half is negated: it goes with the second half of what is turned.
        """
        cos_1NE, sin_1NE = self._rotary(x_NH[None], positions_N[None])
        turned = self.num_heads + self.num_key_heads
        cos_NAE = cos_1NE.new_ones(len(x_NH), turned + self.num_key_heads, self.head_size)
        sin_NAE = torch.zeros_like(cos_NAE)
        half = self.head_size // 2
        cos_NAE[:, :turned] = cos_1NE[0][:, None]
        sin_NAE[:, :turned] = sin_1NE[0][:, None]
        sin_NAE[..., :half].neg_()
        return cos_NAE, sin_NAE

    @torch.inference_mode()
    def _computes_the_same(self, body: Any) -> bool:
        """Whether each layer makes of the states of some text what the model's own makes of them.

        Layer by layer, since bfloat16's rounding would add up over all of them.
        """
        ids_N = torch.arange(CHECKED_TOKENS) * 7919 % body.embed_tokens.num_embeddings
        output = body(input_ids=ids_N[None], use_cache=False, output_hidden_states=True)
        states = [state_1NH[0] for state_1NH in output.hidden_states]
        if not torch.equal(self._embedding(ids_N), states[0]):
            return False
        rows_N = torch.arange(CHECKED_TOKENS)
        ragged = RaggedBatch((Span(0, 0, CHECKED_TOKENS),))
        most = TOLERANCE[body.embed_tokens.weight.dtype]
        buffer = states[0].new_zeros(2 * self.num_key_heads, CHECKED_TOKENS, self.head_size)
        try:
            turn = self._rotation(states[0], rows_N)
            for layer, x_NH, wanted_NH in zip(self._layers, states, states[1:], strict=False):
                found_NH = self._pass(layer, x_NH, turn, buffer, rows_N, ragged)
                if layer is self._layers[-1]:
                    # What a model gives of the last layer has been through the norm.
                    found_NH = self._norm(found_NH)
                error_N = (found_NH - wanted_NH).float().norm(dim=1)
                if not bool((error_N <= most * wanted_NH.float().norm(dim=1)).all()):
                    return False
        except RuntimeError:
            # Sizes that do not fit each other: some part means another thing here.
            return False
        return True


def _has_only(module: object, kind: str) -> bool:
    """Whether a module consists of parts of these names; of an attention some may be missing."""
    if not isinstance(module, nn.Module):
        return False
    names = {name for name, _ in module.named_children()}
    optional = {"q_norm", "k_norm"} if kind == "attention" else set()
    return CHILDREN[kind] - optional <= names <= CHILDREN[kind]


def _norm(module: object) -> _Norm | None:
    """A norm that looks like one by the root mean square."""
    epsilon = getattr(module, "variance_epsilon", None)
    if not isinstance(module, nn.Module) or epsilon is None:
        return None
    weight = module.get_parameter("weight")
    return _Norm(weight.detach(), float(epsilon))
