"""Reading records: bounded memory, truncation, malformed files, records that are none."""

import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import core.data.records as records_module
from core.data.records import CHUNK_BYTES, HubReader, find_sources, read_records
from core.errors import ConfigError, InputError

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
    return [record.parse() for record in read_records(path)]


@pytest.fixture
def small_chunks(monkeypatch):
    """So that every place in a small file falls on the end of a buffer."""
    monkeypatch.setattr(records_module, "CHUNK_BYTES", 3)


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
        patch.setattr(records_module, "CHUNK_BYTES", chunk)
        reader = read_records(path)
        found = [record.parse() for record in reader]
    assert found == records[: len(found)]
    assert reader.truncated == (cut < len(whole))
    if cut == len(whole):
        assert found == records


@pytest.mark.parametrize("number", ["0.5", "12e3", "1E+2", "-3.25e-1", "120"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_number_may_be_anywhere_in_the_buffer(tmp_path, monkeypatch, number, chunk):
    monkeypatch.setattr(records_module, "CHUNK_BYTES", chunk)
    path = tmp_path / "records.json"
    path.write_text(f"[{number}, {number}]")
    assert values(path) == [json.loads(number)] * 2
    path.write_text(f"[1, {number}")
    reader = read_records(path)
    assert [record.parse() for record in reader] == [1]
    assert reader.truncated == 1


def test_jsonl_counts_malformed_lines_as_bad_records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('\ufeff{"id": 1}\n\n{"id": \n[3]\n{"id": 4}', encoding="utf-8")
    records = list(read_records(path))
    assert [record.index for record in records] == [0, 1, 2, 3]
    good = [record.parse() for record in records if record.index != 1]
    assert good == [{"id": 1}, [3], {"id": 4}]
    with pytest.raises(ValueError, match="not valid JSON"):
        records[1].parse()


def test_a_line_in_another_encoding_stands_alone(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"id": 1}\n"Gr\xfc\xdfe"\n{"id": 2}\n')
    records = list(read_records(path))
    assert [records[0].parse(), records[2].parse()] == [{"id": 1}, {"id": 2}]
    with pytest.raises(ValueError, match="not UTF-8"):
        records[1].parse()


def test_jsonl_that_ends_in_mid_record_is_truncated(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": 1}\n{"id": "ab')
    reader = read_records(path)
    assert [record.parse() for record in reader] == [{"id": 1}]
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


def test_text_behind_the_array_is_an_error(tmp_path):
    path = tmp_path / "records.json"
    path.write_text('[{"a": 1}]\n[{"a": 2}]\n')
    with pytest.raises(InputError, match="behind the ']' that ends the array at byte 11"):
        values(path)


def test_a_file_name_that_is_no_text_is_an_error(tmp_path):
    path = os.fsencode(tmp_path) + b"/gr\xfc.jsonl"
    with open(path, "w") as file:
        file.write("{}")
    with pytest.raises(InputError, match=r"gr\\udcfc\.jsonl' is not UTF-8"):
        find_sources(str(tmp_path), field="data.path")


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
    assert sum("conversations" in record.parse() for record in reader) == 17_671
    assert reader.truncated == 1


def test_parquet_rows_are_records(tmp_path):
    rows = [{"id": str(i), "messages": [{"role": "user", "content": f"{i}"}]} for i in range(600)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=250)
    (source,) = find_sources(str(path), field="data.path")
    assert [record.parse() for record in source.read()] == rows
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        list(source.read())


def test_hub_data_sets_are_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": split}) + "\n")
    (source,) = find_sources(f"hub://{tmp_path}?split=test", field="data.path")
    assert [record.parse() for record in source.read()] == [{"prompt": "test"}]
    (missing,) = find_sources(f"hub://{tmp_path}?split=dev", field="data.path")
    with pytest.raises(InputError, match="check the id, the split"):
        list(missing.read())
    with pytest.raises(ConfigError, match="expected hub://"):
        HubReader("hub://some/set?shard=3")


def test_sources_are_files_folders_and_lists(tmp_path):
    for name in ("b.jsonl", "a.json", "c.parquet", "notes.txt"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "empty").mkdir()
    one = str(tmp_path / "b.jsonl")
    assert [s.name for s in find_sources((one, str(tmp_path)), field="data.path")] == [
        "b.jsonl", "a.json", "b.jsonl", "c.parquet",
    ]  # fmt: skip
    with pytest.raises(InputError, match="in that folder"):
        find_sources(str(tmp_path / "empty"), field="data.path")
    with pytest.raises(InputError, match="no such file"):
        find_sources(str(tmp_path / "none.json"), field="data.path")
