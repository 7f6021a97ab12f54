"""Metric sinks: a JSONL file always, Weights & Biases where it is asked for."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

from core.config import TrackingConfig


class MetricLog:
    """Appends metrics to `<folder>/metrics.jsonl`, one JSON object a line, and to W&B.

    A W&B that cannot be reached is a warning: the run goes on, the JSONL has everything.
    """

    def __init__(self, folder: Path, config: TrackingConfig, run_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _drop_cut_off_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._wandb: Any = _start_wandb(folder, config, run_id)

    def log(self, **metrics: Any) -> None:
        """Write one record; `step` is the optimizer step where there is one."""
        self._file.write(json.dumps({"time": round(time.time(), 3), **metrics}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=metrics.get("step"))

    def close(self) -> None:
        """Flush all sinks."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete records of a folder's `metrics.jsonl`; none if there is no such file."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    # What stands behind the last line break was cut off.
    return [json.loads(line) for line in lines[:-1]]


def _drop_cut_off_line(path: Path) -> None:
    """A line that a killed run did not finish would swallow the next one."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _start_wandb(folder: Path, config: TrackingConfig, run_id: str) -> Any:
    if config.wandb == "disabled":
        return None
    import wandb

    try:
        # The same id and resume="allow": a run that goes on is one run in W&B too.
        return wandb.init(
            project=config.project, dir=str(folder), mode=config.wandb, id=run_id, resume="allow"
        )
    except (wandb.errors.Error, OSError) as error:
        warnings.warn(f"Weights & Biases is off: {error}", stacklevel=2)
        return None
