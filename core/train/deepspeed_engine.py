"""A DeepSpeed engine round a trainee: the only module that knows DeepSpeed.

ZeRO divides the optimizer's state among workers (stage 1), their gradients too (2), and the
weights (3). DeepSpeed's own checkpoints bind a run to its number of workers; here its state is
gathered and handed back through its interface for single parameters (`deepspeed.utils`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from core.config import TrainConfig
from core.train.engine import TrainingEngine
from core.train.trainee import Trainee

# Where DeepSpeed's optimizers keep the float32 tensors that they update: stages 3, 1 and 2.
MASTERS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
)
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ScaledEngine(TrainingEngine):
    """What engines of DeepSpeed share: the loss scaling of the optimizer that it wraps."""

    _zero: Any

    def _scaler_state(self) -> dict[str, Any]:
        scaler = getattr(self._zero, "loss_scaler", None)
        return {name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)}

    def _load_scaler(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self._zero.loss_scaler, name, value)


class DeepSpeedEngine(ScaledEngine):
    """See `TrainingEngine`."""

    def __init__(self, trainee: Trainee, config: TrainConfig, device: torch.device) -> None:
        """Move the trainee to its device and dtype, divide its state."""
        super().__init__(trainee, config)
        self._stage = int(config.parallelism.removeprefix("zero"))
        self.equal_passes = self._stage == 3
        deepspeed = _import_deepspeed(device)
        self._utils = importlib.import_module("deepspeed.utils")
        self.module.to(device)
        optimizer = trainee.optimizer(config)
        # Its optimizers print memory figures whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine: Any = deepspeed.initialize(
                model=self.module,
                optimizer=optimizer,
                config=deepspeed_config(config, self.world_size),
                dist_init_required=False,
            )[0]
        self._zero = self._engine.optimizer
        self._base = self._zero if self._stage == 0 else self._zero.optimizer
        self._get_ready(optimizer)
        if self._stage in (1, 2):
            # It would look at its optimizer's state after the first step only.
            self._zero._lazy_init_hp_params_optimizer_state()

    def _accumulate(self, batch: Any, scale: float, last: bool) -> Tensor:
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(last)
        loss, statistics = self._engine(batch)
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        result: Tensor = statistics
        return result

    def _step(self, lr: float) -> float:
        for group in self._zero.param_groups:
            group["lr"] = lr
        # DeepSpeed reports no norm for plain fp32; its other optimizers have one of their own.
        plain = None
        if self._stage == 0:
            found = [p.grad for p in self.module.parameters() if p.grad is not None]
            plain = torch.nn.utils.get_total_norm(found)
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if plain is None else plain)

    def _precision(self) -> Any:
        return contextlib.nullcontext()

    def _masters(self) -> list[Tensor]:
        if self._stage == 0:
            return list(self.names.values())
        found = next(name for name in MASTERS if hasattr(self._zero, name))
        return list(getattr(self._zero, found))

    def _state_of(self, master: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self._base.state[master]
        return state

    def _spread_masters(self) -> None:
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            for number in range(len(self._masters())):
                self._zero._reassign_or_swap_out_partitioned_parameters(number)
            # Small ones are whole on every worker.
            kept = self._zero.persistent_parameters
            if kept:
                kept[0].all_gather(kept)

    def _whole(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        if self._stage == 0:
            tensor = parameter if moment is None else self._base.state[parameter][moment]
        elif moment is None:
            tensor = self._utils.safe_get_full_fp32_param(parameter)
        else:
            tensor = self._utils.safe_get_full_optimizer_state(parameter, moment)
        result: Tensor = tensor.detach().float().cpu().clone()
        return result

    def _set_whole(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        value = value.to(parameter.device)
        if self._stage == 0:
            tensor = parameter if moment is None else self._base.state[parameter][moment]
            tensor.data.copy_(value)
        elif moment is None:
            self._utils.safe_set_full_fp32_param(parameter, value)
        else:
            self._utils.safe_set_full_optimizer_state(parameter, value, moment)


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    The batch sizes in it are for its counters alone: boundaries are set by hand.
    """
    share = config.global_batch_size // world_size
    passes = -(-share // config.micro_batch_size)
    lower = config.dtype != "float32"
    return {
        "train_micro_batch_size_per_gpu": min(config.micro_batch_size, share),
        "gradient_accumulation_steps": passes,
        "gradient_clipping": config.clip,
        # Lion is none that it knows.
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": int(config.parallelism.removeprefix("zero")),
            "overlap_comm": False,
            **_offload(config),
        },
        # Its own optimizers for offloaded state want a compiler; torch's is fused there too.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "fp16": {"enabled": config.dtype == "float16"},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if lower else {}),
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }


def _offload(config: TrainConfig) -> dict[str, Any]:
    where = {"device": "cpu", "pin_memory": config.gpus_per_worker > 0}
    parts = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}
    return {f"offload_{part}": where for part in parts[config.offload]}


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, quietly, and without its C++ extensions on CPU."""
    # It calls collectives by names that torch is giving up.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # It would compile a shared-memory all-reduce for two minutes, which training does not use.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed
