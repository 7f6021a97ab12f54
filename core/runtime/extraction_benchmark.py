"""The benchmark `extraction`: the reference way, Aerie's bare loop and the Ray pipeline.

All three take the same examples to files on disk, at the same dtype and number of threads.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config import Config
from core.data.examples import Example, read_examples
from core.data.feature_manifest import Manifest
from core.data.feature_shards import FeatureDataset
from core.errors import InputError
from core.evaluate.comparison import Ratio, Way, compare, print_comparison, summarize_comparison
from core.models.features import extract_shard, load_for_extraction
from core.models.target import Target, load_target
from core.progress import say
from core.provenance import RunFolder
from core.runtime.extraction import (
    count_tokens,
    extract_in_pool,
    extraction_inputs,
    plan_manifest,
    shard_tasks,
)
from core.runtime.feature_checks import relative_errors

STAGE = "benchmark"
REFERENCE, REFERENCE_BODY = "reference", "reference_without_logits"
BARE, PIPELINE = "bare_loop", "ray_pipeline"
RATIOS = (
    Ratio("bare_loop_speed_to_reference", "tokens_per_second", BARE, REFERENCE, at_least=1.3),
    Ratio("bare_loop_speed_to_reference_without_logits", "tokens_per_second", BARE, REFERENCE_BODY),
    Ratio("ray_pipeline_time_to_bare_loop", "seconds", PIPELINE, BARE, at_most=1.1),
)
# Each replica's first shard is its warm-up, and at the end replicas wait for the last one.
LEFT_OUT = (
    "of the Ray pipeline and the bare loop: starting the replicas (processes), each one's first "
    "shard (one more, to warm up), and the end, when the first has nothing left to do (of the "
    "pipeline start_up_seconds, whole_seconds); of the reference: loading, and one pass to warm up"
)
LEAST_SHARDS_A_REPLICA = 4


def benchmark_extraction(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Run all ways in turn; returns the report.

    Raises:
        InputError: too few example shards to see a steady state.
    """
    bench = _Bench.of(config, folder.path.absolute() / "work")
    say(STAGE, f"{bench.tokens:,} tokens in {len(bench.tasks)} shards, {bench.threads} threads")
    ways = [
        Way(REFERENCE, bench.reference),
        Way(REFERENCE_BODY, bench.reference_body),
        Way(BARE, bench.bare_loop),
        Way(PIPELINE, bench.ray_pipeline),
    ]
    try:
        storage = bench.storage()
        found = compare(ways, config.benchmark.repeats, STAGE)
    finally:
        shutil.rmtree(bench.work, ignore_errors=True)
    summary = summarize_comparison(found, RATIOS)
    print_comparison(summary, f"extraction, {bench.threads} threads, {config.target.dtype}")
    for dtype, figures in storage.items():
        say(
            STAGE,
            f"{dtype}: {figures['bytes_per_token']:,.0f} bytes a token, "
            f"{figures['of_float16']:.1%} of float16, relative error {figures['error']:.2g}",
        )
    lengths = bench.lengths
    return {
        "benchmark": "extraction",
        **summary,
        "storage": storage,
        "left_out": LEFT_OUT,
        "tokens": bench.tokens,
        "examples": len(lengths),
        "lengths": {f"p{p}": float(np.percentile(lengths, p)) for p in (5, 25, 50, 75, 95, 100)},
        "shards": len(bench.tasks),
        "threads": bench.threads,
        "replicas": config.features.num_replicas,
        "dtype": config.target.dtype,
        "features_dtype": config.features.dtype,
        "batch_tokens": config.features.batch_tokens,
    }


