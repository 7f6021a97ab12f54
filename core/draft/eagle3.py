"""The EAGLE-3 draft head: three states of the target fused, and trained on its own output.

It reads pairs (g_i, token_{i+1}), where g_i is the fusion of the states that enter three of the
target's layers, and guesses token_{i+2} with an output layer of its own. Behind the last true
position, the state that it computed itself takes g's place.

Shapes: S supervised places of a batch, M positions with chains, H hidden, L feature layers (three
and the final feature, last), W draft vocabulary.
Source: EAGLE-3 (Li et al. 2025), section 3; reference `eagle/traineagle3/cnets.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from core.config.draft.eagle3 import Eagle3Config
from core.draft.base import DraftBatch, LossSums, TargetGeometry
from core.draft.layer import Layer
from core.draft.recurrent import TOP_N, Chains, RecurrentHead, starts, supervised_positions
from core.draft.soft_cross_entropy import Targets, soft_cross_entropy
from core.draft.vocabulary import DraftVocabulary
from core.errors import InputError
from core.models.features import feature_layers
from core.models.packed import linear


class MidLayer(Layer):
    """A decoder layer that reads embedding and state side by side, each normed by itself."""

    def __init__(self, geometry: TargetGeometry, *, qkv_bias: bool) -> None:
        hidden, eps = geometry.hidden_size, geometry.rms_norm_eps
        super().__init__(geometry, 2 * hidden, qkv_bias=qkv_bias)
        self.hidden_norm = nn.RMSNorm(hidden, eps)
        self.input_layernorm = nn.RMSNorm(hidden, eps)


class OutputLayer(nn.Linear):
    """A linear layer whose logits need not be kept in training.

    The loss is computed inside of `forward`: ZeRO-3 has the weight in one piece there alone.
    """

    def forward(
        self, input: Tensor, targets: Targets | None = None, weights_M: Tensor | None = None
    ) -> Any:
        """Logits [..., W]; with `targets`, what `soft_cross_entropy` gives of states [M, H]."""
        if targets is None:
            return super().forward(input)
        return soft_cross_entropy(input, self.weight, targets, weights_M)


class Eagle3Head(RecurrentHead):
    """EAGLE-3: fusion of three states, one decoder layer, and an output layer of its own."""

    def __init__(
        self, config: Eagle3Config, geometry: TargetGeometry, vocabulary: DraftVocabulary
    ) -> None:
        if config.rope_theta is not None:
            geometry = replace(geometry, rope_theta=config.rope_theta)
        super().__init__(config, geometry, vocabulary)
        hidden, eps = geometry.hidden_size, geometry.rms_norm_eps
        self.step_weights = [config.step_decay**step for step in range(config.num_ttt_steps)]
        self.norm_before_residual = config.norm_before_residual
        self.output_init = config.output_init
        self.fc = nn.Linear(config.num_aux_layers * hidden, hidden, bias=False)
        self.midlayer = MidLayer(geometry, qkv_bias=config.qkv_bias)
        self.norm = nn.RMSNorm(hidden, eps)
        self.lm_head: nn.Module = OutputLayer(hidden, vocabulary.size, bias=False)

    @property
    def layer(self) -> Layer:
        """See base class."""
        return self.midlayer

    def feature_layers(self, num_layers: int) -> tuple[int, ...]:
        """See base class: those it was trained on; the usual ones where nothing is known."""
        return feature_layers(self.aux_layers or "eagle3", num_layers)

    def prepare_for_inference(self, *, packed: bool) -> None:
        """See base class."""
        super().prepare_for_inference(packed=packed)
        weight = self.lm_head.weight
        assert isinstance(weight, Tensor)
        self.lm_head = linear(weight.detach(), packed=packed)

    def start_from(self, output_head_VH: Tensor) -> None:
        """See base class: the draft vocabulary's rows, with `output_init: target`."""
        if self.output_init == "target":
            rows_WH = self.vocabulary.rows(output_head_VH)
            self.lm_head.load_state_dict({"weight": rows_WH})

    def first_state(self, features_LH: Tensor) -> Tensor:
        """See base class: the fusion; the final feature is left aside."""
        state: Tensor = self.fc(features_LH[..., :-1, :].flatten(-2))
        return state

    def layer_input(self, state: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See base class: embedding and state, each normed; the residual is the plain state."""
        normed = self.midlayer.hidden_norm(state)
        embedded = self.midlayer.input_layernorm(self.embed(next_ids))
        residual = normed if self.norm_before_residual else state
        return torch.cat((embedded, normed), dim=-1), residual

    def logits(self, state: Tensor) -> Tensor:
        """See base class; the norm stands here alone, what is fed back has not been through it."""
        logits: Tensor = self.lm_head(self.norm(state))
        return logits

    def losses(self, batch: DraftBatch) -> LossSums:
        """Cross-entropy to the target's distribution along chains of `num_ttt_steps`.

        Step k of the chain from position i reads the text's token i+1+k and guesses the next; it
        counts where position i+k is supervised, with weight `step_decay`^k. The target's softmax
        is renormalized over the draft vocabulary, and places where its argmax is outside of that
        do not count. The sum is to be divided by the supervised tokens, as EAGLE-1's: the
        reference divides by all positions, padding included, so that its loss is this one times
        num_tokens / (B · T).

        Hits are of step 0, against the target's argmax over its whole vocabulary.
        Source: EAGLE-3, section 3.2; reference `eagle/traineagle3/{cnets,main}.py`.
        """
        supervised_BT = supervised_positions(batch)
        chains = Chains.of(batch, supervised_BT, starts(supervised_BT, len(self.step_weights)))
        logits_SW, best_S = self.target_choices(chains.final_SH)
        states, numbers, weights = [], [], []
        for step, state_MH in enumerate(self.grow(batch, chains, len(self.step_weights))):
            number_M = chains.targets_M(step)
            counts_M = chains.counted_M(step) & (best_S[number_M] >= 0)
            rows = counts_M.nonzero()[:, 0]
            states.append(state_MH.index_select(0, rows))
            numbers.append(number_M[rows])
            weights.append(torch.full((len(rows),), self.step_weights[step], device=rows.device))
        number = torch.cat(numbers)

        def targets(part: slice, logits_CW: Tensor) -> Tensor:
            logits_CW.copy_(logits_SW[number[part]])
            return best_S[number[part]]

        loss, rank = self.lm_head(self.norm(torch.cat(states)), targets, torch.cat(weights))
        first = rank[: len(states[0])]
        hits = {f"top{n}": (first < n).sum() for n in TOP_N}
        return LossSums(loss, torch.tensor(len(best_S)), hits)

    # Public layout

    def eagle_tensors(self) -> dict[str, Tensor]:
        """See base class; with the vocabulary's tables, `d2t` (offsets) and `t2d` (marks)."""
        vocabulary = self.vocabulary
        offsets_W = vocabulary.d2t_W - torch.arange(vocabulary.size)
        return {**super().eagle_tensors(), "d2t": offsets_W, "t2d": vocabulary.t2d_V >= 0}

    def load_eagle_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See base class. The vocabulary's tables, where there are some, must say what it is."""
        own = self.eagle_tensors()
        for name in ("d2t", "t2d"):
            given = tensors.get(name)
            if given is not None and not torch.equal(given.cpu().to(own[name].dtype), own[name]):
                raise InputError(
                    f"{name} of the head's weights is not of its draft vocabulary of "
                    f"{self.vocabulary.size} tokens; take both from the same checkpoint"
                )
        super().load_eagle_tensors({n: t for n, t in tensors.items() if n not in ("d2t", "t2d")})

    @classmethod
    def settings_of(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """See base class. The rotary base is the geometry's, which comes from the same config."""
        if "midlayer.hidden_norm.weight" not in tensors:
            return None
        return {
            "rope_theta": None,
            "qkv_bias": "midlayer.self_attn.q_proj.bias" in tensors,
            "norm_before_residual": bool(config.get("norm_before_residual", False)),
        }
