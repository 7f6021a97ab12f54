"""Checkpoints in the folder of a Ray Train run: written whole, and its list of them mended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.paths import TEMPORARY, folder_written_aside, write_atomically
from core.progress import say

# Ray Train's list of those it knows.
SNAPSHOT = "checkpoint_manager_snapshot.json"
# A checkpoint that is being written.
UNFINISHED = f".checkpoint{TEMPORARY}"


def write_checkpoint(kept: Path, save: Callable[[Path], None]) -> None:
    """Have `save` fill a folder, which has its name once it is whole.

    Raises:
        ResourceError: the disk is full; nothing is left behind.
    """
    # Of a killed worker: it is not in Ray Train's list, and takes up room.
    shutil.rmtree(kept, ignore_errors=True)
    # One name for all, so that what a killed worker has left goes too.
    with folder_written_aside(kept, aside=kept.with_name(UNFINISHED)) as folder:
        save(folder)


def mend_snapshot(run: Path, stage: str) -> None:
    """Make Ray Train's list of checkpoints one that it starts with, whatever has become of them.

    It would refuse for ever a list that a kill cut off while it was being written, and one that
    names a checkpoint which the user has removed because it was damaged.
    """
    snapshot = run / SNAPSHOT
    try:
        content: dict[str, Any] = json.loads(snapshot.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        say(stage, f"warning: {snapshot} was cut off; training starts from the first step")
        snapshot.unlink()
        return
    names = [result["checkpoint_dir_name"] for result in content["checkpoint_results"]]
    missing = [name for name in names if not (run / name).exists()]
    if not missing:
        return
    gone = f"warning: {', '.join(missing)} of {run} was removed; training"
    if len(missing) == len(names):
        say(stage, f"{gone} starts from the first step")
        snapshot.unlink()
        return
    _forget(content, missing)
    say(stage, f"{gone} goes on from {content['checkpoint_results'][-1]['checkpoint_dir_name']}")
    write_atomically(snapshot, json.dumps(content).encode())


def _forget(content: dict[str, Any], names: Sequence[str]) -> None:
    """Take checkpoints out of Ray Train's list; some are left."""
    results, indices = content["checkpoint_results"], content["checkpoint_report_indices"]
    kept = [
        (result, index)
        for result, index in zip(results, indices, strict=True)
        if result["checkpoint_dir_name"] not in names
    ]
    content["checkpoint_results"] = [result for result, _ in kept]
    content["checkpoint_report_indices"] = [index for _, index in kept]
    # They stand in the order in which they were reported.
    content["latest_checkpoint_result"] = kept[-1][0]
