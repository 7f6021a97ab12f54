"""One record, however odd, never costs the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.config.sections import DataConfig
from core.data.records import Source
from core.data.scan import ScanCounts, read_blocks, scan_block

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
DEEP = "<div>" * 500 + "x" + "</div>" * 500


def scanned(path: Path) -> tuple[list[dict[str, Any]], ScanCounts]:
    counts, rows = ScanCounts(), []
    for table in read_blocks(Source(str(path), path.name), 0):
        for row in scan_block(table, DataConfig()).to_pylist():
            if row["counts"]:
                counts.merge(json.loads(row["counts"]))
            else:
                rows.append(row)
    return rows, counts


def said(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, GOOD["messages"][1]]}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": [{"role": "user", "content": "a", "tool_calls": 5}]}, "'tool_calls', got 5"),
        ({"instruction": "a", "output": "b", "history": 5}, "'history', got 5"),
        (
            {"type": "conver_has_api", "rounds": [["ans-api", {"actions": 5, "ans": "b"}]]},
            "'actions', got 5",
        ),
        ({"messages": 5}, "'messages', got 5"),
    ],
    ids=["tool_calls", "history", "actions", "messages"],
)
@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_an_odd_record_is_counted(name: str, record: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / name
    records = [GOOD, record, said("c")]
    lines = "\n".join(map(json.dumps, records)) + "\n"
    path.write_text(json.dumps(records) if name.endswith(".json") else lines)
    rows, counts = scanned(path)
    assert len(rows) == counts.read == 2 and counts.bad == 1
    assert why in counts.first_bad[0][2] and f"{name}, record 1" in counts.first_bad[0][2]


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_a_number_that_python_refuses_is_counted(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    bad = '{"n": %s}' % ("9" * 5000)
    good = json.dumps(GOOD)
    path.write_text(f"[{good}, {bad}, {good}]" if name.endswith(".json") else f"{good}\n{bad}\n")
    _, counts = scanned(path)
    assert counts.bad == 1 and "4300 digits" in counts.first_bad[0][2]


def test_what_is_unusual_but_whole_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = [{**GOOD, "id": "\ud800x"}, said("half \ud83d a pair"), said(DEEP)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows, counts = scanned(path)
    assert counts.bad == 0 and rows[0]["id"] == "?x"
    assert DEEP in rows[2]["messages"]


def test_what_no_reader_foresaw_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(value: Any, *_: Any) -> Any:
        raise LookupError("nobody thought of this")

    monkeypatch.setattr("core.data.scan.read_record", broken)
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    _, counts = scanned(path)
    assert "LookupError: nobody thought of this" in counts.first_bad[0][2]
