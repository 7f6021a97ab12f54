"""Write a draft head in the layout of another engine, or in Aerie's own in another dtype.

python -m jobs.export_draft --config configs/export_smollm2.yaml export.format=sglang
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.draft.export import OWN
from core.draft.formats import WRITABLE
from core.runtime import job
from core.runtime.exporting import export_draft, export_inputs

JOB = job.Job(
    name="export_draft",
    summary="Write a draft head (<output>/head) in the layout of another engine: "
    f"{', '.join(WRITABLE)}; or in Aerie's own ({OWN}), for instance in another dtype.",
    sections=("target", "draft", "export"),
    inputs=export_inputs,
    run=export_draft,
    uses_ray=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
