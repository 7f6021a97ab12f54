"""Frozen layers with adapters, made one by one as the stages of a pipeline build them.

What `core.models.adapters` does to a whole model, so that a run goes on from one as from the
other: the same names, the same first weights, the same quantization.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from core.config import FinetuneConfig
from core.errors import ConfigError
from core.models.adapters import (
    LINEAR,
    PREFIX,
    draw_adapters,
    linear_names,
    lora_config,
    quiet_peft,
    unpack_for_training,
)

# What peft calls a layer that it has wrapped, and whether a quantized one was the other way round.
BASE, TRANSPOSED = ".base_layer", "aerie_transposed"


class StageAdapters:
    """Freezes what a stage builds, and gives its decoder layers adapters.

    Attributes:
        prefix: of names in a model that peft has wrapped.
    """

    prefix = PREFIX

    def __init__(self, finetune: FinetuneConfig, seed: int = 0) -> None:
        """Nothing is adapted yet.

        Args:
            finetune: any method but `full`.
            seed: of the adapters' random halves.
        """
        assert finetune.method != "full", "it has no adapters"
        self._finetune, self._seed = finetune, seed

    def check(self, layer: nn.Module) -> None:
        """Make sure that a decoder layer has something to adapt.

        Raises:
            ConfigError: `finetune.target_modules` names none of its linear layers.
        """
        names = linear_names(layer)
        if missing := set(self._finetune.target_modules).difference(names):
            raise ConfigError(
                f"finetune.target_modules={list(self._finetune.target_modules)}: the target's "
                f"layers have no linear layer called {', '.join(sorted(missing))}, but "
                f"{', '.join(names)}; name some of these, or leave it empty for all"
            )

    def freeze(self, module: nn.Module) -> None:
        """Norms, embedding and head in float32 where the rest is quantized."""
        module.requires_grad_(False)
        if self._finetune.method != "lora":
            for parameter in module.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()

    def adapt(self, layer: nn.Module, path: str, device: torch.device) -> None:
        """Freeze a decoder layer, quantize it if so asked, and put adapters beside it.

        Args:
            layer: with its weights.
            path: of the layer in the model.
            device: where quantized weights are made.
        """
        names = linear_names(layer)
        if self._finetune.method != "lora":
            _quantize(layer, self._finetune.method, device)
        self.freeze(layer)
        config = lora_config(self._finetune)
        config.target_modules = set(self._finetune.target_modules or names)
        peft: Any = importlib.import_module("peft")
        with quiet_peft():
            peft.inject_adapter_in_model(config, layer)
        adapters = {
            f"{self.prefix}{path}.{name}": parameter
            for name, parameter in layer.named_parameters()
            if ".lora_" in name
        }
        for parameter in adapters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        draw_adapters(adapters, self._seed)
        layer.to(device)


def merged_weights(layer: nn.Module) -> dict[str, Tensor]:
    """The weights of an adapted layer by the names that they had, float32, adapters added to them.

    Quantized ones are what they stand for, as `core.models.adapters.merge_adapters` has it.
    """
    integrations: Any = importlib.import_module("peft.utils.integrations")
    found: dict[str, Tensor] = {}
    for name, parameter in layer.named_parameters():
        path, _, last = name.rpartition(".")
        if ".lora_" in name:
            continue
        place = path.removesuffix(BASE)
        value = parameter.detach()
        if place != path and last == "weight":
            tuner: Any = layer.get_submodule(place)
            whole = integrations.dequantize_module_weight(tuner.base_layer).detach().float()
            value = whole + tuner.get_delta_weight("default").detach().float()
            if getattr(tuner.base_layer, TRANSPOSED, False):
                value = value.T
        found[f"{place}.{last}"] = value.float().contiguous()
    return found


def _quantize(layer: nn.Module, method: str, device: torch.device) -> None:
    """Replace linear layers by bitsandbytes' of 4 or 8 bits, as transformers does on loading."""
    bnb: Any = importlib.import_module("bitsandbytes")
    linear: list[tuple[str, Any]] = [
        (path, part) for path, part in layer.named_modules() if isinstance(part, LINEAR)
    ]
    for path, module in linear:
        weight = module.weight.data
        if isinstance(module, Conv1D):
            weight = weight.T.contiguous()
        size = (weight.shape[1], weight.shape[0], module.bias is not None)
        if method == "qlora":
            small = bnb.nn.Linear4bit(
                *size, compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4"
            )
            packed = bnb.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4",
                module=small,
            )  # fmt: skip
        else:
            small = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
            packed = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        small.weight = packed.to(device)
        small.bias = module.bias
        setattr(small, TRANSPOSED, isinstance(module, Conv1D))
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, small)
    unpack_for_training(layer)
    # By these peft knows what it has before it.
    setattr(layer, "is_loaded_in_4bit" if method == "qlora" else "is_loaded_in_8bit", True)
