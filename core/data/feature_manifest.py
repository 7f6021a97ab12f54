"""`manifest.json` of a feature folder: what its features are.

Shapes: L feature layers, H hidden, K likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from core.data import groupwise
from core.data.shard_store import ShardStore
from core.errors import InputError
from core.paths import write_atomically

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
INT8 = "int8"


@dataclass(frozen=True)
class Manifest:
    """What the features of a folder are; the same for all its shards.

    Attributes:
        target: fingerprint of the target model.
        feature_layers: each stands for the state that *enters* that layer, as the index into HF's
            `hidden_states` does; the number of layers stands for what leaves the last. Ascending,
            and that one, the final feature, is always there.
        final_norm: whether the final norm has been applied to what leaves the last layer.
        dtype: of `features`; int8 is with scales.
        hidden_size: H.
        vocab_size: V of the target.
        max_length: longest example, in tokens.
        tokenizer_hash: of the tokenizer that encoded the examples.
        template_hash: of the chat template that laid them out.
        shards: split → stems of its shards, in order.
        top_logits: K; 0 where none are stored.
        target_quantization: of the target's weights when it made them.
        store: where the tensor files are (`core.data.shard_store`); None for this folder.
    """

    target: str
    feature_layers: tuple[int, ...]
    final_norm: bool
    dtype: str
    hidden_size: int
    vocab_size: int
    max_length: int
    tokenizer_hash: str
    template_hash: str
    shards: Mapping[str, tuple[str, ...]]
    top_logits: int = 0
    target_quantization: str = "none"
    layer_convention: str = "entering"
    format_version: int = FORMAT_VERSION
    store: str | None = None

    @property
    def bytes_per_token(self) -> int:
        """Of a shard, but for its offsets and header."""
        if self.dtype == INT8:
            vector = self.hidden_size + groupwise.num_groups(self.hidden_size) * 2
        else:
            vector = self.hidden_size * self.stored_dtype.itemsize
        # Beside the features: input_ids 4, loss_mask 1, a likely token 4 and its probability 2.
        return vector * len(self.feature_layers) + 5 + 6 * self.top_logits

    @property
    def stored_dtype(self) -> torch.dtype:
        """The torch dtype of `features`."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @cached_property
    def identity(self) -> str:
        """Hash of what a shard's bytes depend on; every sidecar repeats it."""
        values = {k: v for k, v in asdict(self).items() if k not in ("shards", "store")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @cached_property
    def files(self) -> ShardStore:
        """The shards' tensor files; one store for all of them, so that it is opened once."""
        return ShardStore(self.store, self.identity)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        content = {"identity": self.identity, **asdict(self)}
        write_atomically(folder / MANIFEST, json.dumps(content, indent=2).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a feature folder.

    Raises:
        InputError: there is none, or another version of Aerie wrote it.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise InputError(f"{folder}: no {MANIFEST}; is it a folder that extract_features wrote?")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); run extract_features again") from error
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {content.get('format_version')}, this Aerie reads "
            f"{FORMAT_VERSION}; run extract_features again"
        )
    del content["identity"]
    content["feature_layers"] = tuple(content["feature_layers"])
    content["shards"] = {split: tuple(stems) for split, stems in content["shards"].items()}
    return Manifest(**content)
