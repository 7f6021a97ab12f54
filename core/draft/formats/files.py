"""The files of a head's folder, read without running anything that is in them."""

from __future__ import annotations

import json
import pickle
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from core.errors import InputError

CONFIG = "config.json"
AERIE = "aerie.json"
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
# Target ids of an EAGLE-1 head's draft vocabulary, the file that SGLang's
# `--speculative-token-map` takes. Engines read no weights from a name that ends so.
TOKEN_MAP = "token_map.pt"


class HeadFolder:
    """A folder with a draft head in it; every file is read once, when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.path / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; an empty one where there is no such file.

        Raises:
            InputError: it is no JSON object.
        """
        if not self.has(name):
            return {}
        try:
            content = json.loads((self.path / name).read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{self.path / name}: not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise InputError(f"{self.path / name}: expected an object, got a {type(content)}")
        return content

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`; empty where there is none."""
        return self.json(CONFIG)

    @property
    def is_aeries(self) -> bool:
        """Whether Aerie wrote it."""
        return self.has(AERIE)

    @property
    def architectures(self) -> tuple[str, ...]:
        """What `config.json` calls itself."""
        return tuple(self.config.get("architectures") or ())

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The files with weights: safetensors before pickled ones, one or several of an index."""
        for name in (SAFETENSORS, PICKLED):
            if self.has(name):
                return (self.path / name,)
            index = self.json(f"{name}.index.json").get("weight_map", {})
            if index:
                return tuple(self.path / file for file in sorted(set(index.values())))
        return ()

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All weights by the names in the files, on CPU and in their dtype.

        Raises:
            InputError: there are none, a file is damaged, holds other things than tensors, or
                numbers that are not finite.
        """
        if not self.weight_files:
            raise InputError(
                f"draft.path={self.path}: no {SAFETENSORS} and no {PICKLED} there; copy the whole "
                "folder of the head"
            )
        tensors: dict[str, Tensor] = {}
        for file in self.weight_files:
            tensors.update(read_tensors(file))
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                count = int((~tensor.isfinite()).sum())
                raise InputError(
                    f"draft.path={self.path}: {name} holds {count} values that are NaN or "
                    "infinite; its training failed or the file is damaged: take another checkpoint"
                )
        return tensors

    @cached_property
    def token_map_W(self) -> Tensor | None:
        """int64 [W], the target ids that the head may propose; None where no file says so."""
        if not self.has(TOKEN_MAP):
            return None
        ids_W = _unpickle(self.path / TOKEN_MAP)
        if not isinstance(ids_W, Tensor) or ids_W.dim() != 1 or ids_W.is_floating_point():
            raise InputError(f"{self.path / TOKEN_MAP}: expected a list of token ids as a tensor")
        return ids_W.long()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or pickled file.

    Raises:
        InputError: it is missing, damaged, or holds other things than tensors.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file, though the index beside it names it")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file}: damaged ({error}); copy it again") from error
    content = _unpickle(file)
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise InputError(f"{file}: expected tensors by name, as `torch.save(state_dict)` writes")
    return content


def _unpickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file}: holds other things than tensors, and loading those runs code of whoever "
            "wrote the file; convert it to safetensors on a machine where that does not matter"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{file}: damaged ({error}); copy it again") from error
