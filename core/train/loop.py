"""The training loop, the same on every worker and for every trainee.

It asks its host for the last checkpoint and hands it new ones; the host is Ray Train in a job.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core.config import TrainConfig
from core.errors import StageError
from core.paths import naming_a_full_disk
from core.tracking import MetricLog
from core.train.engine import TrainingEngine, checkpoint_file, damaged
from core.train.evaluation import ACCEPTED_LENGTH, HELD_OUT, means
from core.train.memory import FIGURES, memory_figures
from core.train.order import TrainingOrder
from core.train.schedule import learning_rate
from core.train.state import FILE as STATE
from core.train.state import TrainState
from core.train.trainee import LOSS, NUM_TOKENS, Batches

BEST, LAST = "best.safetensors", "last.safetensors"
LOG_EVERY = 10
"""Steps between records, each the token-weighted mean over these steps."""
MEASURED = ("time", "tokens_per_second", *FIGURES)
"""Entries of records that are not the same when a run is repeated."""


class Host(Protocol):
    """What the loop runs on."""

    @property
    def rank(self) -> int:
        """This worker's number."""

    @property
    def world_size(self) -> int:
        """How many workers there are."""

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder of the newest checkpoint; None at the start."""

    def leaving(self) -> frozenset[str]:
        """Ids of the workers' nodes whose loss is announced; all workers call, all get the same."""

    def keep_checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Have `save` write into a folder, on all workers, and keep what the first one wrote."""


@dataclass
class TrainingLoop:
    """One worker's training run.

    Attributes:
        log: where metrics go; None on all workers but one, which opens it by `open_log` once it
            is known where the run goes on.
        scratch: a folder of this worker's own, for as long as the result is wanted.
    """

    engine: TrainingEngine
    order: TrainingOrder
    training: Batches
    held_out: Batches | None
    config: TrainConfig
    host: Host
    open_log: Callable[[int], MetricLog] | None
    scratch: Path
    state: TrainState = field(default_factory=TrainState)
    _leaving: frozenset[str] = frozenset()
    _fresh: list[Tensor] = field(default_factory=list)
    _log: MetricLog | None = None

    def run(self) -> TrainState:
        """Train to the last step, from the last checkpoint if there is one.

        Raises:
            StageError: the loss is not a number; raised on all workers at the same step.
        """
        self._resume()
        self.training.announce(
            self.order.passes(
                self.state.step,
                self.engine.data_rank,
                self.engine.data_size,
                self.config.micro_batch_size,
            )
        )
        if self.open_log is not None:
            self._log = self.open_log(self.state.step)
        try:
            if (
                self.held_out is not None
                and self.engine.module.evaluated_first
                and not self.state.step
            ):
                self.state.held_out_first = self._measure(self.held_out)
            while self.state.step < self.order.total_steps:
                self._advance()
        finally:
            if self._log is not None:
                self._log.close()
        return self.state

    def result(self) -> Path:
        """A file of the weights that are kept, by name, float32; all workers call.

        It is there on the first worker, and of the best evaluation where that is wanted.
        """
        path = self.scratch / (BEST if self.state.best else LAST)
        if not self.state.best:
            # It is put together from all workers' parts.
            with self.engine.averaged():
                self.engine.save_weights(path)
        return path

    def _resume(self) -> None:
        with self.host.last_checkpoint() as folder:
            if folder is not None:
                self.engine.load(folder)
                try:
                    self.state = TrainState.load(folder)
                except (OSError, ValueError, TypeError) as error:
                    raise damaged(folder / STATE, error) from error
                if self.state.best:
                    # Here already, not when it is needed at the end.
                    with checkpoint_file(folder / BEST):
                        pass
                    if self.host.rank == 0:
                        with naming_a_full_disk(self.scratch / BEST):
                            shutil.copyfile(folder / BEST, self.scratch / BEST)

    def _advance(self) -> None:
        """One optimizer step, and what is due after it."""
        norm = self._train_step()
        step, last = self.state.step, self.state.step == self.order.total_steps
        if step % LOG_EVERY == 0 or step == 1 or last:
            self._log_window(norm)
        if self.held_out is not None and (step % self.config.eval_every == 0 or last):
            self._evaluate(self.held_out)
        if step % self.config.checkpoint_every == 0 or last or self._announced():
            self._collect()
            self.host.keep_checkpoint(step, self._save)

    def _announced(self) -> bool:
        """Whether the loss of a node has been announced that was not before."""
        if not self.config.on_notice:
            return False
        before, self._leaving = self._leaving, self.host.leaving()
        return bool(self._leaving - before)

    def _save(self, folder: Path) -> None:
        self.engine.save(folder)
        if self.host.rank == 0:
            self.state.save(folder)
            if self.state.best:
                # With every checkpoint, so that a run never goes on with a best of its future.
                shutil.copyfile(self.scratch / BEST, folder / BEST)

    def _train_step(self) -> float:
        """Returns the gradient's norm."""
        started = time.perf_counter()
        state, order = self.state, self.order
        passes = order.micro_batches(
            state.step, self.engine.data_rank, self.engine.data_size, self.config.micro_batch_size
        )
        supervised = order.supervised(state.step)
        statistics = [
            self.engine.accumulate(
                self.training.batch(rows, state.step), supervised, last=number == len(passes)
            )
            for number, rows in enumerate(passes, start=1)
        ]
        norm = self.engine.step(learning_rate(state.step, order.total_steps, self.config))
        self._fresh.append(torch.stack(statistics).sum(0))
        state.tokens += order.tokens(state.step)
        state.step += 1
        state.seconds += time.perf_counter() - started
        return norm

    def _collect(self) -> None:
        """Sum the latest steps' statistics over workers, and look whether the loss is a number."""
        if not self._fresh:
            return
        sums = torch.stack(self._fresh)
        torch.distributed.all_reduce(sums)
        self._fresh.clear()
        self.state.window += sums.tolist()
        first = self.state.step - len(self.state.window) + 1
        loss, tokens = (self.engine.statistic_names.index(name) for name in (LOSS, NUM_TOKENS))
        for step, row in enumerate(self.state.window, start=first):
            assert row[tokens] == self.order.supervised(step - 1), "head and order count alike"
            if not math.isfinite(row[loss]):
                raise StageError(
                    f"the loss is {row[loss]} at step {step}; lower train.lr="
                    f"{self.config.lr:g} or train.clip={self.config.clip:g}, raise "
                    "train.warmup_steps, or check the features (extract_features --verify)"
                )

    def _log_window(self, norm: float) -> None:
        self._collect()
        state = self.state
        sums = torch.tensor(state.window, dtype=torch.float64).sum(0)
        metrics = means(self.engine.statistic_names, sums)
        state.final_loss = metrics[LOSS]
        if state.initial_loss is None:
            state.initial_loss = metrics[LOSS]
        seconds = max(state.seconds - state.logged_seconds, 1e-9)
        speed = (state.tokens - state.logged_tokens) / seconds
        state.window, state.logged_tokens, state.logged_seconds = [], state.tokens, state.seconds
        if self._log is not None:
            lr = learning_rate(state.step - 1, self.order.total_steps, self.config)
            self._log.log(
                step=state.step,
                **metrics,
                lr=lr,
                grad_norm=norm,
                tokens=state.tokens,
                tokens_per_second=round(speed, 1),
                **memory_figures(self.training.device),
            )

    def _evaluate(self, held_out: Batches) -> None:
        """Metrics on held-out sequences; keeps the weights if they are the best so far."""
        state = self.state
        state.held_out = self._measure(held_out)
        if self.config.keep == "best" and (
            not state.best or score(state.held_out) >= score(state.best)
        ):
            state.best, state.best_step = state.held_out, state.step
            with self.engine.averaged():
                self.engine.save_weights(self.scratch / BEST)

    def _measure(self, held_out: Batches) -> dict[str, float]:
        found = self.engine.module.evaluate(self.engine, held_out, self.config)
        if self._log is not None:
            self._log.log(step=self.state.step, tokens=self.state.tokens, **found)
        return found


def score(held_out: dict[str, float]) -> float:
    """What makes an evaluation the best: accepted length, or where there is none, less loss."""
    return held_out.get(ACCEPTED_LENGTH, -held_out[f"{HELD_OUT}{LOSS}"])
