"""An HF folder, written block by block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.config import FinetuneConfig
from core.models.adapters import load_for_training, merge_adapters, save_adapters
from core.models.stage_adapters import StageAdapters
from core.models.stage_saving import StageWriter, write_merged
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


@pytest.mark.parametrize("method", ["lora", "qlora", "int8_lora"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt-2", "bloom-untied", "mixtral"])
def test_adapters_are_merged_block_by_block_as_into_a_whole_model(
    tmp_path: Path, name: str, method: str
) -> None:
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS[name]())
    finetune = FinetuneConfig.model_validate({"method": method, "rank": 3})
    adapted = load_for_training(folder, finetune, torch.float32)
    weights = {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    weights = {n: torch.randn_like(p) * 0.1 for n, p in weights.items()}
    save_file(weights, tmp_path / "adapters.safetensors")
    save_adapters(tmp_path / "adapter", weights, finetune, folder, str(folder))
    wanted = merge_adapters(folder, tmp_path / "adapter").state_dict()

    stages = ModelStages(folder, adapters=StageAdapters(finetune))
    write_merged(stages, tmp_path / "adapters.safetensors", tmp_path / "merged", torch.float32)
    built = stages.skeleton.named_parameters()
    assert all(parameter.is_meta for _, parameter in built), "nothing is kept"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert model.state_dict().keys() == wanted.keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-6, msg=key)
    assert sum(not torch.equal(base[key], tensor) for key, tensor in wanted.items()) >= 9
