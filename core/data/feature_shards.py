"""Feature shards: the target's hidden states on disk, one file an example shard.

A folder holds `manifest.json` and, for each split, `<split>/<stem>.safetensors` with a sidecar
`<stem>.json`. A shard's tokens are flat: `features` [T, L, H], `input_ids` int32 [T], `loss_mask`
uint8 [T] and `offsets` int64 [E + 1], example e being the rows offsets[e]:offsets[e + 1]. int8
features have `scales` bfloat16 [T, L, G] beside them (`core.data.groupwise`). Where asked for,
`top_ids` int32 [T, K] and `top_log_probs` float16 [T, K] are the target's likeliest next tokens.
The sidecar is written last, so that its presence means that the shard is finished. The tensor
file may be in an object store instead (`core.data.shard_store`).

Shapes: T tokens (of a shard or an example), L feature layers, H hidden, G groups of H, K likeliest
tokens, E examples, V vocabulary.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from core.data import groupwise
from core.data.feature_manifest import INT8, Manifest, read_manifest
from core.data.shard_store import AGAIN
from core.errors import InputError, MismatchError, ShapeError
from core.paths import TEMPORARY, write_atomically

# Tokens that are quantized at a time, which bounds the float32 copy.
QUANTIZED_AT_ONCE = 1024


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


@dataclass(frozen=True)
class TopLogits:
    """The likeliest next tokens, likeliest first.

    Attributes:
        ids_TK: int32 [T, K].
        log_probs_TK: float16 [T, K], of the whole vocabulary: what is missing to a probability of
            1 is the tail's. float16 because its 11 bits matter near 0 and -65,504 is far.
    """

    ids_TK: Tensor
    log_probs_TK: Tensor


def write_feature_shard(
    shard: Path,
    *,
    features_TLH: Tensor,
    input_ids_T: Tensor,
    loss_mask_T: Tensor,
    offsets: Tensor,
    padded_tokens: int,
    manifest: Manifest,
    top: TopLogits | None = None,
) -> ShardRecord:
    """Write a shard whole or not at all, then its sidecar.

    Equal tensors make equal bytes. Several writers of one shard do not harm each other.

    Args:
        shard: path ending in `.safetensors`.
        features_TLH: [T, L, H] in the manifest's dtype; any float where that is int8.
        input_ids_T: int32 [T].
        loss_mask_T: uint8 [T].
        offsets: int64 [E + 1].
        padded_tokens: see `ShardRecord`.
        manifest: of the folder.
        top: as the manifest's `top_logits` says.
    Raises:
        ShapeError: the tensors disagree with each other or with the manifest.
        ResourceError: the disk is full, or the store refused.
    """
    _check_shapes(features_TLH, input_ids_T, loss_mask_T, offsets, manifest, top)
    tokens = len(input_ids_T)
    tensors = {
        **_encoded(features_TLH, manifest.dtype),
        **({"top_ids": top.ids_TK, "top_log_probs": top.log_probs_TK} if top else {}),
        "input_ids": input_ids_T.to(torch.int32),
        "loss_mask": loss_mask_T.to(torch.uint8),
        "offsets": offsets.to(torch.int64),
    }
    content = save(tensors)
    manifest.files.put(shard, content)
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


def _check_shapes(
    features_TLH: Tensor,
    input_ids_T: Tensor,
    loss_mask_T: Tensor,
    offsets: Tensor,
    manifest: Manifest,
    top: TopLogits | None,
) -> None:
    tokens = len(input_ids_T)
    expected = (tokens, len(manifest.feature_layers), manifest.hidden_size)
    right_dtype = (
        features_TLH.is_floating_point()
        if manifest.dtype == INT8
        else features_TLH.dtype == manifest.stored_dtype
    )
    if tuple(features_TLH.shape) != expected or not right_dtype:
        raise ShapeError(
            f"features {tuple(features_TLH.shape)} {features_TLH.dtype}, expected {expected} "
            f"{manifest.dtype}"
        )
    if len(loss_mask_T) != tokens or int(offsets[-1]) != tokens:
        raise ShapeError(f"{len(loss_mask_T)} mask entries and {offsets[-1]} for {tokens} tokens")
    found = tuple(top.ids_TK.shape) if top else (tokens, 0)
    if found != (tokens, manifest.top_logits):
        raise ShapeError(f"top logits {found}, expected {(tokens, manifest.top_logits)}")


def _encoded(features_TLH: Tensor, dtype: str) -> dict[str, Tensor]:
    """The tensors that features are stored as."""
    if dtype != INT8:
        return {"features": features_TLH.contiguous()}
    parts = [groupwise.quantize(part) for part in features_TLH.split(QUANTIZED_AT_ONCE)]
    return {
        "features": torch.cat([codes for codes, _ in parts]),
        "scales": torch.cat([scales for _, scales in parts]),
    }


def finished_record(shard: Path, manifest: Manifest) -> ShardRecord | None:
    """The record of a shard that is finished and of its recorded size; None if it is to be made."""
    try:
        record = ShardRecord(**json.loads(sidecar(shard).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if record.manifest != manifest.identity:
        return None
    return record if record.bytes == manifest.files.size(shard) else None


def verify_shard(shard: Path, manifest: Manifest) -> ShardRecord:
    """Read a whole shard and compare it with its checksum.

    Raises:
        InputError: it is unfinished or damaged; the message says what to do.
    """
    record = finished_record(shard, manifest)
    if record is None or manifest.files.checksum(shard) != record.checksum:
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
    """One example.

    Attributes:
        input_ids: int64 [T].
        loss_mask: bool [T].
        features: [T, L, H] as stored, float32 where that is int8; index -1 of L is the final one.
        top: the target's likeliest next tokens, where they are stored.
    """

    input_ids: Tensor
    loss_mask: Tensor
    features: Tensor
    top: TopLogits | None = None


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
        self._records = [self._record(shard) for shard in self._shards]
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
            features=self._features(file, rows),
            top=self._top(file, rows),
        )

    def _features(self, file: Any, rows: slice) -> Tensor:
        stored: Tensor = file.get_slice("features")[rows]
        if self.manifest.dtype == INT8:
            return groupwise.dequantize(stored, file.get_slice("scales")[rows])
        # A slice is a view of the whole mapped file: pickled, it would take that along.
        return stored.clone()

    def _top(self, file: Any, rows: slice) -> TopLogits | None:
        if not self.manifest.top_logits:
            return None
        return TopLogits(
            ids_TK=file.get_slice("top_ids")[rows].clone(),
            log_probs_TK=file.get_slice("top_log_probs")[rows].clone(),
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
            self._open[number] = self._open_shard(number)
        return self._open[number]

    def _read_offsets(self, number: int) -> NDArray[np.int64]:
        offsets: NDArray[np.int64] = self._open_shard(number).get_tensor("offsets").numpy()
        return offsets

    def _record(self, shard: Path) -> ShardRecord:
        record = finished_record(shard, self.manifest)
        if record is None:
            raise InputError(_damaged(shard, "is missing, cut off or unfinished"))
        return record

    def _open_shard(self, number: int) -> Any:
        shard = self._shards[number]
        # On another node than the one that opened the dataset it may have to be fetched.
        file = self.manifest.files.local_file(shard, self._records[number].checksum)
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(_damaged(shard, f"cannot be read ({error})")) from error


def _damaged(shard: Path, what: str) -> str:
    return f"{shard} {what}; {AGAIN}"
