"""Examples: tokenized conversations with a loss mask, as Parquet shards.

`<folder>/<split>/shard-NNNNN.parquet`; a split's folder appears only when all of it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import InputError
from core.paths import write_atomically

FORMAT_VERSION = "1"
SPLITS = ("train", "held_out")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.uint8()), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("num_turns", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenized conversation.

    Attributes:
        id: unique within the folder.
        input_ids_T: int32 [T], the conversation in the target's chat template, cut to max_length.
        loss_mask_T: uint8 [T], 1 where the assistant speaks, its end token included.
        source: the file that it came from.
        num_turns: messages of the whole conversation, before it was cut.
    """

    id: str
    input_ids_T: npt.NDArray[np.int32]
    loss_mask_T: npt.NDArray[np.uint8]
    source: str
    num_turns: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids_T)


@dataclass(frozen=True)
class ExampleMetadata:
    """What a shard's table metadata says about all its examples."""

    split: str
    tokenizer_hash: str
    template_hash: str
    max_length: int
    cleaning: Mapping[str, Mapping[str, int]]

    def encode(self) -> dict[bytes, bytes]:
        """As Parquet key-value metadata."""
        values = {
            "format_version": FORMAT_VERSION,
            "split": self.split,
            "tokenizer_hash": self.tokenizer_hash,
            "template_hash": self.template_hash,
            "max_length": str(self.max_length),
            "cleaning": json.dumps(self.cleaning, sort_keys=True),
        }
        return {f"aerie.{key}".encode(): value.encode() for key, value in values.items()}


def shard_name(index: int) -> str:
    """`shard-00007.parquet`."""
    return f"shard-{index:05d}.parquet"


def write_examples(path: Path, examples: Sequence[Example], metadata: ExampleMetadata) -> None:
    """Write one shard; the same examples give the same bytes."""
    table = pa.Table.from_pydict(
        {
            "id": [example.id for example in examples],
            "input_ids": [example.input_ids_T for example in examples],
            "loss_mask": [example.loss_mask_T for example in examples],
            "source": [example.source for example in examples],
            "num_turns": [example.num_turns for example in examples],
        },
        schema=SCHEMA.with_metadata(metadata.encode()),
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes())


def example_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split, in order; none for a split that was left empty.

    Raises:
        InputError: prepare_data has not finished in this folder.
    """
    if not (folder / split).is_dir():
        raise InputError(
            f"{folder} has no {split!r} examples; give the output folder of a prepare_data run "
            "that has finished (data.examples=<folder>)"
        )
    return sorted((folder / split).glob("shard-*.parquet"))


def read_examples(path: Path) -> list[Example]:
    """All examples of one shard, in order.

    Raises:
        InputError: the file is no shard of examples.
    """
    table = _read_table(path)
    return [
        Example(
            id=id_,
            input_ids_T=ids.values.to_numpy(),
            loss_mask_T=mask.values.to_numpy(),
            source=source,
            num_turns=turns,
        )
        for id_, ids, mask, source, turns in zip(
            table["id"].to_pylist(),
            table["input_ids"],
            table["loss_mask"],
            table["source"].to_pylist(),
            table["num_turns"].to_pylist(),
            strict=True,
        )
    ]


def read_metadata(path: Path) -> ExampleMetadata:
    """The metadata of one shard.

    Raises:
        InputError: the file is no shard of examples.
    """
    return _decode_metadata(path, _open(path, pq.read_schema))


def verify_examples(path: Path) -> tuple[int, int, int]:
    """Re-read a shard and check every example.

    Returns:
        The numbers of examples, tokens and supervised tokens.
    Raises:
        InputError: naming the shard, the example and what is wrong with it.
    """
    metadata, examples = read_metadata(path), read_examples(path)
    tokens = supervised = 0
    for example in examples:
        problem = _problem(example, metadata.max_length)
        if problem:
            raise InputError(f"{path}: example {example.id!r} {problem}; run prepare_data again")
        tokens += example.num_tokens
        supervised += int(example.loss_mask_T.sum())
    return len(examples), tokens, supervised


class ShardWriter:
    """Fills shards of about `shard_tokens` tokens each; an example is never divided."""

    def __init__(self, folder: Path, metadata: ExampleMetadata, shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.metadata, self.shard_tokens = folder, metadata, shard_tokens
        self.num_shards = self.num_examples = self.num_tokens = 0
        self.num_supervised = self.longest = 0
        self._waiting: list[Example] = []
        self._waiting_tokens = 0

    def add(self, example: Example) -> None:
        """Append an example, and write the shard that it fills."""
        self._waiting.append(example)
        self._waiting_tokens += example.num_tokens
        self.num_examples += 1
        self.num_tokens += example.num_tokens
        self.num_supervised += int(example.loss_mask_T.sum())
        self.longest = max(self.longest, example.num_tokens)
        if self._waiting_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a last, smaller shard."""
        if self._waiting:
            write_examples(self.folder / shard_name(self.num_shards), self._waiting, self.metadata)
            self.num_shards += 1
            self._waiting, self._waiting_tokens = [], 0


def _problem(example: Example, max_length: int) -> str | None:
    if example.num_tokens != len(example.loss_mask_T):
        return f"has {example.num_tokens} tokens and a mask of {len(example.loss_mask_T)}"
    if example.num_tokens > max_length:
        return f"has {example.num_tokens} tokens, more than data.max_length={max_length}"
    if example.num_tokens and int(example.input_ids_T.min()) < 0:
        return "has a negative token id"
    if not np.isin(example.loss_mask_T, (0, 1)).all():
        return "has a loss mask with other values than 0 and 1"
    if not example.loss_mask_T.any():
        return "has an all-zero loss mask"
    return None


def _read_table(path: Path) -> pa.Table:
    table = _open(path, pq.read_table)
    if not table.schema.equals(SCHEMA):
        raise InputError(
            f"{path}: expected the columns {', '.join(map(str, SCHEMA))}, "
            f"got {', '.join(map(str, table.schema))}; run prepare_data again"
        )
    return table


def read_footer(shard: Path) -> pq.FileMetaData:
    """What a shard's last bytes say of it.

    Raises:
        InputError: it is damaged.
    """
    footer: pq.FileMetaData = _open(shard, pq.read_metadata)
    return footer


def _open(path: Path, read: Any) -> Any:
    try:
        return read(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run prepare_data again") from error


def _decode_metadata(path: Path, schema: pa.Schema) -> ExampleMetadata:
    raw: Iterable[tuple[bytes, bytes]] = (schema.metadata or {}).items()
    values = {key.decode(): value.decode() for key, value in raw if key.startswith(b"aerie.")}
    version = values.get("aerie.format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: examples of format {version!r}, this version reads {FORMAT_VERSION!r}; "
            "run prepare_data again"
        )
    return ExampleMetadata(
        split=values["aerie.split"],
        tokenizer_hash=values["aerie.tokenizer_hash"],
        template_hash=values["aerie.template_hash"],
        max_length=int(values["aerie.max_length"]),
        cleaning=json.loads(values["aerie.cleaning"]),
    )
