"""A target made ready for training: whole, or frozen with LoRA adapters beside its linear layers.

A frozen target may be kept in 4 bits (NF4 with double quantization: QLoRA, Dettmers et al. 2023)
or in 8, with norms and output head in float32. The folder of adapters is peft's own, with a
record of the target beside it, since adapters on another target give nonsense in silence.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from core.config import FinetuneConfig, TargetConfig
from core.errors import ConfigError, InputError, MismatchError
from core.models.target import quiet_transformers, target_fingerprint
from core.models.weights import load_causal_lm
from core.paths import folder_written_aside, resolve_path
from core.provenance import fingerprint, hash_json

RECORD = "aerie.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# Of peft's name for the one adapter that a model has.
ADAPTER = ".default"
LINEAR = (nn.Linear, Conv1D)
# Of the names in a model that peft has wrapped.
PREFIX = "base_model.model."


def load_for_training(
    folder: Path,
    finetune: FinetuneConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model; what `finetune.method` trains of it requires gradients, and is float32.

    Args:
        folder: of the target.
        finetune: which method.
        dtype: of frozen weights that are not quantized.
        device: where quantized weights are made; None for the CPU.
        seed: of the adapters' random halves.
    Raises:
        ConfigError: `finetune.target_modules` names no layer.
    """
    if finetune.method == "full":
        return _load(folder, torch.float32).requires_grad_(True)
    model = _load(folder, dtype, finetune.method, device).requires_grad_(False)
    if finetune.method != "lora":
        # Norms and output head to float32; what they cost is little beside the rest.
        model = _peft().prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return _with_adapters(model, finetune, seed)


def count_trained(folder: Path, finetune: FinetuneConfig) -> tuple[int, int]:
    """Parameters of the model, and those that are trained; nothing is allocated.

    Raises:
        ConfigError: `finetune.target_modules` names no layer.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        total = sum(parameter.numel() for parameter in model.parameters())
        if finetune.method == "full":
            return total, total
        adapted = _with_adapters(model.requires_grad_(False), finetune, seed=0)
    return total, sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def save_adapters(
    folder: Path,
    weights: Mapping[str, Tensor],
    finetune: FinetuneConfig,
    target: Path,
    location: str,
) -> int:
    """Write a peft folder; returns its bytes.

    Args:
        folder: replaced if it exists; appears whole or not at all.
        weights: of the adapters, by their names in the model.
        finetune: how they were made.
        target: folder of the model that they belong to.
        location: what it was called.
    """
    config = lora_config(finetune)
    config.base_model_name_or_path, config.inference_mode = location, True
    if not finetune.target_modules:
        names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights}
        config.target_modules = names
    record = {"target_fingerprint": target_fingerprint(target), "method": finetune.method}
    with folder_written_aside(folder) as aside:
        save_file(
            {name.replace(ADAPTER, ""): tensor.contiguous() for name, tensor in weights.items()},
            aside / WEIGHTS,
        )
        config.save_pretrained(aside)
        (aside / RECORD).write_text(json.dumps(record, indent=2))
    return sum(file.stat().st_size for file in folder.iterdir())


def load_adapted(target: Path, adapters: Path) -> nn.Module:
    """The target as its adapters were trained on it, quantization included, and they upon it.

    Float32 where nothing is quantized; for inference.
    Raises:
        InputError: no folder of adapters, or a damaged one.
        MismatchError: they were trained on another target.
    """
    method = check_adapters(target, adapters)
    model = _load(target, torch.float32, method)
    return _peft().PeftModel.from_pretrained(model, adapters).eval().requires_grad_(False)


def merge_adapters(target: Path, adapters: Path) -> nn.Module:
    """A plain model with the logits of `load_adapted`, float32: quantized weights are unpacked.

    Raises:
        InputError: no folder of adapters, or a damaged one.
        MismatchError: they were trained on another target.
    """
    method = check_adapters(target, adapters)
    model = _load(target, torch.float32)
    if method != "lora":
        _unpack(_load(target, torch.float32, method), model)
    return _peft().PeftModel.from_pretrained(model, adapters).merge_and_unload()


def adapter_folder(config: TargetConfig) -> Path:
    """The folder that `target.adapter` names.

    Raises:
        InputError: it does not exist.
        ConfigError: the target's other settings leave no weights to merge adapters into.
    """
    if config.quantization != "none" or config.device_map is not None:
        raise ConfigError(
            "target.adapter is merged into weights that are neither quantized nor spread over "
            "GPUs; leave target.quantization and target.device_map out, or merge the adapters "
            "first (jobs.convert_model)"
        )
    return resolve_path(str(config.adapter), field="target.adapter")


def adapted_fingerprint(base: str, adapters: Path) -> str:
    """Of the target that adapters make of another: neither that one's, nor other adapters'.

    Args:
        base: the other one's fingerprint.
        adapters: their folder.
    """
    files = {name: fingerprint(adapters / name) for name in (WEIGHTS, PEFT_CONFIG, RECORD)}
    return hash_json({"base": base, "adapters": files})


def merged_target(target: Path, adapters: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """`merge_adapters`, as a target is loaded: in its dtype, on its device.

    Raises:
        InputError: no folder of adapters, or a damaged one.
        MismatchError: they were trained on another target.
    """
    model: Any = merge_adapters(target, adapters).to(device)
    for parameter in model.parameters():
        # Not its buffers: rotary frequencies stay in float32, as transformers keeps them.
        parameter.data = parameter.data.to(dtype)
    return model


def check_adapters(target: Path, adapters: Path) -> str:
    """Make sure that adapters belong to a target; returns the method that trained them.

    Raises:
        InputError: no folder of adapters, or a damaged one.
        MismatchError: they were trained on another target.
    """
    record = adapters / RECORD
    if not record.exists() or not (adapters / PEFT_CONFIG).exists():
        raise InputError(
            f"{adapters}: no {RECORD} and {PEFT_CONFIG} in it; give a folder of adapters that "
            "finetune_target wrote (<output>/adapter)"
        )
    found = _read_record(record)
    if found["target_fingerprint"] != target_fingerprint(target):
        raise MismatchError(
            f"{adapters} was trained on another model than {target}; give the one that it was "
            "trained on: its weights count, not its name"
        )
    return found["method"]


def _read_record(path: Path) -> dict[str, str]:
    """What `save_adapters` wrote of the target and the method."""
    try:
        found = json.loads(path.read_text())
        return {key: str(found[key]) for key in ("target_fingerprint", "method")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({error!r}); copy the folder of adapters anew, or run "
            "finetune_target again with overwrite=true"
        ) from error


def _load(
    folder: Path, dtype: torch.dtype, method: str = "full", device: torch.device | None = None
) -> Any:
    quiet_transformers()
    placement: dict[str, Any] = {}
    if method == "qlora":
        placement["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif method == "int8_lora":
        placement["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if placement:
        placement["device_map"] = {"": device or torch.device("cpu")}
    # transformers takes torch's fused attention where the architecture has it.
    model = load_causal_lm(folder, dtype=dtype, **placement)
    unpack_for_training(model)
    return model


@torch.no_grad()
def _unpack(quantized: nn.Module, plain: nn.Module) -> None:
    """Give a plain model what a quantized one's weights stand for."""
    integrations: Any = importlib.import_module("peft.utils.integrations")
    for path, module in quantized.named_modules():
        if type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params"):
            weight: Tensor = integrations.dequantize_module_weight(module).float()
            own: Any = plain.get_submodule(path)
            # Packed, all are as torch's own linear layers.
            own.weight.copy_(weight.T if isinstance(own, Conv1D) else weight)


