"""Train the target itself further: whole, or by adapters.

    python -m jobs.finetune_target --config configs/finetune_smoke.yaml
    python -m jobs.finetune_target target.path=runs/target/model data.examples=runs/examples \\
        finetune.method=qlora train.parallelism=ddp train.lr=2e-4 output=runs/finetuned

Writes `model/`, an HF folder that every other job takes as target.path (adapters are merged into
it), with adapters also `adapter/`, peft's own folder; curves, `wandb/`, and checkpoints under
`ray_train/`. The loss is that of the assistant's tokens alone. Killed and run again, it goes on
from the last checkpoint, with another train.num_workers too. Without target.path it converts
convert.source first, without data.examples it prepares data.path, both in its own folder.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from core.runtime import job
from core.runtime.finetuning import (
    counted_sections,
    finetune_target,
    finetuning_inputs,
    finetuning_resources,
)
from jobs import prepare_data

JOB = job.Job(
    name="finetune_target",
    summary="Train the target itself further, whole or by LoRA adapters, on Ray Train workers.",
    sections=("convert", "target", "data", "finetune", "train", "tracking"),
    counted=counted_sections,
    inputs=finetuning_inputs,
    run=functools.partial(finetune_target, preparation=prepare_data.JOB),
    resources=finetuning_resources,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
