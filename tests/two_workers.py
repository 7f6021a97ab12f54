"""Processes that stay, joined by gloo: workers for tests without Ray."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PATIENCE_SECONDS = 240
# What takes seconds to import, done once for all processes, which are copies of one that has.
IMPORTS = ("deepspeed.pipe", "core.train.finetune", "core.train.deepspeed_engine", "peft")


class TwoWorkers:
    """Calls functions in all at the same time; they must be importable by name."""

    count = 2

    def __init__(self, folder: Path) -> None:
        # DeepSpeed reads it when it is imported.
        os.environ["DS_ACCELERATOR"] = "cpu"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTS])
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(self.count):
            here, there = context.Pipe()
            about = (rank, self.count, folder / "group", there)
            process = context.Process(target=_work, args=about)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(rank, *arguments)` in each; the results in the order of ranks."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        found = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(PATIENCE_SECONDS), f"worker {rank} does not answer"
            failed, result = pipe.recv()
            assert not failed, f"worker {rank}: {result}"
            found.append(result)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()


class FourWorkers(TwoWorkers):
    """Twice as many."""

    count = 4


def _work(rank: int, count: int, group: Path, pipe: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    assert "deepspeed" in sys.modules, "not imported beforehand"
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{group}", rank=rank, world_size=count
    )
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((False, function(rank, *arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
