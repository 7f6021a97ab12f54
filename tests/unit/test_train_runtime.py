"""What the driver of a training run makes of snapshots, failures and metrics."""

from __future__ import annotations

import json
import pickle
import re
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.train import CheckpointConfig, ControllerError, FailureConfig
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2.api.exceptions import WorkerGroupError

from core.config import Config
from core.errors import ConfigError, InputError, ResourceError, StageError, UserError
from core.runtime import checkpoints, workers
from core.runtime.streaming import StreamBroken
from core.tracking import append_json_line, read_json_lines
from core.train.tensor_file import float32_file
from jobs.train_draft import JOB
from tests.tiny_features import write_tiny_features

# Every write to it finds no room.
FULL_DISK = Path("/dev/full")


def test_inputs_are_named_when_they_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features\.path is not set"):
        JOB.inputs(Config())
    missing = Config().replace(features={"path": str(tmp_path / "none")})
    with pytest.raises(InputError, match=r"features\.path=.*none"):
        JOB.inputs(missing)


def test_resources_are_those_of_all_workers(tmp_path: Path) -> None:
    target, features = write_tiny_features(tmp_path, examples=4)
    config = Config().replace(
        target={"path": str(target)},
        features={"path": str(features)},
        train={"num_workers": 4, "cpus_per_worker": 2, "gpus_per_worker": 1},
    )
    needs = JOB.resources(config)
    assert (needs.cpus, needs.gpus) == (8, 4)
    assert 0 < needs.disk_gb < 0.01


def test_a_whole_snapshot_stays_and_a_broken_one_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.mend_snapshot(tmp_path, "train_draft")
    snapshot = tmp_path / checkpoints.SNAPSHOT
    snapshot.write_text('{"checkpoint_results": []}')
    checkpoints.mend_snapshot(tmp_path, "train_draft")
    assert snapshot.exists()
    assert not capsys.readouterr().out
    snapshot.write_text('{"checkpoint_res')
    checkpoints.mend_snapshot(tmp_path, "train_draft")
    assert not snapshot.exists()
    assert "was cut off" in capsys.readouterr().out


def _run_of_three(folder: Path) -> StorageContext:
    """A run with its snapshot, as Ray Train leaves them."""
    storage = StorageContext(str(folder), "draft")
    results: list[dict[str, Any]] = [
        {"checkpoint_dir_name": f"step-{step:08d}", "metrics": {"step": step}}
        for step in (10, 20, 30)
    ]
    for result in results:
        (folder / "draft" / result["checkpoint_dir_name"]).mkdir(parents=True)
    state = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": [1, 2, 3],
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 4,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    (folder / "draft" / checkpoints.SNAPSHOT).write_text(json.dumps(state))
    return storage


@pytest.mark.parametrize(
    ("removed", "latest", "said"),
    [
        ((), 30, ""),
        ((30,), 20, "step-00000030 of .* was removed; training goes on from step-00000020"),
        ((20,), 30, "step-00000020 of .* goes on from step-00000030"),
        ((10, 20, 30), None, "was removed; training starts from the first step"),
    ],
)
def test_ray_train_goes_on_without_removed_checkpoints(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    removed: tuple[int, ...],
    latest: int | None,
    said: str,
) -> None:
    storage = _run_of_three(tmp_path)
    for step in removed:
        (tmp_path / "draft" / f"step-{step:08d}").rmdir()
    checkpoints.mend_snapshot(tmp_path / "draft", "train_draft")
    assert re.search(said, capsys.readouterr().out)
    manager = CheckpointManager(CheckpointConfig(num_to_keep=3), storage)
    found = manager.latest_checkpoint_result
    assert (None if found is None else found.metrics["step"]) == latest
    assert len(manager.best_checkpoint_results) == 3 - len(removed)


def test_a_checkpoint_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    kept = tmp_path / "step-00000010"
    for left in (kept, tmp_path / checkpoints.UNFINISHED):
        left.mkdir()
        (left / "of a killed worker").touch()

    def save(folder: Path) -> None:
        assert not kept.exists()
        (folder / "state.json").write_text("{}")

    checkpoints.write_checkpoint(kept, save)
    assert list(tmp_path.iterdir()) == [kept]
    assert [file.name for file in kept.iterdir()] == ["state.json"]


