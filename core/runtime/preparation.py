"""The stage prepare_data: conversations to examples and evaluation prompts.

The driver reads, cleans and selects in one pass over the file; Ray Data tokenizes what was
selected, in order, on as many CPUs as there are; the driver packs the examples into shards as
they come back. Order and selection go by content hash, so the bytes that are written depend
neither on the order of the input nor on the number of workers.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from core.config import Config
from core.data.cleaning import LATE_ANSWER
from core.data.conversations import Conversation, Message
from core.data.corpus import STAGE, Corpus, read_corpus
from core.data.examples import SPLITS, Example, ExampleMetadata, ShardWriter
from core.data.inspection import show_examples, verify_folder
from core.data.prompts import PromptPool, prompts_of, write_prompts
from core.data.template import (
    encode_conversation,
    encode_prompt,
    template_hash,
    tokenizer_hash,
)
from core.errors import ConfigError, InputError, MismatchError, UserError
from core.models.target import load_tokenizer, quiet_transformers, target_folder, target_location
from core.paths import resolve_path, write_atomically
from core.progress import Progress, say
from core.provenance import RunFolder
from core.tracking import MetricLog

# Small enough that a few hundred conversations already occupy several workers.
CONVERSATIONS_PER_BLOCK = 64
# Everything is written aside here first, so that a split that is there is complete.
ASIDE = ".unfinished"
# What a run came to, kept where it must not count as finished because of bad records.
OUTCOME = "outcome.json"

CONVERSATION_SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("held_out", pa.bool_()),
     ("messages", pa.string())]
)  # fmt: skip
ENCODED_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("prompt_lengths", pa.list_(pa.int32())),
        ("problem", pa.string()),
    ]
)


def preparation_inputs(config: Config) -> dict[str, Path]:
    """The conversations, and the target for its tokenizer.

    Raises:
        UserError: one of them is not set or does not exist.
    """
    if config.data.path is None:
        raise ConfigError("data.path is not set; give a JSON or JSONL file of conversations")
    path = resolve_path(config.data.path, field="data.path")
    if not path.is_file():
        raise InputError(f"data.path={config.data.path}: a folder; give one JSON or JSONL file")
    return {"data.path": path, "target.path": target_folder(config.target.path)}


def prepare(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Write examples and prompts.

    Raises:
        InputError: a template that does not fit, no conversation left, or, after everything is
            written, more bad records than allowed. Then only this check is done again next time.
    """
    outcome_path = folder.path / OUTCOME
    if not outcome_path.exists():
        outcome = _prepare(config, folder)
        write_atomically(outcome_path, json.dumps(outcome, indent=2).encode())
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
    paths = preparation_inputs(config)
    # Before the file is read: a tokenizer without a template should not cost a minute to find.
    tokenizer = _tokenizer(paths["target.path"])
    hashes = tokenizer_hash(tokenizer), template_hash(tokenizer)
    started = time.monotonic()
    corpus = read_corpus(paths["data.path"], config)
    read = time.monotonic()
    figures = _write(config, folder.path, corpus, hashes)
    encoded = time.monotonic()
    metrics = MetricLog(folder.path, config.tracking, folder.identity[:16])
    metrics.log(
        read_seconds=read - started,
        encode_seconds=encoded - read,
        train_tokens=figures["train_tokens"],
        train_examples=figures["train_examples"],
    )
    metrics.close()
    report = {
        "conversations_read": corpus.conversations_read,
        "bad_records": corpus.bad_records,
        "truncated": corpus.truncated,
        "dropped": corpus.counts.all_dropped(),
        "changed": corpus.counts.all_changed(),
        "conversations": len(corpus.selected),
        **figures,
    }
    return {"report": report, "first_bad": corpus.first_bad}


def _write(config: Config, folder: Path, corpus: Corpus, hashes: tuple[str, str]) -> dict[str, int]:
    """Encode and write everything aside, then put it in place; returns the report's figures."""
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    cleaning = {"dropped": corpus.counts.all_dropped(), "changed": corpus.counts.all_changed()}
    writers = {
        split: ShardWriter(
            aside / split,
            ExampleMetadata(split, *hashes, config.data.max_length, cleaning),
            config.data.shard_tokens,
        )
        for split in SPLITS
    }
    pool = PromptPool(config.data.prompt_tokens)
    dropped = 0
    target = target_location(str(config.target.path))
    rows = encode_all(corpus.selected, target, hashes[0], config.data.max_length)
    # The first takes as long as the workers take to start, which says nothing about the rate.
    rows = itertools.chain([next(rows)], rows)
    with Progress(STAGE, total=len(corpus.selected), unit="conversations") as progress:
        for (conversation, held_out), row in zip(corpus.selected, rows, strict=True):
            progress.advance(1, tokens=len(row["input_ids"]))
            pool.add(conversation, held_out, row["prompt_lengths"])
            if row["loss_mask"].any():
                writers[SPLITS[held_out]].add(_example(conversation, row))
            else:
                dropped += 1
    corpus.counts.dropped[LATE_ANSWER] += dropped
    for writer in writers.values():
        writer.flush()
    prompts = pool.prompts()
    write_prompts(aside / "prompts.jsonl", prompts)
    train, held_out_writer = (writers[split] for split in SPLITS)
    if not train.num_examples:
        raise InputError(
            f"data.path={config.data.path}: no training example is left; raise data.max_length="
            f"{config.data.max_length} or data.max_conversations, or lower data.held_out"
        )
    _put_in_place(aside, folder)
    return {
        "train_examples": train.num_examples,
        "held_out_examples": held_out_writer.num_examples,
        "train_tokens": train.num_tokens,
        "held_out_tokens": held_out_writer.num_tokens,
        "supervised_tokens": train.num_supervised,
        "longest": max(train.longest, held_out_writer.longest),
        "prompts": len(prompts),
    }


