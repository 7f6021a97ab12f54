"""Measure ways of doing one thing side by side, in one run, in turn.

    python -m jobs.benchmark --config configs/benchmark_extraction.yaml
    python -m jobs.benchmark --config configs/benchmark_training.yaml

Prints a table and writes `report.json`: for every way its figures, and their ratios, each with
the least, median and largest of all repeats. Figures of different runs do not compare: a machine
drifts by more than most improvements. `overwrite=true` measures again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.runtime import benchmark, job

JOB = job.Job(
    name="benchmark",
    summary="Compare ways of doing one thing (benchmark.name) side by side in one run.",
    sections=("benchmark", "target", "data.examples", "features", "draft", "train"),
    counted=benchmark.sections,
    inputs=benchmark.inputs,
    run=benchmark.run,
    resources=benchmark.resources,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
