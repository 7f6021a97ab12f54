"""prepare_data's first pass: sources are read and cleaned by Ray Data, and put aside on disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from core.config import Config
from core.config.sections import DataConfig
from core.data.cleaning import rules_for
from core.data.conversations import Conversation, unpack_messages
from core.data.records import Source, find_sources
from core.data.scan import ScanCounts, read_blocks, scan_block
from core.data.spool import Spool, num_partition_bits, select
from core.errors import InputError
from core.progress import say
from core.runtime.blocks import bounded, num_workers, quiet_ray_data

STAGE = "prepare_data"
SELECTED = "selected.parquet"
# A reader only cuts records apart, which is some ten times as fast as cleaning them.
CLEANERS_A_READER = 4
READER_CPUS = 0.1
# Of a source whose size nobody knows.
ASSUMED_BYTES = 2**33
SECONDS_BETWEEN_LINES = 5.0


def scan(config: Config, aside: Path) -> dict[str, Any]:
    """The first pass: write `selected.parquet` into a folder.

    Returns:
        What is reported of it: `report`, `first_bad` (lines) and `samples`.
    Raises:
        InputError: a source cannot be read to its end, or no conversation is left.
    """
    data = config.data
    sources = find_sources(data.path or (), field="data.path")
    counts, started = ScanCounts(), time.monotonic()
    spool = Spool(
        aside / "spool", num_partition_bits(sum(s.num_bytes or ASSUMED_BYTES for s in sources))
    )
    # Left open by an error, it would start a new Ray when it is closed at the process's end.
    with closing(_scanned_blocks(sources, data)) as blocks:
        for batch in blocks:
            is_counts = batch["counts"].is_valid()
            for found in batch.filter(is_counts)["counts"].to_pylist():
                counts.merge(json.loads(found))
            spool.add(batch.filter(pc.invert(is_counts)))
            if time.monotonic() - started > SECONDS_BETWEEN_LINES:
                read, kept = counts.read, len(spool)
                say(STAGE, f"{read:,} conversations read, {kept:,} different ones kept")
                started = time.monotonic()
    spool.close()
    if counts.fatal:
        raise InputError(min(counts.fatal))
    taken = select(
        spool,
        aside / SELECTED,
        counts.cleaning,
        similarity=data.near_duplicates,
        limit=data.max_conversations,
        held_out=data.held_out,
        seed=data.seed,
    )
    shutil.rmtree(aside / "spool")
    rules = rules_for(data.rules_off, data.only_languages, data.drop_languages, data.mask_pii)
    report = {
        "conversations_read": counts.read,
        "formats": dict(sorted(counts.formats.items())),
        "bad_records": counts.bad,
        "truncated": len(counts.truncated),
        "dropped": counts.cleaning.all_dropped(rules),
        "changed": counts.cleaning.all_changed(rules),
        "conversations": taken,
    }
    first_bad = [why for _, _, why in counts.first_bad]
    _say_what_was_read(config, report, counts, first_bad, len(sources))
    return {
        "report": report,
        "first_bad": first_bad,
        "samples": counts.cleaning.shown_samples(),
    }


def selected_conversations(config: Config, aside: Path) -> list[Conversation]:
    """What prepare_data would take, in its order; texts without turns are left out.

    Args:
        config: section data.
        aside: a folder to work in, which is removed.
    """
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    scan(config, aside)
    with pq.ParquetFile(aside / SELECTED) as file:
        rows = file.read().to_pylist()
    shutil.rmtree(aside)
    return [
        Conversation(row["id"], unpack_messages(row["messages"]), row["source"], row["kind"])
        for row in rows
        if row["kind"] != "text"
    ]


def _say_what_was_read(
    config: Config,
    report: Mapping[str, Any],
    counts: ScanCounts,
    first_bad: list[str],
    num_sources: int,
) -> None:
    say(STAGE, f"{counts.read:,} conversations read, {report['conversations']:,} taken")
    for what in ("dropped", "changed"):
        counted = ", ".join(f"{name} {count:,}" for name, count in report[what].items() if count)
        say(STAGE, f"{what}: {counted or 'none'}")
    for name in sorted(set(counts.truncated)):
        after = f", after {counts.read:,} conversations" if num_sources == 1 else ""
        say(STAGE, f"warning: {name} ends in mid-record{after}; what came before is used")
    if not report["conversations"]:
        bad = f"; {first_bad[0]}" if first_bad else ""
        raise InputError(
            f"data.path={config.data.path}: no conversation is left after cleaning ({counts.read} "
            f"read, {counts.bad} bad records{bad}); expected records such as "
            '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}'
        )


def _scanned_blocks(sources: list[Source], data: DataConfig) -> Generator[pa.Table]:
    """Tables of SCANNED_SCHEMA, in any order."""
    quiet_ray_data()
    workers = num_workers(data)
    readers = min(len(sources), max(1, workers // CLEANERS_A_READER))
    items = [
        {"location": source.location, "name": source.name, "place": place}
        for place, source in enumerate(sources)
    ]
    dataset = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            _read_items,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=readers),
            num_cpus=READER_CPUS,
        )
        # Another share of a CPU keeps Ray Data from joining the two steps into one.
        .map_batches(
            scan_block,
            fn_args=(data,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=workers),
            num_cpus=1 - READER_CPUS,
        )
    )
    dataset = bounded(dataset, in_order=False)
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _read_items(items: pa.Table) -> Iterator[pa.Table]:
    for item in items.to_pylist():
        yield from read_blocks(Source(item["location"], item["name"]), item["place"])
