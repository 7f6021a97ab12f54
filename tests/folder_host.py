"""A host of the training loop that is no Ray Train."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class FolderHost:
    """Keeps checkpoints in a folder; stops the run after one of them, as a kill would."""

    folder: Path
    stop_after: int | None = None
    rank: int = 0
    world_size: int = 1

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        kept = sorted(self.folder.glob("step-*"))
        yield kept[-1] if kept else None

    def leaving(self) -> frozenset[str]:
        return frozenset()

    def keep_checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        kept = self.folder / f"step-{step:08d}"
        if self.rank == 0:
            kept.mkdir(parents=True)
            save(kept)
        else:
            with tempfile.TemporaryDirectory() as nowhere:
                save(Path(nowhere))
                assert not list(Path(nowhere).iterdir()), "only the first worker writes"
        torch.distributed.barrier()
        if step == self.stop_after:
            raise KeyboardInterrupt
