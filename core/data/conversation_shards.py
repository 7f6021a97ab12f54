"""Conversations that were made here, in JSONL shards which join into one file.

`<stem>.jsonl` has a record a line, `<stem>.json` beside it what came of the shard and the file's
checksum; that is written last, so that its presence means that the shard is finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.data.conversations import Conversation
from core.paths import file_written_aside, write_atomically

# As ShareGPT names the roles.
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def as_sharegpt(conversation: Conversation) -> dict[str, Any]:
    """The record that `prepare_data` reads."""
    turns = [{"from": SPEAKERS[m.role], "value": m.content} for m in conversation.messages]
    return {"id": conversation.id, "conversations": turns}


def write_shard(
    shard: Path, records: Iterable[Mapping[str, Any]], figures: Mapping[str, Any]
) -> None:
    """Write records aside and rename, then the figures; equal records make equal bytes."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    content = "".join(lines).encode()
    write_atomically(shard, content)
    about = {"checksum": hashlib.sha256(content).hexdigest(), "records": len(lines), **figures}
    write_atomically(shard.with_suffix(".json"), json.dumps(about, indent=2).encode())


def finished_shard(shard: Path) -> dict[str, Any] | None:
    """What came of a shard; None if it is unfinished, damaged, or not there."""
    try:
        about: dict[str, Any] = json.loads(shard.with_suffix(".json").read_text())
        checksum = hashlib.sha256(shard.read_bytes()).hexdigest()
    except (FileNotFoundError, ValueError):
        return None
    return about if about.get("checksum") == checksum else None


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a shard, or of the joined file."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


def join_shards(shards: Sequence[Path], path: Path) -> None:
    """Write all shards into one file, in order, aside and renamed."""
    with file_written_aside(path) as file:
        for shard in shards:
            with shard.open("rb") as part:
                shutil.copyfileobj(part, file)
