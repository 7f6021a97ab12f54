from __future__ import annotations

from pathlib import Path

import pytest

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
        log = MetricLog(folder, TrackingConfig(), "run-id")
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
    log = MetricLog(tmp_path, TrackingConfig(), "run-id")
    log.log(step=0)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]
    log = MetricLog(tmp_path, TrackingConfig(), "run-id")
    log.log(step=1)
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_wandb_offline_keeps_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = MetricLog(tmp_path, TrackingConfig(wandb="offline", project="tests"), "some-run-id")
    log.log(step=3, loss=0.5)
    log.close()
    assert _values(tmp_path) == [{"step": 3, "loss": 0.5}]
    (kept,) = tmp_path.glob("wandb/offline-run-*-some-run-id/*.wandb")
    assert kept.stat().st_size > 0
