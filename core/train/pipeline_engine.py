"""A DeepSpeed pipeline round a target: its layers divided into stages, each on several workers.

`TrainingEngine` says what it does, and its checkpoints are the same: whole tensors by their HF
names, in one file that the first worker writes as they come. A run goes on from it with another
topology, or with an engine that is no pipeline. What is different:

- A worker's share of a batch depends on `data_rank` and `data_size`; the workers of all stages of
  a share are given the same batches.
- A pipeline works on all micro-batches of a step at once. `accumulate` keeps them until the last,
  and then returns the statistics of all; before, zeros.
- Statistics are the last stage's; other workers return zeros, so that adding them up over all
  workers counts each token once.
- `evaluate` takes several batches, between which the stages do not wait for each other.
- Passes have no dropout, in training neither.

The optimizer's state is divided among a stage's workers by ZeRO's stage 1, always: without it
DeepSpeed clips by a norm that depends on the division (0.19). Beyond it, it has no pipelines.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.config import FinetuneConfig, TrainConfig
from core.errors import ConfigError
from core.models.partition import Topology, balance, check_parts
from core.models.stages import ModelStages
from core.train.causal import CausalBatch, CausalTrainee
from core.train.deepspeed_engine import MASTERS, ScaledEngine, _import_deepspeed
from core.train.pipeline_module import PassesAlone, add_up_norms_once, divided, pipeline_config


class StagedTrainee(CausalTrainee):
    """A model of which each worker has a stage; its passes are the engine's.

    Attributes:
        stages: the model's.
        recomputes: whether layers' activations are computed again in the backward pass.
    """

    def __init__(self, stages: ModelStages, finetune: FinetuneConfig) -> None:
        """Of a model of which nothing is built yet."""
        super().__init__(stages.skeleton, finetune)
        self.stages, self.recomputes = stages, False

    def trained(self) -> dict[str, nn.Parameter]:
        """Those of this worker's stage."""
        return {n: p for n, p in self.stages.names().items() if p.requires_grad}

    def forward(self, batch: CausalBatch, *arguments: Any) -> tuple[Tensor, Tensor]:
        """A stage alone has no loss."""
        raise NotImplementedError("a pipeline's passes are its engine's")

    def settle(self) -> None:
        """Rotary frequencies are no part of what DeepSpeed is given, and stay exact."""

    def recompute(self) -> None:
        """Layer by layer."""
        self.recomputes = True


