"""What trains a draft head: forward, backward, optimizer step, and their state.

Two kinds: `core.train.ddp_engine` on plain torch, `core.train.deepspeed_engine` on DeepSpeed's
ZeRO. Workers' gradients are averaged. Losses are sums over tokens here, so that a step's gradient
is that of the mean over all supervised tokens of the global batch, however the batch is spread
over workers and micro-batches.

A checkpoint holds whole tensors, whatever the number of workers and the way that their state was
divided, so that a run goes on with another number of workers. It is one file: a head is small.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.config import TrainConfig
from core.draft.base import DraftBatch, DraftHead

LOSS, NUM_TOKENS = "loss", "num_tokens"
FILE = "engine.safetensors"
WEIGHTS, AVERAGE = "weights", "average"
MOMENTS = ("exp_avg", "exp_avg_sq")


class LossModule(nn.Module):
    """What an engine wraps: its forward pass is the head's training loss.

    Attributes:
        names: what the statistics' entries are, known after the first pass.
    """

    def __init__(self, head: DraftHead) -> None:
        super().__init__()
        self.head = head
        self.names: tuple[str, ...] = ()

    def forward(self, batch: DraftBatch, chain_depth: int = 0) -> tuple[Tensor, Tensor]:
        """The differentiable sum of losses, and float64 statistics [len(names)], detached.

        With a `chain_depth`, `DraftHead.chain_hits` instead: positions, and hits by depth. It
        comes this way since ZeRO-3 gathers weights round this module's forward pass alone.
        """
        if chain_depth:
            hits_D, positions = self.head.chain_hits(batch, chain_depth)
            return torch.as_tensor(positions), hits_D
        result = self.head.losses(batch)
        found = {LOSS: result.loss.detach(), NUM_TOKENS: result.num_tokens, **result.sums}
        self.names = tuple(found)
        device = result.loss.device
        values = [value.to(device=device, dtype=torch.float64) for value in found.values()]
        return result.loss, torch.stack(values)


class TrainingEngine(ABC):
    """One object a worker. Expects that `torch.distributed` is initialized.

    Attributes:
        module: the loss, round the head.
        equal_passes: whether workers exchange weights in a forward pass, so that each must make
            as many of them as the others, in evaluation too.
    """

    equal_passes = False

    def __init__(self, head: DraftHead, config: TrainConfig) -> None:
        """Nothing is moved or wrapped yet; see `_get_ready`."""
        self.config = config
        self.rank, self.world_size = (
            torch.distributed.get_rank(),
            torch.distributed.get_world_size(),
        )
        self.module = LossModule(head)
        head.recomputes = config.gradient_checkpointing
        self.names = dict(head.named_parameters())
        self._updates = 0
        self._averages: list[Tensor] | None = None

    def _get_ready(self, embedding_VH: Tensor, output_head_VH: Tensor) -> None:
        """The last part of construction, once the optimizer has its tensors."""
        for master in self._masters():
            # As AdamW makes them at its first step; made now, they can be loaded and saved.
            self._state_of(master).update(
                step=torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master.data) for moment in MOMENTS},
            )
        if self.config.ema:
            self._averages = [master.detach().clone() for master in self._masters()]
        self.module.head.attach_target(embedding_VH, output_head_VH)

    # Training

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

    @torch.no_grad()
    def evaluate(self, batch: DraftBatch) -> Tensor:
        """Statistics of one batch, without training on it."""
        self.module.eval()
        with self._precision():
            result: Tensor = self.module(batch)[1]
        return result

    @torch.no_grad()
    def chain_hits(self, batch: DraftBatch, depth: int) -> Tensor:
        """Positions of `DraftHead.chain_hits` of one batch, then hits: float64 [1 + depth]."""
        self.module.eval()
        with self._precision():
            positions, hits_D = self.module(batch, depth)
        return torch.cat((positions.to(hits_D.device)[None], hits_D)).double()

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
        """The head's weights in float32 on CPU; all workers call, all get them."""
        return {name: self._whole(p, None) for name, p in self.names.items()}

    def save(self, folder: Path) -> None:
        """Write the whole state; all workers call, the first one writes."""
        tensors = {f"{WEIGHTS}/{name}": t for name, t in self.full_weights().items()}
        for moment in MOMENTS:
            tensors |= {f"{moment}/{n}": self._whole(p, moment) for n, p in self.names.items()}
        if self._averages is not None:
            with self.averaged():
                average = self.full_weights()
            tensors |= {f"{AVERAGE}/{name}": tensor for name, tensor in average.items()}
        if self.rank == 0:
            counts = {"updates": self._updates, "scaler": self._scaler_state()}
            counts["optimizer_steps"] = float(self._state_of(self._masters()[0])["step"])
            save_file(tensors, folder / FILE, metadata={"counts": json.dumps(counts)})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from a folder that any number of workers has saved."""
        with safe_open(folder / FILE, framework="pt") as file:
            counts = json.loads(file.metadata()["counts"])
            if self._averages is not None:
                self._fill(file, AVERAGE, None)
                for average, master in zip(self._averages, self._masters(), strict=True):
                    average.copy_(master)
            for moment in MOMENTS:
                self._fill(file, moment, moment)
            self._fill(file, WEIGHTS, None)
        self._spread_masters()
        for master in self._masters():
            self._state_of(master)["step"].fill_(counts["optimizer_steps"])
        self._updates = counts["updates"]
        self._load_scaler(counts["scaler"])

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
    def _accumulate(self, batch: DraftBatch, scale: float, last: bool) -> Tensor:
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


def adamw(parameters: Any, config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer; fused, since it is the fastest and takes no memory of its own."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def decay(limit: float, updates: int) -> float:
    """The moving average's decay at an update: rises to its limit, to forget the random start."""
    return min(limit, (1 + updates) / (10 + updates))


def build_engine(
    head: DraftHead,
    embedding_VH: Tensor,
    output_head_VH: Tensor,
    config: TrainConfig,
    device: torch.device,
) -> TrainingEngine:
    """Move the head to its device and dtype, attach the target's tensors, make the engine."""
    # Each kind imports what the other can do without.
    if config.parallelism == "ddp":
        from core.train.ddp_engine import DdpEngine

        return DdpEngine(head, embedding_VH, output_head_VH, config, device)
    from core.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(head, embedding_VH, output_head_VH, config, device)
