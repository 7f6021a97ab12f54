"""What training says of memory, and where there is too little of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ray.exceptions import OutOfMemoryError
from ray.train.v2.api.exceptions import WorkerGroupError

from core.config import FinetuneConfig, TrainConfig
from core.errors import ResourceError
from core.runtime import workers
from core.train.memory import FIGURES, is_out_of_memory, memory_advice, memory_figures

# How many MiB the figure grows by with 256 MiB that are held.
GROWTH = """
import torch
from core.train.memory import memory_figures
before = memory_figures(torch.device("cpu"))
held = torch.ones(256 * 2**18)
after = memory_figures(torch.device("cpu"))
print(after["memory_allocated_mib"] - before["memory_allocated_mib"])
"""


def test_figures_are_those_of_the_process() -> None:
    # Other threads of this process take and give back memory meanwhile: bounds, not differences.
    held = torch.ones(64 * 2**18)
    found = memory_figures(torch.device("cpu"))
    assert tuple(found) == FIGURES
    allocated, reserved, peak = found.values()
    assert 64 < allocated <= peak * 1.01
    assert allocated < reserved
    del held


def test_what_is_held_counts() -> None:
    # In a process of its own, where nothing else is given back at the same time.
    said = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert 250 < float(said) < 300


def test_what_the_allocator_raises_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_the_cheapest_settings_come_first_and_those_in_use_not_at_all() -> None:
    train = TrainConfig(micro_batch_size=8, parallelism="zero1", max_length=512)
    said = memory_advice(train, FinetuneConfig())
    order = ["train.micro_batch_size=4", "train.gradient_checkpointing=true", "=zero2", "=zero3",
             "finetune.method=lora", "train.max_length=256"]  # fmt: skip
    places = [said.index(text) for text in order]
    assert places == sorted(places)
    spare = train.model_copy(
        update={"micro_batch_size": 1, "gradient_checkpointing": True, "parallelism": "zero3"}
    )
    said = memory_advice(spare, FinetuneConfig(method="qlora"))
    assert said == "(1) train.max_length=256 (cuts longer sequences)"
    assert "finetune" not in memory_advice(train, None)
    assert "pipeline_stages=4" in memory_advice(
        TrainConfig(parallelism="pipeline"), FinetuneConfig()
    )
    on_gpu = train.model_copy(update={"gpus_per_worker": 1.0})
    assert "train.offload=optimizer" in memory_advice(on_gpu, FinetuneConfig())


def test_the_user_is_told_whatever_found_out() -> None:
    """A worker that ran out of memory itself, and one that Ray has ended for its node."""
    error = workers.out_of_memory("worker 1: cannot allocate\nstack", "(1) less")
    assert isinstance(error, ResourceError)
    assert "worker 1: cannot allocate\n" in str(error) and "first: (1) less." in str(error)
    killed: dict[int, Exception] = {0: OutOfMemoryError("node is full")}
    explained = workers.explain(WorkerGroupError("died", killed), "(1) less")
    assert isinstance(explained, ResourceError) and "(1) less" in str(explained)
