"""Turn checkpoints of other kinds into an HF folder that every other stage reads."""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.config import ConvertConfig
from core.errors import ConfigError, InputError
from core.models.adapters import PEFT_CONFIG, merge_adapters
from core.models.folder import model_folder
from core.models.target import quiet_transformers
from core.models.tiny import save_tiny_target
from core.paths import folder_written_aside, resolve_path

TINY_RANDOM = "tiny-random"


def convert(config: ConvertConfig, folder: Path, base: Path | None = None) -> dict[str, Any]:
    """Write `config.source` to `folder` as safetensors with tokenizer; returns its figures.

    The folder appears whole or not at all.

    Args:
        config: what from, and the dtype.
        folder: is replaced.
        base: of a folder of adapters, the model that they belong to.
    Raises:
        ConfigError: no source, or one of a kind that is not supported.
        InputError: the file does not exist or is not a GGUF file.
        MismatchError: adapters of another base.
    """
    if base is not None:
        _merge(source_path(config), base, folder, getattr(torch, config.dtype))
        return _figures(folder)
    dtype: torch.dtype = getattr(torch, config.dtype)
    quiet_transformers()
    with folder_written_aside(folder) as aside:
        if config.source == TINY_RANDOM:
            save_tiny_target(aside, config.seed, dtype)
        else:
            _convert_gguf(source_path(config), aside, dtype)
    return _figures(folder)


def _figures(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "parameters": sum(_count_parameters(file) for file in files),
    }


def source_path(config: ConvertConfig) -> Path:
    """The GGUF file, or the folder of adapters, that `convert.source` names."""
    if config.source is None:
        raise ConfigError("convert.source is not set; give a .gguf file, or a folder of adapters")
    path = resolve_path(config.source, field="convert.source")
    if path.is_dir() and (path / PEFT_CONFIG).exists():
        return path
    if path.suffix != ".gguf":
        raise ConfigError(
            f"convert.source={config.source}: only .gguf files, folders of adapters "
            f"({PEFT_CONFIG} in them) and `{TINY_RANDOM}` are supported"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"convert.source={path} is not a GGUF file (no GGUF magic)")
    return path


def adapters_base(adapters: Path) -> str:
    """Where the model is on which they were trained, as they say themselves."""
    found: dict[str, Any] = json.loads((adapters / PEFT_CONFIG).read_text("utf-8"))
    return str(found.get("base_model_name_or_path"))


def _merge(adapters: Path, base: Path, folder: Path, dtype: torch.dtype) -> None:
    with model_folder(folder, base) as (aside, _):
        merged: Any = merge_adapters(base, adapters)
        merged.to(dtype).save_pretrained(aside)


def _count_parameters(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(n).get_shape()) for n in tensors.keys())  # noqa: SIM118


def _convert_gguf(path: Path, folder: Path, dtype: torch.dtype) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (struct.error, ValueError, IndexError, KeyError) as error:
        # What the reader of GGUF raises where the file ends too early.
        raise InputError(
            f"convert.source={path} cannot be read ({type(error).__name__}: {error}); is it whole? "
            "Download it again"
        ) from error
    # Its progress bar, which no setting turns off, fills a job's log with hundreds of lines.
    bar = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stderr(bar):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    # The weights are dequantized now; transformers refuses to save a model that says otherwise.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
