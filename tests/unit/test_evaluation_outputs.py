"""outputs.jsonl of an interrupted evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from core.evaluate.speculation import PromptResult
from core.runtime.evaluation import _read_outputs


def test_a_line_cut_off_is_dropped_and_odd_characters_are_not_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "outputs.jsonl"
    whole = PromptResult("1", "t", 3, "a\u2028b\u0085c").as_dict()
    path.write_text(json.dumps(whole, ensure_ascii=False) + "\n" + '{"id": "2", "ta', "utf-8")
    for _ in range(2):
        found = _read_outputs(path)
        assert list(found) == ["1"]
        assert found["1"].text == "a\u2028b\u0085c"
