"""Adapters: what is trained, what is kept of them, merging, and the model that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.config import Config, FinetuneConfig
from core.errors import ConfigError, InputError, MismatchError
from core.models.adapters import (
    RECORD,
    check_adapters,
    count_trained,
    load_adapted,
    load_for_training,
    merge_adapters,
    save_adapters,
)
from core.runtime.job import run_stage
from jobs import convert_model
from tests.tiny_targets import ARCHITECTURES, save_tiny

METHODS = ("lora", "qlora", "int8_lora")


def _finetune(method: str, **settings: object) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"method": method, "rank": 4, "alpha": 8, **settings})


def _trained(folder: Path, finetune: FinetuneConfig) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model with adapters that do something."""
    model = load_for_training(folder, finetune, torch.float32)
    with torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(std=0.1)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return model.eval(), weights


def _without_rounding_activations(model: nn.Module) -> nn.Module:
    """Its int8 layers, by bitsandbytes' definition of their weights: codes times rows' scales."""

    def plain(layer: Any, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        whole = layer.state.CB.float() * layer.state.SCB.float()[:, None] / 127
        return nn.functional.linear(inputs[0].float(), whole, layer.bias)

    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)]
    assert layers
    for layer in layers:
        layer.register_forward_hook(plain)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_merged_weights_have_the_logits_of_base_and_adapters(tmp_path: Path, method: str) -> None:
    folder = save_tiny(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128)
    finetune = _finetune(method)
    model, weights = _trained(folder, finetune)
    assert weights and all("lora_" in name for name in weights)
    size = save_adapters(tmp_path / "adapter", weights, finetune, folder, str(folder))
    assert size < 0.5 * (folder / "model.safetensors").stat().st_size
    ids_1T = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = model(ids_1T).logits.float()
        again = load_adapted(folder, tmp_path / "adapter")(ids_1T).logits.float()
        merged = merge_adapters(folder, tmp_path / "adapter").eval()
        found = merged(ids_1T).logits.float()
        plain = load_for_training(folder, _finetune("full"), torch.float32)(ids_1T).logits
    torch.testing.assert_close(again, wanted)
    scale = float(wanted.abs().max())
    assert float((plain - wanted).abs().max()) > 0.15 * scale
    if method == "int8_lora":
        # int8 rounds what enters a layer too, which a merged model does not: near the model as it
        # is, and equal to one that multiplies what enters by the same weights.
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.1 * scale)
        with torch.no_grad():
            wanted = _without_rounding_activations(model)(ids_1T).logits.float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * scale)
    assert all(p.dtype == torch.float32 for p in merged.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_are_kept_as_the_method_says(tmp_path: Path, method: str) -> None:
    folder = save_tiny(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128)
    model, _ = _trained(folder, _finetune(method))
    kinds = {type(m).__name__ for m in model.modules()}
    expected = {"lora": "Linear", "qlora": "Linear4bit", "int8_lora": "Linear8bitLt"}[method]
    assert expected in kinds
    assert {"Linear4bit", "Linear8bitLt"} & kinds <= {expected}
    if method == "qlora":
        states = [getattr(p, "quant_state", None) for p in model.parameters()]
        found = {(state.quant_type, state.nested) for state in states if state is not None}
        assert found == {("nf4", True)}
    if method != "lora":
        for name, parameter in model.named_parameters():
            if "norm" in name or "lm_head" in name:
                assert parameter.dtype == torch.float32, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_trained_is_counted_without_making_it(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny(tmp_path / "base", architecture, tied=architecture == "gpt2")
    for method in ("full", "lora"):
        model = load_for_training(folder, _finetune(method), torch.float32)
        total, trained = count_trained(folder, _finetune(method))
        parameters = list(model.parameters())
        assert trained == sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        assert total == (frozen if method == "lora" else trained)


def test_adapters_go_where_they_are_told_and_nowhere_else(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    some = _finetune("lora", target_modules=["q_proj"])
    _, weights = _trained(folder, some)
    assert all("q_proj" in name for name in weights) and len(weights) == 4
    wrong = _finetune("lora", target_modules=["attention"])
    with pytest.raises(ConfigError, match=r"finetune\.target_modules=\['attention'\].*q_proj"):
        count_trained(folder, wrong)


def test_a_wrong_base_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    finetune = _finetune("lora")
    _, weights = _trained(folder, finetune)
    save_adapters(tmp_path / "adapter", weights, finetune, folder, str(folder))
    assert check_adapters(folder, tmp_path / "adapter") == "lora"
    other = save_tiny(tmp_path / "other", "llama", initializer_range=0.2)
    for refuse in (merge_adapters, load_adapted):
        with pytest.raises(MismatchError, match="trained on another model"):
            refuse(other, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"no aerie\.json"):
        merge_adapters(folder, folder)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    finetune = _finetune("lora")
    _, weights = _trained(folder, finetune)
    save_adapters(tmp_path / "adapter", weights, finetune, folder, str(folder))
    record = tmp_path / "adapter" / RECORD
    whole = record.read_text()
    for content in (whole[: len(whole) // 2], "", "[]", "{}"):
        record.write_text(content)
        with pytest.raises(InputError, match=r"adapter/aerie\.json is damaged \(.*copy the folder"):
            check_adapters(folder, tmp_path / "adapter")


def test_peft_reads_the_folder(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    folder = save_tiny(tmp_path / "base", "llama")
    finetune = _finetune("lora")
    model, weights = _trained(folder, finetune)
    save_adapters(tmp_path / "adapter", weights, finetune, folder, str(folder))
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == len(weights)
    ids_1T = torch.arange(3, 40)[None]
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_1T).logits, model(ids_1T).logits)


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_changes_no_gradient(tmp_path: Path, method: str) -> None:
    folder = save_tiny(tmp_path / "base", "llama", hidden_size=64, head_dim=16)
    model, _ = _trained(folder, _finetune(method))
    ids_1T = torch.arange(3, 40)[None]

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(ids_1T).logits.float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(ids_1T)
    after = gradients()
    assert len(before) == len(after) == 2 * 2 * 7
    assert all(
        torch.equal(a, b) and bool((a != 0).any()) for a, b in zip(after, before, strict=True)
    )


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_command_that_merges_writes_what_has_the_adapters_logits(
    tmp_path: Path, method: str
) -> None:
    """By the base that they name themselves, or another place of it; a wrong one is refused."""
    base = save_tiny(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128)
    _, weights = _trained(base, _finetune(method))
    adapters = tmp_path / "adapter"
    save_adapters(adapters, weights, _finetune(method), base, str(base))
    convert = {"source": str(adapters), "dtype": "float32"}
    config = Config().replace(output=str(tmp_path / "merged"), convert=convert)
    assert run_stage(convert_model.JOB, config)["parameters"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model")
    ids_1T = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = load_adapted(base, adapters)(ids_1T).logits
        torch.testing.assert_close(model(ids_1T).logits, wanted, rtol=1e-4, atol=1e-4)
    tokenizers = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "merged" / "model", base))
    assert len({tokenizer.chat_template for tokenizer in tokenizers}) == 1
    wrong = save_tiny(tmp_path / "wrong", "llama", hidden_size=64, intermediate_size=96)
    config = config.replace(output=str(tmp_path / "no"), target={"path": str(wrong)})
    with pytest.raises(MismatchError, match="trained on another model"):
        run_stage(convert_model.JOB, config)
    assert not (tmp_path / "no" / "model").exists()
