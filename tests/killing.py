"""Killing training runs at random steps, and seeing where they stand."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil

from core.runtime.checkpoints import SNAPSHOT
from core.tracking import read_metrics

PATIENCE_SECONDS = 900


def last_step(folder: Path) -> int:
    """Of the metrics so far."""
    return max((record["step"] for record in read_metrics(folder)), default=0)


def wait_for_step(folder: Path, step: int, driver: subprocess.Popen[bytes]) -> None:
    """Wait until a run has got there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while last_step(folder) < step:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline, f"not at step {step} after {PATIENCE_SECONDS} s"
        time.sleep(0.05)


class RankKiller(threading.Thread):
    """Kills rank 1 at random steps: each time after progress beyond the kill before."""

    def __init__(self, folder: Path, times: int, checkpoint_every: int) -> None:
        """Of a run of two workers below this process, which may not have begun yet."""
        super().__init__(daemon=True)
        self.folder, self.times, self.every = folder, times, checkpoint_every
        self.killed_after: list[int] = []
        self.start()

    def run(self) -> None:
        """Until it has killed so often, or patience ends."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        # Far enough for a new checkpoint, which the run goes on from.
        step = last_step(self.folder) + random.randint(self.every, 2 * self.every)
        while len(self.killed_after) < self.times and time.monotonic() < deadline:
            time.sleep(0.02)
            if last_step(self.folder) < step:
                continue
            victim = _rank_1(self.folder)
            if victim is None:
                continue
            os.kill(victim, signal.SIGKILL)
            self.killed_after.append(last_step(self.folder))
            step = self.killed_after[-1] + random.randint(10, self.every)


def _rank_1(folder: Path) -> int | None:
    """The process that trains and does not write the metrics; None unless both are there."""
    ranks: dict[int, int] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                files = {file.path for file in process.open_files()}
                ranks[0 if str(folder / "metrics.jsonl") in files else 1] = process.pid
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            # It is ending.
            continue
    return ranks[1] if ranks.keys() == {0, 1} else None


def last_checkpoint(output: Path, run: str) -> int:
    """The step of the newest one that Ray Train knows of."""
    snapshot = json.loads((output / "ray_train" / run / SNAPSHOT).read_text())
    return int(snapshot["latest_checkpoint_result"]["metrics"]["step"])
