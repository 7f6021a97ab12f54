"""The EAGLE-1 draft head, which the EAGLE-2 tree uses too.

It reads pairs (feature_i, token_{i+1}) and predicts feature_{i+1}, whose logits under the
target's own output head guess token_{i+2}.

Shapes: B batch, T tokens, H hidden, M supervised positions, V target vocabulary, W draft
vocabulary, K nodes of one depth, C cached positions.
Source: EAGLE (Li et al. 2024), section 4; reference `eagle/model/cnets1.py`, `eagle/train/main.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config.draft.eagle1 import Eagle1Config
from core.draft.base import (
    DraftBatch,
    DraftCache,
    DraftHead,
    DraftNodes,
    DraftOutput,
    LossSums,
    TargetGeometry,
)
from core.draft.layer import Attention, FeedForward, RotaryEmbedding
from core.draft.packing import Packing
from core.draft.soft_cross_entropy import soft_cross_entropy
from core.draft.vocabulary import DraftVocabulary
from core.errors import InputError
from core.models.packed import linear, pack_linears

TOP_N = (1, 2, 3, 10)
# In the reference's files, but the target's own, which is attached instead.
TARGETS_OWN = ("embed_tokens.weight",)


class Layer(nn.Module):
    """One decoder layer without input norm: the residual is the fusion's output itself."""

    def __init__(self, geometry: TargetGeometry) -> None:
        super().__init__()
        self.self_attn = Attention(geometry, geometry.hidden_size)
        self.mlp = FeedForward(geometry)
        self.post_attention_layernorm = nn.RMSNorm(geometry.hidden_size, geometry.rms_norm_eps)

    def after_attention(self, residual: Tensor, attention: Tensor) -> Tensor:
        """Residual additions, norm and feed-forward; [..., H] in and out."""
        x = residual + attention
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Eagle1Head(DraftHead):
    """EAGLE-1: a fusion layer and one decoder layer on the target's final feature."""

    def __init__(
        self, config: Eagle1Config, geometry: TargetGeometry, vocabulary: DraftVocabulary
    ) -> None:
        super().__init__(config, geometry, vocabulary)
        self.loss_weights = (config.feature_weight, config.token_weight)
        hidden = geometry.hidden_size
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.bias)
        self.layers = nn.ModuleList([Layer(geometry)])
        self.rotary = RotaryEmbedding(geometry.head_dim, geometry.rope_theta)
        self.embedding_VH: Tensor | None = None
        self._output_head_VH: Tensor | None = None
        self.output_layer: nn.Module | None = None

    @property
    def layer(self) -> Layer:
        """The only decoder layer; a list in the public layout."""
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        return layer

    def attach_target(self, embedding_VH: Tensor, output_head_VH: Tensor) -> None:
        """See base class. Of the output head, drafting keeps the draft vocabulary's rows."""
        like = self.fc.weight
        self.embedding_VH = embedding_VH.to(device=like.device, dtype=like.dtype)
        self._output_head_VH = output_head_VH.to(device=like.device, dtype=like.dtype)
        rows_WH = self.vocabulary.rows(self._output_head_VH).contiguous()
        # Outside the module's registry: neither a parameter nor part of the state dict.
        object.__setattr__(self, "output_layer", linear(rows_WH, packed=False))

    # Training

    def losses(self, batch: DraftBatch) -> LossSums:
        """Smooth L1 on features and cross-entropy to the target's distribution.

        The target's softmax is renormalized over the draft vocabulary. In evaluation mode the
        hits count against the target's argmax over its whole vocabulary; in training mode, to
        save the product with V rows, against the argmax over the draft vocabulary.
        Tokens are packed, and only supervised positions go on behind the keys and values.
        Source: reference `eagle/train/main.py`, weights 1.0 and 0.1; the loss mask is not
        shifted, and a sequence's last position is never supervised.
        """
        # Position i+1 must hold a token, not padding; it does where the mask says so, except
        # after a sequence's last supervised token.
        supervised_BT = batch.loss_mask_BT[:, :-1] & _is_token(batch)[:, 1:]
        # What stands behind a sequence's last supervised position is seen by none.
        packing = Packing.of(supervised_BT.flip(1).cumsum(1).flip(1) > 0)
        wanted_M = packing.pack(supervised_BT).nonzero()[:, 0]
        features_BTH = batch.features_BTLH[:, :, -1]
        inputs_NH = packing.pack(features_BTH[:, :-1])
        if batch.noise_BTLH is not None:
            inputs_NH = inputs_NH + packing.pack(batch.noise_BTLH[:, :-1, -1])
        next_ids_N = packing.pack(batch.input_ids_BT[:, 1:])
        predicted_MH = self.recomputed(self._forward, inputs_NH, next_ids_N, packing, wanted_M)
        wanted_MH = packing.pack(features_BTH[:, 1:]).index_select(0, wanted_M)
        return self._loss_sums(predicted_MH, wanted_MH.to(predicted_MH.dtype))

    def _loss_sums(self, predicted_MH: Tensor, wanted_MH: Tensor) -> LossSums:
        assert self.output_layer is not None and self._output_head_VH is not None
        rows_WH = self.output_layer.weight.to(predicted_MH.dtype)
        whole_VH = self._output_head_VH
        count_all = not (self.training or self.vocabulary.is_whole)

        def targets(part: slice) -> tuple[Tensor, Tensor]:
            logits_CW = (wanted_MH[part] @ rows_WH.T).float()
            if count_all:
                best_V = (wanted_MH[part] @ whole_VH.to(wanted_MH.dtype).T).argmax(-1)
                best_C = self.vocabulary.t2d_V.to(best_V.device)[best_V]
            else:
                best_C = logits_CW.argmax(-1)
            return logits_CW.softmax(-1), best_C

        feature_loss = F.smooth_l1_loss(predicted_MH.float(), wanted_MH.float(), reduction="none")
        feature_loss = feature_loss.mean(-1).sum()
        token_loss, rank_M = soft_cross_entropy(predicted_MH, rows_WH, targets)
        feature_weight, token_weight = self.loss_weights
        loss = feature_weight * feature_loss + token_weight * token_loss
        sums = {
            "feature_loss": feature_loss.detach(),
            "token_loss": token_loss.detach(),
            **{f"top{n}": (rank_M < n).sum() for n in TOP_N},
        }
        return LossSums(loss, torch.tensor(len(predicted_MH)), sums)

    def _forward(
        self, features_NH: Tensor, next_ids_N: Tensor, packing: Packing, wanted_M: Tensor
    ) -> Tensor:
        """Predicted features [M, H] of packed tokens, at the wanted ones of them."""
        fused_NH = self._fuse(features_NH, next_ids_N)
        cos_NE, sin_NE = self.rotary(packing.positions_N)
        attention_MH = self.layer.self_attn.packed(fused_NH, packing, wanted_M, cos_NE, sin_NE)
        return self.layer.after_attention(fused_NH.index_select(0, wanted_M), attention_MH)

    def _fuse(self, features: Tensor, next_ids: Tensor) -> Tensor:
        assert self.embedding_VH is not None, "attach_target comes first"
        embedded = F.embedding(next_ids, self.embedding_VH)
        result: Tensor = self.fc(torch.cat((embedded, features.to(embedded.dtype)), dim=-1))
        return result

    # Decoding

    def prepare_for_inference(self, *, packed: bool) -> None:
        """See base class; the whole output head is let go, drafting needs its W rows alone."""
        assert self._output_head_VH is not None, "attach_target comes first"
        self.eval().requires_grad_(False)
        if packed:
            pack_linears(self)
        rows_WH = self.vocabulary.rows(self._output_head_VH).contiguous()
        object.__setattr__(self, "output_layer", linear(rows_WH, packed=packed))
        self._output_head_VH = None

    def new_cache(self, max_tokens: int) -> DraftCache:
        """See base class."""
        assert self.embedding_VH is not None, "attach_target comes first"
        shape = (1, self.geometry.num_key_value_heads, max_tokens, self.geometry.head_dim)
        return DraftCache(self.embedding_VH.new_zeros(shape), self.embedding_VH.new_zeros(shape))

    def extend(self, cache: DraftCache, features_TLH: Tensor, next_ids_T: Tensor) -> DraftOutput:
        """See base class."""
        cache.length = cache.committed
        tokens = next_ids_T.shape[0]
        positions_T = torch.arange(cache.length, cache.length + tokens, device=next_ids_T.device)
        sees_TC = None
        if tokens > 1:
            columns = torch.arange(cache.length + tokens, device=next_ids_T.device)
            sees_TC = columns[None, :] <= positions_T[:, None]
        hidden_TH = self._cached(cache, features_TLH[:, -1], next_ids_T, positions_T, sees_TC)
        cache.committed = cache.length
        return self._output(hidden_TH[-1:])

    def step(self, cache: DraftCache, nodes: DraftNodes) -> DraftOutput:
        """See base class."""
        count = nodes.token_ids_K.shape[0]
        position = cache.committed + nodes.depth - 1
        positions_K = nodes.token_ids_K.new_full((count,), position)
        sees_KC = F.pad(nodes.sees_KT, (cache.committed, 0), value=True)
        hidden_KH = self._cached(cache, nodes.hidden_KH, nodes.token_ids_K, positions_K, sees_KC)
        return self._output(hidden_KH)

    def _cached(
        self,
        cache: DraftCache,
        features_TH: Tensor,
        next_ids_T: Tensor,
        positions_T: Tensor,
        sees_TC: Tensor | None,
    ) -> Tensor:
        fused_1TH = self._fuse(features_TH, next_ids_T)[None]
        cos, sin = self.rotary(positions_T)
        attention = self.layer.self_attn.cached(fused_1TH, cos, sin, cache, sees_TC)
        return self.layer.after_attention(fused_1TH, attention)[0]

    def _output(self, hidden_KH: Tensor) -> DraftOutput:
        assert self.output_layer is not None
        return DraftOutput(hidden_KH, self.output_layer(hidden_KH))

    # Public layout

    def eagle_tensors(self) -> dict[str, Tensor]:
        """See base class: `fc.*` and `layers.0.*`."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def load_eagle_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See base class. An embedding in the file is passed over: it is the target's."""
        given = {name: t for name, t in tensors.items() if name not in TARGETS_OWN}
        own = self.state_dict()
        wrong = [
            f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
            for name in own.keys() & given.keys()
            if given[name].shape != own[name].shape
        ]
        problems = {
            "missing": sorted(own.keys() - given.keys()),
            "unknown": sorted(given.keys() - own.keys()),
            "of another shape": wrong,
        }
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        if said:
            raise InputError(f"these are not the weights of this EAGLE-1 head: {said}")
        self.load_state_dict(given)


def _is_token(batch: DraftBatch) -> Tensor:
    """bool [B, T], false on right padding, which `lengths_B` tells."""
    columns = torch.arange(batch.input_ids_BT.shape[1], device=batch.input_ids_BT.device)
    return columns[None, :] < batch.lengths_B[:, None]