def test_a_full_disk_is_named_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        (folder / "state.json").write_text("{}")
        FULL_DISK.write_text("weights")

    with pytest.raises(ResourceError, match=r"step-00000010: cannot be written \(No space left"):
        checkpoints.write_checkpoint(tmp_path / "step-00000010", save)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_by_a_file_of_weights() -> None:
    def save() -> None:
        with float32_file(FULL_DISK, {"weight": (4, 1024)}, {}) as write:
            write("weight", torch.zeros(4, 1024))

    with pytest.raises(ResourceError, match=r"/dev/full: cannot be written \(No space left"):
        save()


def test_a_users_error_in_a_worker_is_the_users() -> None:
    cause = InputError("shard-00000 is damaged")
    lost: dict[int, Exception] = {
        0: RuntimeError("connection closed by peer"),
        1: UserExceptionWithTraceback(cause, "Traceback …"),
    }
    assert workers.explain(WorkerGroupError("two workers failed", lost), "") is cause
    broken = StreamBroken(StageError("a target replica failed: out of memory"))
    lost[1] = UserExceptionWithTraceback(pickle.loads(pickle.dumps(broken)), "Traceback …")
    explained = workers.explain(WorkerGroupError("two workers failed", lost), "")
    assert isinstance(explained, StageError)
    assert str(explained) == "a target replica failed: out of memory"
    explained = workers.explain(WorkerGroupError("died", {0: lost[0]}), "")
    assert isinstance(explained, StageError)
    assert "the last checkpoint" in str(explained)


@pytest.mark.parametrize("cause", [InputError("it is damaged"), ResourceError("disk is full")])
def test_a_users_error_ends_the_run_at_once(tmp_path: Path, cause: UserError) -> None:
    """However many lost workers are survived, and whatever befell the others."""
    log, policy = workers._FailureLog(tmp_path), DefaultFailurePolicy(FailureConfig(-1))
    lost: dict[int, Exception] = {0: RuntimeError("connection closed by peer")}
    log.after_exception(None, lost)
    assert policy.make_decision(WorkerGroupError("lost", lost)) is FailureDecision.RETRY
    assert len(read_json_lines(tmp_path / workers.FAILURES)) == 1
    lost[1] = UserExceptionWithTraceback(cause, "Traceback …")
    with pytest.raises(ControllerError) as ended:
        log.after_exception(None, lost)
    assert policy.make_decision(ended.value) is FailureDecision.RAISE
    assert len(read_json_lines(tmp_path / workers.FAILURES)) == 1, "nothing goes on"
    explained = workers.explain(pickle.loads(pickle.dumps(ended.value)), "")
    assert (type(explained), str(explained)) == (type(cause), str(cause))


def _records(*steps: int) -> list[dict[str, Any]]:
    return [{"step": s, "loss": 2.0, "top1": 0.25, "tokens": 100 * s} for s in steps]


def test_progress_follows_the_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.progress.SECONDS_BETWEEN_LINES", 0.0)
    follower = workers.Follower(tmp_path, total_steps=40, stage="train_draft")
    follower._show(_records(1))
    follower._show([*_records(1, 10), {"step": 10, "held_out_loss": 1.0, "held_out_top1": 0.125}])
    line = capsys.readouterr().out
    assert "10/40 steps" in line
    assert "loss 2.000 top-1 0.250 (held out 0.125)" in line
    failure = {"time": 0.0, "workers": {"1": "it died\nby a signal"}}
    append_json_line(tmp_path / workers.FAILURES, failure)
    follower.look()
    said = capsys.readouterr().out
    assert "lost worker 1 (by a signal); going on from the last checkpoint" in said
    follower._show(_records(1, 5))
    follower._show(_records(1, 5, 15))
    assert "15/40 steps" in capsys.readouterr().out


def test_what_an_earlier_run_left_is_no_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SECONDS_BETWEEN_LOOKS", 0.01)
    lines = "".join(json.dumps(record) + "\n" for record in _records(1, 10))
    (tmp_path / "metrics.jsonl").write_text(lines)
    with workers.Follower(tmp_path, total_steps=40, stage="train_draft") as follower:
        time.sleep(0.2)
        assert follower._progress is None
        assert not capsys.readouterr().out
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_records(20)[0]) + "\n")
        time.sleep(0.2)
        assert follower._progress is not None
