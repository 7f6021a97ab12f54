"""The main job, end to end: conversations in, draft head out, its speedup measured.

    python -m jobs.quickstart --config configs/quickstart.yaml

Without a cluster it starts Ray on this machine and submits itself through Ray's jobs API, as

    ray job submit --working-dir . -- \\
        python -m jobs.quickstart --config configs/quickstart.yaml output=/shared/run

does on a cluster. Run again, it skips what is finished and goes on with the rest.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from core.config import Config
from core.runtime import chain, job
from core.runtime.training import start_head
from jobs import convert_model, evaluate_draft, extract_features, prepare_data, train_draft

STAGES = (
    convert_model.JOB,
    prepare_data.JOB,
    extract_features.JOB,
    train_draft.JOB,
    evaluate_draft.JOB,
)


def inputs(config: Config) -> dict[str, Path]:
    """What comes from outside: the target's checkpoint, the conversations, a head to start from."""
    return {**convert_model.JOB.inputs(config), **chain.data_input(config), **start_head(config)}


JOB = job.Job(
    name="quickstart",
    summary="The main job, end to end: convert_model → prepare_data → extract_features → "
    "train_draft → evaluate_draft, and a report.",
    sections=chain.SECTIONS,
    inputs=inputs,
    run=functools.partial(chain.run_chain, stages=STAGES),
    resources=chain.chain_resources,
    of_parts=True,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return chain.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
