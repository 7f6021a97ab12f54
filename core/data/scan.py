"""The first pass over the input: records are read, cleaned and described, block by block.

Both functions run in workers and hold one block at a time. Nothing of what they give depends on
how the input was cut into blocks: counts add up, and samples are those of the smallest hash.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from core.config.sections import DataConfig
from core.data.cleaning import CleaningCounts, Rule, clean, rules_for
from core.data.conversations import RecordError, pack_messages
from core.data.formats import read_record
from core.data.near_duplicates import signature
from core.data.records import Record, Source
from core.data.selection import content_hash, order_key
from core.errors import UserError

BLOCK_BYTES = 2**20
BAD_RECORDS_SHOWN = 3
HASH_BYTES = 16

RAW_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("place", pa.int32()),
        ("index", pa.int64()),
        ("text", pa.large_string()),
        ("problem", pa.string()),
        # What ended the source early: "truncated", or an error's message.
        ("truncated", pa.bool_()),
        ("fatal", pa.string()),
    ]
)
# A cleaned conversation, on its way from one pass to the other.
CONVERSATION = (
    pa.field("content", pa.string()),
    pa.field("key", pa.uint64()),
    pa.field("id", pa.string()),
    pa.field("source", pa.string()),
    pa.field("kind", pa.string()),
    pa.field("messages", pa.large_string()),
)
SCANNED_SCHEMA = pa.schema(
    [
        *CONVERSATION,
        ("signature", pa.binary()),
        # The counts of the block, in its last row, which has nothing else.
        ("counts", pa.large_string()),
    ]
)


@dataclass
class ScanCounts:
    """What reading and cleaning came to.

    Attributes:
        read: conversations.
        formats: records by the format that they were read as.
        bad: records that are no conversation.
        first_bad: the first few of these: place of the source, index, and what was wrong.
        truncated: sources that end in mid-record.
        fatal: sources that could not be read to their end, and why.
    """

    cleaning: CleaningCounts = field(default_factory=CleaningCounts)
    formats: Counter[str] = field(default_factory=Counter)
    read: int = 0
    bad: int = 0
    first_bad: list[tuple[int, int, str]] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    fatal: list[str] = field(default_factory=list)

    def note_bad(self, place: int, index: int, source: str, why: str) -> None:
        """Count a record that is no conversation."""
        self.bad += 1
        self._show_bad([(place, index, f"{source}, record {index}: {why}")])

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add another block's counts, as `as_json` gave them."""
        self.cleaning.merge(other["cleaning"])
        self.formats.update(other["formats"])
        self.read += other["read"]
        self.bad += other["bad"]
        self._show_bad([(place, index, why) for place, index, why in other["first_bad"]])
        self.truncated += other["truncated"]
        self.fatal += other["fatal"]

    def as_json(self) -> str:
        """For `merge`."""
        return json.dumps({**vars(self), "cleaning": self.cleaning.as_dict()})

    def _show_bad(self, more: list[tuple[int, int, str]]) -> None:
        self.first_bad = sorted([*self.first_bad, *more])[:BAD_RECORDS_SHOWN]


def read_blocks(source: Source, place: int) -> Iterator[pa.Table]:
    """A source's records as tables of RAW_SCHEMA, of about BLOCK_BYTES.

    Args:
        source: what is read.
        place: its number among all sources.
    """
    rows: list[dict[str, Any]] = []
    waiting = 0
    common = {"source": source.name, "place": place}
    try:
        reader = source.read()
        for record in reader:
            rows.append({**common, **vars(record)})
            waiting += len(record.text)
            if waiting >= BLOCK_BYTES:
                yield pa.Table.from_pylist(rows, schema=RAW_SCHEMA)
                rows, waiting = [], 0
        rows.append({**common, "truncated": bool(reader.truncated)})
    except UserError as error:
        # As a value: Ray would wrap an exception in its own.
        rows.append({**common, "fatal": str(error)})
    yield pa.Table.from_pylist(rows, schema=RAW_SCHEMA)


def scan_block(table: pa.Table, data: DataConfig) -> pa.Table:
    """Parse and clean records, and describe what is left.

    Args:
        table: of RAW_SCHEMA.
        data: format, rules, seed.
    Returns:
        Of SCANNED_SCHEMA: a row for each conversation that is left, and one with the counts.
    """
    counts = ScanCounts()
    rules = rules_for(data.rules_off, data.only_languages, data.drop_languages, data.mask_pii)
    rows: list[dict[str, Any]] = []
    for row in table.to_pylist():
        if row["text"] is None:
            counts.truncated += [row["source"]] * bool(row["truncated"])
            counts.fatal += [row["fatal"]] * bool(row["fatal"])
            continue
        record = Record(row["index"], row["text"], row["problem"])
        try:
            name, conversation = read_record(record.parse(), row["source"], data.format)
            described = _described(conversation, counts, rules, data)
        except (RecordError, ValueError) as error:
            counts.note_bad(row["place"], row["index"], row["source"], str(error))
            continue
        except Exception as error:
            # What no reader or rule foresaw must not cost the other records. It is named.
            why = f"{type(error).__name__}: {error}"
            counts.note_bad(row["place"], row["index"], row["source"], why)
            continue
        counts.read += 1
        counts.formats[name] += 1
        if described is not None:
            rows.append(described)
    rows.append({"counts": counts.as_json()})
    return pa.Table.from_pylist(rows, schema=SCANNED_SCHEMA)


def _described(
    conversation: Any, counts: ScanCounts, rules: Mapping[str, Rule], data: DataConfig
) -> dict[str, Any] | None:
    cleaned = clean(conversation, counts.cleaning, rules)
    if cleaned is None:
        return None
    content = content_hash(cleaned)
    wanted = data.near_duplicates is not None
    return {
        "content": content,
        "key": order_key(content, data.seed),
        "id": cleaned.id,
        "source": cleaned.source,
        "kind": cleaned.kind,
        "messages": pack_messages(cleaned.messages),
        "signature": signature(cleaned.messages).tobytes() if wanted else None,
    }
