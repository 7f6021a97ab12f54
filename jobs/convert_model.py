"""Turn a GGUF file into an HF folder that the other jobs read.

    python -m jobs.convert_model --config configs/convert_gguf.yaml \\
        convert.source=/models/some.gguf output=/models/some
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.runtime import job
from core.runtime.conversion import conversion_inputs, convert_model

JOB = job.Job(
    name="convert_model",
    summary="Turn a GGUF file into an HF folder (<output>/model) that the other jobs read.",
    sections=("convert",),
    inputs=conversion_inputs,
    run=convert_model,
    uses_ray=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