def linear_names(module: nn.Module) -> list[str]:
    """Last names of the linear layers in a model or a part of it, its output head left out.

    Of a mixture these are not its experts, which are one parameter together, nor its router.
    """
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    return sorted(
        {
            path.rsplit(".", 1)[-1]
            for path, part in module.named_modules()
            if isinstance(part, LINEAR) and part is not head
        }
    )


def unpack_for_training(model: nn.Module) -> None:
    """Keep quantized layers from packing their weights, at the first evaluation, for a kernel that
    knows no gradients.
    """
    for module in cast(Iterable[Any], model.modules()):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def draw_adapters(weights: Mapping[str, nn.Parameter], seed: int) -> None:
    """The adapters' first weights, which depend on seed and name alone.

    So they are the same whoever makes them, and with them the whole run.

    Args:
        weights: all or some of them, by name.
        seed: of the random halves; the others are zero.
    """
    with torch.random.fork_rng(devices=[]):
        for name, weight in weights.items():
            if ".lora_A." in name:
                torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                # As peft draws them, but where the same numbers come out on every device.
                drawn = torch.empty(weight.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
                weight.data.copy_(drawn)


def _with_adapters(model: Any, finetune: FinetuneConfig, seed: int) -> nn.Module:
    config = lora_config(finetune)
    # Named one by one: where peft finds all by itself, it plans for experts too, and differently
    # when it reads the adapters again.
    config.target_modules = set(finetune.target_modules or linear_names(model))
    with quiet_peft():
        try:
            adapted: nn.Module = _peft().get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(
                f"finetune.target_modules={list(finetune.target_modules)}: {error}; name linear "
                "layers of the target, such as q_proj, or leave it empty for all of them"
            ) from error
    draw_adapters({n: p for n, p in adapted.named_parameters() if not p.is_meta}, seed)
    return adapted


def lora_config(finetune: FinetuneConfig) -> Any:
    """peft's."""
    return _peft().LoraConfig(
        r=finetune.rank,
        lora_alpha=finetune.alpha,
        lora_dropout=finetune.dropout,
        target_modules=list(finetune.target_modules),
        task_type="CAUSAL_LM",
    )


def _peft() -> Any:
    """peft, which not every fine-tuning needs; it takes seconds, and bitsandbytes has a say."""
    quiet_transformers()
    return importlib.import_module("peft")


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without what peft sees and sets right by itself."""
    with warnings.catch_warnings():
        # GPT-2's layers are transposed.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        yield
