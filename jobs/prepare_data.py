"""Clean conversations, tokenize them in the target's chat template, and hold some out.

    python -m jobs.prepare_data data.path=conversations.json target.path=/models/some \\
        output=/data/examples
    python -m jobs.prepare_data target.path=/models/some output=/data/examples --inspect 3
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.runtime import job
from core.runtime.preparation import (
    inspect_examples,
    preparation_inputs,
    preparation_resources,
    prepare,
    verify_examples_written,
)

JOB = job.Job(
    name="prepare_data",
    summary="Conversations to examples (tokens and loss mask) and held-out prompts.",
    sections=("target.path", "target.template", "data"),
    inputs=preparation_inputs,
    run=prepare,
    resources=preparation_resources,
    actions={
        "inspect": job.Action(
            "print N examples, what is learnt in green", inspect_examples, metavar="N"
        ),
        "verify": job.Action("read the examples again and check them", verify_examples_written),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
