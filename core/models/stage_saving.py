"""Writing an HF folder block by block, so that the whole model is never in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from core.models.stage_adapters import merged_weights
from core.models.stages import ModelStages

FILE_BYTES = 5 * 10**9
GENERATION = "generation_config.json"


def write_stages(stages: ModelStages, weights: Path, folder: Path) -> None:
    """Write an HF folder with the weights of a safetensors file that names them as modules do.

    No more of the model than a file's worth is in memory.
    Args:
        stages: the model; nothing of it needs to be built. Its dtype is the folder's.
        weights: all of the model's.
        folder: to be made.
    """
    writer = StageWriter(stages, folder)
    with safe_open(weights, framework="pt") as file:
        for names in stages.block_names():
            writer.add({name: file.get_tensor(name) for name in names})
    writer.finish()


def write_merged(stages: ModelStages, weights: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write an HF folder of a model with its adapters merged into it, block by block.

    Args:
        stages: the model with adapters, float32; nothing of it is built yet, or kept.
        weights: a safetensors file of the adapters' weights, by their names.
        folder: to be made.
        dtype: of the folder.
    """
    assert stages.folder is not None and stages.adapters is not None
    writer = StageWriter(ModelStages(stages.folder, dtype=dtype), folder)
    last = stages.num_layers + 1
    with safe_open(weights, framework="pt") as file:
        for number, names in enumerate(stages.block_names()):
            if not 0 < number < last:
                writer.add(stages.read_block(number, names))
                continue
            path, layer = stages.build_layer(number - 1)
            before = f"{stages.adapters.prefix}{path}."
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    if ".lora_" in name:
                        parameter.copy_(file.get_tensor(f"{before}{name}"))
            found = merged_weights(layer)
            writer.add({f"{path}.{name}": tensor for name, tensor in found.items()})
            stages.drop_layer(number - 1)
    writer.finish()


class StageWriter:
    """Takes a model's weights, named as its modules are, and writes them as checkpoints do."""

    def __init__(self, stages: ModelStages, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        """Writes the config; weights follow."""
        self._stages, self._folder, self._limit = stages, folder, file_bytes
        folder.mkdir(parents=True, exist_ok=True)
        stages.config.save_pretrained(folder)
        if stages.folder is not None and (stages.folder / GENERATION).exists():
            shutil.copy(stages.folder / GENERATION, folder / GENERATION)
        self._held: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights of one block: all of a layer's together, since checkpoints split experts."""
        converted = revert_weight_conversion(self._stages.skeleton, dict(tensors))
        for name, tensor in converted.items():
            kept = tensor.detach().to("cpu", self._stages.dtype).contiguous()
            self._held[name] = kept
            self._bytes += kept.nbytes
            if sum(held.nbytes for held in self._held.values()) >= self._limit:
                self._write()

    def finish(self) -> None:
        """Write what is left, and the index where there are several files."""
        if self._held:
            self._write()
        count = len(self._files)
        mapping = {}
        for number, names in enumerate(self._files, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            file = "model.safetensors" if count == 1 else file
            (self._folder / self._part(number)).rename(self._folder / file)
            mapping.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": mapping}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _part(self, number: int) -> str:
        return f"part-{number}.safetensors"

    def _write(self) -> None:
        path = self._folder / self._part(len(self._files) + 1)
        save_file(self._held, path, metadata={"format": "pt"})
        self._files.append(list(self._held))
        self._held = {}
