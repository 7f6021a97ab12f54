"""Turn a GGUF file, or adapters and their base, into an HF folder that the other jobs read.

    python -m jobs.convert_model --config configs/convert_gguf.yaml \\
        convert.source=/models/some.gguf output=/models/some
    python -m jobs.convert_model convert.source=runs/finetuned/adapter output=runs/merged
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.runtime import conversion, job

JOB = conversion.JOB


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
