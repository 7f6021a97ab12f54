"""Made-up prompts: where a user's turn begins and ends, and which are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.data.conversation_shards import (
    as_sharegpt,
    finished_shard,
    join_shards,
    read_shard,
    write_shard,
)
from core.data.conversations import Conversation, Message
from core.data.formats import read_sharegpt
from core.data.synthesis import PromptFilter, UserTurn, user_turn
from core.data.template import TemplateError
from core.models.tiny import byte_tokenizer

LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def test_a_users_turn_is_read_off_the_template(tiny_tokenizer) -> None:
    turn = user_turn(tiny_tokenizer)
    assert tiny_tokenizer.decode(turn.prefix_ids) == "<|im_start|>user\n"
    assert turn.suffix == "<|im_end|>"
    assert turn.stop_token_ids == {tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_turn_that_ends_in_plain_text_has_no_stop_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LLAMA_2
    turn = user_turn(tokenizer)
    assert tokenizer.decode(turn.prefix_ids) == "[INST] "
    assert (turn.suffix, turn.stop_token_ids) == ("[/INST]", frozenset())


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] }}", "<u>{{ messages[0]['content'] | lower }}"]
)
def test_templates_that_do_not_show_where_a_user_speaks(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match="give conversations with"):
        user_turn(tokenizer)


@pytest.fixture
def chosen() -> PromptFilter:
    turn = UserTurn((1,), "[/INST]", frozenset())
    return PromptFilter(turn, ["<|im_start|>", ""], min_words=3)


@pytest.mark.parametrize(
    ("text", "cut", "reason"),
    [
        ("How do bees find their way", True, "too_long"),
        ("Hello there!", False, "too_short"),
        ("", False, "too_short"),
        ("What is this <|im_start|> thing?", False, "special_tokens"),
        ("What is this \ufffd thing?", False, "special_tokens"),
        ("the bee and " * 30, False, "repetitive"),
    ],
)
def test_what_is_dropped(chosen: PromptFilter, text: str, cut: bool, reason: str) -> None:
    assert chosen.keep(text, cut=cut) is None
    assert chosen.dropped == {reason: 1}


def test_what_is_kept_is_the_users_words_once(chosen: PromptFilter) -> None:
    kept = chosen.keep("  How do bees fly? [/INST] They do not.", cut=True)
    assert kept == "How do bees fly?", "the end of the turn counts, even where it is no token"
    assert chosen.keep("HOW do bees... fly", cut=False) is None
    assert chosen.dropped == {"duplicate": 1}
    assert chosen.keep("Why do bees fly?", cut=False) == "Why do bees fly?"
    assert chosen.keep("Count: " + " ".join(map(str, range(60))), cut=False) is not None


def test_records_are_those_that_prepare_data_reads() -> None:
    turns = (Message("system", "S"), Message("user", "Ü?"), Message("assistant", "A"))
    conversation = Conversation("id", turns, "source")
    assert read_sharegpt(as_sharegpt(conversation), "source") == conversation


def test_shards_are_finished_when_whole_and_join_in_order(tmp_path: Path) -> None:
    shards = [tmp_path / "shards" / f"shard-{n}.jsonl" for n in range(2)]
    for number, shard in enumerate(shards):
        assert finished_shard(shard) is None
        # U+2028 ends a line for some readers, and not for JSONL.
        write_shard(shard, [{"n": number, "text": "a\u2028b"}, {"n": "ü"}], {"answers": number})
    assert [(finished_shard(shard) or {})["answers"] for shard in shards] == [0, 1]
    join_shards(shards, tmp_path / "all.jsonl")
    joined = list(read_shard(tmp_path / "all.jsonl"))
    assert [record["n"] for record in joined] == [0, "ü", 1, "ü"]
    assert joined[0]["text"] == "a\u2028b"
    assert not list(tmp_path.rglob(".*"))
    content = bytearray(shards[0].read_bytes())
    content[-3] ^= 1
    shards[0].write_bytes(content)
    assert finished_shard(shards[0]) is None, "damaged"
    shards[1].with_suffix(".json").write_text('{"check')
    assert finished_shard(shards[1]) is None, "cut off"
