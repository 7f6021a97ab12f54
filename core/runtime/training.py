"""train_draft: a draft head trained by Ray Train workers, each with a DeepSpeed engine."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from core.config import Config
from core.errors import AerieError, ConfigError
from core.models.target import target_folder, target_location
from core.paths import resolve_path
from core.progress import say
from core.provenance import RunFolder
from core.runtime.extraction import extraction_inputs, plan_manifest
from core.runtime.resources import Resources
from core.runtime.streaming import FeatureStream, feature_stream, streams
from core.runtime.workers import Follower, RayHost, WorkerGroup, on_worker
from core.train.curves import plot_curves
from core.train.evaluation import ACCEPTED_LENGTH
from core.train.task import (
    DraftTask,
    SourceOpener,
    count_parameters,
    open_shards,
    prepare,
    train,
)

STAGE, RUN = "train_draft", "draft"
# Weights, AdamW's two moments, and maybe the best weights and the moving average, all float32.
CHECKPOINT_BYTES_PER_PARAMETER = 20


def training_inputs(config: Config) -> Mapping[str, Path]:
    """The features, or the examples that they are streamed from, the target, and a head's start."""
    start = start_head(config)
    if streams(config):
        return {**extraction_inputs(config), **start}
    if not config.features.path:
        raise ConfigError("features.path is not set; give the folder that extract_features wrote")
    return {
        "features.path": resolve_path(config.features.path, field="features.path"),
        "target.path": target_folder(config.target.path),
        **start,
    }


def start_head(config: Config) -> dict[str, Path]:
    """The head that training goes on from, if one is given."""
    if not config.draft.path:
        return {}
    return {"draft.path": resolve_path(config.draft.path, field="draft.path")}


def counted_sections(config: Config) -> tuple[str, ...]:
    """What the result depends on besides the inputs: streamed features are made on the way."""
    return ("target", "features", "draft", "train") if streams(config) else ("draft", "train")


def training_resources(config: Config) -> Resources:
    """All workers at once, since they wait for each other, and for the replicas of a stream.

    On disk, the checkpoints.
    """
    train, features = config.train, config.features
    parameters = count_parameters(config, training_inputs(config)["target.path"])
    checkpoints = (train.keep_checkpoints + 1) * parameters * CHECKPOINT_BYTES_PER_PARAMETER
    because = "train.num_workers times train.cpus_per_worker and train.gpus_per_worker"
    replicas = 0
    if streams(config):
        replicas = features.num_replicas
        because += ", and at the same time features.num_replicas times features.cpus_per_replica "
        because += "and features.gpus_per_replica"
    return Resources(
        cpus=train.num_workers * train.cpus_per_worker + replicas * features.cpus_per_replica,
        gpus=train.num_workers * train.gpus_per_worker + replicas * features.gpus_per_replica,
        disk_gb=checkpoints / 1e9,
        because=because,
    )


def train_draft(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Train the head `<output>/head`; returns the report.

    Raises:
        UserError: config or features are wrong; before any worker starts.
        StageError: the loss is not a number, or too many workers were lost.
    """
    paths = training_inputs(config)
    output = folder.path.absolute()
    target = target_location(str(config.target.path))
    start = paths["draft.path"].absolute() if "draft.path" in paths else None
    if streams(config):
        examples = paths["data.examples"].absolute()
        manifest = plan_manifest(config, examples, paths["target.path"])
        task = prepare(config, target, examples, manifest, start)
    else:
        task = prepare(config, target, paths["features.path"].absolute(), start=start)
    order = task.order
    say(
        STAGE,
        f"{len(task.training):,} sequences, {task.training.tokens:,} tokens; "
        f"{order.total_steps:,} steps of {config.train.global_batch_size} sequences; draft "
        f"vocabulary {task.vocabulary.size:,} ({task.coverage:.1%} of the supervised tokens)",
    )
    with feature_stream(task) if task.streamed else nullcontext() as stream:
        say(STAGE, f"starting {config.train.num_workers} worker(s)")
        group = WorkerGroup(STAGE, RUN, output, config.train)
        run_id = folder.identity[:16]
        with Follower(output, order.total_steps, STAGE):
            settings = {"task": task, "output": output, "run_id": run_id, "stream": stream}
            figures = group.fit(_work, settings)
    plot_curves(output)
    say(STAGE, _summary(figures))
    return figures


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs."""
    task: DraftTask = settings["task"]
    stream: FeatureStream | None = settings["stream"]

    def work(host: RayHost, device: torch.device) -> dict[str, Any]:
        open_source: SourceOpener = open_shards
        if stream is not None:
            if failure := _agreed(stream.failure(), host.world_size):
                return {"failed": failure}
            open_source = functools.partial(stream.open, rank=host.rank)
        return train(task, settings["output"], settings["run_id"], host, device, open_source)

    return on_worker(task.config.train, work)


def _agreed(failure: AerieError | None, world_size: int) -> AerieError | None:
    """The failure that any worker knows of: they must all stop, or the others would wait."""
    known: list[AerieError | None] = [None] * world_size
    torch.distributed.all_gather_object(known, failure)
    return next((found for found in known if found is not None), None)


def _summary(figures: Mapping[str, Any]) -> str:
    text = (
        f"loss {figures['initial_loss']:.3f} → {figures['final_loss']:.3f}, "
        f"{figures['tokens_per_second']:,.0f} tokens/s"
    )
    if figures["held_out_loss"] is None:
        return text
    tops = ", ".join(f"top-{n} {figures[f'held_out_top{n}']:.3f}" for n in (1, 3, 10))
    text = f"{text}; held out: loss {figures['held_out_loss']:.3f}, {tops}"
    accepted = figures[ACCEPTED_LENGTH]
    if accepted is not None:
        text += f", accepted length {accepted:.2f} on a chain"
    return f"{text}; head of step {figures['head_step']:,}"
