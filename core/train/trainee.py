"""What can be trained: the loop and the engines know a `Trainee`, and not what it is of.

A batch is whatever the trainee's own `Batches` make of rows of a selection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from core.config import TrainConfig
from core.train.order import Indices, Selection

if TYPE_CHECKING:
    from core.train.engine import TrainingEngine

LOSS, NUM_TOKENS = "loss", "num_tokens"


class Batches(Protocol):
    """Makes the batches of one split."""

    @property
    def selection(self) -> Selection:
        """The examples that rows are of."""

    @property
    def device(self) -> torch.device:
        """Where batches go."""

    def announce(self, passes: Iterable[Indices]) -> None:
        """Say which rows `batch` will be asked for next, in order; read lazily."""

    def batch(self, rows: Indices, step: int | None = None) -> Any:
        """The examples of these rows; with what is random in step `step`, if one is given."""


class Trainee(nn.Module, ABC):
    """A module with parameters to train, whose forward pass is the loss of a batch.

    An engine moves it to its device and dtype, wraps it and calls nothing else of it in passes:
    ZeRO-3 gathers weights round forward passes alone.

    Attributes:
        names: what the statistics' entries are; known after the first pass, or before it.
        evaluated_first: whether there is an evaluation before the first step.
    """

    names: tuple[str, ...] = ()
    evaluated_first = False

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters to train, by their names in checkpoints."""

    @abstractmethod
    def forward(self, batch: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The differentiable sum of the supervised tokens' losses, and statistics, detached.

        Statistics are float64 [len(names)]: sums over these tokens, the loss and their number
        among them. With further arguments, whatever the trainee's own evaluation asks for.
        """

    def settle(self) -> None:
        """The last part of an engine's construction: weights are where and what they stay."""

    @abstractmethod
    def recompute(self) -> None:
        """Compute activations again in the backward pass, from now on."""

    def optimizer(self, config: TrainConfig) -> torch.optim.Optimizer:
        """Of all trained parameters; `core.train.optimizers.Moments` knows what state it has."""
        return adamw(self.trained().values(), config)

    @abstractmethod
    def evaluate(
        self, engine: TrainingEngine, held_out: Batches, config: TrainConfig
    ) -> dict[str, float]:
        """Metrics on held-out sequences; all workers call, each does its part, all get them."""

    def _statistics(self, found: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Sums by name as a row of statistics; sets `names`."""
        self.names = tuple(found)
        values = [value.detach().to(device, torch.float64) for value in found.values()]
        return torch.stack(values)


def adamw(parameters: Any, config: TrainConfig) -> torch.optim.AdamW:
    """Fused, since that is the fastest and takes no memory of its own."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
