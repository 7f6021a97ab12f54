"""HF folders of models that are made from a target."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig

from core.paths import folder_written_aside

# What a model's folder has besides weights: tokenizer, template, generation settings.
BESIDES = ("*.json", "*.jinja", "*.model", "*.txt")
UNWANTED = (".safetensors.index.json",)


@contextmanager
def model_folder(folder: Path, target: Path) -> Iterator[tuple[Path, torch.dtype]]:
    """Replace an HF folder by one of a model made from a target, whole or not at all.

    Args:
        folder: is replaced at the end.
        target: whose tokenizer and settings it gets.
    Yields:
        Where to write config and weights, and the target's dtype, which is to be theirs.
    """
    with folder_written_aside(folder) as aside:
        for pattern in BESIDES:
            for file in target.glob(pattern):
                if not file.name.endswith(UNWANTED):
                    shutil.copyfile(file, aside / file.name)
        dtype = AutoConfig.from_pretrained(target).get_text_config().dtype or torch.float32
        yield aside, dtype
