"""How much text a token can stand for: what shows without tokenizing that a text is too long."""

from __future__ import annotations

import json
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def most_bytes_a_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Bytes of UTF-8 that no token stands for more of; None where nothing is certain.

    It is certain of byte-level BPE that sees all of a text. A normalizer may shorten it, a
    pre-tokenizer leave white space out, an added token take what is around it, and an unknown
    token stand for anything.
    """
    if not tokenizer.is_fast:
        return None
    made: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, vocabulary = made["model"], made["model"].get("vocab", {})
    if model["type"] != "BPE" or made["normalizer"] is not None:
        return None
    if not _keeps_all(made["pre_tokenizer"]) or any(
        byte not in vocabulary for byte in ByteLevel.alphabet()
    ):
        return None
    added = made["added_tokens"]
    if any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    # In a byte-level vocabulary, a character is a byte.
    return max([*map(len, vocabulary), *(len(token["content"].encode()) for token in added)])


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether it makes bytes of a text without losing any."""
    if pre_tokenizer is None:
        return False
    steps = [pre_tokenizer]
    if pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    return any(step["type"] == "ByteLevel" for step in steps) and all(
        step["type"] in ("ByteLevel", "Digits")
        or (step["type"] == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
