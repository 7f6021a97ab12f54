"""EAGLE-3: one decoder layer on three of the target's inner states, trained on its own output."""

from __future__ import annotations

from typing import ClassVar, Literal

from core.config.base import field
from core.config.draft.common import DraftConfig


class Eagle3Config(DraftConfig):
    """EAGLE-3 head (Li et al. 2025, "EAGLE-3", section 3)."""

    implementation: ClassVar[str] = "core.draft.eagle3:Eagle3Head"
    architecture: ClassVar[tuple[str, ...]] = ("rope_theta", "qkv_bias", "norm_before_residual")

    num_aux_layers: ClassVar[int] = 3

    kind: Literal["eagle3"] = "eagle3"
    num_ttt_steps: int = field(
        7,
        "steps of training-time test: the head reads its own output so many times less one",
        ge=1,
    )
    step_decay: float = field(0.8, "weight of step k in the loss is this to the k", gt=0, le=1)
    rope_theta: float | None = field(
        10000.0,
        "base of the head's rotary positions; 10000 is the reference's whatever the target's is, "
        "null takes the target's",
        gt=0,
    )
    output_init: Literal["random", "target"] = field(
        "random",
        "what the head's output layer is before training: random as in the reference, or the "
        "target's own rows",
    )
    qkv_bias: bool = field(False, "biases of queries, keys and values, as Qwen-2's layers have")
    norm_before_residual: bool = field(
        False,
        "the residual is the state after its norm, as in heads of speculators, instead of before",
    )
