"""A Llama-like model's pass over new tokens in few operators, on CPU, with packed weights.

For a few tokens, starting operators takes longer in transformers' own forward than reading the
weights. Here a layer is a dozen of them (`core/models/fused_layer.py`), and nothing is built for a
mask. The model's modules stay as they are and hold the weights; its own forward is the reference
(`target.pack_linear=false`, and `dense_attention` of the decoder), and decides at the start whether
this pass computes the same.

Shapes: N new tokens, H hidden, L feature layers, G key heads, E head size, M rows of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from core.models.fused_layer import FusedLayer, FusedNorm, Heads
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
class _Layer:
    """A decoder layer: the norm before attention, and the rest."""

    norm: FusedNorm
    rest: FusedLayer

    @classmethod
    def of(cls, layer: nn.Module, heads: Heads) -> _Layer | None:
        """Take the weights of a layer that looks as Llama's does."""
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if not (_has_only(layer, "layer") and _has_only(attention, "attention")):
            return None
        if not (_has_only(mlp, "mlp") and isinstance(cast(Any, mlp).act_fn, SILU)):
            return None
        one = cast(Any, layer)
        norm = FusedNorm.of(one.input_layernorm)
        rest = FusedLayer.of(one.self_attn, one.mlp, one.post_attention_layernorm, heads)
        return None if norm is None or rest is None else cls(norm, rest)


class FusedDecoder:
    """The pass of one model; see `of`."""

    def __init__(
        self,
        embedding: nn.Module,
        rotary: nn.Module,
        layers: Sequence[_Layer],
        norm: FusedNorm,
        heads: Heads,
    ) -> None:
        self._embedding, self._rotary = embedding, rotary
        self._layers, self._norm, self._heads = tuple(layers), norm, heads

    @classmethod
    def of(cls, model: PreTrainedModel) -> FusedDecoder | None:
        """The pass of a model with packed layers; None where it would not compute the same.

        What a model is made of is compared first, and then what it computes: an architecture
        that only looks like Llama's is found out by its features.
        """
        body, text = cast(Any, model.base_model), cast(Any, model.config.get_text_config())
        if not _has_only(body, "body"):
            return None
        size = getattr(getattr(body.layers[0], "self_attn", None), "head_dim", None)
        norm = FusedNorm.of(body.norm)
        if size is None or norm is None:
            return None
        heads = Heads(text.num_attention_heads, text.num_key_value_heads, size)
        layers = [_Layer.of(layer, heads) for layer in body.layers]
        if any(layer is None for layer in layers):
            return None
        found = [layer for layer in layers if layer is not None]
        fused = cls(body.embed_tokens, body.rotary_emb, found, norm, heads)
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
        buffers = cache.joint(x_NH, self._heads.keys, self._heads.size)
        rows_N = cache.writes_N(x_NH.device)
        turn = self._rotation(x_NH, positions_N)
        entering: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            if index in layers:
                entering[index] = x_NH
            x_NH = layer.rest(layer.norm(x_NH), x_NH, turn, buffers[index], rows_N, ragged)
        final_NH = self._norm(x_NH)
        return torch.stack([*(entering[index] for index in layers[:-1]), final_NH], dim=1)

    def _rotation(self, x_NH: Tensor, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """See `Heads.rotation`."""
        cos_1NE, sin_1NE = self._rotary(x_NH[None], positions_N[None])
        return self._heads.rotation(cos_1NE[0], sin_1NE[0])

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
        heads = self._heads
        buffer = states[0].new_zeros(2 * heads.keys, CHECKED_TOKENS, heads.size)
        try:
            turn = self._rotation(states[0], rows_N)
            for layer, x_NH, wanted_NH in zip(self._layers, states, states[1:], strict=False):
                found_NH = layer.rest(layer.norm(x_NH), x_NH, turn, buffer, rows_N, ragged)
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
