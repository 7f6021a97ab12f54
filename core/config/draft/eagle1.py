"""EAGLE-1: one decoder layer on the target's final feature and the next token's embedding."""

from __future__ import annotations

from typing import ClassVar, Literal

from core.config.base import field
from core.config.draft.common import DraftConfig


class Eagle1Config(DraftConfig):
    """EAGLE-1 head (Li et al. 2024, "EAGLE", section 4)."""

    implementation: ClassVar[str] = "core.draft.eagle1:Eagle1Head"
    architecture: ClassVar[tuple[str, ...]] = ("bias", "qkv_bias")

    kind: Literal["eagle1"] = "eagle1"
    bias: bool = field(False, "bias in the fusion layer `fc`; vLLM reads heads without only")
    qkv_bias: bool = field(False, "biases of queries, keys and values, as Qwen-2's layers have")
    feature_weight: float = field(1.0, "weight of the smooth-L1 loss on features", ge=0)
    token_weight: float = field(0.1, "weight of the cross-entropy to the target's softmax", ge=0)
    num_ttt_steps: int = field(
        1,
        "steps of training-time test; 1 is EAGLE-1's own training, more read the head's own "
        "predictions, as drafting does (HASS)",
        ge=1,
    )
    step_decay: float = field(1.0, "weight of step k in the loss is this to the k", gt=0, le=1)
    noise: float = field(
        0.1, "half-width of the uniform noise on input features, times 512 / length", ge=0
    )
