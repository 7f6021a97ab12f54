"""prepare_data's second pass: conversations to tokens and masks, by Ray Data, in order."""

from __future__ import annotations

import functools
import platform
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from core.config import Config, TargetConfig
from core.config.sections import DataConfig, TemplateName
from core.data.conversations import Conversation, unpack_messages
from core.data.prompts import prompts_of, questions_of
from core.data.splitting import encode_parts
from core.data.template import chat_template, encode_prompt, tokenizer_hash
from core.errors import InputError, MismatchError, UserError
from core.models.target import load_tokenizer, quiet_transformers, target_folder, target_location
from core.runtime.blocks import bounded, num_workers, quiet_ray_data

ENCODED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("held_out", pa.bool_()),
        ("kind", pa.string()),
        # One entry a part.
        ("input_ids", pa.list_(pa.list_(pa.int32()))),
        ("loss_mask", pa.list_(pa.list_(pa.uint8()))),
        ("num_turns", pa.list_(pa.int32())),
        ("cut", pa.list_(pa.bool_())),
        ("shortened", pa.list_(pa.bool_())),
        ("left_out", pa.list_(pa.int32())),
        ("questions", pa.list_(pa.binary())),
        # Of held-out conversations, for their prompts.
        ("messages", pa.large_string()),
        ("prompt_lengths", pa.list_(pa.int32())),
        ("problem", pa.string()),
    ]
)
ARRAYS = ("input_ids", "loss_mask")


def encode_all(selected: Path, config: Config, tokenizer: str) -> Generator[dict[str, Any]]:
    """Encode with Ray Data, streaming, in the given order.

    Args:
        selected: a file of SELECTED_SCHEMA; its row groups are what a worker takes at a time.
        config: the sections target (path and template) and data.
        tokenizer: the tokenizer's hash here.

    Yields:
        Rows of ENCODED_SCHEMA; ids and masks as arrays.

    Raises:
        InputError: naming the first conversation that the template cannot render.
    """
    quiet_ray_data()
    groups = [
        {"path": str(selected), "group": group}
        for group in range(pq.ParquetFile(selected).metadata.num_row_groups)
    ]
    location = target_location(str(config.target.path))
    target = config.target.model_copy(update={"path": location})
    dataset = ray.data.from_items(groups, override_num_blocks=len(groups)).map_batches(
        encode_group,
        fn_args=(target, tokenizer, config.data),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=num_workers(config.data)),
    )
    dataset = bounded(dataset, in_order=True)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from _rows(batch)


def _rows(batch: pa.Table) -> Iterator[dict[str, Any]]:
    rest = batch.drop_columns(list(ARRAYS)).to_pylist()
    for row, ids, masks in zip(rest, batch["input_ids"], batch["loss_mask"], strict=True):
        if row["problem"] is not None:
            raise InputError(row["problem"])
        row["input_ids"] = [part.values.to_numpy() for part in ids]
        row["loss_mask"] = [part.values.to_numpy() for part in masks]
        yield row


def encode_group(
    items: pa.Table, target: TargetConfig, tokenizer: str, data: DataConfig
) -> pa.Table:
    """Row groups of SELECTED_SCHEMA to a table of ENCODED_SCHEMA, in a worker.

    A task, not an actor: Ray keeps its worker processes, and with them what they have imported
    and the tokenizer that they have loaded.
    """
    rows: list[dict[str, Any]] = []
    for item in items.to_pylist():
        with pq.ParquetFile(item["path"]) as file:
            selected = file.read_row_group(item["group"]).to_pylist()
        for row in selected:
            try:
                loaded = _worker_tokenizer(str(target.path), tokenizer, target.template)
                rows.append(encode_row(loaded, row, data))
            except UserError as error:
                # As a value: Ray would wrap an exception in its own and lose which came first.
                rows.append({"problem": f"conversation {row['id']!r}: {error}"})
    return pa.Table.from_pylist(rows, schema=ENCODED_SCHEMA)


def encode_row(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], data: DataConfig
) -> dict[str, Any]:
    """A row of SELECTED_SCHEMA to one of ENCODED_SCHEMA."""
    messages = unpack_messages(row["messages"])
    conversation = Conversation(row["id"], messages, row["source"], row["kind"])
    # A prompt without an answer cannot be learnt; it is there to be answered.
    held_out = row["held_out"] or row["kind"] == "prompt"
    parts = []
    if row["kind"] != "prompt":
        parts = encode_parts(
            tokenizer, conversation, data.max_length, split=data.too_long == "split"
        )
    prompts = prompts_of(conversation) if held_out else ()
    return {
        **{name: row[name] for name in ("id", "source", "held_out", "kind")},
        "input_ids": [part.input_ids_T for part in parts],
        "loss_mask": [part.loss_mask_T for part in parts],
        "num_turns": [part.num_turns for part in parts],
        "cut": [part.cut for part in parts],
        "shortened": [part.shortened for part in parts],
        "left_out": [part.left_out for part in parts],
        "questions": questions_of(conversation),
        "messages": row["messages"] if held_out else None,
        "prompt_lengths": [len(encode_prompt(tokenizer, prompt.messages)) for prompt in prompts],
        "problem": None,
    }


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(
    location: str, expected: str, template: TemplateName
) -> PreTrainedTokenizerBase:
    tokenizer = load_chat_tokenizer(target_folder(location), template)
    if tokenizer_hash(tokenizer) != expected:
        raise MismatchError(
            f"target.path={location} holds another tokenizer on {platform.node()} than where the "
            "job started; give a folder that all nodes share"
        )
    return tokenizer


def load_chat_tokenizer(folder: Path, template: TemplateName) -> PreTrainedTokenizerBase:
    """A target's tokenizer, with its own chat template or the named family's.

    Raises:
        UserError: it cannot be loaded, has no template, or does not go with the one that is named.
    """
    quiet_transformers()
    tokenizer = load_tokenizer(folder, template)
    chat_template(tokenizer)
    return tokenizer
