"""The stage convert_model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.config import Config
from core.models.convert import TINY_RANDOM, adapters_base, convert, source_path
from core.models.target import target_folder
from core.progress import say
from core.provenance import RunFolder
from core.runtime.job import Job, run_stage

MODEL_FOLDER = "model"


def conversion_inputs(config: Config) -> dict[str, Path]:
    """The GGUF file, or adapters and their base; nothing for a model that is made up."""
    if config.convert.source == TINY_RANDOM:
        return {}
    source = source_path(config.convert)
    base = _base(config)
    return {"convert.source": source, **({} if base is None else {"target.path": base})}


def _base(config: Config) -> Path | None:
    """Of a folder of adapters: `target.path`, or what they name themselves."""
    if config.convert.source == TINY_RANDOM:
        return None
    source = source_path(config.convert)
    if not source.is_dir():
        return None
    return target_folder(config.target.path or adapters_base(source))


def convert_model(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Write the HF folder `<output>/model`."""
    say("convert_model", f"{config.convert.source} → HF folder ({config.convert.dtype})")
    figures = convert(config.convert, folder.path / MODEL_FOLDER, _base(config))
    say("convert_model", f"{figures['parameters']:,} parameters")
    return figures


JOB = Job(
    name="convert_model",
    summary="Turn a GGUF file, or adapters and their base, into an HF folder (<output>/model).",
    sections=("convert", "target.path"),
    inputs=conversion_inputs,
    run=convert_model,
    uses_ray=False,
)


def with_converted_target(config: Config) -> Config:
    """Make the target where the config says what from and names none; skipped when it is there."""
    named = all(model.target.path for model in config.served_models().values())
    if named or not config.convert.source:
        return config
    # Adapters are upon what is made.
    run_stage(JOB, config.replace(target={"adapter": None}))
    folder = Path(config.output or "").expanduser().absolute() / MODEL_FOLDER
    return config.replace(target={"path": str(folder)})
