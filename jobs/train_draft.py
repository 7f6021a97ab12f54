"""Train a draft head on the target's features.

    python -m jobs.train_draft target.path=runs/target/model features.path=runs/features \\
        output=runs/draft
    python -m jobs.train_draft target.path=runs/target/model data.examples=runs/examples \\
        features.mode=stream output=runs/draft

Writes `head/`, the loss and accuracy curves, and checkpoints under `ray_train/`. Killed and run
again, it goes on from the last checkpoint, and the head is the one it would have been. The second
line streams the features from target replicas to the workers and stores none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.runtime import job
from core.runtime.training import (
    counted_sections,
    train_draft,
    training_inputs,
    training_resources,
)

JOB = job.Job(
    name="train_draft",
    summary="Train a draft head on features: Ray Train workers with a DeepSpeed engine each.",
    sections=("target", "data.examples", "features", "draft", "train", "tracking"),
    counted=counted_sections,
    inputs=training_inputs,
    run=train_draft,
    resources=training_resources,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
