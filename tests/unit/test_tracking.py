from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

import pytest
import wandb
from tensorboardX.proto.event_pb2 import Event

from core import tracking
from core.config import TrackingConfig
from core.tracking import MetricLog, read_metrics


def _values(folder: Path) -> list[dict]:
    records = read_metrics(folder)
    assert all(record.pop("time") > 1.6e9 for record in records)
    return records


def test_records_are_appended_and_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert read_metrics(folder) == []
    for step in range(2):
        log = MetricLog(folder, TrackingConfig(wandb="disabled"), "run-id")
        log.log(step=step, loss=0.5, split="train")
        # At once, so that who follows the file sees it.
        assert len(read_metrics(folder)) == step + 1
        log.close()
    assert _values(folder) == [
        {"step": 0, "loss": 0.5, "split": "train"},
        {"step": 1, "loss": 0.5, "split": "train"},
    ]
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("rest", ['{"step": 1, "lo', '{"step": 1, "sizes": {"a": 1}', "{"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, rest: str) -> None:
    log = MetricLog(tmp_path, TrackingConfig(wandb="disabled"), "run-id")
    log.log(step=0)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]
    log = MetricLog(tmp_path, TrackingConfig(wandb="disabled"), "run-id")
    log.log(step=1)
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


@pytest.fixture(autouse=True)
def _fresh_wandb() -> None:
    """It reads the environment once a process."""
    wandb.teardown()


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No API key in the environment, nor in a file of `wandb login`."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def _offline_runs(folder: Path, run_id: str) -> list[bytes]:
    return [path.read_bytes() for path in folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb")]


@pytest.mark.usefixtures("no_key")
def test_without_a_key_wandb_is_offline_and_a_run_goes_on_as_one(tmp_path: Path) -> None:
    about = {"config": {"train": {"lr": 0.25}}, "code": {"git": "0123abcd"}}
    # Back to an earlier step, as after a kill.
    for steps in ((10, 20), (10, 20, 30)):
        log = MetricLog(tmp_path, TrackingConfig(project="tests"), "some-run-id", about)
        for step in steps:
            log.log(step=step, some_loss=0.5)
        log.close()
        # W&B names a run's folder by the second.
        time.sleep(1.1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 20, 10, 20, 30]
    kept = _offline_runs(tmp_path, "some-run-id")
    assert len(kept) == 2
    for content, least in zip(sorted(kept, key=len), (2, 3), strict=True):
        # Protocol buffers, in which texts stand as they are.
        assert content.count(b"some_loss") >= least
        assert b"0123abcd" in content and b"0.25" in content


def test_disabled_writes_nothing_but_the_file(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, TrackingConfig(wandb="disabled"), "some-run-id")
    log.log(step=1)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.usefixtures("no_key")
def test_online_without_a_key_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"goes on offline: No API key configured"):
        log = MetricLog(tmp_path, TrackingConfig(wandb="online"), "keyless")
    log.log(step=3, loss=0.5)
    log.close()
    assert _values(tmp_path) == [{"step": 3, "loss": 0.5}]
    assert len(_offline_runs(tmp_path, "keyless")) == 1


def test_an_unreachable_wandb_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key `auto` is online; nothing listens at this port of this machine."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    with pytest.warns(UserWarning, match=rf"(?s)goes on offline: .*127\.0\.0\.1:{port}"):
        log = MetricLog(tmp_path, TrackingConfig(wandb_seconds=2.0), "unreachable")
    log.log(step=3, loss=0.5)
    log.close()
    assert _values(tmp_path) == [{"step": 3, "loss": 0.5}]
    assert len(_offline_runs(tmp_path, "unreachable")) == 1


@pytest.mark.usefixtures("no_key")
def test_a_wandb_that_breaks_later_is_a_warning(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, TrackingConfig(), "breaks")
    log._wandb.finish()
    with pytest.warns(UserWarning, match="off from here"):
        log.log(step=1, loss=0.5)
    log.log(step=2, loss=0.25)
    log.close()
    assert [record["loss"] for record in read_metrics(tmp_path)] == [0.5, 0.25]


def test_a_key_of_wandb_login_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    address = "https://api.example.org"
    assert not tracking._has_key(address)
    file = tmp_path / ".netrc"
    file.write_text("machine api.example.org login user password 0123\n")
    file.chmod(0o600)
    assert tracking._has_key(address)
    assert not tracking._has_key("https://elsewhere.example.org")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert tracking._has_key("https://elsewhere.example.org")


def test_tensorboards_files_have_the_metrics(tmp_path: Path) -> None:
    """What a killed run wrote behind its last checkpoint is marked as void by the next."""
    config = TrackingConfig(wandb="disabled", tensorboard=True)
    for first_step, loss in ((0, 3.0), (1, 2.0)):
        log = MetricLog(tmp_path, config, "run-id", first_step=first_step)
        for step in range(first_step + 1, 4):
            log.log(step=step, loss=loss, split="train")
        log.close()
    found, starts = [], []
    for file in sorted((tmp_path / tracking.TENSORBOARD).glob("events.out.tfevents.*")):
        for event in _events(file):
            if event.HasField("session_log"):
                starts.append(event.step)
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    assert starts == [2]
    assert found == [(1, "loss", 3.0), (2, "loss", 3.0), (3, "loss", 3.0),
                     (2, "loss", 2.0), (3, "loss", 2.0)]  # fmt: skip


def _events(file: Path) -> list[Event]:
    """Records of length, its checksum, the event, and its checksum."""
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    return found
