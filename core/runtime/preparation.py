"""The stage prepare_data: conversations to examples and evaluation prompts.

1. Ray Data reads the sources and cleans their records, block by block, on as many CPUs as there
   are. The driver puts the texts aside on disk, by content hash, and keeps hashes.
2. Near duplicates are found among the signatures, and what is taken is written in its order.
3. Ray Data tokenizes it, in that order; the driver packs the examples into shards.

Order and selection go by content hash, so the bytes that are written depend neither on the order
of the input nor on the number of workers; memory grows by hashes alone.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from core.config import Config
from core.config.sections import DataConfig
from core.data.cleaning import LATE_ANSWER
from core.data.conversations import Conversation, unpack_messages
from core.data.examples import SPLITS, Example, ExampleMetadata, ShardWriter
from core.data.inspection import show_examples, verify_folder
from core.data.language import known_languages
from core.data.prompts import PromptPool, prompts_of
from core.data.records import HUB_SCHEME, find_sources
from core.data.template import check_rounds, template_hash, tokenizer_hash
from core.errors import ConfigError, InputError, UserError
from core.models.target import target_folder
from core.paths import naming_a_full_disk, resolve_path, write_atomically
from core.progress import Progress, say
from core.provenance import RunFolder
from core.runtime.encoding import encode_all, load_chat_tokenizer
from core.runtime.hub import hub_revision
from core.runtime.memory import PeakMemory
from core.runtime.resources import Resources
from core.runtime.scanning import SELECTED, STAGE, scan
from core.tracking import MetricLog

# Everything is made aside here first, so that a split that is there is complete.
ASIDE = ".unfinished"
# In it, written last, what the first pass came to: a run that was killed later goes on from there.
SCANNED = "scanned.json"
# What a run came to, kept where it must not count as finished because of bad records.
OUTCOME = "outcome.json"


def preparation_inputs(config: Config) -> dict[str, Path]:
    """The conversations, and the target for its tokenizer.

    Raises:
        UserError: one of them is not set or does not exist.
    """
    return {**data_inputs(config.data), "target.path": target_folder(config.target.path)}


def data_inputs(data: DataConfig) -> dict[str, Path]:
    """Where the conversations are; a hub data set by a file that holds its revision.

    Raises:
        UserError: not set, or does not exist.
    """
    if not data.path:
        raise ConfigError(
            "data.path is not set; give conversations: JSON, JSONL, Parquet, a folder, hub://…"
        )
    locations = [data.path] if isinstance(data.path, str) else list(data.path)
    # Found now, so that an empty folder is said at once.
    find_sources(tuple(locations), field="data.path")
    inputs = {}
    for number, location in enumerate(locations):
        name = "data.path" if len(locations) == 1 else f"data.path[{number}]"
        on_hub = location.startswith(HUB_SCHEME)
        inputs[name] = (
            hub_revision(location) if on_hub else resolve_path(location, field="data.path")
        )
    return inputs


def preparation_resources(config: Config) -> Resources:
    """Disk for the texts (twice, while they are sorted) and the examples."""
    sources = find_sources(config.data.path or (), field="data.path")
    return Resources(disk_gb=0.1 + 3 * sum(source.num_bytes for source in sources) / 1e9)


def prepare(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Write examples and prompts.

    Raises:
        InputError: a template that does not fit, no conversation left, or, after everything is
            written, more bad records than allowed. Then only this check is done again next time.
        ResourceError: the disk is full.
    """
    outcome_path = folder.path / OUTCOME
    if not outcome_path.exists():
        try:
            with naming_a_full_disk(folder.path / ASIDE):
                outcome = _prepare(config, folder)
            write_atomically(outcome_path, json.dumps(outcome, indent=2).encode())
        except UserError:
            # With other settings nothing of it could be used, and it would only fill the disk.
            shutil.rmtree(folder.path / ASIDE, ignore_errors=True)
            raise
    shutil.rmtree(folder.path / ASIDE, ignore_errors=True)
    outcome = json.loads(outcome_path.read_text())
    _check_bad_records(config, outcome)
    report: dict[str, Any] = outcome["report"]
    return report


def _check_bad_records(config: Config, outcome: Mapping[str, Any]) -> None:
    report, allowed = outcome["report"], config.data.max_bad_records
    bad = report["bad_records"]
    if not bad:
        return
    total = bad + report["conversations_read"]
    shown = outcome["first_bad"] + ["…"] * (bad > len(outcome["first_bad"]))
    message = (
        f"data.path={config.data.path}: {bad} of {total} records "
        f"{'is' if bad == 1 else 'are'} no conversation ({'; '.join(shown)})"
    )
    if bad > allowed:
        raise InputError(
            f"{message}; mend them, or allow them with data.max_bad_records={bad} (now {allowed}): "
            "the others are written already, and the same command then ends at once"
        )
    say(STAGE, f"warning: {message}; allowed by data.max_bad_records={allowed}")


