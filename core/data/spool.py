"""What the first pass found, on disk: sorted, without duplicates, and cut to what is taken.

`Spool` takes rows in any order and puts them aside in partitions by their key, so that `select`
can sort one partition after the other. In memory are some 200 bytes a conversation (hashes), never
texts. What is selected is the same whatever order the rows came in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from core.data.cleaning import DUPLICATE, NEAR_DUPLICATE, SAMPLE_CHARACTERS, CleaningCounts
from core.data.conversations import unpack_messages
from core.data.near_duplicates import near_duplicates, open_signatures
from core.data.scan import CONVERSATION, HASH_BYTES
from core.data.selection import is_held_out
from core.progress import say

PARTITION_BYTES = 2**22
MAX_PARTITION_BITS = 12
# Rows wait in memory until so many bytes, so that a partition grows by more than a few at a time.
FLUSH_BYTES, FLUSH_BYTES_PER_PARTITION = 2**23, 2**14
ID_SUFFIX_LENGTH = 8
# How the parts of a long conversation are named.
PART_OF = re.compile(r"#\d+\Z")
MIN_GROUP_ROWS, MAX_GROUP_ROWS, GROUPS = 64, 512, 2000

# `messages` is null in what a twin left: its id and source alone.
PARTITION_SCHEMA = pa.schema(CONVERSATION)
SELECTED_SCHEMA = pa.schema(
    [*(column for column in CONVERSATION if column.name != "key"), pa.field("held_out", pa.bool_())]
)


@dataclass
class Spool:
    """Rows of SCANNED_SCHEMA, put aside under a folder.

    Attributes:
        folder: empty, on a file system with room for the input.
        bits: there are 2**bits partitions.
    """

    folder: Path
    bits: int
    num_duplicates: int = 0
    _seen: set[bytes] = field(default_factory=set)
    _contents: list[bytes] = field(default_factory=list)
    _keys: list[int] = field(default_factory=list)
    _waiting: list[pa.Table] = field(default_factory=list)
    _waiting_bytes: int = 0

    def __post_init__(self) -> None:
        """Make the folder, and the file of signatures in it."""
        self.folder.mkdir(parents=True)
        self._signatures = self.folder.joinpath("signatures.bin").open("wb")

    def __len__(self) -> int:
        """Different conversations so far."""
        return len(self._contents)

    def add(self, table: pa.Table) -> None:
        """Rows that describe conversations, without the row of counts."""
        if not table.num_rows:
            return
        fresh = [self._is_new(content) for content in table["content"].to_pylist()]
        mask = pa.array(fresh)
        found = table.filter(mask)
        self._keys += found["key"].to_pylist()
        for one in found["signature"]:
            if one.is_valid:
                self._signatures.write(one.as_py())
        texts = pc.if_else(mask, table["messages"], pa.scalar(None, pa.large_string()))
        place = table.schema.get_field_index("messages")
        kept = table.set_column(place, "messages", texts).select(PARTITION_SCHEMA.names)
        self._waiting.append(kept.cast(PARTITION_SCHEMA))
        self._waiting_bytes += kept.nbytes
        if self._waiting_bytes >= max(FLUSH_BYTES, FLUSH_BYTES_PER_PARTITION << self.bits):
            self._flush()

    def close(self) -> None:
        """Write what is left; `select` comes after it."""
        self._flush()
        self._signatures.close()

    def _is_new(self, content: str) -> bool:
        digest = bytes.fromhex(content)[:HASH_BYTES]
        if digest in self._seen:
            self.num_duplicates += 1
            return False
        self._seen.add(digest)
        self._contents.append(digest)
        return True

    def _flush(self) -> None:
        if not self._waiting:
            return
        # A copy: slices of blocks would keep Ray's memory occupied.
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._waiting_bytes = [], 0
        partitions = table["key"].to_numpy() >> np.uint64(63 - self.bits) >> np.uint64(1)
        for partition in np.unique(partitions).tolist():
            # A stream of its own each time: thousands of files could not stay open.
            with (
                self._path(partition).open("ab") as file,
                pa.ipc.new_stream(file, PARTITION_SCHEMA) as stream,
            ):
                stream.write_table(table.filter(pa.array(partitions == partition)))

    def _path(self, partition: int) -> Path:
        return self.folder / f"partition-{partition:04d}.arrow"

    def _partition(self, partition: int) -> pa.Table:
        tables = []
        with self._path(partition).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            while file.tell() < size:
                with pa.ipc.open_stream(file) as stream:
                    tables.append(stream.read_all())
        return pa.concat_tables(tables)

    def losers(self, similarity: float | None) -> set[bytes]:
        """Hashes of those that are nearly the same as another one with a smaller hash."""
        if similarity is None:
            return set()
        contents = np.frombuffer(b"".join(self._contents), dtype=f"V{HASH_BYTES}")
        halves = contents.view(">u8").reshape(-1, 2)
        rank_N = np.empty(len(contents), dtype=np.int64)
        rank_N[np.lexsort((halves[:, 1], halves[:, 0]))] = np.arange(len(contents))
        signatures_NP = open_signatures(self.folder / "signatures.bin")
        gone_N = near_duplicates(signatures_NP, rank_N, similarity)
        return {self._contents[index] for index in np.flatnonzero(gone_N)}

    def last_key(self, losers: set[bytes], limit: int | None) -> int:
        """The key of the last conversation that is taken."""
        if limit is None:
            return 2**64 - 1
        pairs = zip(self._keys, self._contents, strict=True)
        keys = np.sort(np.array([k for k, c in pairs if c not in losers], dtype=np.uint64))
        return int(keys[min(limit, len(keys)) - 1]) if len(keys) else 0

    def rows(
        self, losers: set[bytes], last_key: int, counts: CleaningCounts
    ) -> Iterator[tuple[dict[str, Any], bool]]:
        """All conversations by ascending key, and whether each stays, up to the last key."""
        for partition in range(2**self.bits):
            if partition > last_key >> (64 - self.bits) or not self._path(partition).exists():
                continue
            table = self._partition(partition)
            table = table.filter(pc.less_equal(table["key"], pa.scalar(last_key, pa.uint64())))
            for row in _without_twins(table, counts):
                stays = bytes.fromhex(row["content"])[:HASH_BYTES] not in losers
                if not stays:
                    counts.sample("dropped", NEAR_DUPLICATE, row["content"], _shown(row))
                yield row, stays


def num_partition_bits(num_bytes: int) -> int:
    """So many that one partition's texts are a few megabytes."""
    return min(MAX_PARTITION_BITS, (num_bytes // PARTITION_BYTES).bit_length())


def select(
    spool: Spool,
    path: Path,
    counts: CleaningCounts,
    *,
    similarity: float | None,
    limit: int | None,
    held_out: float,
    seed: int,
) -> int:
    """Write those that are taken, in their order, each with an id that no other has.

    Args:
        spool: closed.
        path: a Parquet file of SELECTED_SCHEMA; row groups are what workers take at a time.
        counts: duplicates are noted there.
        similarity: of near duplicates, or None.
        limit: at most so many, those of lowest key.
        held_out: share kept out of training.
        seed: of that decision.
    Returns:
        How many were taken.
    """
    say("prepare_data", f"{len(spool):,} different conversations; looking for near duplicates")
    losers = spool.losers(similarity)
    counts.dropped[DUPLICATE] += spool.num_duplicates
    counts.dropped[NEAR_DUPLICATE] += len(losers)
    last_key = spool.last_key(losers, limit)
    group_rows = min(MAX_GROUP_ROWS, max(MIN_GROUP_ROWS, len(spool) // GROUPS))
    taken, waiting, ids = 0, [], _UniqueIds()
    with pq.ParquetWriter(path, SELECTED_SCHEMA, compression="lz4") as writer:
        for row, stays in spool.rows(losers, last_key, counts):
            if not stays:
                continue
            taken += 1
            waiting.append(
                {
                    **{name: row[name] for name in SELECTED_SCHEMA.names if name in row},
                    "id": ids.of(row["id"], row["content"]),
                    "held_out": is_held_out(row["content"], held_out, seed),
                }
            )
            if len(waiting) == group_rows:
                writer.write_table(pa.Table.from_pylist(waiting, schema=SELECTED_SCHEMA))
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema=SELECTED_SCHEMA))
    return taken


def _shown(row: Mapping[str, Any]) -> Callable[[], dict[str, str]]:
    """A sample of what is dropped."""

    def sample() -> dict[str, str]:
        first = unpack_messages(row["messages"])[0].content[:SAMPLE_CHARACTERS]
        return {"id": row["id"], "before": first.encode("utf-8", "replace").decode()}

    return sample


def _without_twins(table: pa.Table, counts: CleaningCounts) -> list[dict[str, Any]]:
    """By key and content; of twins, the id and source that come first in the alphabet."""
    found: dict[str, dict[str, Any]] = {}
    twins: set[str] = set()
    for row in table.to_pylist():
        twin = found.setdefault(row["content"], row)
        if twin is row:
            continue
        best = min(twin, row, key=_rank)
        messages = row["messages"] if twin["messages"] is None else twin["messages"]
        found[row["content"]] = {**best, "messages": messages}
        twins.add(row["content"])
    for content in twins:
        counts.sample("dropped", DUPLICATE, content, _shown(found[content]))
    return sorted(found.values(), key=lambda row: (row["key"], row["content"]))


def _rank(row: dict[str, Any]) -> tuple[bool, str, str]:
    return (not row["id"], row["id"], row["source"])


class _UniqueIds:
    """Gives each conversation its own id, or one made of it and the content's hash."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def of(self, own_id: str, content: str) -> str:
        unique = own_id or content
        if _short_hash(unique) in self._taken or PART_OF.search(unique):
            unique = f"{unique}-{content[:ID_SUFFIX_LENGTH]}"
        self._taken.add(_short_hash(unique))
        return unique


def _short_hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace"))
