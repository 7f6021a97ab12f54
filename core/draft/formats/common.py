"""What every folder format offers: to tell its folders, to read them, and maybe to write them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig

from core.draft.base import DraftHead, TargetGeometry
from core.draft.formats.files import HeadFolder


@dataclass(frozen=True)
class ReadHead:
    """A head and what its folder says of it.

    Attributes:
        head: with its weights, in their dtype; the target is still to be attached.
        record: of an Aerie folder `aerie.json`; of others what of it is known.
        format: the format's name.
    """

    head: DraftHead
    record: Mapping[str, Any]
    format: str


@dataclass(frozen=True)
class ExportTarget:
    """What an exported folder says of the target.

    Attributes:
        path: HF folder or hub id, as the engine will be given it.
        architectures: of its `config.json`.
        geometry: its own.
        num_layers: decoder layers.
        fingerprint: of its weights and config; empty where it is not known.
    """

    path: str
    architectures: tuple[str, ...]
    geometry: TargetGeometry
    num_layers: int
    fingerprint: str = ""

    @classmethod
    def of(cls, path: str, config: PretrainedConfig, fingerprint: str = "") -> ExportTarget:
        """Of a target with an HF config."""
        return cls(
            path=path,
            architectures=tuple(config.architectures or ()),
            geometry=TargetGeometry.of(config),
            num_layers=int(config.get_text_config().num_hidden_layers),
            fingerprint=fingerprint,
        )


@dataclass(frozen=True)
class ExportedHead:
    """A head as another engine's files.

    Attributes:
        config: `config.json`.
        tensors: by the engine's names.
        pickled: write `pytorch_model.bin` instead of `model.safetensors`.
        token_map_W: int64 [W], the target ids of the draft vocabulary, where the weights cannot
            hold it; a file beside them.
        differences: what the engine does otherwise than Aerie with this head, a sentence each.
        run_with: how the engine is started with it.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    run_with: str
    pickled: bool = False
    token_map_W: Tensor | None = None
    differences: tuple[str, ...] = field(default_factory=tuple)


class HeadFormat(ABC):
    """One way in which draft heads lie in a folder."""

    name: ClassVar[str]
    holds: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Draft algorithms that `export` can write, each with those fields of its config that the
    engine has nothing for, so that they must be off; empty where the format is only read."""

    @abstractmethod
    def recognizes(self, folder: HeadFolder) -> bool:
        """Whether a folder is of this format, and of no other, by its content."""

    @abstractmethod
    def read(self, folder: HeadFolder) -> ReadHead:
        """The head in a folder of this format.

        Raises:
            InputError: files are missing, damaged, or ask for what Aerie's heads do not do.
        """

    def export(self, head: DraftHead, target: ExportTarget) -> ExportedHead:
        """The head in this format, weights in their dtype.

        Raises:
            ConfigError: the engine cannot do what this very head wants.
        """
        raise NotImplementedError(f"{self.name} is only read: {head.config.kind} for {target.path}")
