"""Which optimizers there are, and the state that each keeps of a weight."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Values with one scale, where a moment has 8 bits; bitsandbytes' own."""


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


class Moments:
    """The moments of an optimizer, by the names that checkpoints have for them.

    Attributes:
        names: of the state that it keeps of each weight, in the weight's shape.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Of any that `optimizer_of` makes, or of torch's AdamW."""
        self._optimizer: Any = optimizer
        self._blocks = hasattr(optimizer, "name2qmap")
        one = isinstance(optimizer, Lion) or getattr(optimizer, "optimizer_name", "") == "lion"
        self.names = ("exp_avg",) if one else ("exp_avg", "exp_avg_sq")

    def begin(self, weight: Tensor, state: dict[str, Any]) -> None:
        """Make the state of a weight, as the optimizer would at its first step."""
        if not self._blocks:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state.update({name: torch.zeros_like(weight.data) for name in self.names})
            return
        for number, group in enumerate(self._optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter is weight:
                    self._optimizer.init_state(group, parameter, number, place)

    def read(self, state: dict[str, Any], name: str, weight: Tensor) -> Tensor:
        """A moment in float32.

        One of 8 bits is replaced by what it would be if it were read from a checkpoint, so that a
        run that goes on from one computes what the run that wrote it does.
        """
        key, absmax = self._keys(name)
        if not self._blocks or state[key].dtype == torch.float32:
            moment: Tensor = state[key if self._blocks else name]
            return moment
        found: Tensor = _functional().dequantize_blockwise(
            state[key].flatten(),
            absmax=state[absmax],
            code=state[f"qmap{key[-1]}"],
            blocksize=BLOCK,
        )
        self.write(state, name, found.view(weight.shape))
        return found.view(weight.shape)

    def write(self, state: dict[str, Any], name: str, value: Tensor) -> None:
        """Replace a moment."""
        key, absmax = self._keys(name)
        if not self._blocks or state[key].dtype == torch.float32:
            state[key if self._blocks else name].copy_(value)
            return
        value = value.to(state[key].device, torch.float32).contiguous()
        packed, scales = _functional().quantize_blockwise(
            value.flatten(), code=state[f"qmap{key[-1]}"], blocksize=BLOCK
        )
        state[key].copy_(packed.view(state[key].shape))
        state[absmax].copy_(scales.absmax)

    def _keys(self, name: str) -> tuple[str, str]:
        number = 1 + self.names.index(name)
        return f"state{number}", f"absmax{number}"


def optimizer_of(
    groups: list[dict[str, Any]], name: str, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """The optimizer that `finetune.optimizer` names, of groups with their own weight decay."""
    if name == "lion":
        return Lion(groups, lr=lr, betas=betas)
    if name.endswith("_8bit"):
        bnb: Any = importlib.import_module("bitsandbytes")
        kind = bnb.optim.Lion8bit if name == "lion_8bit" else bnb.optim.AdamW8bit
        optimizer: torch.optim.Optimizer = kind(groups, lr=lr, betas=betas)
        # What it would look at before its first step, which may be behind a checkpoint's state.
        optimizer.check_overrides()  # type: ignore[attr-defined]
        optimizer.initialized = True  # type: ignore[attr-defined]
        return optimizer
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def _functional() -> Any:
    return importlib.import_module("bitsandbytes.functional")
