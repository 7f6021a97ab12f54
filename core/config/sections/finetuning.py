"""How the target itself is trained further."""

from __future__ import annotations

from typing import Literal

from core.config.base import Section, field, setting
from core.config.sections.training import TrainConfig


class FinetuneConfig(Section):
    """What finetune_target trains of the target; how long and how fast is the section train's."""

    method: Literal["full", "lora", "qlora", "int8_lora"] = field(
        "full",
        "full: all weights; lora: adapters beside the linear layers, on top of frozen weights, "
        "which qlora keeps in 4 bits (NF4, double quantization) and int8_lora in 8, with norms "
        "and output head in float32",
    )
    rank: int = field(16, "rank of the adapters", ge=1)
    alpha: float = field(32.0, "the adapters' product is scaled by alpha / rank", gt=0)
    dropout: float = field(0.0, "share of an adapter's inputs that is dropped", ge=0, lt=1)
    target_modules: tuple[str, ...] = field(
        (), "last names of the layers that get adapters, such as q_proj; empty for all linear ones"
    )
    optimizer: Literal["adamw", "lion", "adamw_8bit", "lion_8bit"] = field(
        "adamw",
        "lion keeps one moment instead of two, and wants a third to a tenth of the learning rate; "
        "8 bits a moment instead of 32 are bitsandbytes', with train.parallelism=ddp",
    )
    packing: bool = setting(
        True,
        "sequences of a pass stand behind each other in one row, instead of below each other with "
        "padding; same loss and gradients. Models without position ids (Bloom) want false",
    )


def check_finetuning(finetune: FinetuneConfig, train: TrainConfig) -> None:
    """Refuse what exclude each other.

    Raises:
        ValueError: says what, and what to choose instead.
    """
    where = f"finetune.method={finetune.method} with train.parallelism={train.parallelism}"
    if finetune.optimizer.endswith("_8bit") and train.parallelism != "ddp":
        raise ValueError(
            f"finetune.optimizer={finetune.optimizer} with train.parallelism={train.parallelism}: "
            "moments of 8 bits come in blocks that DeepSpeed cannot divide and put together again; "
            "choose train.parallelism=ddp, or finetune.optimizer=adamw or lion"
        )
    quantized = finetune.method in ("qlora", "int8_lora")
    if finetune.method != "full" and finetune.dropout and train.parallelism == "pipeline":
        raise ValueError(
            f"{where} and finetune.dropout={finetune.dropout:g}: passes of a pipeline have no "
            "dropout; choose finetune.dropout=0, or train.parallelism=zero1 or ddp"
        )
    if quantized and train.parallelism == "zero3":
        raise ValueError(
            f"{where}: ZeRO-3 cannot divide quantized weights among workers; choose "
            "train.parallelism=zero2 or ddp, or finetune.method=lora"
        )
    if finetune.method == "int8_lora" and train.parallelism != "ddp" and train.dtype != "float32":
        raise ValueError(
            f"{where} and train.dtype={train.dtype}: DeepSpeed would turn norms and output head, "
            f"which stay in float32, to {train.dtype}; choose train.parallelism=ddp or "
            "train.dtype=float32"
        )
