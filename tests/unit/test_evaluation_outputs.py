"""outputs.jsonl of an interrupted evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from core.data.conversations import Message
from core.data.prompts import Prompt
from core.evaluate.batches import BatchDifference, BatchRun
from core.evaluate.speculation import PromptResult
from core.runtime.evaluators import Unanswered, read_answers, read_batches, unanswered


def test_a_line_cut_off_is_dropped_and_odd_characters_are_not_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "outputs.jsonl"
    whole = PromptResult("1", "t", 3, "a\u2028b\u0085c").as_dict()
    path.write_text(json.dumps(whole, ensure_ascii=False) + "\n" + '{"id": "2", "ta', "utf-8")
    for _ in range(2):
        found = read_answers(path)
        assert list(found) == [(0.0, "1")]
        assert found[0.0, "1"].text == "a\u2028b\u0085c"


def test_an_interrupted_prompt_goes_on_with_the_turn_that_is_missing() -> None:
    prompts = [
        Prompt(name, "t", (Message("user", "x"),), ("y", "z")[:more])
        for name, more in (("a", 2), ("b", 0), ("c", 1))
    ]
    said = {(0.0, name): PromptResult(name, "t", 1, f"says {name}") for name in ("a/1", "b")}
    assert unanswered(prompts, said, None) == [
        Unanswered(0, prompts[0], ("says a/1",)),
        Unanswered(2, prompts[2], ()),
    ]
    # At another temperature nothing is answered yet.
    assert unanswered(prompts[1:2], said, None, (0.0, 0.7)) == [Unanswered(0, prompts[1], (), 0.7)]
    assert unanswered(prompts[:1], said | {(0.0, "a/2"): said[0.0, "a/1"]}, 2) == []


def test_runs_of_batches_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    assert read_batches(path) == []
    found = (BatchDifference(3, 1e-5, 2.0, id="q/1"),)
    run = BatchRun(4, 1, "chosen", 0.0, ((20, 1.5), (30, 1.0)), 17, 90, 31, 8, found)
    path.write_text(json.dumps(run.as_dict()) + "\n" + '{"batch_si')
    assert read_batches(path) == [run]
    assert run.key == (0.0, 4, 1, "chosen", 0.0)
