"""What trains a `Trainee`: forward, backward, optimizer step, and their state.

Two kinds: `core.train.ddp_engine` on plain torch, `core.train.deepspeed_engine` on DeepSpeed's
ZeRO. Workers' gradients are averaged. Losses are sums over tokens here, so that a step's gradient
is that of the mean over all supervised tokens of the global batch, however the batch is spread
over workers and micro-batches.

A checkpoint holds whole tensors, whatever the number of workers and the way that their state was
divided, so that a run goes on with another number of workers. It is one file, which the first
worker writes tensor by tensor as they are gathered: no worker holds the whole state.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from core.config import TrainConfig
from core.errors import InputError
from core.train.optimizers import Moments
from core.train.tensor_file import float32_file
from core.train.trainee import Trainee

FILE = "engine.safetensors"
WEIGHTS, AVERAGE = "weights", "average"


class TrainingEngine(ABC):
    """One object a worker. Expects that `torch.distributed` is initialized.

    Attributes:
        module: what is trained; its forward pass is the loss.
        data_rank: number of this worker's share of every batch.
        data_size: into how many shares batches are divided.
        equal_passes: whether workers exchange weights in a forward pass, so that each must make
            as many of them as the others, in evaluation too.
    """

    equal_passes = False

    def __init__(self, trainee: Trainee, config: TrainConfig) -> None:
        """Nothing is moved or wrapped yet; see `_get_ready`."""
        self.config = config
        self.rank, self.world_size = (
            torch.distributed.get_rank(),
            torch.distributed.get_world_size(),
        )
        self.data_rank, self.data_size = self.rank, self.world_size
        self.module = trainee
        if config.gradient_checkpointing:
            trainee.recompute()
        self.names = trainee.trained()
        self.moments: tuple[str, ...] = ()
        self._updates = 0
        self._averages: list[Tensor] | None = None

    def _get_ready(self, optimizer: torch.optim.Optimizer) -> None:
        """The last part of construction, once the optimizer has its tensors."""
        self._moments = Moments(optimizer)
        self.moments = self._moments.names
        for master in self._masters():
            # Made now, they can be loaded and saved.
            self._moments.begin(master, self._state_of(master))
        if self.config.ema:
            self._averages = [master.detach().clone() for master in self._masters()]
        self.module.settle()

    # Training

    @property
    def statistic_names(self) -> tuple[str, ...]:
        """Names of the entries of statistics; known after the first pass."""
        return self.module.names

    def accumulate(self, batch: Any, global_tokens: int, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; returns its statistics.

        Args:
            batch: of this worker.
            global_tokens: supervised tokens of the whole global batch, over all workers.
            last: whether the optimizer step comes next, so that workers exchange gradients now.
        """
        return self._accumulate(batch, self.world_size / global_tokens, last)

    def step(self, lr: float) -> float:
        """Clip, update, clear gradients; returns the gradient's norm before clipping."""
        norm = self._step(lr)
        self._updates += 1
        if self._averages is not None:
            share = 1 - decay(self.config.ema, self._updates)
            torch._foreach_lerp_(self._averages, [m.detach() for m in self._masters()], share)
        return norm

    # Evaluation

    def evaluate(self, batch: Any) -> Tensor:
        """Statistics of one batch, without training on it."""
        return self.compute(batch)[1]

    @torch.no_grad()
    def compute(self, batch: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The module's forward pass on one batch, without gradients."""
        self.module.eval()
        with self._precision():
            found: tuple[Tensor, Tensor] = self.module(batch, *arguments)
        return found

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their moving average, where there is one. Not for training."""
        if self._averages is None:
            yield
            return
        self._swap(self._averages)
        try:
            yield
        finally:
            self._swap(self._averages)

    # State

    def full_weights(self) -> dict[str, Tensor]:
        """The trained weights in float32 on CPU; all workers call, all get them."""
        return dict(self._tensors(None))

    def save_weights(self, path: Path) -> None:
        """Write the same alone, by their names; all workers call, the first one writes.

        No worker ever holds more than one of them.
        """
        if self.rank:
            for _ in self._tensors(None):
                pass
            return
        with float32_file(path, self._whole_shapes(), {"format": "pt"}) as write:
            for name, tensor in self._tensors(None):
                write(name, tensor)

    def save(self, folder: Path) -> None:
        """Write the whole state; all workers call, the first one writes."""
        kinds = [WEIGHTS, *self.moments, *([AVERAGE] if self._averages is not None else [])]
        if self.rank:
            for _ in self._state(kinds):
                pass
            return
        counts = {"updates": self._updates, "scaler": self._scaler_state()}
        counts["optimizer_steps"] = float(self._state_of(self._masters()[0])["step"])
        shapes = {
            f"{kind}/{name}": shape
            for kind in kinds
            for name, shape in self._whole_shapes().items()
        }
        metadata = {"counts": json.dumps(counts)}
        with float32_file(folder / FILE, shapes, metadata) as write:
            for name, tensor in self._state(kinds):
                write(name, tensor)

    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what `_tensors` gives, by name."""
        return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.names.items()}

    def _tensors(self, moment: str | None) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.names.items():
            yield name, self._whole(parameter, moment)

    def _state(self, kinds: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """All tensors of a checkpoint, one at a time."""
        for kind in kinds:
            with self.averaged() if kind == AVERAGE else nullcontext():
                for name, tensor in self._tensors(kind if kind in self.moments else None):
                    yield f"{kind}/{name}", tensor

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from a folder that any number of workers, or another engine, has saved.

        Raises:
            InputError: a damaged checkpoint, or one of another model; on all workers, before
                anything is changed.
        """
        with checkpoint_file(folder / FILE) as file:
            self._check(folder / FILE, file)
            counts = json.loads(file.metadata()["counts"])
            if self._averages is not None:
                self._fill(file, AVERAGE, None)
                for average, master in zip(self._averages, self._masters(), strict=True):
                    average.copy_(master)
            for moment in self.moments:
                self._fill(file, moment, moment)
            self._fill(file, WEIGHTS, None)
        self._spread_masters()
        for master in self._masters():
            state = self._state_of(master)
            # bitsandbytes counts in a plain number.
            steps, counted = counts["optimizer_steps"], state["step"]
            state["step"] = (
                int(steps) if isinstance(counted, int) else torch.full_like(counted, steps)
            )
        self._updates = counts["updates"]
        self._load_scaler(counts["scaler"])

    def _check(self, path: Path, file: Any) -> None:
        stored = set(file.keys())
        averages = [AVERAGE] if self._averages is not None else []
        for name, shape in self._whole_shapes().items():
            for kind in (WEIGHTS, *self.moments, *averages):
                key = f"{kind}/{name}"
                found = tuple(file.get_slice(key).get_shape()) if key in stored else None
                if found != tuple(shape):
                    raise InputError(
                        f"{path}: {key} is {found or 'missing'}, this run's is {tuple(shape)}; the "
                        "checkpoint is of another model, method or optimizer: start anew with "
                        "overwrite=true"
                    )

    def _fill(self, file: Any, kind: str, moment: str | None) -> None:
        for name, parameter in self.names.items():
            self._set_whole(parameter, moment, file.get_tensor(f"{kind}/{name}"))

    def _swap(self, others: Sequence[Tensor]) -> None:
        for master, other in zip(self._masters(), others, strict=True):
            kept = master.detach().clone()
            master.data.copy_(other)
            other.copy_(kept)
        self._spread_masters()

    # What the kinds differ in

    @abstractmethod
    def _accumulate(self, batch: Any, scale: float, last: bool) -> Tensor:
        """See `accumulate`; the loss is multiplied by `scale`."""

    @abstractmethod
    def _step(self, lr: float) -> float:
        """See `step`."""

    @abstractmethod
    def _precision(self) -> Any:
        """The context in which the module computes."""

    @abstractmethod
    def _masters(self) -> list[Tensor]:
        """The float32 tensors that this worker's optimizer updates: weights, or parts of them."""

    @abstractmethod
    def _state_of(self, master: Tensor) -> dict[str, Any]:
        """The optimizer's state of one of them, to be read and changed."""

    @abstractmethod
    def _spread_masters(self) -> None:
        """Bring the weights that the module computes with up to date; all workers call."""

    @abstractmethod
    def _whole(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """A parameter, or a moment of it, float32 on CPU, put together from all workers."""

    @abstractmethod
    def _set_whole(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Give this worker's optimizer its part of a whole tensor."""

    @abstractmethod
    def _scaler_state(self) -> dict[str, Any]:
        """The state of the loss scaling; empty where there is none."""

    @abstractmethod
    def _load_scaler(self, state: dict[str, Any]) -> None:
        """Take such a state back."""


@contextmanager
def checkpoint_file(path: Path) -> Iterator[Any]:
    """A safetensors file of a checkpoint, open.

    Raises:
        InputError: it is damaged; from within the block too.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> InputError:
    """What the user is told of a checkpoint's file that cannot be read."""
    return InputError(
        f"{path} cannot be read ({error}): the checkpoint is damaged; remove {path.parent} to go "
        "on from the checkpoint before it, or from the first step if there is no other"
    )


def decay(limit: float, updates: int) -> float:
    """The moving average's decay at an update: rises to its limit, to forget the random start."""
    return min(limit, (1 + updates) / (10 + updates))


def build_engine(trainee: Trainee, config: TrainConfig, device: torch.device) -> TrainingEngine:
    """The engine that `train.parallelism` names: the one place where it is chosen."""
    # Each kind imports what the other can do without.
    if config.parallelism == "ddp":
        from core.train.ddp_engine import DdpEngine

        return DdpEngine(trainee, config, device)
    if config.parallelism == "pipeline":
        from core.train.pipeline_engine import PipelineEngine, StagedTrainee

        assert isinstance(trainee, StagedTrainee), "refused before"
        return PipelineEngine(trainee, config)
    from core.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(trainee, config, device)
