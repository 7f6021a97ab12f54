"""Measure what a draft head brings: accepted length, speedup, losslessness.

    python -m jobs.evaluate_draft --config configs/evaluate_smollm2.yaml \\
        draft.path=runs/quickstart/draft/head output=runs/evaluation
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.evaluate.page import print_table
from core.runtime import job
from core.runtime.evaluation import evaluate_draft, evaluation_inputs, evaluation_resources

JOB = job.Job(
    name="evaluate_draft",
    summary="Measure a draft head: accepted length, speedup over Aerie's own autoregressive "
    "decode, and whether every output is the target's.",
    sections=("target", "draft", "decode", "eval"),
    inputs=evaluation_inputs,
    run=evaluate_draft,
    resources=evaluation_resources,
    show=print_table,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
