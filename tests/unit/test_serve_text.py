"""serve.text: pieces add up to the whole, and no stop string slips through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.models.tiny import SPECIAL_TOKENS, byte_tokenizer
from serve.text import Detokenizer, Span, StopFilter, TextStream

BYTES = byte_tokenizer()


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2's kind: `▁` for spaces, the first one dropped, bytes for what is not a word."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁é", "語", "c"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=60))
def test_pieces_of_any_tokens_add_up_to_their_decoding(ids: list[int]) -> None:
    # Random bytes: most of them are no valid UTF-8, and special tokens are among them.
    assert "".join(pieces_of(BYTES, ids)) == BYTES.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_a_character_is_never_cut(text: str) -> None:
    text = text.replace("\ufffd", "")
    ids = BYTES.encode(text, add_special_tokens=False)
    pieces = pieces_of(BYTES, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.sampled_from(["▁", "▁a", "b", "▁é", "語", "c", "é", "😀"]), max_size=30))
def test_pieces_add_up_where_the_decoding_depends_on_the_token_before(words: list[str]) -> None:
    tokenizer = sentencepiece_like()
    ids = []
    for word in words:
        known = tokenizer.convert_tokens_to_ids(word)
        whole = known != tokenizer.unk_token_id
        ids += [known] if whole else [1 + byte for byte in word.encode()]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_first_word_alone_loses_its_space() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.convert_tokens_to_ids(["▁a", "▁a", "b"])
    assert pieces_of(tokenizer, ids) == ["a", " a", "b", ""]


@given(
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_cut_wherever_the_pieces_end(pieces: list[str], stops: list[str]) -> None:
    stop_filter = StopFilter(stops)
    shown = []
    for piece in pieces:
        shown += stop_filter.push((piece, False))
        if stop_filter.stopped:
            break
    shown += stop_filter.flush()
    text = "".join(piece for piece, _ in shown)
    whole = "".join(pieces)
    assert all(piece for piece, _ in shown)
    assert not any(stop in text for stop in stops)
    assert stop_filter.stopped == any(stop in whole for stop in stops)
    if stop_filter.stopped:
        assert any(whole.startswith(text + stop) for stop in stops)
    else:
        assert text == whole


def test_what_may_begin_a_stop_string_waits_and_keeps_its_colour() -> None:
    stop_filter = StopFilter(["END"])
    assert stop_filter.push(("say E", True)) == [("say ", True)]
    assert stop_filter.push(("N", False)) == []
    assert stop_filter.push(("T", True)) == [("E", True), ("N", False), ("T", True)]
    assert stop_filter.push(("xEND of it", False)) == [("x", False)]
    assert stop_filter.stopped


def push_all(stream: TextStream, text: str, drafted: list[bool]) -> list[Span]:
    return stream.push(BYTES.encode(text, add_special_tokens=False), drafted)


def test_a_character_counts_as_guessed_only_if_all_its_tokens_were() -> None:
    spans = push_all(TextStream(BYTES), "aéé", [True, True, False, True, True])
    assert spans == [("a", True), ("é", False), ("é", True)]


def test_tokens_after_a_stop_string_do_not_count() -> None:
    stream = TextStream(BYTES, ["c"])
    assert push_all(stream, "abcd", [False, True, False, True]) == [("a", False), ("b", True)]
    assert stream.stopped
    assert stream.num_tokens == 3
    assert stream.finish() == []


def test_the_end_releases_what_was_held_back() -> None:
    stream = TextStream(BYTES, ["cd"])
    assert push_all(stream, "abc", [False] * 3) == [("a", False), ("b", False)]
    assert stream.finish() == [("c", False)]


def test_half_a_character_at_the_end_is_shown_as_the_tokenizer_decodes_it() -> None:
    ids = BYTES.encode("aé", add_special_tokens=False)[:-1]
    stream = TextStream(BYTES)
    spans = [*stream.push(ids, [False, True]), *stream.finish()]
    assert spans == [("a", False), ("\ufffd", True)]
    assert "".join(text for text, _ in spans) == BYTES.decode(ids)


def test_special_tokens_are_not_shown() -> None:
    end = BYTES.convert_tokens_to_ids(SPECIAL_TOKENS[2])
    stream = TextStream(BYTES)
    assert stream.push([end], [True]) == []
    assert stream.finish() == []
    assert stream.num_tokens == 1


def test_drafted_must_match_the_tokens() -> None:
    with pytest.raises(ValueError, match="shorter"):
        TextStream(BYTES).push([1, 2], [True])
