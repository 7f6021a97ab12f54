"""What a run remembers, its metrics after a restart, its plots."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import image

from core.tracking import read_metrics
from core.train.curves import plot_curves, series
from core.train.state import TrainState, trim_metrics


def _write(folder: Path, records: list[dict[str, float]], tail: str = "") -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + tail)


def test_state_survives_exactly(tmp_path: Path) -> None:
    state = TrainState(
        step=7,
        tokens=123,
        seconds=0.1 + 0.2,
        window=[[1 / 3, 2.0], [1e-300, 5e17]],
        initial_loss=2 / 3,
        held_out={"held_out_loss": 1 / 7},
        best={"held_out_loss": 1 / 9},
        best_step=5,
    )
    state.save(tmp_path)
    assert TrainState.load(tmp_path) == state


def test_records_beyond_the_checkpoint_go(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 1.0 / step} for step in (1, 10, 10, 20, 30)]
    _write(tmp_path, records, tail='{"step": 40, "lo')
    trim_metrics(tmp_path, last_step=10)
    assert read_metrics(tmp_path) == records[:3]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


def test_a_run_from_the_start_drops_all_records(tmp_path: Path) -> None:
    _write(tmp_path, [{"step": 1, "loss": 1.0}])
    trim_metrics(tmp_path, last_step=0)
    assert read_metrics(tmp_path) == []


def test_no_metrics_yet_is_fine(tmp_path: Path) -> None:
    trim_metrics(tmp_path, last_step=0)
    assert list(tmp_path.iterdir()) == []


def test_series_takes_the_records_that_have_the_metric() -> None:
    records = [
        {"step": 1, "loss": 3.0},
        {"step": 1, "held_out_loss": 4.0},
        {"step": 2, "loss": 2.0},
    ]
    assert series(records, "loss") == ([1, 2], [3.0, 2.0])
    assert series(records, "held_out_loss") == ([1], [4.0])


def test_plots_are_pictures(tmp_path: Path) -> None:
    training = {"loss": 2.0, "top1": 0.1, "top2": 0.2, "top3": 0.3}
    _write(
        tmp_path,
        [
            {"step": 1, **training},
            {"step": 10, **training},
            {"step": 10, **{f"held_out_{name}": value for name, value in training.items()}},
        ],
    )
    plot_curves(tmp_path)
    assert not (tmp_path / "accepted_length.png").exists()
    accepted = {"held_out_accepted_length": 1.5, "held_out_accepted_depth_1": 0.4}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "tokens": 500, **accepted}) + "\n")
    plot_curves(tmp_path)
    for name in ("loss.png", "accuracy.png", "accepted_length.png"):
        height, width, _ = image.imread(tmp_path / name).shape
        assert (width, height) == (840, 480)
