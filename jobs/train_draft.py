"""Train a draft head on the target's features.

    python -m jobs.train_draft target.path=runs/target/model features.path=runs/features \\
        output=runs/draft
    python -m jobs.train_draft target.path=runs/target/model data.examples=runs/examples \\
        features.mode=stream output=runs/draft

Writes `head/` (of the evaluation with the largest accepted length; train.keep=last takes the last
step's), curves of loss, accuracy and accepted length, `wandb/`, and checkpoints under `ray_train/`.
Killed and run again, it goes on from the last checkpoint, and the head is the one it would have
been; with another train.num_workers too, where it is the same up to rounding. The second line
streams the features from target replicas to the workers and stores none of them.
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
    summary="Train a draft head on features: Ray Train workers, with DeepSpeed or plain DDP.",
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
