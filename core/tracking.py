"""Metric sinks: a JSONL file always, Weights & Biases where it is wanted."""

from __future__ import annotations

import json
import netrc
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from core.config import TrackingConfig

Mode = Literal["online", "offline"]


class MetricLog:
    """Appends metrics to `<folder>/metrics.jsonl`, one JSON object a line, and to W&B.

    A W&B that cannot be reached is a warning: the run goes on, the JSONL has everything.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        run_id: str,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the sinks.

        Args:
            folder: of the run.
            config: where metrics go.
            run_id: the same one continues the same W&B run.
            about: config values and versions, for W&B; `run.yaml` has them otherwise.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _drop_cut_off_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._wandb: Any = _start_wandb(folder, config, run_id, about or {})

    def log(self, **metrics: Any) -> None:
        """Write one record; `step` is the optimizer step where there is one."""
        self._file.write(json.dumps({"time": round(time.time(), 3), **metrics}) + "\n")
        self._file.flush()
        # W&B's own step may not go back, as ours does when a run goes on from a checkpoint.
        self._tell_wandb(lambda run: run.log(metrics))

    def close(self) -> None:
        """Flush all sinks."""
        self._file.close()
        self._tell_wandb(lambda run: run.finish())

    def _tell_wandb(self, what: Callable[[Any], None]) -> None:
        if self._wandb is None:
            return
        try:
            what(self._wandb)
        except Exception as error:
            # Whatever goes wrong there, of which W&B has many kinds, is no reason to stop.
            warnings.warn(f"Weights & Biases is off from here: {error}", stacklevel=2)
            self._wandb = None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete records of a folder's `metrics.jsonl`; none if there is no such file."""
    return read_json_lines(folder / "metrics.jsonl")


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """One more record in a file with a JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete records of a file that may still be written to; none if there is none."""
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


def _start_wandb(
    folder: Path, config: TrackingConfig, run_id: str, about: Mapping[str, Any]
) -> Any:
    """A W&B run: online, or offline where it was asked for or cannot be reached, or None."""
    if config.wandb == "disabled":
        return None
    import wandb

    online = config.wandb == "online"
    if config.wandb == "auto":
        online = _has_key(wandb.setup().settings.base_url)
    modes: tuple[Mode, ...] = ("online", "offline") if online else ("offline",)
    for mode in modes:
        try:
            run = _init_wandb(folder, config, run_id, about, mode)
        except Exception as error:
            what = "goes on offline" if mode != modes[-1] else "is off"
            warnings.warn(f"Weights & Biases {what}: {error}", stacklevel=2)
            # Its service still holds on to the run that it could not start.
            wandb.teardown()
        else:
            return run
    return None


def _init_wandb(
    folder: Path, config: TrackingConfig, run_id: str, about: Mapping[str, Any], mode: Mode
) -> Any:
    import wandb

    run = wandb.init(
        project=config.project,
        dir=str(folder),
        mode=mode,
        # The same id and resume="allow": a run that goes on is one run in W&B too.
        id=run_id,
        resume="allow",
        config=dict(about),
        settings=wandb.Settings(
            init_timeout=config.wandb_seconds,
            login_timeout=config.wandb_seconds,
            finish_timeout=config.wandb_seconds,
            silent=True,
            # What the worker prints is the job's log, not the run's.
            console="off",
        ),
    )
    run.define_metric("*", step_metric="step")
    return run


def _has_key(address: str) -> bool:
    """Whether W&B finds an API key for a server: in the environment, or where login puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(address).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        # No such file is the usual case; one that cannot be read gives W&B no key either.
        return False