def _put_in_place(aside: Path, folder: Path) -> None:
    for made in sorted(aside.iterdir()):
        place = folder / made.name
        if place.is_dir():
            shutil.rmtree(place)
        made.replace(place)
    aside.rmdir()


def _example(conversation: Conversation, row: Mapping[str, Any]) -> Example:
    return Example(
        id=conversation.id,
        input_ids_T=row["input_ids"],
        loss_mask_T=row["loss_mask"],
        source=conversation.source,
        num_turns=len(conversation.messages),
    )


def encode_all(
    selected: Sequence[tuple[Conversation, bool]], target: str, tokenizer: str, max_length: int
) -> Iterator[dict[str, Any]]:
    """Encode with Ray Data, streaming, in the given order.

    Args:
        selected: conversations, and whether each is held out.
        target: location of the tokenizer, the same for every node.
        tokenizer: its hash here.
        max_length: longest example, in tokens.

    Yields:
        input_ids int32 [T], loss_mask uint8 [T], and for held-out conversations prompt_lengths,
        the tokens of each of their prompts.

    Raises:
        InputError: naming the first conversation that the template cannot render.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It would warn that its progress bars are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    dataset = ray.data.from_arrow(list(_blocks(selected))).map_batches(
        encode_batch,
        fn_args=(target, tokenizer, max_length),
        batch_size=None,
        batch_format="pyarrow",
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from _rows(batch)


def _blocks(selected: Sequence[tuple[Conversation, bool]]) -> Iterator[pa.Table]:
    for start in range(0, len(selected), CONVERSATIONS_PER_BLOCK):
        rows = [
            {
                "id": conversation.id,
                "source": conversation.source,
                "held_out": held_out,
                "messages": json.dumps([(m.role, m.content) for m in conversation.messages]),
            }
            for conversation, held_out in selected[start : start + CONVERSATIONS_PER_BLOCK]
        ]
        yield pa.Table.from_pylist(rows, schema=CONVERSATION_SCHEMA)


def _rows(batch: pa.Table) -> Iterator[dict[str, Any]]:
    for ids, mask, lengths, problem in zip(
        *(batch[name] for name in ENCODED_SCHEMA.names), strict=True
    ):
        if problem.is_valid:
            raise InputError(problem.as_py())
        yield {
            "input_ids": ids.values.to_numpy(),
            "loss_mask": mask.values.to_numpy(),
            "prompt_lengths": lengths.as_py(),
        }


def encode_batch(batch: pa.Table, target: str, tokenizer: str, max_length: int) -> pa.Table:
    """Table of CONVERSATION_SCHEMA to table of ENCODED_SCHEMA, in a worker.

    A task, not an actor: Ray keeps its worker processes, and with them what they have imported
    and the tokenizer that they have loaded.
    """
    rows: list[dict[str, Any]] = []
    for row in batch.to_pylist():
        turns = tuple(Message(role, content) for role, content in json.loads(row["messages"]))
        conversation = Conversation(row["id"], turns, row["source"])
        try:
            loaded = _worker_tokenizer(target, tokenizer)
            rows.append(_encode(loaded, conversation, row["held_out"], max_length))
        except UserError as error:
            # As a value: Ray would wrap an exception in its own and lose which came first.
            rows.append({"problem": f"conversation {conversation.id!r}: {error}"})
    return pa.Table.from_pylist(rows, schema=ENCODED_SCHEMA)


def _encode(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, held_out: bool, max_length: int
) -> dict[str, Any]:
    ids, mask = encode_conversation(tokenizer, conversation.messages, max_length)
    prompts = prompts_of(conversation) if held_out else ()
    lengths = [len(encode_prompt(tokenizer, prompt.messages)) for prompt in prompts]
    return {"input_ids": ids, "loss_mask": mask, "prompt_lengths": lengths}


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(location: str, expected: str) -> PreTrainedTokenizerBase:
    tokenizer = _tokenizer(target_folder(location))
    if tokenizer_hash(tokenizer) != expected:
        raise MismatchError(
            f"target.path={location} holds another tokenizer on {platform.node()} than where the "
            "job started; give a folder that all nodes share"
        )
    return tokenizer


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    quiet_transformers()
    try:
        return load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"target.path={folder}: its tokenizer cannot be loaded ({error}); give a folder with "
            "the model's tokenizer files"
        ) from error


def inspect_examples(config: Config, count: int) -> None:
    """`--inspect N`: print examples, the unsupervised tokens dimmed."""
    show_examples(_written(config), _tokenizer(target_folder(config.target.path)), count)


def verify_examples_written(config: Config, _: int) -> None:
    """`--verify`: read everything again and check it."""
    for split in SPLITS:
        say(STAGE, verify_folder(_written(config), split))


def _written(config: Config) -> Path:
    if config.output is None:
        raise ConfigError("output is not set; pass output=<folder that prepare_data wrote>")
    return Path(config.output).expanduser()
