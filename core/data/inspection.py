"""Looking at examples: in colour for people, in full for certainty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from core.data.examples import (
    Example,
    example_shards,
    read_examples,
    read_metadata,
    verify_examples,
)
from core.data.template import tokenizer_hash
from core.errors import InputError, MismatchError

SUPERVISED, UNSUPERVISED = "bold green", "dim"


def show_examples(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    split: str = "train",
    console: Console | None = None,
) -> None:
    """Print the first examples of a split: what is learnt in green, the rest dimmed.

    Raises:
        InputError: no examples there.
        MismatchError: they were made with another tokenizer.
    """
    console = console or Console()
    shards = example_shards(folder, split)
    if shards and read_metadata(shards[0]).tokenizer_hash != tokenizer_hash(tokenizer):
        raise MismatchError(
            f"{folder}: these examples were made with another tokenizer than target.path's; "
            "give the target that prepare_data was given"
        )
    examples = (example for shard in shards for example in read_examples(shard))
    for example, _ in zip(examples, range(count), strict=False):
        supervised = int(example.loss_mask_T.sum())
        console.rule(f"{example.id}  {example.num_tokens} tokens, {supervised} supervised")
        console.print(coloured(example, tokenizer))


def coloured(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The example's text, each run of equally masked tokens in its style."""
    text = Text()
    changes = np.flatnonzero(np.diff(example.loss_mask_T)) + 1
    for ids, mask in zip(
        np.split(example.input_ids_T, changes), np.split(example.loss_mask_T, changes), strict=True
    ):
        text.append(
            tokenizer.decode(ids.tolist(), skip_special_tokens=False),
            style=SUPERVISED if mask[0] else UNSUPERVISED,
        )
    return text


def verify_folder(folder: Path, split: str) -> str:
    """Read a split again and check every example; returns a line that says what was found.

    Raises:
        InputError: a shard is missing, cannot be read, or holds a wrong example.
    """
    examples = tokens = supervised = 0
    shards = example_shards(folder, split)
    hashes = set()
    for index, shard in enumerate(shards):
        if int(shard.stem.removeprefix("shard-")) != index:
            raise InputError(f"{folder}/{split}: shard {index} is missing; run prepare_data again")
        metadata = read_metadata(shard)
        hashes.add((metadata.tokenizer_hash, metadata.template_hash, metadata.max_length))
        counts = verify_examples(shard)
        examples, tokens, supervised = (
            examples + counts[0], tokens + counts[1], supervised + counts[2],
        )  # fmt: skip
    if len(hashes) > 1:
        raise InputError(
            f"{folder}/{split}: shards of different tokenizers, templates or max_length; "
            "run prepare_data again into an empty folder"
        )
    return (
        f"{split}: {len(shards)} shards, {examples:,} examples, {tokens:,} tokens, "
        f"{supervised:,} supervised: all well"
    )
