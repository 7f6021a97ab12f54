"""Have the target answer the user's turns of conversations itself: what its draft head learns best.

    python -m jobs.regenerate_responses data.path=conversations.json target.path=/models/some \\
        output=/data/answers
    python -m jobs.regenerate_responses generate.synthesize=10000 target.path=/models/some \\
        output=/data/answers

Writes `conversations.jsonl`, which prepare_data reads, from `shards/`. Killed and run again, it
goes on with the shards that are left. The second line needs no data: the target makes the prompts
up too.

    --inspect 3    print three conversations, the target's words in green
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.runtime import job
from core.runtime.generation import (
    generation_inputs,
    generation_resources,
    inspect_conversations,
    regenerate_responses,
)

JOB = job.Job(
    name="regenerate_responses",
    summary="Have the target answer every user turn itself, on a pool of replicas; without data, "
    "have it make up the prompts too.",
    sections=("target", "data", "generate"),
    inputs=generation_inputs,
    run=regenerate_responses,
    resources=generation_resources,
    actions={
        "inspect": job.Action("print N conversations", inspect_conversations, metavar="N"),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
