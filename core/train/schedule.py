"""The learning rate as a pure function of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math

from core.config import TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step` (0 is the first).

    Rises linearly and reaches `config.lr` at step `warmup_steps - 1`; then stays there, or falls
    on a half cosine that would be 0 at `total_steps`. A warm-up longer than the run ends it
    before the peak.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
