"""Reading records: bounded memory, truncation, malformed files, records that are none."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

import core.data.conversations as conversations
from core.data.conversations import (
    CHUNK_BYTES,
    Message,
    RecordError,
    parse_sharegpt,
    read_records,
)
from core.errors import InputError

RECORDS = [
    {"id": "a", "conversations": [{"from": "human", "value": 'Grüße 世界 😀 "quoted" \\ ]}'}]},
    {"id": "b", "conversations": []},
    42,
    [1, [2, "]"]],
    "text",
    None,
    -12.5e3,
]


def values(path):
    return [record.value for record in read_records(path)]


@pytest.fixture
def small_chunks(monkeypatch):
    """So that every place in a small file falls on the end of a buffer."""
    monkeypatch.setattr(conversations, "CHUNK_BYTES", 3)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_array_is_read_whatever_the_chunks(tmp_path, small_chunks, indent, ascii_only):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert values(path) == RECORDS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.lists(json_values), st.integers(1, 9), st.booleans(), st.data())
def test_every_cut_gives_the_complete_records(tmp_path_factory, records, chunk, indented, data):
    whole = json.dumps(records, indent=1 if indented else None, ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )
    cut = data.draw(st.integers(1, len(whole)))
    path = tmp_path_factory.mktemp("cut") / "records.json"
    path.write_bytes(whole[:cut])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "CHUNK_BYTES", chunk)
        reader = read_records(path)
        found = [record.value for record in reader]
    assert found == records[: len(found)]
    assert reader.truncated == (cut < len(whole))
    if cut == len(whole):
        assert found == records


@pytest.mark.parametrize("number", ["0.5", "12e3", "1E+2", "-3.25e-1", "120"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_number_may_be_anywhere_in_the_buffer(tmp_path, monkeypatch, number, chunk):
    monkeypatch.setattr(conversations, "CHUNK_BYTES", chunk)
    path = tmp_path / "records.json"
    path.write_text(f"[{number}, {number}]")
    assert values(path) == [json.loads(number)] * 2
    path.write_text(f"[1, {number}")
    reader = read_records(path)
    assert [record.value for record in reader] == [1]
    assert reader.truncated == 1


def test_jsonl_counts_malformed_lines_as_bad_records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('\ufeff{"id": 1}\n\n{"id": \n[3]\n{"id": 4}', encoding="utf-8")
    records = list(read_records(path))
    assert [record.index for record in records] == [0, 1, 2, 3]
    assert [record.value for record in records] == [{"id": 1}, None, [3], {"id": 4}]
    assert "not valid JSON" in (records[1].problem or "")


def test_jsonl_that_ends_in_mid_record_is_truncated(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": 1}\n{"id": "ab')
    reader = read_records(path)
    assert [record.value for record in reader] == [{"id": 1}]
    assert reader.truncated == 1


def test_malformed_array_names_the_byte(tmp_path, small_chunks):
    path = tmp_path / "records.json"
    content = '[{"name": "Grüße"}, {"a": oops}, {"name": "' + "x" * 100 + '"}]'
    path.write_text(content, encoding="utf-8")
    byte = content.encode().index(b"oops")
    with pytest.raises(InputError, match=rf"byte {byte}, in or after record 1"):
        values(path)


def test_missing_comma_is_an_error(tmp_path):
    path = tmp_path / "records.json"
    path.write_text('[{"a": 1} {"a": 2}]')
    with pytest.raises(InputError, match="byte 10"):
        values(path)


def test_array_in_another_encoding_is_an_error(tmp_path):
    path = tmp_path / "records.json"
    path.write_bytes('[{"a": "Grüße"}, 2]'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        values(path)


def test_nesting_that_python_cannot_follow_is_an_error(tmp_path):
    path = tmp_path / "records.json"
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(InputError, match="nested too deeply"):
        values(path)


def test_file_that_is_neither_array_nor_jsonl(tmp_path):
    path = tmp_path / "records.json"
    path.write_text('{\n "data": [\n  1\n ]\n}')
    with pytest.raises(InputError, match="expected a JSON array"):
        values(path)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "records.json"
    record = json.dumps({"text": "x" * 10_000})
    path.write_text("[" + ",".join([record] * 3000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3000
    assert path.stat().st_size > 25 * CHUNK_BYTES
    assert peak < 8 * CHUNK_BYTES


def test_the_real_file_gives_all_its_conversations(sharegpt_path):
    reader = read_records(sharegpt_path)
    assert len([parse_sharegpt(record.value, "x") for record in reader]) == 17_671
    assert reader.truncated == 1


def test_roles_are_mapped():
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("user", "q"), ("bing", "a")]
    value = {"id": 7, "conversations": [{"from": f, "value": v} for f, v in turns]}
    conversation = parse_sharegpt(value, "file.json")
    assert conversation.id == "7"
    assert conversation.source == "file.json"
    assert conversation.messages == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "q"),
        Message("assistant", "a"),
    )


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (42, "42"),
        (None, "null"),
        ([1], "[1]"),
        ({"foo": 1}, '{"foo": 1}'),
        ({"conversations": "hello"}, '"hello" there'),
        ({"conversations": [3]}, "turn 0: expected 'from' and a text 'value', got 3"),
        ({"conversations": [{"from": "human"}]}, "turn 0: expected"),
        ({"conversations": [{"value": "x"}]}, "turn 0: expected"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 0"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 0"),
        (
            {"conversations": [{"from": "gpt", "value": ""}, {"from": "alien", "value": "x"}]},
            'turn 1: from="alien"',
        ),
    ],
)
def test_a_value_that_is_no_conversation_says_what_it_is(value, got):
    with pytest.raises(RecordError) as caught:
        parse_sharegpt(value, "x")
    assert got in str(caught.value)
