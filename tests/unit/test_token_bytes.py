"""core.data.token_bytes: a bound that holds, or none."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from core.data.token_bytes import most_bytes_a_token
from core.models.target import Target


def changed(target: Target, **parts: Any) -> PreTrainedTokenizerFast:
    """The target's tokenizer with other parts."""
    made = json.loads(target.tokenizer.backend_tokenizer.to_str())
    text = json.dumps({**made, **parts})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text))


def test_no_token_stands_for_more(tiny_target: Target) -> None:
    tokenizer = tiny_target.tokenizer
    most = most_bytes_a_token(tokenizer)
    assert most is not None
    random.seed(1)
    special = [str(token) for token in tokenizer.all_special_tokens]
    pieces = ["the ", "  ", "\n\n", "é", "\u200d", "😀", "\x00", "12", *special]
    for _ in range(200):
        text = "".join(random.choices(pieces, k=random.randrange(1, 60)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(text.encode()) <= most * len(ids), text
    longest = max(special, key=len)
    assert most >= len(longest.encode())


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed",
                     "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                     "use_regex": False},
                ],
            }
        },
        {
            "added_tokens": [
                {"id": 258, "content": "<mask>", "single_word": False, "lstrip": True,
                 "rstrip": False, "normalized": False, "special": True}
            ]
        },
    ],
)  # fmt: skip
def test_where_text_may_vanish_there_is_none(tiny_target: Target, parts: Any) -> None:
    assert most_bytes_a_token(changed(tiny_target)) is not None
    assert most_bytes_a_token(changed(tiny_target, **parts)) is None
