"""Train a draft head on the target's features.

    python -m jobs.train_draft target.path=runs/target/model features.path=runs/features \\
        output=runs/draft

Writes `head/`, the loss and accuracy curves, and checkpoints under `ray_train/`. Killed and run
again, it goes on from the last checkpoint, and the head is the one it would have been.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.runtime import job
from core.runtime.training import train_draft, training_inputs, training_resources

JOB = job.Job(
    name="train_draft",
    summary="Train a draft head on features: Ray Train workers with a DeepSpeed engine each.",
    sections=("draft", "train"),
    inputs=training_inputs,
    run=train_draft,
    resources=training_resources,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
