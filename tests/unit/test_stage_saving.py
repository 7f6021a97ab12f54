"""An HF folder, written block by block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.models.stage_saving import StageWriter
from core.models.stages import ModelStages
from tests.tiny_models import TINY_CONFIGS, save_tiny


@pytest.mark.parametrize("name", ["mixtral", "gpt-2", "bloom-untied"])
def test_weights_given_block_by_block_are_the_model(tmp_path: Path, name: str) -> None:
    """In files of a kilobyte or so, with an index, as checkpoints name and split them."""
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS[name]())
    (folder / "generation_config.json").write_text('{"temperature": 0.25}')
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = dict(model.named_parameters())
    stages = ModelStages(folder)
    writer = StageWriter(stages, tmp_path / "saved", file_bytes=10_000)
    for names in stages.block_names():
        writer.add({key: weights[key] for key in names})
    writer.finish()

    start = load_file(folder / "model.safetensors")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == start.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in start.values())
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    for key, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "saved" / file)[key], start[key]), key
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for key, parameter in again.named_parameters():
        assert torch.equal(parameter, weights[key]), key
    assert again.generation_config.temperature == 0.25


def test_weights_are_written_in_the_models_dtype(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS["llama-tied"]())
    stages = ModelStages(folder, dtype=torch.bfloat16)
    writer = StageWriter(stages, tmp_path / "saved")
    weights = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for names in stages.block_names():
        writer.add({key: weights[key] for key in names})
    writer.finish()
    assert [path.name for path in (tmp_path / "saved").glob("model*")] == ["model.safetensors"]
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16
