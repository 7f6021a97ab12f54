"""train_draft: a draft head trained by Ray Train workers, each with a DeepSpeed engine.

Ray Train starts the workers, replaces lost ones and keeps the checkpoints; the folder and the
name of its run are always the same, so that a new driver goes on where a killed one was.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointConsistencyMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.config import LoggingConfig

from core.config import Config, TrainConfig
from core.errors import AerieError, ConfigError, StageError, UserError
from core.models.target import target_folder, target_location
from core.paths import resolve_path
from core.progress import Progress, say
from core.provenance import RunFolder
from core.runtime.extraction import extraction_inputs, plan_manifest
from core.runtime.resources import Resources
from core.runtime.streaming import FeatureStream, StreamBroken, feature_stream, streams
from core.runtime.watching import Watcher
from core.tracking import read_metrics
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

STAGE = "train_draft"
STORAGE, RUN = "ray_train", "draft"
SNAPSHOT = "checkpoint_manager_snapshot.json"
SECONDS_BETWEEN_LOOKS = 1.0
# Weights, AdamW's two moments, and maybe the best weights and the moving average, all float32.
CHECKPOINT_BYTES_PER_PARAMETER = 20
# Ray Train hands these on to its controller; what the user has set stays.
RAY_TRAIN_SETTINGS = {
    # The default of 2 adds seconds to the end of a run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # It writes an error into every job's log, and all it adds is that a node whose end was
    # announced does not count towards train.max_failures.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def training_inputs(config: Config) -> Mapping[str, Path]:
    """The features, or the examples that they are streamed from, the target, and a head's start."""
    start: dict[str, Path] = {}
    if config.draft.path:
        start["draft.path"] = resolve_path(config.draft.path, field="draft.path")
    if streams(config):
        return {**extraction_inputs(config), **start}
    if not config.features.path:
        raise ConfigError("features.path is not set; give the folder that extract_features wrote")
    return {
        "features.path": resolve_path(config.features.path, field="features.path"),
        "target.path": target_folder(config.target.path),
        **start,
    }


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
        with _Follower(output, order.total_steps):
            figures = _fit(task, output, folder.identity[:16], stream)
    plot_curves(output)
    say(STAGE, _summary(figures))
    return figures


