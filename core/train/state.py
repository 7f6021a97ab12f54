"""What a training run knows besides its weights: where it stands, and its metrics so far.

Everything random is a function of seed and step, so this small record and the engine's state are
all that a run needs to go on exactly.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core.paths import write_atomically
from core.tracking import read_metrics

FILE = "state.json"


@dataclass
class TrainState:
    """A position in a run; equal on all workers, times aside.

    Attributes:
        step: optimizer steps done.
        tokens: trained so far, padding not counted.
        seconds: spent in training steps so far, over all restarts.
        logged_tokens: `tokens` when metrics were last logged.
        logged_seconds: `seconds` when metrics were last logged.
        window: statistics of the steps since then, one list a step.
        initial_loss: of the first step.
        final_loss: of the steps last logged.
        held_out_first: metrics of an evaluation before the first step, where there was one.
        held_out: metrics of the latest evaluation, by name.
        best: those of the best evaluation so far.
        best_step: at which it was; 0 before the first one.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    logged_tokens: int = 0
    logged_seconds: float = 0.0
    window: list[list[float]] = field(default_factory=list)
    initial_loss: float | None = None
    final_loss: float | None = None
    held_out_first: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0

    def save(self, folder: Path) -> None:
        """Write `state.json`; floats survive exactly."""
        (folder / FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> TrainState:
        """Read `state.json`."""
        values: dict[str, Any] = json.loads((folder / FILE).read_text())
        return cls(**values)


def trim_metrics(folder: Path, last_step: int) -> None:
    """Drop records of steps after a checkpoint: the run that goes on from it writes them anew.

    A record cut off by the interruption goes too, and all where the run starts anew: it may begin
    with a record of step 0.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    records = read_metrics(folder) if last_step else []
    kept = [record for record in records if record["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
