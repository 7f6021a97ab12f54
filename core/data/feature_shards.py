"""Feature shards: the target's hidden states on disk, one file an example shard.

A folder holds `manifest.json` and, for each split, `<split>/<stem>.safetensors` with a sidecar
`<stem>.json`. A shard's tokens are flat: `features` [T, L, H], `input_ids` int32 [T], `loss_mask`
uint8 [T] and `offsets` int64 [E + 1], example e being the rows offsets[e]:offsets[e + 1]. The
sidecar is written last, so that its presence means that the shard is finished.

Shapes: T tokens (of a shard or an example), L feature layers, H hidden, E examples, V vocabulary.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from core.errors import InputError, MismatchError, ShapeError
from core.paths import TEMPORARY, write_atomically

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What the features of a folder are; the same for all its shards.

    Attributes:
        target: fingerprint of the target model.
        feature_layers: each stands for the state that *enters* that layer, as the index into HF's
            `hidden_states` does; the number of layers stands for what leaves the last.
        final_norm: whether the final norm has been applied to what leaves the last layer.
        dtype: of `features`.
        hidden_size: H.
        vocab_size: V of the target.
        max_length: longest example, in tokens.
        tokenizer_hash: of the tokenizer that encoded the examples.
        template_hash: of the chat template that laid them out.
        shards: split → stems of its shards, in order.
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
    layer_convention: str = "entering"
    format_version: int = FORMAT_VERSION

    @property
    def identity(self) -> str:
        """Hash of everything but the list of shards; every sidecar repeats it."""
        values = {key: value for key, value in asdict(self).items() if key != "shards"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

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
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {content.get('format_version')}, this Aerie reads "
            f"{FORMAT_VERSION}; run extract_features again"
        )
    del content["identity"]
    content["feature_layers"] = tuple(content["feature_layers"])
    content["shards"] = {split: tuple(stems) for split, stems in content["shards"].items()}
    return Manifest(**content)


@dataclass(frozen=True)
class ShardRecord:
    """A shard's sidecar.

    Attributes:
        manifest: identity of the manifest it belongs to.
        checksum: SHA-256 of the file.
        bytes: size of the file.
        examples: E.
        tokens: T.
        padded_tokens: tokens that the target computed for it, padding included.
    """

    manifest: str
    checksum: str
    bytes: int
    examples: int
    tokens: int
    padded_tokens: int


def sidecar(shard: Path) -> Path:
    """Where the record of a shard stands."""
    return shard.with_suffix(".json")


def write_feature_shard(
    shard: Path,
    *,
    features_TLH: Tensor,
    input_ids_T: Tensor,
    loss_mask_T: Tensor,
    offsets: Tensor,
    padded_tokens: int,
    manifest: Manifest,
) -> ShardRecord:
    """Write a shard aside, rename it, then write its sidecar.

    Equal tensors make equal bytes. Several writers of one shard do not harm each other.

    Args:
        shard: path ending in `.safetensors`.
        features_TLH: [T, L, H] in the manifest's dtype.
        input_ids_T: int32 [T].
        loss_mask_T: uint8 [T].
        offsets: int64 [E + 1].
        padded_tokens: see `ShardRecord`.
        manifest: of the folder.
    Raises:
        ShapeError: the tensors disagree with each other or with the manifest.
    """
    tokens = len(input_ids_T)
    expected = (tokens, len(manifest.feature_layers), manifest.hidden_size)
    if tuple(features_TLH.shape) != expected or features_TLH.dtype != _dtype(manifest):
        raise ShapeError(
            f"features {tuple(features_TLH.shape)} {features_TLH.dtype}, expected {expected} "
            f"{_dtype(manifest)}"
        )
    if len(loss_mask_T) != tokens or int(offsets[-1]) != tokens:
        raise ShapeError(f"{len(loss_mask_T)} mask entries and {offsets[-1]} for {tokens} tokens")
    tensors = {
        "features": features_TLH.contiguous(),
        "input_ids": input_ids_T.to(torch.int32),
        "loss_mask": loss_mask_T.to(torch.uint8),
        "offsets": offsets.to(torch.int64),
    }
    content = save(tensors)
    write_atomically(shard, content)
    record = ShardRecord(
        manifest=manifest.identity,
        checksum=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        examples=len(offsets) - 1,
        tokens=tokens,
        padded_tokens=padded_tokens,
    )
    write_atomically(sidecar(shard), json.dumps(asdict(record), indent=2).encode())
    return record


def file_checksum(path: Path) -> str:
    """SHA-256 of a file (1.8 GB/s where the CPU has instructions for it)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished_record(shard: Path, manifest: Manifest) -> ShardRecord | None:
    """The record of a shard that is finished and of its recorded size; None if it is to be made."""
    try:
        record = ShardRecord(**json.loads(sidecar(shard).read_text()))
        size = shard.stat().st_size
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if record.manifest == manifest.identity and record.bytes == size else None


