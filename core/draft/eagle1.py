"""The EAGLE-1 draft head, which the EAGLE-2 tree uses too.

It reads pairs (feature_i, token_{i+1}) and predicts feature_{i+1}, whose logits under the
target's own output head guess token_{i+2}.

Shapes: M supervised positions, H hidden, L feature layers, W draft vocabulary.
Source: EAGLE (Li et al. 2024), section 4; reference `eagle/model/cnets1.py`, `eagle/train/main.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config.draft.eagle1 import Eagle1Config
from core.draft.base import DraftBatch, LossSums, TargetGeometry
from core.draft.layer import Layer
from core.draft.recurrent import TOP_N, Chains, RecurrentHead, starts, supervised_positions
from core.draft.soft_cross_entropy import product_dtype, soft_cross_entropy
from core.draft.vocabulary import DraftVocabulary
from core.models.packed import linear


class Eagle1Head(RecurrentHead):
    """EAGLE-1: a fusion layer and one decoder layer on the target's final feature."""

    fixed_vocabulary = False

    def __init__(
        self, config: Eagle1Config, geometry: TargetGeometry, vocabulary: DraftVocabulary
    ) -> None:
        super().__init__(config, geometry, vocabulary)
        self.loss_weights = (config.feature_weight, config.token_weight)
        self.step_weights = [config.step_decay**step for step in range(config.num_ttt_steps)]
        hidden = geometry.hidden_size
        self.fc = nn.Linear(2 * hidden, hidden, bias=config.bias)
        self.layers = nn.ModuleList([Layer(geometry, hidden, qkv_bias=config.qkv_bias)])
        self.output_layer: nn.Module | None = None
        self._kept_rows_WH: Tensor | None = None

    @property
    def layer(self) -> Layer:
        """The only decoder layer; a list in the public layout."""
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        return layer

    def attach_target(self, embedding_VH: Tensor, output_head_VH: Tensor) -> None:
        """See base class. Of the output head, drafting keeps the draft vocabulary's rows."""
        super().attach_target(embedding_VH, output_head_VH)
        self._set_output_layer(packed=False)

    def prepare_for_inference(self, *, packed: bool) -> None:
        """See base class."""
        self._set_output_layer(packed=packed)
        super().prepare_for_inference(packed=packed)

    def _set_output_layer(self, *, packed: bool) -> None:
        rows_WH = self.output_rows().contiguous()
        # Outside the module's registry: neither a parameter nor part of the state dict.
        object.__setattr__(self, "output_layer", linear(rows_WH, packed=packed))
        self._kept_rows_WH = None

    def first_state(self, features_LH: Tensor) -> Tensor:
        """See base class: the final feature itself."""
        return features_LH[..., -1, :]

    def layer_input(self, state: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See base class: both are the fusion of embedding and feature, in this order."""
        fused: Tensor = self.fc(torch.cat((self.embed(next_ids), state), dim=-1))
        return fused, fused

    def logits(self, state: Tensor) -> Tensor:
        """See base class: the target's own output head on predicted features."""
        assert self.output_layer is not None, "attach_target comes first"
        logits: Tensor = self.output_layer(state)
        return logits

    def losses(self, batch: DraftBatch) -> LossSums:
        """Smooth L1 on features and cross-entropy to the target's distribution.

        The target's softmax is renormalized over the draft vocabulary. In evaluation mode the
        hits count against the target's argmax over its whole vocabulary; in training mode, to
        save the product with V rows, against the argmax over the draft vocabulary.
        Tokens are packed, and only supervised positions go on behind the keys and values.

        With `num_ttt_steps` above 1, chains go on from what the head predicted itself, as in
        drafting, and step k counts where position i+k is supervised, with weight `step_decay`^k.
        The parts of the loss and the hits that are told are of step 0.
        Source: reference `eagle/train/main.py`, weights 1.0 and 0.1; the loss mask is not
        shifted, and a sequence's last position is never supervised. Further steps: HASS (Zhang et
        al. 2024), section 3.2.
        """
        supervised_BT = supervised_positions(batch)
        num_steps = len(self.step_weights)
        chains = Chains.of(batch, supervised_BT, starts(supervised_BT, num_steps))
        steps = []
        for step, state_MH in enumerate(self.grow(batch, chains, num_steps)):
            rows = chains.counted_M(step).nonzero()[:, 0]
            wanted_MH = chains.final_SH[chains.targets_M(step)[rows]].to(state_MH.dtype)
            steps.append(self._loss_sums(state_MH.index_select(0, rows), wanted_MH))
        weighted = [
            weight * sums.loss for weight, sums in zip(self.step_weights, steps, strict=True)
        ]
        return LossSums(torch.stack(weighted).sum(), steps[0].num_tokens, steps[0].sums)

    def _loss_sums(self, predicted_MH: Tensor, wanted_MH: Tensor) -> LossSums:
        rows_WH = self._loss_rows(predicted_MH)
        count_all = not (self.training or self.vocabulary.is_whole)

        def targets(part: slice, logits_CW: Tensor) -> Tensor | None:
            if count_all:
                found_CW, best_C = self.target_choices(wanted_MH[part])
                logits_CW.copy_(found_CW)
                return best_C
            torch.mm(wanted_MH[part].to(rows_WH.dtype), rows_WH.T, out=logits_CW)
            return None

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

    def _loss_rows(self, like: Tensor) -> Tensor:
        """The draft vocabulary's rows as the loss multiplies with them, kept between steps."""
        dtype = product_dtype(like)
        if self._kept_rows_WH is None or self._kept_rows_WH.dtype != dtype:
            assert self.output_layer is not None, "attach_target comes first"
            weight_WH = self.output_layer.weight
            assert isinstance(weight_WH, Tensor)
            self._kept_rows_WH = weight_WH.detach().to(dtype)
        return self._kept_rows_WH

    @classmethod
    def settings_of(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """See base class. The file knows about biases; many configs do not say."""
        if "layers.0.post_attention_layernorm.weight" not in tensors:
            return None
        return {
            "bias": "fc.bias" in tensors,
            "qkv_bias": "layers.0.self_attn.q_proj.bias" in tensors,
        }
