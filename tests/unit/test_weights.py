from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from core.errors import InputError
from core.models.tiny import tiny_config
from core.models.weights import load_causal_lm, load_embedding, load_output_head


def _model(*, tied: bool) -> LlamaForCausalLM:
    config = tiny_config(64)
    config.tie_word_embeddings = tied
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_single_tensors_are_the_models(tmp_path: Path, tied: bool, shard_size: str) -> None:
    model = _model(tied=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "10KB")
    embedding, head = load_embedding(tmp_path), load_output_head(tmp_path)
    assert torch.equal(embedding, model.get_input_embeddings().weight)
    assert torch.equal(head, model.get_output_embeddings().weight)
    assert torch.equal(embedding, head) is tied


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    _model(tied=True).save_pretrained(tmp_path)
    assert load_causal_lm(tmp_path).lm_head.weight is not None, "a tied weight is no missing one"
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"1 of its weights .*{name}.*copy the folder anew"):
        load_causal_lm(tmp_path)


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    _model(tied=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        load_causal_lm(tmp_path)


def test_tensors_keep_their_dtype(tmp_path: Path) -> None:
    _model(tied=False).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_embedding(tmp_path).dtype == torch.bfloat16


def test_other_architectures_names(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    assert torch.equal(load_embedding(tmp_path), model.transformer.wte.weight)
    assert torch.equal(load_output_head(tmp_path), model.lm_head.weight)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="convert the checkpoint to safetensors"):
        load_embedding(tmp_path)


def test_unknown_names_are_refused_with_those_looked_for(tmp_path: Path) -> None:
    tiny_config(64).save_pretrained(tmp_path)
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"no output head found; looked for lm_head\.weight in"):
        load_output_head(tmp_path)
    looked = r"looked for model\.embed_tokens\.weight, embed_tokens\.weight in"
    with pytest.raises(InputError, match=looked):
        load_embedding(tmp_path)


def test_a_config_of_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a causal language model"):
        load_output_head(tmp_path)


def test_a_checkpoint_of_the_bare_body(tmp_path: Path) -> None:
    """As GPT-2's on the model hub: names without `transformer.`, and no output head."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    model.config.save_pretrained(tmp_path)
    save_file(dict(model.transformer.state_dict()), tmp_path / "model.safetensors")
    assert torch.equal(load_embedding(tmp_path), model.transformer.wte.weight)
    assert torch.equal(load_output_head(tmp_path), model.transformer.wte.weight)


def test_a_bias_of_the_output_head_is_refused(tmp_path: Path) -> None:
    """Draft heads would learn another distribution than the target's."""
    config = PhiConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="output head of PhiForCausalLM has a bias"):
        load_output_head(tmp_path)
    assert load_embedding(tmp_path).shape == (32, 16)