class PipelineEngine(ScaledEngine):
    """See the module and `TrainingEngine`.

    Attributes:
        stages: the model's, of which this worker's is built.
        topology: stages and workers.
    """

    module: StagedTrainee

    def __init__(self, trainee: StagedTrainee, config: TrainConfig) -> None:
        """Load this worker's stage.

        Args:
            trainee: the model.
            config: how it is trained, in how many stages, and their parts.
        Raises:
            ConfigError: parts or stages that do not fit, or float16 on CPU.
            InputError: the model's weights cannot be read.
        """
        stages = self.stages = trainee.stages
        topology = Topology.of(config.pipeline_stages, torch.distributed.get_world_size())
        bounds = stages.spec_bounds(stage_bounds(stages, config))
        if stages.dtype == torch.float16 and stages.device.type == "cpu":
            raise ConfigError(
                "train.dtype=float16 on CPU: DeepSpeed has no float16 there; set "
                "train.dtype=bfloat16, which needs no loss scaling"
            )
        super().__init__(trainee, config)
        self.topology = topology
        self.data_rank, self.data_size = topology.data_rank_of(self.rank), topology.data
        self._loss, self._pending = stages.loss(), list[CausalBatch]()
        deepspeed = _import_deepspeed(stages.device)
        self._utils = importlib.import_module("deepspeed.utils")
        self._schedule = importlib.import_module("deepspeed.runtime.pipe.schedule")
        # Its optimizers and modules print figures whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(
                torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
            )
            # It sends tied weights to and fro, which autograd would follow.
            with torch.no_grad():
                pipeline = divided(stages, topology, bounds, trainee.recomputes)
            pipeline.loss_fn = self._loss
            self.names = trainee.trained()
            optimizer = trainee.optimizer(config)
            self._engine: Any = deepspeed.initialize(
                model=pipeline,
                optimizer=optimizer,
                config=pipeline_config(stages.dtype, config.clip, topology.data),
                dist_init_required=False,
            )[0]
        self._zero = self._engine.optimizer
        if hasattr(self._zero, "scaled_global_norm"):
            add_up_norms_once(self._zero)
        self._get_ready(optimizer)
        # It would look at its optimizer's state after the first step only.
        self._zero._lazy_init_hp_params_optimizer_state()
        self._owners, self._shapes = self._agree()

    # Training

    def accumulate(self, batch: CausalBatch, global_tokens: int, *, last: bool) -> Tensor:
        """Forward and backward of all micro-batches of the step, when the last has come.

        Args:
            batch: of this worker's share; the stages of a share have the same.
            global_tokens: supervised tokens of the whole global batch, over all shares.
            last: whether the optimizer step comes next.
        """
        self._pending.append(batch)
        if not last:
            return self._no_statistics()
        batches, self._pending = self._pending, []
        # Shares' gradients are averaged.
        return self._run(batches, self._schedule.TrainSchedule, self.data_size / global_tokens)

    @torch.no_grad()
    def evaluate(self, *batches: CausalBatch) -> Tensor:
        """Statistics of batches of this worker's share, without training on them."""
        return self._run(batches, self._schedule.InferenceSchedule, 1.0)

    def _run(self, batches: Sequence[CausalBatch], schedule: Any, scale: float) -> Tensor:
        engine = self._engine
        self._loss.start(scale)
        engine.module.eval()
        engine.total_loss, engine._compute_loss = None, True
        engine.set_dataiterator(iter([_as_deepspeed_wants(batch) for batch in batches]))
        steps = schedule(len(batches), self.topology.pipe, self.topology.stage_of(self.rank))
        engine._exec_schedule(PassesAlone(steps))
        sums = self._loss.sums
        return torch.stack(sums).sum(0) if sums else self._no_statistics()

    def _no_statistics(self) -> Tensor:
        return torch.zeros(
            len(self.statistic_names), dtype=torch.float64, device=self.stages.device
        )

    def _step(self, lr: float) -> float:
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine._exec_reduce_tied_grads()
        self._engine._exec_reduce_grads()
        self._engine._exec_optimizer_step()
        return float(self._engine.get_global_grad_norm())

    def _accumulate(self, batch: Any, scale: float, last: bool) -> Tensor:
        raise NotImplementedError("micro-batches go through a pipeline together: `accumulate`")

    def _precision(self) -> Any:
        return contextlib.nullcontext()

    # State

    def full_weights(self) -> dict[str, Tensor]:
        """See `TrainingEngine`."""
        weights = {}
        for name, tensor in self._tensors(None):
            held = tensor.to(self.stages.device)
            torch.distributed.broadcast(held, 0)
            weights[name] = held.cpu()
        return weights

    def _agree(self) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
        """Which worker gives away each trained weight, over all stages, and its shape."""
        found: list[Any] = [None] * self.world_size
        mine = [(name, tuple(weight.shape)) for name, weight in self.names.items()]
        torch.distributed.all_gather_object(found, mine)
        owners: dict[str, int] = {}
        shapes = {}
        for rank, weights in enumerate(found):
            for name, shape in weights:
                # A tied one is on two stages, and every one on all workers of its stage.
                owners.setdefault(name, rank)
                shapes[name] = shape
        return owners, shapes

    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def _tensors(self, moment: str | None) -> Iterator[tuple[str, Tensor]]:
        """Those of all stages; what other workers than the first get is not to be read."""
        for name in self._shapes:
            yield name, self._to_first(name, moment)

    def _to_first(self, name: str, moment: str | None) -> Tensor:
        owner = self._owners[name]
        tensor = torch.empty(self._shapes[name], device=self.stages.device)
        if self.topology.stage_of(self.rank) == self.topology.stage_of(owner):
            tensor = self._whole(self.names[name], moment)
        if owner and self.rank == owner:
            torch.distributed.send(tensor, 0)
        elif owner and self.rank == 0:
            torch.distributed.recv(tensor, owner)
        return tensor

    def _masters(self) -> list[Tensor]:
        found = next(name for name in MASTERS if hasattr(self._zero, name))
        return list(getattr(self._zero, found))

    def _state_of(self, master: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self._zero.optimizer.state[master]
        return state

    def _spread_masters(self) -> None:
        self._zero.update_lp_params()

    def _whole(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """From all workers of the stage, which all call; on their device."""
        if moment is None:
            tensor = self._utils.safe_get_full_fp32_param(parameter)
        else:
            tensor = self._utils.safe_get_full_optimizer_state(parameter, moment)
        result: Tensor = tensor.detach().float().contiguous()
        return result

    def _set_whole(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        value = value.to(parameter.device)
        if moment is None:
            self._utils.safe_set_full_fp32_param(parameter, value)
        else:
            self._utils.safe_set_full_optimizer_state(parameter, value, moment)


def stage_bounds(stages: ModelStages, config: TrainConfig) -> list[int]:
    """Bounds of the stages in blocks: as `train.parts` says, or balanced.

    Raises:
        ConfigError: no parts of this model, or more stages than it has blocks.
    """
    parts = list(config.parts) or balance(
        stages.costs(
            rows=config.micro_batch_size,
            tokens=config.max_length,
            recompute=config.gradient_checkpointing,
        ),
        config.pipeline_stages,
        memory_bytes=config.stage_memory_gib and config.stage_memory_gib * 2**30,
        tied_bytes=stages.tied_bytes(),
        # Adapters are in layers alone, and a stage without any would have nothing to train.
        layers_everywhere=stages.adapters is not None,
    )
    bounds = check_parts(parts, stages.num_layers, config.pipeline_stages)
    inner = range(1, stages.num_layers + 1)
    if stages.adapters is not None and any(
        not set(inner) & set(range(*pair)) for pair in itertools.pairwise(bounds)
    ):
        raise ConfigError(
            f"train.parts={list(parts)} has a stage without a layer, and so without adapters to "
            "train; give every stage a layer, or leave train.parts out"
        )
    return bounds


def _as_deepspeed_wants(batch: CausalBatch) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Inputs of the first stage, and labels of the last.

    Padding stands at the right and only follows on: no token before it sees it.
    """
    positions_BT = batch.position_ids_BT
    if positions_BT is None:
        length = batch.input_ids_BT.shape[1]
        positions_T = torch.arange(length, device=batch.input_ids_BT.device)
        positions_BT = positions_T.expand_as(batch.input_ids_BT)
    return (batch.input_ids_BT, positions_BT), batch.labels_BT
