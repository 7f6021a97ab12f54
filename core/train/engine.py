"""A DeepSpeed engine round a draft head: the only module that knows DeepSpeed.

The engine averages gradients over workers. Losses are sums over tokens here, so that a step's
gradient is that of the mean over all supervised tokens of the global batch, however the batch is
spread over workers and micro-batches.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.config import TrainConfig
from core.draft.base import DraftBatch, DraftHead
from core.errors import ConfigError

ZERO_STAGES = {"ddp": 0, "zero1": 1, "zero2": 2}
TAG = "engine"
LOSS, NUM_TOKENS = "loss", "num_tokens"


class LossModule(nn.Module):
    """What DeepSpeed wraps: its forward pass is the head's training loss.

    Attributes:
        names: what the statistics' entries are, known after the first pass.
    """

    def __init__(self, head: DraftHead) -> None:
        super().__init__()
        self.head = head
        self.names: tuple[str, ...] = ()

    def forward(self, batch: DraftBatch) -> tuple[Tensor, Tensor]:
        """The differentiable sum of losses, and float64 statistics [len(names)], detached."""
        result = self.head.losses(batch)
        found = {LOSS: result.loss.detach(), NUM_TOKENS: result.num_tokens, **result.sums}
        self.names = tuple(found)
        device = result.loss.device
        values = [value.to(device=device, dtype=torch.float64) for value in found.values()]
        return result.loss, torch.stack(values)


class TrainingEngine:
    """Forward, backward, optimizer step, and their state; one object a worker.

    Expects that `torch.distributed` is initialized.
    """

    def __init__(
        self,
        head: DraftHead,
        embedding_VH: Tensor,
        output_head_VH: Tensor,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        """Move the head to its device and dtype, attach the target's tensors, make the engine."""
        self.world_size = torch.distributed.get_world_size()
        self.clip = config.clip
        self.module = LossModule(head)
        self._names = dict(head.named_parameters())
        deepspeed = _import_deepspeed(device)
        self.module.to(device)
        optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        # Its bf16 optimizer prints memory figures whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine: Any = deepspeed.initialize(
                model=self.module,
                optimizer=optimizer,
                config=deepspeed_config(config, self.world_size),
                dist_init_required=False,
            )[0]
        head.attach_target(embedding_VH, output_head_VH)

    @property
    def statistic_names(self) -> tuple[str, ...]:
        """Names of the entries of statistics; known after the first pass."""
        return self.module.names

    def accumulate(self, batch: DraftBatch, global_tokens: int, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; returns its statistics.

        Args:
            batch: of this worker.
            global_tokens: supervised tokens of the whole global batch, over all workers.
            last: whether the optimizer step comes next, so that workers exchange gradients now.
        """
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(last)
        loss, statistics = self._engine(batch)
        self._engine.backward(loss * (self.world_size / global_tokens), scale_wrt_gas=False)
        result: Tensor = statistics
        return result

    def step(self, lr: float) -> float:
        """Clip, update, clear gradients; returns the gradient's norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        plain = [p.grad for p in self.module.parameters() if p.grad is not None]
        # DeepSpeed reports no norm for plain fp32; its other optimizers have one of their own.
        norm = torch.nn.utils.get_total_norm(plain) if self._is_plain else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    @torch.no_grad()
    def evaluate(self, batch: DraftBatch) -> Tensor:
        """Statistics of one batch, without training on it."""
        self._engine.eval()
        result: Tensor = self._engine(batch)[1]
        return result

    def save(self, folder: Path) -> None:
        """Write this worker's part of the state; all workers call, each with its own folder."""
        self._engine.save_checkpoint(str(folder), tag=TAG)

    def load(self, folder: Path) -> None:
        """Go on from a folder that holds all workers' parts."""
        self._engine.load_checkpoint(str(folder), tag=TAG)

    def full_weights(self) -> dict[str, Tensor]:
        """The head's weights in float32 on CPU; all workers call, all get them."""
        fragments = importlib.import_module("deepspeed.utils")
        weights: dict[str, Tensor] = {}
        for name, parameter in self._names.items():
            full = fragments.safe_get_full_fp32_param(parameter)
            weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
        return weights

    @property
    def _is_plain(self) -> bool:
        return isinstance(self._engine.optimizer, torch.optim.Optimizer)


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    The batch sizes in it are for its counters alone: boundaries are set by hand.

    Raises:
        ConfigError: a combination that DeepSpeed does badly.
    """
    bf16 = config.dtype == "bfloat16"
    if bf16 and config.parallelism == "ddp":
        raise ConfigError(
            "train.parallelism=ddp with train.dtype=bfloat16: DeepSpeed would add up gradients in "
            "bfloat16; choose train.parallelism=zero1, which adds them up in float32"
        )
    share = config.global_batch_size // world_size
    passes = -(-share // config.micro_batch_size)
    return {
        "train_micro_batch_size_per_gpu": min(config.micro_batch_size, share),
        "gradient_accumulation_steps": passes,
        "gradient_clipping": config.clip,
        "zero_optimization": {
            "stage": ZERO_STAGES[config.parallelism],
            "overlap_comm": False,
        },
        "bf16": {"enabled": bf16},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }


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
