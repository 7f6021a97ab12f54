"""Checkpoints: the target model, what it is made from, and what a head is written as."""

from __future__ import annotations

from typing import Literal

from core.config.base import Section, field, setting

DType = Literal["float32", "bfloat16", "float16"]
TemplateName = Literal["auto", "llama-2", "vicuna", "mixtral", "llama-3", "qwen-2"]


class ConvertConfig(Section):
    """Turn a checkpoint that transformers does not serve directly into an HF folder."""

    source: str | None = setting(
        None,
        "a .gguf file (also pkg://<package>/<file>), a folder of adapters that finetune_target "
        "wrote, to be merged into target.path (left out: the model that they name), or "
        "`tiny-random` for a Llama of random weights with a byte tokenizer, made for tests",
    )
    dtype: DType = field("bfloat16", "dtype of the saved weights")
    seed: int = field(0, "seed of the weights of `tiny-random`")


class TargetConfig(Section):
    """The target model: the one whose output is kept."""

    path: str | None = setting(None, "HF folder or hub id of the target model")
    adapter: str | None = setting(
        None,
        "for serving: folder of adapters that finetune_target wrote (<output>/adapter), merged "
        "into the target when it is loaded. Jobs take a merged folder (convert_model)",
    )
    template: TemplateName = field(
        "auto",
        "chat template, for prepare_data and wherever the target is spoken to; auto takes the "
        "tokenizer's own, a name the one of that family",
    )
    dtype: DType = field("bfloat16", "dtype of the target's weights and activations")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where the target runs; auto takes a GPU if the worker has one"
    )
    pack_linear: bool = field(
        True,
        "on CPU, pack linear layers once for oneDNN and run Llama-like models in few operators "
        "(faster; same result up to rounding)",
    )
    quantization: Literal["none", "int8", "nf4"] = field(
        "none", "the linear layers' weights by bitsandbytes: int8, or 4-bit NF4"
    )
    device_map: Literal["auto", "balanced"] | None = setting(
        None, "spread one target over several GPUs of a worker; null keeps it on one device"
    )


class ExportConfig(Section):
    """What export_draft writes."""

    format: str | None = field(
        None, "layout of the head that is written, by the engine's name; `--help` begins with them"
    )
    dtype: Literal["same"] | DType = field(
        "same", "dtype of the weights; same keeps the head's, bit for bit"
    )
