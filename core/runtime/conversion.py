"""The stage convert_model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.config import Config
from core.models.convert import TINY_RANDOM, convert, gguf_path
from core.progress import say
from core.provenance import RunFolder


def conversion_inputs(config: Config) -> dict[str, Path]:
    """The GGUF file; nothing for a model that is made up."""
    if config.convert.source == TINY_RANDOM:
        return {}
    return {"convert.source": gguf_path(config.convert)}


def convert_model(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Write the HF folder `<output>/model`."""
    say("convert_model", f"{config.convert.source} → HF folder ({config.convert.dtype})")
    figures = convert(config.convert, folder.path / "model")
    say("convert_model", f"{figures['parameters']:,} parameters")
    return figures
