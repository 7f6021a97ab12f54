"""Start a server, put it under load, and say what came of it.

    python -m jobs.load_test --config configs/load_smollm2.yaml load.name=soak
    python -m jobs.load_test --config configs/load_smollm2.yaml load.name=overload
    python -m jobs.load_test --config configs/load_smollm2.yaml load.name=comparison
    python -m jobs.load_test --config configs/load_autoscaling.yaml

Prints a table, and of each promise whether it was kept; `report.json` has all figures. The server
is `python -m serve.run` with the sections target, draft, decode and serve.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.runtime import job
from core.runtime.load_test import load_inputs, load_resources, run_load_test, show

JOB = job.Job(
    name="load_test",
    summary="Start a server and put it under load (load.name).",
    sections=("load", "convert", "target", "draft", "decode", "serve"),
    inputs=load_inputs,
    run=run_load_test,
    resources=load_resources,
    uses_ray=False,
    show=show,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
