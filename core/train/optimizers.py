"""Which optimizers there are besides AdamW, and the state that each keeps of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """One moment, and steps of the same size for every weight.

    Source: Symbolic Discovery of Optimization Algorithms (Chen et al. 2023), algorithm 2.
    """

    def __init__(
        self, parameters: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        assert closure is None, "no engine uses one"
        for group in self.param_groups:
            weights: list[Tensor] = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            for weight in weights:
                if "exp_avg" not in self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
            moments = [self.state[weight]["exp_avg"] for weight in weights]
            first, second = group["betas"]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            # The step follows the moment as the gradient bends it, the moment itself less so.
            directions = torch._foreach_lerp(moments, gradients, 1 - first)
            torch._foreach_sign_(directions)
            torch._foreach_add_(weights, directions, alpha=-group["lr"])
            torch._foreach_lerp_(moments, gradients, 1 - second)


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the state that it keeps of each weight, in the weight's shape."""
    return ("exp_avg",) if isinstance(optimizer, Lion) else ("exp_avg", "exp_avg_sq")
