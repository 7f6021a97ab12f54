"""Single tensors of an HF folder, read without loading the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from core.errors import InputError


def load_embedding(folder: Path) -> Tensor:
    """The input embedding [V, H] of the model in `folder`, in its stored dtype.

    Raises:
        InputError: no safetensors files, not a causal language model, or no such tensor in them.
    """
    return _load(folder, lambda model: model.get_input_embeddings(), "input embedding")


def load_output_head(folder: Path) -> Tensor:
    """The output head [V, H]; the embedding where the two are tied.

    Raises:
        InputError: as `load_embedding`; also where the output head has a bias, without which the
            target's distribution would be another.
    """
    return _load(folder, lambda model: model.get_output_embeddings(), "output head")


def load_causal_lm(folder: Path, **settings: Any) -> Any:
    """The causal language model in `folder`, as transformers loads it, with all of its weights.

    Args:
        folder: in HF's layout.
        settings: of `from_pretrained`.
    Raises:
        InputError: a file of weights is damaged, or some are missing, for which transformers
            would take random numbers.
    """
    check_readable(folder)
    model, about = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **settings
    )
    if missing := sorted(about["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"{folder}: {len(missing)} of its weights are in none of its files ({shown}); copy the "
            "folder anew, or convert the checkpoint again"
        )
    return model


def check_readable(folder: Path) -> None:
    """Look at the beginning of each safetensors file, which tells how long it must be.

    Raises:
        InputError: one is cut off or none at all.
    """
    for file in sorted(folder.glob("*.safetensors")):
        _names_in(file)


def _load(folder: Path, find: Callable[[PreTrainedModel], Any], what: str) -> Tensor:
    files = tensor_files(folder)
    model = _without_weights(folder)
    layer = find(model)
    if layer is None:
        raise InputError(f"{folder}: {type(model).__name__} says of no layer that it is its {what}")
    if getattr(layer, "bias", None) is not None:
        raise InputError(
            f"{folder}: the {what} of {type(model).__name__} has a bias, which draft heads do not "
            "take over; use another target"
        )
    names = _stored_names(model, layer.weight)
    for name in names:
        if name in files:
            with safe_open(files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
    raise InputError(
        f"{folder}: no {what} found; looked for {', '.join(names)} in its safetensors files"
    )


def _without_weights(folder: Path) -> PreTrainedModel:
    """The model's modules, which know their names and what is tied; no memory for weights."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    except ValueError as error:
        raise InputError(
            f"{folder}: not a causal language model that transformers knows ({error})"
        ) from error


def _stored_names(model: PreTrainedModel, weight: Tensor) -> list[str]:
    """How a checkpoint may call a weight: all names of a tied one, with and without the body's.

    Checkpoints of the bare body, as GPT-2's on the model hub, leave its name out; some
    architectures store other names than their modules have (GPT-NeoX's `embed_out`).
    """
    named = model.named_parameters(remove_duplicate=False)
    own = {name: parameter for name, parameter in named if parameter is weight}
    body = f"{model.base_model_prefix}."
    bare = [name.removeprefix(body) for name in own if name.startswith(body)]
    return list(dict.fromkeys((*own, *bare, *revert_weight_conversion(model, own))))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name → the file that holds it.

    Raises:
        InputError: no safetensors files, or the only one is damaged.
    """
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
    return dict.fromkeys(_names_in(single), single)


def _names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error}); copy the folder anew") from error
