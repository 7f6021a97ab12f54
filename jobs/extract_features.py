"""Run the target over the examples and store its features, which the draft head learns from.

    python -m jobs.extract_features target.path=runs/target/model data.examples=runs/examples \\
        output=runs/features

Writes `manifest.json` and, for each example shard, `<split>/shard-NNNNN.safetensors` with a
sidecar that marks it as finished. Killed and run again, it goes on with the shards that are left.
`features.layers=eagle3` takes three more layers, `features.dtype=int8` half the disk.

    --inspect 3    print shapes and norms of three examples of each split
    --verify       check every checksum, and some examples against a fresh pass of the target
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.runtime import job
from core.runtime.extraction import extract_features, extraction_inputs, extraction_resources
from core.runtime.feature_checks import inspect_features, verify_features

JOB = job.Job(
    name="extract_features",
    summary="Store the target's hidden states for every example, sharded, on a pool of replicas.",
    sections=("data.examples", "target", "features"),
    inputs=extraction_inputs,
    run=extract_features,
    resources=extraction_resources,
    actions={
        "inspect": job.Action("print N examples of each split", inspect_features, "N"),
        "verify": job.Action("check the features that are there", verify_features),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return job.main(JOB, argv)


if __name__ == "__main__":
    sys.exit(main())
