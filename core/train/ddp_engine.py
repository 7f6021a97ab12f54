"""Plain data parallelism: torch's DistributedDataParallel, with float32 weights.

Where `train.dtype` is not float32, passes run under autocast: products in that dtype, weights,
gradients and their exchange in float32. float16 has its loss scaled.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.config import TrainConfig
from core.train.engine import TrainingEngine
from core.train.trainee import Trainee


class DdpEngine(TrainingEngine):
    """See `TrainingEngine`; every worker has the whole optimizer."""

    def __init__(self, trainee: Trainee, config: TrainConfig, device: torch.device) -> None:
        """Move the trainee to its device; its weights stay float32."""
        super().__init__(trainee, config)
        self.device, self.dtype = device, getattr(torch, config.dtype)
        self.module.to(device)
        self._optimizer = trainee.optimizer(config)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self._parallel = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self._get_ready(self._optimizer)

    def _accumulate(self, batch: Any, scale: float, last: bool) -> Tensor:
        self._parallel.train()
        with nullcontext() if last else self._parallel.no_sync():
            with self._precision():
                loss, statistics = self._parallel(batch)
            self._scaler.scale(loss * scale).backward()
        result: Tensor = statistics
        return result

    def _step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return float(norm)

    def _precision(self) -> Any:
        lower = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if lower else nullcontext()

    def _masters(self) -> list[Tensor]:
        return list(self.names.values())

    def _state_of(self, master: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.state[master]
        return state

    def _spread_masters(self) -> None:
        """Nothing to do: the module computes with them."""

    def _whole(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        if moment is None:
            return parameter.detach().cpu().clone()
        state = self._optimizer.state[parameter]
        return self._moments.read(state, moment, parameter).detach().cpu().clone()

    def _set_whole(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        if moment is None:
            parameter.data.copy_(value)
        else:
            self._moments.write(self._optimizer.state[parameter], moment, value)

    def _scaler_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._scaler.state_dict()
        return state

    def _load_scaler(self, state: dict[str, Any]) -> None:
        if state:
            self._scaler.load_state_dict(state)
