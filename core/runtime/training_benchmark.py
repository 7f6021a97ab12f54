"""The benchmark `training`: EAGLE's training step and Aerie's, on the same sequences in turn.

Each way trains a new head of the same weights, in this process, on the same global batches at the
same dtype and number of threads, with noise and the optimizer's step. The comparison is with equal
vocabularies, where losses are equal; beside it stands the draft vocabulary that was configured,
whose loss is of a softmax over fewer tokens. Nothing is kept from one epoch for the next, so that
each costs what the steps measured here do.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config import Config
from core.draft.soft_cross_entropy import product_dtype
from core.errors import ConfigError, InputError
from core.evaluate.comparison import Ratio, Way, compare, print_comparison, summarize_comparison
from core.models.target import target_folder, target_location
from core.models.weights import load_embedding, load_output_head
from core.progress import say
from core.provenance import RunFolder
from core.runtime.training import training_inputs
from core.runtime.training_reference import eagle1_reference_loss, eagle3_reference_loss
from core.train.batches import BatchMaker
from core.train.draft import DraftTrainee
from core.train.engine import build_engine
from core.train.order import Indices
from core.train.schedule import learning_rate
from core.train.task import TRAIN, DraftTask, open_shards, prepare

STAGE = "benchmark"
REFERENCE, WHOLE, AERIE = "reference", "aerie_whole_vocabulary", "aerie"
AT_LEAST = 2.0

CPU = torch.device("cpu")


def benchmark_training(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Run all ways in turn; returns the report.

    Raises:
        ConfigError: there is no reference for `draft.kind`.
        InputError: too few sequences for two steps.
    """
    threads = max(1, round(config.train.cpus_per_worker * config.train.num_workers))
    torch.set_num_threads(threads)
    with _one_process():
        bench = _Bench.of(config)
        say(
            STAGE,
            f"{len(bench.steps)} steps of {config.train.global_batch_size} sequences, "
            f"{bench.tokens:,} tokens, {threads} threads",
        )
        ways = [Way(REFERENCE, bench.reference)]
        if bench.alike is not bench.task:
            ways.append(Way(WHOLE, lambda _: bench.engine(bench.alike)))
        ways.append(Way(AERIE, lambda _: bench.engine(bench.task)))
        found = compare(ways, config.benchmark.repeats, STAGE)
    summary = summarize_comparison(found, _ratios(ways[1].name))
    print_comparison(summary, f"training, {threads} threads, {config.train.dtype}")
    dtype: torch.dtype = getattr(torch, config.train.dtype)
    lengths = bench.task.training.lengths_N[np.concatenate(bench.steps)]
    return {
        "benchmark": "training",
        **summary,
        "tokens": bench.tokens,
        "supervised": bench.supervised,
        "steps": len(bench.steps),
        "lengths": {f"p{p}": float(np.percentile(lengths, p)) for p in (5, 25, 50, 75, 95, 100)},
        "padding": bench.padding,
        "loss_products": str(product_dtype(torch.empty(0, dtype=dtype))).removeprefix("torch."),
        "threads": threads,
        "dtype": config.train.dtype,
        "parallelism": config.train.parallelism,
        "kind": config.draft.kind,
        "draft_vocab_size": bench.task.vocabulary.size,
        "draft_vocab_coverage": bench.task.coverage,
        "left_out": "reading the target's tensors, making the head, and one step to warm up",
    }


