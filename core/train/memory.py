"""How much memory training takes, and what to change where there is too little."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import psutil
import torch

from core.config import FinetuneConfig, TrainConfig

PEAK = "memory_peak_mib"
FIGURES = ("memory_allocated_mib", "memory_reserved_mib", PEAK)
# What torch's allocator of the CPU says in a RuntimeError.
CPU_MESSAGES = ("can't allocate memory", "not enough memory")


def memory_figures(device: torch.device) -> dict[str, float]:
    """Memory of this worker by `FIGURES`, MiB: the GPU's, or what of the process is in memory.

    Reserved is what torch holds on to of the GPU, and on a CPU what the process asked for.
    """
    if device.type == "cuda":
        found = (
            torch.cuda.memory_allocated(device),
            torch.cuda.memory_reserved(device),
            torch.cuda.max_memory_allocated(device),
        )
    else:
        process = psutil.Process().memory_info()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        found = (process.rss, process.vms, peak)
    return {name: round(value / 2**20, 1) for name, value in zip(FIGURES, found, strict=True)}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch or Python raise where memory is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_MESSAGES)


def memory_advice(train: TrainConfig, finetune: FinetuneConfig | None) -> str:
    """The settings that help, the cheapest first: those that change no result, then the others.

    Args:
        train: as the run that had too little memory was.
        finetune: of a target's; None for a draft head.
    """
    found = list(_settings(train, finetune))
    return "; ".join(f"({number}) {text}" for number, text in enumerate(found, start=1))


def _settings(train: TrainConfig, finetune: FinetuneConfig | None) -> Iterator[str]:
    if train.micro_batch_size > 1:
        yield f"train.micro_batch_size={train.micro_batch_size // 2} (same result, a little slower)"
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true (same result, a third slower)"
    quantized = finetune is not None and finetune.method in ("qlora", "int8_lora")
    if train.num_workers > 1 and train.parallelism in ("ddp", "zero0", "zero1"):
        yield "train.parallelism=zero2 (divides gradients and the optimizer's state among workers)"
    if train.num_workers > 1 and train.parallelism not in ("zero3", "pipeline") and not quantized:
        yield "train.parallelism=zero3 (divides the weights too)"
    if train.parallelism == "pipeline":
        yield f"train.pipeline_stages={2 * train.pipeline_stages}, with as many more workers"
    elif train.gpus_per_worker and train.offload == "none" and train.parallelism != "ddp":
        yield "train.offload=optimizer (its state to the CPU's memory)"
    if finetune is not None and finetune.method == "full":
        yield "finetune.method=lora (trains adapters alone), or qlora (4-bit weights besides)"
    elif finetune is not None and finetune.method == "lora" and train.parallelism != "zero3":
        yield "finetune.method=qlora (4-bit weights)"
    yield f"train.max_length={train.max_length // 2} (cuts longer sequences)"