def verify_shard(shard: Path, manifest: Manifest) -> ShardRecord:
    """Read a whole shard and compare it with its checksum.

    Raises:
        InputError: it is unfinished or damaged; the message says what to do.
    """
    record = finished_record(shard, manifest)
    if record is None or file_checksum(shard) != record.checksum:
        raise InputError(_damaged(shard, "is missing, damaged or unfinished"))
    return record


def discard_shard(shard: Path) -> None:
    """Take a shard's finished mark away, so that the next run computes it anew."""
    sidecar(shard).unlink(missing_ok=True)


def remove_leftovers(folder: Path, older_than: float) -> None:
    """Delete what killed writers left aside before a time (seconds since the epoch)."""
    for aside in folder.glob(f"*/.*{TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):
            if aside.stat().st_mtime < older_than:
                aside.unlink()


@dataclass(frozen=True)
class FeatureExample:
    """One example: input_ids int64 [T], loss_mask bool [T], features [T, L, H]."""

    input_ids: Tensor
    loss_mask: Tensor
    features: Tensor


class FeatureDataset:
    """Random access to the examples of one split, memory-mapped; can be pickled.

    Attributes:
        manifest: of the folder.
        lengths: int64 [examples], tokens of each.
        num_tokens: their sum.
    """

    def __init__(self, folder: str | Path, split: str, target: str | None = None) -> None:
        """Open a split; only the shards' offsets are read.

        Args:
            folder: that extract_features wrote.
            split: `train` or `held_out`.
            target: fingerprint of the target that the features must come from.
        Raises:
            InputError: the folder, the split or a shard is missing or damaged.
            MismatchError: the features come from another target.
        """
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        if target is not None and target != self.manifest.target:
            raise MismatchError(
                f"{self.folder}: its features come from the target {self.manifest.target[:12]}, "
                f"this target is {target[:12]}; set target.path to the model that they came from "
                "or run extract_features with this one"
            )
        stems = self.manifest.shards.get(split, ())
        if not stems:
            raise InputError(
                f"{self.folder}: no {split} shards; its splits are "
                f"{', '.join(s for s, found in self.manifest.shards.items() if found) or 'none'}"
            )
        self._shards = [self.folder / split / f"{stem}.safetensors" for stem in stems]
        self._open: dict[int, Any] = {}
        self._offsets = [self._read_offsets(number) for number in range(len(self._shards))]
        # Examples before each shard, for finding an example's shard by bisection.
        self._first = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)]).tolist()
        self.lengths: NDArray[np.int64] = np.concatenate(
            [np.diff(offsets) for offsets in self._offsets]
        )
        self.num_tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        """Number of examples."""
        return int(self._first[-1])

    def __getitem__(self, index: int) -> FeatureExample:
        """Example `index`; its tensors are copies, free to be changed."""
        file, rows = self._locate(index)
        return FeatureExample(
            input_ids=file.get_slice("input_ids")[rows].to(torch.int64),
            loss_mask=file.get_slice("loss_mask")[rows].to(torch.bool),
            # A slice is a view of the whole mapped file: pickled, it would take that along.
            features=file.get_slice("features")[rows].clone(),
        )

    def loss_mask(self, index: int) -> Tensor:
        """The loss mask of example `index` alone, bool [T]; its features are not read."""
        file, rows = self._locate(index)
        mask: Tensor = file.get_slice("loss_mask")[rows].to(torch.bool)
        return mask

    def announce(self, passes: Iterable[Sequence[int]]) -> None:
        """Nothing needs to be got ready: any example can be read at any time."""

    def take(self, indices: Sequence[int]) -> list[FeatureExample]:
        """Several examples."""
        return [self[index] for index in indices]

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is supervised: int64 [vocab_size], for the draft vocabulary."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for number in range(len(self._shards)):
            file = self._file(number)
            supervised = file.get_tensor("input_ids")[file.get_tensor("loss_mask").bool()]
            counts += torch.bincount(supervised, minlength=vocab_size)
        return counts

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay behind."""
        return {**self.__dict__, "_open": {}}

    def _locate(self, index: int) -> tuple[Any, slice]:
        """The open shard that holds an example, and the example's rows in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect.bisect_right(self._first, index) - 1
        begin, end = self._offsets[number][index - self._first[number] :][:2].tolist()
        return self._file(number), slice(begin, end)

    def _file(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = _open_shard(self._shards[number])
        return self._open[number]

    def _read_offsets(self, number: int) -> NDArray[np.int64]:
        shard = self._shards[number]
        if finished_record(shard, self.manifest) is None:
            raise InputError(_damaged(shard, "is missing, cut off or unfinished"))
        offsets: NDArray[np.int64] = _open_shard(shard).get_tensor("offsets").numpy()
        return offsets


def _open_shard(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(_damaged(shard, f"cannot be read ({error})")) from error


def _damaged(shard: Path, what: str) -> str:
    report = shard.parent.parent / "report.json"
    return (
        f"{shard} {what}; delete it and {report}, then run extract_features with the same "
        "output: it computes this shard alone again"
    )


def _dtype(manifest: Manifest) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    return dtype