def _fit(
    task: DraftTask, output: Path, run_id: str, stream: FeatureStream | None
) -> dict[str, Any]:
    train = task.config.train
    storage = output / STORAGE
    _drop_broken_snapshot(storage / RUN)
    for name, value in RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": task, "output": output, "run_id": run_id, "stream": stream},
        torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker=_worker_resources(train),
            placement_strategy="SPREAD",
        ),
        run_config=RunConfig(
            name=RUN,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            worker_runtime_env={"env_vars": _worker_environment(train)},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise _explain(error) from error
    if "failed" in outcome:
        raise outcome["failed"]
    return {**outcome, "workers": train.num_workers}


def _worker_resources(train: TrainConfig) -> dict[str, float]:
    resources = {"CPU": train.cpus_per_worker}
    return {**resources, "GPU": train.gpus_per_worker} if train.gpus_per_worker else resources


def _worker_environment(train: TrainConfig) -> dict[str, str]:
    """Variables that must be there before torch and DeepSpeed are imported."""
    # More threads than CPUs make workers wait for each other: ten times slower on two cores.
    variables = {"OMP_NUM_THREADS": str(_num_threads(train))}
    return variables if train.gpus_per_worker else {**variables, "DS_ACCELERATOR": "cpu"}


def _num_threads(train: TrainConfig) -> int:
    return max(1, int(train.cpus_per_worker))


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs."""
    # Ray Train logs every report past its own log level.
    logging.getLogger().setLevel(logging.WARNING)
    task: DraftTask = settings["task"]
    torch.set_num_threads(_num_threads(task.config.train))
    host = _RayHost.here()
    stream: FeatureStream | None = settings["stream"]
    open_source: SourceOpener = open_shards
    if stream is not None:
        if failure := _agreed(stream.failure(), host.world_size):
            return {"failed": failure}
        open_source = functools.partial(stream.open, rank=host.rank)
    try:
        figures = train(
            task, settings["output"], settings["run_id"], host, get_device(), open_source
        )
    except StageError as error:
        # All workers are here. Raised, it would be taken for a lost worker and tried again.
        return {"failed": error}
    finally:
        # The last checkpoint counts once the controller has taken note of it.
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
    return {**figures, "nodes": _count_nodes(host.world_size)}


def _agreed(failure: AerieError | None, world_size: int) -> AerieError | None:
    """The failure that any worker knows of: they must all stop, or the others would wait."""
    known: list[AerieError | None] = [None] * world_size
    torch.distributed.all_gather_object(known, failure)
    return next((found for found in known if found is not None), None)


def _count_nodes(world_size: int) -> int:
    nodes: list[str] = [""] * world_size
    torch.distributed.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return len(set(nodes))


@dataclass(frozen=True)
class _RayHost:
    """`core.train.loop.Host` on Ray Train."""

    rank: int
    world_size: int

    @classmethod
    def here(cls) -> _RayHost:
        context = ray.train.get_context()
        return cls(context.get_world_rank(), context.get_world_size())

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def keep_checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        # All workers report; only the first one has something to keep.
        with tempfile.TemporaryDirectory(prefix="aerie-") as folder:
            save(Path(folder))
            ray.train.report(
                {"step": step},
                checkpoint=Checkpoint.from_directory(folder) if self.rank == 0 else None,
                checkpoint_dir_name=f"step-{step:08d}",
            )


def _drop_broken_snapshot(run: Path) -> None:
    """Remove Ray Train's list of checkpoints if a kill cut it off while it was being written.

    Ray Train would refuse to start for ever; without the list it starts from the first step.
    """
    snapshot = run / SNAPSHOT
    try:
        json.loads(snapshot.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        say(STAGE, f"warning: {snapshot} was cut off; training starts from the first step")
        snapshot.unlink()


def _explain(error: Exception) -> Exception:
    """The user's error that a worker ran into, else a StageError that says what happened."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        # Ray Train wraps what a worker raised.
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, StreamBroken):
            return cause.error
        if isinstance(cause, UserError):
            return cause
    return StageError(
        f"training failed: {error}\nMore lost workers than train.max_failures; see the log above. "
        "The same command goes on from the last checkpoint."
    )


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


class _Follower(Watcher):
    """Prints progress from the metrics file, which a worker on any node may be writing.

    The driver prints, since what workers print arrives with a prefix and out of order.
    """

    def __init__(self, folder: Path, total_steps: int) -> None:
        super().__init__("follow metrics", SECONDS_BETWEEN_LOOKS)
        self._folder, self._total = folder, total_steps
        self._progress: Progress | None = None
        self._tokens = 0
        # What an interrupted run left is no progress of this one.
        self._seen = len(read_metrics(folder))

    def look(self) -> None:
        """See `Watcher`."""
        records = read_metrics(self._folder)
        if len(records) != self._seen:
            self._seen = len(records)
            self._show(records)

    def _show(self, records: list[dict[str, Any]]) -> None:
        trained = [record for record in records if "loss" in record]
        if not trained:
            return
        last = trained[-1]
        if self._progress is None:
            self._progress = Progress(STAGE, self._total, "steps", skipped=last["step"])
        elif last["step"] < self._progress.done:
            say(STAGE, f"a worker was lost; going on from step {last['step']}")
            self._progress = Progress(STAGE, self._total, "steps", skipped=last["step"])
        else:
            self._progress.advance(
                last["step"] - self._progress.done,
                _note(records),
                tokens=last["tokens"] - self._tokens,
            )
        self._tokens = last["tokens"]


def _note(records: list[dict[str, Any]]) -> str:
    """The latest metrics, in a few words."""
    latest: dict[str, Any] = {}
    for record in records[-20:]:
        latest.update(record)
    text = f"loss {latest['loss']:.3f} top-1 {latest['top1']:.3f}"
    if "held_out_top1" in latest:
        text += f" (held out {latest['held_out_top1']:.3f})"
    if ACCEPTED_LENGTH in latest:
        text += f" τ {latest[ACCEPTED_LENGTH]:.2f}"
    return text