def _prepare(config: Config, folder: RunFolder) -> dict[str, Any]:
    # Before anything is read: a template that is missing or does not show the answers should not
    # cost a pass over the data to find.
    tokenizer = load_chat_tokenizer(target_folder(config.target.path), config.target.template)
    check_rounds(tokenizer)
    hashes = tokenizer_hash(tokenizer), template_hash(tokenizer)
    _check_languages(config.data)
    aside = folder.path / ASIDE
    started = time.monotonic()
    with PeakMemory() as memory:
        if not (aside / SCANNED).exists():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            scanned = scan(config, aside)
            write_atomically(aside / SCANNED, json.dumps(scanned).encode())
        scanned = json.loads((aside / SCANNED).read_text())
        read = time.monotonic()
        figures = _write(config, folder.path, scanned, hashes)
    seconds = {"read_seconds": read - started, "encode_seconds": time.monotonic() - read}
    metrics = MetricLog(folder.path, config.tracking, folder.identity[:16])
    metrics.log(
        **seconds,
        peak_memory_mib=memory.peak_mib,
        train_tokens=figures["train_tokens"],
        train_examples=figures["train_examples"],
    )
    metrics.close()
    report = {
        **scanned["report"],
        **figures,
        **{name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_mib": memory.peak_mib,
        "samples": scanned["samples"],
    }
    return {"report": report, "first_bad": scanned["first_bad"]}


def _check_languages(data: DataConfig) -> None:
    asked = (*data.only_languages, *data.drop_languages)
    if asked and (unknown := sorted(set(asked) - known_languages())):
        raise ConfigError(
            f"data.only_languages, data.drop_languages: unknown {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known_languages()))}"
        )


def _write(
    config: Config, folder: Path, scanned: Mapping[str, Any], hashes: tuple[str, str]
) -> dict[str, Any]:
    """Encode and write everything aside, then put it in place; returns the report's figures."""
    data, aside = config.data, folder / ASIDE
    made = aside / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    report = scanned["report"]
    cleaning = {"dropped": report["dropped"], "changed": report["changed"]}
    writers = {
        split: ShardWriter(
            made / split,
            ExampleMetadata(split, *hashes, data.max_length, cleaning),
            data.shard_tokens,
        )
        for split in SPLITS
    }
    pool = PromptPool(aside / "candidates.jsonl", data.prompt_tokens)
    split_up = {
        "conversations_split": 0,
        "questions_shortened": 0,
        "answers_cut": 0,
        "answers_left_out": 0,
        "parts_without_answer": 0,
    }
    late = to_learn = 0
    with closing(encode_all(aside / SELECTED, config, hashes[0])) as encoded:
        # The first takes as long as the workers take to start, which says nothing about the rate.
        rows = itertools.chain([next(encoded)], encoded)
        with Progress(STAGE, total=report["conversations"], unit="conversations") as progress:
            for row in rows:
                progress.advance(1, tokens=sum(len(ids) for ids in row["input_ids"]))
                _offer(pool, row)
                examples = list(_examples(row))
                for example in examples:
                    writers[SPLITS[row["held_out"]]].add(example)
                to_learn += row["kind"] != "prompt"
                late += not examples and row["kind"] != "prompt"
                split_up["conversations_split"] += len(row["input_ids"]) > 1
                split_up["questions_shortened"] += sum(row["shortened"])
                split_up["answers_left_out"] += sum(row["left_out"])
                split_up["answers_cut"] += sum(row["cut"])
                split_up["parts_without_answer"] += len(row["input_ids"]) - len(examples)
    for writer in writers.values():
        writer.flush()
    num_prompts = pool.write(made / "prompts.jsonl")
    train, held_out = (writers[split] for split in SPLITS)
    # Prompts alone are all that regenerate_responses and an evaluation need.
    if not train.num_examples and (to_learn or not num_prompts):
        raise InputError(
            f"data.path={data.path}: no training example is left; raise data.max_length="
            f"{data.max_length} or data.max_conversations, or lower data.held_out"
        )
    _put_in_place(made, folder)
    return {
        "dropped": {**report["dropped"], LATE_ANSWER: late},
        **split_up,
        "train_examples": train.num_examples,
        "held_out_examples": held_out.num_examples,
        "train_tokens": train.num_tokens,
        "held_out_tokens": held_out.num_tokens,
        "supervised_tokens": train.num_supervised,
        "longest": max(train.longest, held_out.longest),
        "prompts": num_prompts,
    }


def _put_in_place(made: Path, folder: Path) -> None:
    for one in sorted(made.iterdir()):
        place = folder / one.name
        if place.is_dir():
            shutil.rmtree(place)
        one.replace(place)


def _offer(pool: PromptPool, row: Mapping[str, Any]) -> None:
    if row["messages"] is None:
        pool.saw(row["questions"])
    elif row["questions"]:
        conversation = Conversation(row["id"], unpack_messages(row["messages"]), row["source"])
        prompts = zip(prompts_of(conversation), row["prompt_lengths"], strict=True)
        pool.offer(row["questions"], prompts)


def _examples(row: Mapping[str, Any]) -> Iterator[Example]:
    """The parts that have something to learn."""
    parts = list(zip(row["input_ids"], row["loss_mask"], row["num_turns"], strict=True))
    for number, (ids, mask, turns) in enumerate(parts, start=1):
        if mask.any():
            part_id = row["id"] if len(parts) == 1 else f"{row['id']}#{number}"
            yield Example(part_id, ids, mask, row["source"], turns)


def inspect_examples(config: Config, count: int) -> None:
    """`--inspect N`: print examples, the unsupervised tokens dimmed."""
    tokenizer = load_chat_tokenizer(target_folder(config.target.path), config.target.template)
    show_examples(_written(config), tokenizer, count)


def verify_examples_written(config: Config, _: int) -> None:
    """`--verify`: read everything again and check it."""
    for split in SPLITS:
        say(STAGE, verify_folder(_written(config), split))


def _written(config: Config) -> Path:
    if config.output is None:
        raise ConfigError("output is not set; pass output=<folder that prepare_data wrote>")
    return Path(config.output).expanduser()
