"""Workers of Ray Train, whatever they train: started, replaced when lost, followed.

Ray Train starts the workers, replaces lost ones and keeps the checkpoints; the folder and the
name of its run are always the same, so that a new driver goes on where a killed one was.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointConsistencyMode,
    CheckpointUploadMode,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.config import LoggingConfig

from core.config import Config, TrainConfig
from core.errors import ResourceError, StageError, UserError
from core.progress import Progress, say
from core.runtime.checkpoints import mend_snapshot, write_checkpoint
from core.runtime.resources import check_placement
from core.runtime.streaming import StreamBroken
from core.runtime.watching import Watcher
from core.tracking import append_json_line, read_json_lines, read_metrics
from core.train.evaluation import ACCEPTED_LENGTH
from core.train.memory import is_out_of_memory

STORAGE = "ray_train"
FAILURES = "failures.jsonl"
SECONDS_BETWEEN_LOOKS = 1.0
# After which a run of fewer workers than it might have looks for nodes.
SECONDS_BETWEEN_RESIZES = 15.0
WATCHES_NODES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# Ray Train hands these on to its controller; what the user has set stays.
RAY_TRAIN_SETTINGS = {
    # The default of 2 adds seconds to the end of a run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of one run.

    Attributes:
        stage: the job's name, for what is printed.
        run: Ray Train's name of the run, below `ray_train`.
        output: the run's folder.
        train: how many workers, on what, and what is kept.
        advice: what helps where memory is short (`core.train.memory.memory_advice`).
    """

    stage: str
    run: str
    output: Path
    train: TrainConfig
    advice: str

    def fit(
        self, work: Callable[[dict[str, Any]], dict[str, Any]], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Run `work(settings)` on all workers; returns what the first one's came to.

        Args:
            work: importable by name; goes through `on_worker`.
            settings: for each.
        Raises:
            UserError: one that a worker ran into; at once.
            StageError: too many workers were lost, or `work` failed with one on all of them.
        """
        train, storage = self.train, self.output / STORAGE
        mend_snapshot(storage / self.run, self.stage)
        for name, value in RAY_TRAIN_SETTINGS.items():
            os.environ.setdefault(name, value)
        # What it adds, besides an error in every job's log, is wanted on announced losses alone.
        os.environ[WATCHES_NODES] = str(int(train.on_notice))
        trainer = TorchTrainer(
            work,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=_counts(train),
                elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
                use_gpu=train.gpus_per_worker > 0,
                resources_per_worker=_worker_resources(train),
                placement_strategy=train.placement.upper(),
            ),
            run_config=RunConfig(
                name=self.run,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=train.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
                worker_runtime_env={"env_vars": _worker_environment(train)},
                callbacks=[_FailureLog(self.output)],
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            outcome = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            raise explain(error, self.advice) from error
        if "failed" in outcome:
            raise outcome["failed"]
        return outcome


def check_workers(config: Config) -> None:
    """Make sure that the nodes can hold all workers as `train.placement` wants them.

    Raises:
        ResourceError: they cannot, and the cluster does not grow.
    """
    train = config.train
    bundle, count = (train.cpus_per_worker, train.gpus_per_worker), least_workers(train)
    bundles = [bundle] * count
    if train.placement == "strict_pack":
        bundles = [(count * bundle[0], count * bundle[1])]
    check_placement(
        bundles,
        config,
        f"{count} training workers (train.placement={train.placement})",
        apart=train.placement == "strict_spread",
    )


def least_workers(train: TrainConfig) -> int:
    """As many as there must be to begin."""
    return train.min_workers or train.num_workers


def on_worker(
    train: TrainConfig, advice: str, work: Callable[[RayHost, torch.device], dict[str, Any]]
) -> dict[str, Any]:
    """What each worker runs: `work`, and what all of them need round it.

    A result with the key `failed` is an error to be raised by the driver.
    Raises:
        ResourceError: the memory is used up; with `advice`.
    """
    # Ray Train logs every report past its own log level.
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(_num_threads(train))
    host = RayHost.here()
    try:
        figures = work(host, get_device())
    except StageError as error:
        # All workers are here. Raised, it would be taken for a lost worker and tried again.
        return {"failed": error}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The others wait for this one, and are told by its end.
        raise out_of_memory(f"worker {host.rank}: {error}", advice) from error
    finally:
        # The last checkpoint counts once the controller has taken note of it.
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
    if "failed" in figures:
        return figures
    return {**figures, "workers": host.world_size, "nodes": _count_nodes(host.world_size)}


def out_of_memory(what: str, advice: str) -> ResourceError:
    """What the user is told where memory is used up."""
    return ResourceError(
        f"not enough memory: {what.splitlines()[0]}\nWhat helps, the cheapest first: {advice}. "
        "The same command with one of these goes on from the last checkpoint"
    )


def _counts(train: TrainConfig) -> int | tuple[int, int]:
    if train.min_workers in (None, train.num_workers):
        return train.num_workers
    return (least_workers(train), train.num_workers)


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


def _count_nodes(world_size: int) -> int:
    nodes: list[str] = [""] * world_size
    torch.distributed.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return len(set(nodes))


@dataclass(frozen=True)
class RayHost:
    """`core.train.loop.Host` on Ray Train."""

    rank: int
    world_size: int

    @classmethod
    def here(cls) -> RayHost:
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

    def leaving(self) -> frozenset[str]:
        # A barrier, as Ray has it.
        info = ray.train.get_preemption_info()
        return frozenset() if info is None else frozenset(info.preempted_node_ids)

    def keep_checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        # All workers report; only the first one has something to keep.
        storage, name = ray.train.get_context().get_storage(), f"step-{step:08d}"
        kept = Path(storage.build_checkpoint_path_from_name(name))
        checkpoint = None
        if self.rank == 0:
            write_checkpoint(kept, save)
            checkpoint = Checkpoint(str(kept), storage.storage_filesystem)
        else:
            save(kept)
        # Ray Train's own copying into this folder, where the disk is full, has all workers wait
        # for ever for the first one's report.
        ray.train.report(
            {"step": step},
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )


def explain(error: Exception, advice: str) -> Exception:
    """The user's error that a worker ran into, else a StageError that says what happened.

    Args:
        error: Ray Train's.
        advice: for where Ray has ended a worker because its node ran out of memory.
    """
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, UserError):
        # See `_FailureLog`.
        return error.controller_failure
    for cause in _causes(getattr(error, "worker_failures", {})):
        if isinstance(cause, StreamBroken):
            return cause.error
        if isinstance(cause, ray.exceptions.OutOfMemoryError):
            return out_of_memory(str(cause), advice)
        if isinstance(cause, UserError):
            return cause
    return StageError(
        f"training failed: {error}\nMore lost workers than train.max_failures; see the log above. "
        "The same command goes on from the last checkpoint."
    )


def _causes(failures: Mapping[int, Exception]) -> list[Exception]:
    """What the workers raised, which Ray Train wraps."""
    return [getattr(failure, "_base_exc", failure) for failure in failures.values()]


class _FailureLog(UserCallback):
    """Writes `failures.jsonl` in the run's folder: when which workers failed, and of what.

    The controller calls it. Metrics do not tell: a run that makes up for what it lost between
    two looks at them seems never to have been disturbed.

    An error that the user has to mend ends the run here: a worker started anew would run into the
    same, up to `train.max_failures` times, and load the model for each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: dict[int, str] = {}

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """See `UserCallback`.

        Raises:
            ControllerError: with the user's error; Ray Train does not try again after one.
        """
        for cause in _causes(worker_exceptions):
            if isinstance(cause, UserError):
                raise ControllerError(cause)
        failures = {rank: str(error).strip() for rank, error in sorted(worker_exceptions.items())}
        # While Ray waits for an announced loss, it hands over the same failure at every look.
        if failures != self._last:
            append_json_line(self._folder / FAILURES, {"time": time.time(), "workers": failures})
        self._last = failures


class Follower(Watcher):
    """Prints progress from the metrics file, which a worker on any node may be writing.

    The driver prints, since what workers print arrives with a prefix and out of order.
    """

    def __init__(self, folder: Path, total_steps: int, stage: str) -> None:
        super().__init__("follow metrics", SECONDS_BETWEEN_LOOKS)
        self._folder, self._total, self._stage = folder, total_steps, stage
        self._progress: Progress | None = None
        self._tokens = 0
        # What an interrupted run left is no progress of this one.
        self._seen = len(read_metrics(folder))
        self._failures = len(read_json_lines(folder / FAILURES))

    def look(self) -> None:
        """See `Watcher`."""
        failures = read_json_lines(self._folder / FAILURES)
        for failure in failures[self._failures :]:
            say(self._stage, f"{_reason(failure)}; going on from the last checkpoint")
        self._failures = len(failures)
        records = read_metrics(self._folder)
        if len(records) != self._seen:
            self._seen = len(records)
            self._show(records)

    def _show(self, records: list[dict[str, Any]]) -> None:
        trained = [record for record in records if "loss" in record]
        if not trained:
            return
        last = trained[-1]
        if self._progress is None or last["step"] < self._progress.done:
            self._progress = Progress(self._stage, self._total, "steps", skipped=last["step"])
        else:
            self._progress.advance(
                last["step"] - self._progress.done,
                _note(records),
                tokens=last["tokens"] - self._tokens,
            )
        self._tokens = last["tokens"]


def _reason(failure: dict[str, Any]) -> str:
    """Which workers failed, and the first one's error in a line."""
    ranks, errors = ", ".join(failure["workers"]), list(failure["workers"].values())
    return f"lost worker {ranks} ({errors[0].splitlines()[-1] if errors[0] else 'no error'})"


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