def steady_state(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Tokens and seconds of the time in which all replicas were warm and at work.

    It begins when the last replica has finished its first shard and ends when the first one has
    finished its last. A shard that lies partly inside counts in proportion.
    """
    by_replica: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: float(row["ended"])):
        by_replica.setdefault(row["replica"], []).append(row)
    begin = max(own[0]["ended"] for own in by_replica.values())
    end = min(own[-1]["ended"] for own in by_replica.values())
    if end <= begin:
        raise InputError(
            "a replica finished no second shard while the others worked: raise "
            "benchmark.max_tokens, or make examples with a lower data.shard_tokens"
        )
    tokens = 0.0
    for row in rows:
        inside = min(row["ended"], end) - max(row["started"], begin)
        tokens += row["tokens"] * max(0.0, inside) / (row["ended"] - row["started"])
    return tokens, end - begin


@dataclass
class _Bench:
    """What the ways work on. The targets of this process are loaded once, outside the time."""

    config: Config
    manifest: Manifest
    tasks: list[dict[str, str]]
    work: Path
    threads: int

    @classmethod
    def of(cls, config: Config, work: Path) -> _Bench:
        paths = extraction_inputs(config)
        manifest = plan_manifest(config, paths["data.examples"], paths["target.path"])
        shutil.rmtree(work, ignore_errors=True)
        tasks = list(_so_many(shard_tasks(paths["data.examples"], work), config))
        needed = LEAST_SHARDS_A_REPLICA * config.features.num_replicas
        if len(tasks) < needed:
            raise InputError(
                f"data.examples={config.data.examples}: {len(tasks)} shards of examples "
                f"within benchmark.max_tokens, {needed} are needed to see a steady state; make "
                "them with a lower data.shard_tokens, or raise benchmark.max_tokens"
            )
        threads = max(1, round(config.features.cpus_per_replica * config.features.num_replicas))
        return cls(config, manifest, tasks, work, threads)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [example.num_tokens for example in self._examples()]

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return sum(self.lengths)

    @cached_property
    def plain(self) -> Target:
        """As transformers loads it."""
        settings = self.config.target.model_copy(update={"pack_linear": False})
        return self._warm(load_target(settings, num_threads=self.threads))

    @cached_property
    def target(self) -> Target:
        """As Aerie's replicas load it."""
        return self._warm(load_for_extraction(self.config.target, self.threads))

    def reference(self, _: int) -> dict[str, float]:
        """As EAGLE's `ge_data` does: the whole model, batch 1, one file a sample."""
        model = self.plain.model

        def final(ids_1T: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = model(ids_1T, output_hidden_states=True).hidden_states[-1]
            return hidden

        return self._one_by_one(final)

    def reference_body(self, _: int) -> dict[str, float]:
        """The same without the output head, whose logits `ge_data` computes and drops."""
        return self._one_by_one(self.plain.features)

    def bare_loop(self, _: int) -> dict[str, float]:
        """What replicas do, without Ray: as many processes, as new as each repeat's replicas are.

        A process that has been through all batches before knows their shapes, for which oneDNN
        then builds nothing.
        """
        replicas, tasks = self.config.features.num_replicas, self._with_warm_up()
        settings = (self.config, self.manifest, self.threads // replicas)
        with ProcessPoolExecutor(
            replicas, get_context("spawn"), initializer=_start_bare, initargs=settings
        ) as processes:
            rows = list(processes.map(_extract_bare, tasks))
        padded = sum(row["padded_tokens"] for row in rows)
        waste = 1 - sum(row["tokens"] for row in rows) / padded
        return {**self._steady_figures(rows), "padding_waste": waste}

    def ray_pipeline(self, _: int) -> dict[str, float]:
        """The job's own pool."""
        replicas, tasks = self.config.features.num_replicas, self._with_warm_up()
        started = time.time()
        rows = list(extract_in_pool(tasks, replicas, self.config, self.manifest))
        whole = time.time() - started
        return {
            **self._steady_figures(rows),
            "start_up_seconds": min(row["started"] for row in rows) - started,
            "whole_seconds": whole,
        }

    def _with_warm_up(self) -> list[dict[str, str]]:
        """One more shard a replica, so that what is timed is the same shards in all ways."""
        self._fresh()
        return [
            {**self.tasks[0], "shard": str(self.work / "warm_up" / f"{number}.safetensors")}
            for number in range(self.config.features.num_replicas)
        ] + self.tasks

    def _steady_figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Seconds are those of all tokens at the steady rate."""
        tokens, seconds = steady_state(rows)
        written = sum(Path(task["shard"]).stat().st_size for task in self.tasks)
        return {
            "tokens_per_second": tokens / seconds,
            "seconds": self.tokens * seconds / tokens,
            "bytes_per_token": written / self.tokens,
        }

    def storage(self) -> dict[str, dict[str, float]]:
        """What each dtype costs: bytes a token on disk, and the error it adds."""
        target, folder = self.target, self._fresh()
        examples = read_examples(Path(self.tasks[0]["work"]))
        float16 = 2 * self.manifest.hidden_size * len(self.manifest.feature_layers)
        found, exact = {}, None
        # float32 holds exactly what the target computes.
        for dtype in ("float32", "bfloat16", "int8"):
            manifest = replace(self.manifest, dtype=dtype, shards={"train": (dtype,)})
            manifest.write(folder)
            shard = folder / "train" / f"{dtype}.safetensors"
            budget = self.config.features.batch_tokens
            record = extract_shard(target, examples, shard, manifest, budget)
            stored = _features(folder)
            if exact is None:
                exact = stored
            size = record.bytes / record.tokens
            error = relative_errors(stored, exact).mean().item()
            found[dtype] = {"bytes_per_token": size, "of_float16": size / float16, "error": error}
        return found

    def _one_by_one(self, final: Any) -> dict[str, float]:
        folder = self._fresh()
        started = time.perf_counter()
        with torch.inference_mode():
            for number, example in enumerate(self._examples()):
                ids_T = torch.tensor(example.input_ids_T.tolist())
                sample = {
                    "input_ids": ids_T,
                    "hidden_state": final(ids_T[None].to(self.plain.device))[0].cpu().clone(),
                    "loss_mask": torch.tensor(example.loss_mask_T.tolist()),
                }
                torch.save(sample, folder / f"data_{number}.ckpt")
        seconds = time.perf_counter() - started
        written = sum(file.stat().st_size for file in folder.iterdir())
        return {
            "tokens_per_second": self.tokens / seconds,
            "seconds": seconds,
            "bytes_per_token": written / self.tokens,
        }

    def _examples(self) -> Iterator[Example]:
        for task in self.tasks:
            yield from read_examples(Path(task["work"]))

    def _warm(self, target: Target) -> Target:
        # A process's first passes take several times as long.
        example = next(self._examples())
        target.features(torch.tensor([example.input_ids_T.tolist()]))
        return target

    def _fresh(self) -> Path:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        return self.work


# Of a process of the bare loop: what `_start_bare` gave it.
_bare: tuple[Target, Config, Manifest]


def _start_bare(config: Config, manifest: Manifest, threads: int) -> None:
    global _bare
    _bare = load_for_extraction(config.target, threads), config, manifest


def _extract_bare(task: Mapping[str, str]) -> dict[str, Any]:
    """One shard; a row as the pool's."""
    target, config, manifest = _bare
    started, shard = time.time(), Path(task["shard"])
    shard.parent.mkdir(parents=True, exist_ok=True)
    budget = config.features.batch_tokens
    record = extract_shard(target, read_examples(Path(task["work"])), shard, manifest, budget)
    return {
        "replica": str(os.getpid()),
        "started": started,
        "ended": time.time(),
        "tokens": record.tokens,
        "padded_tokens": record.padded_tokens,
    }


def _so_many(tasks: list[dict[str, str]], config: Config) -> Iterator[dict[str, str]]:
    """The first shards, up to the tokens asked for."""
    sizes = itertools.accumulate(count_tokens(Path(task["work"])) for task in tasks)
    for task, total in zip(tasks, sizes, strict=True):
        if total > config.benchmark.max_tokens:
            return
        yield task


def _features(folder: Path) -> torch.Tensor:
    """All features of a folder's training split, float32 [T, L, H]."""
    dataset = FeatureDataset(folder, "train")
    return torch.cat([dataset[index].features.float() for index in range(len(dataset))])
