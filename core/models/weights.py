"""Single tensors of an HF folder, read without loading the model."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from core.errors import InputError

EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.word_embeddings.weight",
    "embed_tokens.weight",
)
OUTPUT_HEAD_NAMES = ("lm_head.weight", "output.weight")


def load_embedding(folder: Path) -> Tensor:
    """The input embedding [V, H] of the model in `folder`, in its stored dtype."""
    return _load(folder, EMBEDDING_NAMES, "input embedding")


def load_output_head(folder: Path) -> Tensor:
    """The output head [V, H]; the embedding where the two are tied."""
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)
    names = EMBEDDING_NAMES if tied else OUTPUT_HEAD_NAMES + EMBEDDING_NAMES
    return _load(folder, names, "output head")


def _load(folder: Path, names: tuple[str, ...], what: str) -> Tensor:
    files = _tensor_files(folder)
    for name in names:
        if name in files:
            with safe_open(files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
    raise InputError(
        f"{folder}: no {what} found; looked for {', '.join(names)} in its safetensors files"
    )


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name → the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        mapping: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in mapping.items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise InputError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json; convert the "
            "checkpoint to safetensors first (jobs.convert_model)"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