@dataclass
class _Bench:
    """What the ways train on.

    Attributes:
        task: as configured.
        alike: with the reference's vocabulary, so that losses are the same: the target's whole one
            for EAGLE-1, whose reference knows no other; the task itself for EAGLE-3.
        steps: rows of the selection of each step, in the order of the data.
    """

    task: DraftTask
    alike: DraftTask
    steps: list[Indices]
    embedding_VH: Tensor
    output_head_VH: Tensor

    @classmethod
    def of(cls, config: Config) -> _Bench:
        if config.draft.kind not in REFERENCES:
            raise ConfigError(
                f"draft.kind={config.draft.kind}: the benchmark has the reference's step of "
                f"{', '.join(REFERENCES)} alone"
            )
        features = training_inputs(config)["features.path"].absolute()
        location = target_location(str(config.target.path))
        task = prepare(config, location, features)
        alike = task
        if config.draft.kind == "eagle1" and not task.vocabulary.is_whole:
            alike = prepare(config.replace(draft={"vocab_size": 0}), location, features)
        size, total = config.train.global_batch_size, 0
        steps: list[Indices] = []
        for start in range(0, len(task.training) - size + 1, size):
            rows = np.arange(start, start + size)
            total += int(task.training.lengths_N[rows].sum())
            if total > config.benchmark.max_tokens:
                break
            steps.append(rows)
        if len(steps) < 2:
            raise InputError(
                f"features.path={features}: fewer than two steps of "
                f"{size} sequences within benchmark.max_tokens={config.benchmark.max_tokens}; "
                "raise it, or lower train.global_batch_size"
            )
        folder = target_folder(location)
        return cls(task, alike, steps, load_embedding(folder), load_output_head(folder))

    @property
    def tokens(self) -> int:
        """Of all steps, padding not counted."""
        return int(self.task.training.lengths_N[np.concatenate(self.steps)].sum())

    @property
    def supervised(self) -> int:
        """Positions that count in the loss."""
        return int(self.task.training.supervised_N[np.concatenate(self.steps)].sum())

    @property
    def padding(self) -> dict[str, float]:
        """Share of padding, in the order of the data and sorted by length within a step."""
        return {
            "in_order": self._padding(lambda rows: rows),
            "sorted": self._padding(self._longest_first),
        }

    def reference(self, _: int) -> dict[str, float]:
        """EAGLE's step; see `core.runtime.training_reference`."""
        train, loss_of = self.task.config.train, REFERENCES[self.task.config.draft.kind]
        head = self.alike.new_head().train()
        # Rows of padding in the target's own tensors are part of the reference's products.
        head.attach_target(self.embedding_VH, self.output_head_VH)
        optimizer = torch.optim.AdamW(
            head.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay
        )
        tensors = self.embedding_VH.float(), self.output_head_VH.float()
        lower = train.dtype != "float32"
        maker = self._maker(self.alike)

        def step(number: int, rows: Indices) -> float:
            optimizer.zero_grad()
            parts = self._parts(rows)
            total = float(self.task.training.supervised_N[rows].sum())
            loss_sum = 0.0
            for part in parts:
                share = float(self.task.training.supervised_N[part].sum()) / total
                batch = maker.batch(part, number)
                with torch.autocast("cpu", getattr(torch, train.dtype), enabled=lower):
                    loss = loss_of(head, *tensors, batch) * share
                loss.backward()
                loss_sum += loss.item()
            nn.utils.clip_grad_norm_(head.parameters(), train.clip)
            for group in optimizer.param_groups:
                group["lr"] = self._rate(number)
            optimizer.step()
            return loss_sum

        return self._timed(step)

    def engine(self, task: DraftTask) -> dict[str, float]:
        """Aerie's step, as a worker makes it."""
        train = task.config.train
        trainee = DraftTrainee(task.new_head(), self.embedding_VH, self.output_head_VH)
        engine = build_engine(trainee, train, CPU)
        maker = self._maker(task)

        def step(number: int, rows: Indices) -> float:
            parts = self._parts(self._longest_first(rows))
            total = int(task.training.supervised_N[rows].sum())
            sums = [
                engine.accumulate(maker.batch(part, number), total, last=i == len(parts))
                for i, part in enumerate(parts, start=1)
            ]
            engine.step(self._rate(number))
            return float(torch.stack(sums).sum(0)[0]) / total

        return self._timed(step)

    def _timed(self, step: Callable[[int, Indices], float]) -> dict[str, float]:
        first = step(0, self.steps[0])
        started, used = time.perf_counter(), time.process_time()
        losses = [step(number, rows) for number, rows in enumerate(self.steps[1:], start=1)]
        seconds = time.perf_counter() - started
        tokens = self.tokens - int(self.task.training.lengths_N[self.steps[0]].sum())
        return {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "cpu_seconds": time.process_time() - used,
            "first_loss": first,
            "last_loss": float(np.mean(losses[-5:])),
        }

    def _maker(self, task: DraftTask) -> BatchMaker:
        train = task.config.train
        return BatchMaker(
            source=open_shards(task, TRAIN),
            selection=task.training,
            dtype=getattr(torch, train.dtype),
            device=CPU,
            noise=getattr(task.config.draft, "noise", 0.0),
            seed=train.seed,
        )

    def _parts(self, rows: Indices) -> list[Indices]:
        size = self.task.config.train.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _longest_first(self, rows: Indices) -> Indices:
        return rows[np.argsort(-self.task.training.lengths_N[rows], kind="stable")]

    def _padding(self, order: Callable[[Indices], Indices]) -> float:
        lengths_N = self.task.training.lengths_N
        parts = [part for rows in self.steps for part in self._parts(order(rows))]
        padded = sum(len(part) * int(lengths_N[part].max()) for part in parts)
        return 1 - self.tokens / padded

    def _rate(self, number: int) -> float:
        return learning_rate(number, len(self.steps), self.task.config.train)


def _ratios(alike: str) -> tuple[Ratio, ...]:
    """What is compared; `alike` is the way whose loss must be the reference's."""
    found = (
        Ratio("speed_at_equal_loss", "tokens_per_second", alike, REFERENCE, at_least=AT_LEAST),
        # Of a machine that does other things too, this is the figure to trust.
        Ratio("cpu_time_saved_at_equal_loss", "cpu_seconds", REFERENCE, alike),
        Ratio("first_loss", "first_loss", alike, REFERENCE, 0.99, 1.01),
        Ratio("last_loss", "last_loss", alike, REFERENCE, 0.98, 1.02),
    )
    if alike == AERIE:
        return found
    return (*found, Ratio("speed_with_draft_vocabulary", "tokens_per_second", AERIE, REFERENCE))


@contextmanager
def _one_process() -> Iterator[None]:
    """A process group of one, as an engine expects it."""
    if torch.distributed.is_initialized():
        yield
        return
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory(prefix="aerie-") as folder:
        store = f"file://{Path(folder) / 'group'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "eagle1": eagle1_reference_loss,
    "eagle3": eagle3_reference_loss,
}
