"""DeepSpeed's pipelines as `core.train.pipeline_engine` wants them, and the ways round their traps.

Read in its release 0.19 and measured there.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core.models.partition import Topology
from core.models.stages import DecoderLayer, ModelStages


class PassesAlone:
    """A schedule of DeepSpeed's without the exchange of gradients and the step at its end."""

    LEFT_OUT = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule

    def num_pipe_buffers(self) -> int:
        return int(self._schedule.num_pipe_buffers())

    def __iter__(self) -> Iterator[list[Any]]:
        for commands in self._schedule:
            yield [command for command in commands if command.name not in self.LEFT_OUT]


def divided(stages: ModelStages, topology: Topology, bounds: Sequence[int], recompute: bool) -> Any:
    """DeepSpeed's module, with this worker's stage in it."""
    pipe = importlib.import_module("deepspeed.pipe")
    grid = importlib.import_module("deepspeed.runtime.pipe.topology")
    # It reads nothing else of the environment, and every launcher sets this.
    os.environ.setdefault("LOCAL_RANK", "0")

    class Divided(pipe.PipelineModule):  # type: ignore[name-defined]
        """Divided where we say; DeepSpeed knows ways of its own only."""

        def _partition_layers(self, method: str = "") -> None:
            self.parts = list(bounds)
            stage = topology.stage_of(self.global_rank)
            self._set_bounds(start=bounds[stage], stop=bounds[stage + 1])

    return Divided(
        layers=stages.specs(),
        topology=grid.ProcessTopology(["pipe", "data"], [topology.pipe, topology.data]),
        activation_checkpoint_interval=int(recompute),
        activation_checkpoint_func=functools.partial(checkpoint, use_reentrant=False),
        checkpointable_layers=[DecoderLayer.__name__],
        # Micro-batches are as long as their longest sequence.
        dynamic_shape=True,
    )


def add_up_norms_once(zero: Any) -> None:
    """Have an optimizer of DeepSpeed's add up squared norms over the stages once a step.

    Its own way (0.19) is once for each group of weights, and waits for ever where the stages have
    unlike numbers of groups: one with an embedding alone has none that is not decayed.
    """
    of_stage, add_up = zero.scaled_global_norm, zero._model_parallel_all_reduce

    def over_stages(norm_type: int = 2) -> Tensor:
        zero._model_parallel_all_reduce = lambda **_: None
        try:
            norm = of_stage(norm_type)
        finally:
            zero._model_parallel_all_reduce = add_up
        # A negative one stands for one that is no number.
        squared = torch.where(norm < 0, torch.nan, norm.square())
        add_up(tensor=squared, op=torch.distributed.ReduceOp.SUM)
        return torch.where(squared.isnan(), -1.0, squared.sqrt())

    zero.scaled_global_norm = over_stages


def pipeline_config(dtype: torch.dtype, clip: float, data: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; the batch sizes in it are for its counters alone."""
    lower = dtype != torch.float32
    return {
        "train_micro_batch_size_per_gpu": 1,
        # It would divide losses by it, which are scaled already.
        "gradient_accumulation_steps": 1,
        "train_batch_size": data,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if lower else {}),
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }
