from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from core.evaluate.batch_summary import summarize_batches
from core.evaluate.batches import BatchDifference, BatchRun
from core.evaluate.names import way_name
from core.evaluate.page import (
    PLOTS,
    lossless,
    print_table,
    read_samples,
    way_rows,
    write_page,
)
from core.evaluate.plots import plot_evaluation
from core.evaluate.speculation import (
    BASELINE,
    HF_GENERATE,
    HF_LOOKUP,
    Answer,
    Difference,
    PromptResult,
)
from core.evaluate.summary import summarize
from core.evaluate.ways import CHOSEN, COPIES_ALONE, WITHOUT_COPIES

CALIBRATION = {
    "by_size": {
        "2": {"verify_ms": 10.0, "depth": 0, "accepted_length": 1.2, "speedup": 1.1},
        "8": {"verify_ms": 12.0, "depth": 2, "accepted_length": 1.9, "speedup": 1.4},
    }
}


def _report(
    *, rounds: int = 3, calibration: dict[str, Any] | None = CALIBRATION, timed: bool = True
) -> dict[str, Any]:
    def answer(way: str, size: int) -> tuple[Answer, ...]:
        accepted = (2,) * rounds if size > 1 else (1,) * rounds
        # Two of three rounds accept one token at least, one of these two.
        depths = (0, 1, 2)[:rounds] if size > 1 else (0,) * rounds
        # The second repeat finds the machine busy.
        return tuple(
            Answer(way, (1, 2, 3), busy / size, rounds, accepted, depths, size)
            for busy in (1.0, 1.5)
        )

    answers = {
        BASELINE: answer(BASELINE, 1),
        CHOSEN: answer(CHOSEN, 8),
        "tree_60": answer("tree_60", 60),
        "tree_6": answer("tree_6", 6),
        "untrained_60": answer("untrained_60", 60),
        HF_GENERATE: tuple(Answer(HF_GENERATE, (1, 2, 3), s) for s in (2.0, 3.0)),
    }
    results = [
        PromptResult(
            f"a/{n}", "first_turn", 4, "text", answers, {"tree_60": Difference(2, 3e-5, 4.0)}
        )
        for n in range(1, 3)
    ]
    results = results if timed else [result.untimed() for result in results]
    runs = [
        BatchRun(
            size, repeat, way, 0.0, ((10, seconds), (20, 2 * seconds)), 10, 10 * nodes, 15, 4, ()
        )
        for size in (1, 4)
        for repeat in range(2)
        for way, nodes, seconds in ((BASELINE, 1, 1.0), (CHOSEN, 7, 0.5), ("tree_60", 60, 2.0))
    ]
    near = BatchDifference(5, 2e-5, 3.0, id="a/2")
    runs.append(BatchRun(4, 0, CHOSEN, 3.0, (), 10, 70, 15, 4, (near,)))
    return {
        "batches": summarize_batches(runs),
        **summarize(results, ["tree_60", "tree_6"]),
        "chosen": {"total_tokens": 8, "depth": 2},
        "calibration": calibration,
        "device": "cpu",
        "memory": {
            "weight_bytes_per_token": 270_000_000,
            "bytes_per_second": 27e9,
            "tokens_per_second_limit": 100.0,
        },
        "threads": 2,
        "settings": {
            "dtype": "float32",
            "max_new_tokens": 64,
            "temperature": 0,
            "hf_model": "plain",
            "hf_lookup_tokens": 4,
        },
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for stage, name, _ in PLOTS:
        (tmp_path / stage).mkdir(exist_ok=True)
        (tmp_path / stage / name).write_bytes(b"\x89PNG of " + name.encode())
    return tmp_path


def _write(folder: Path, reports: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    folders = {stage: folder / stage for stage in ("train_draft", "evaluate_draft")}
    return write_page(folder / "report.html", folders, reports, samples).read_text()


def test_rows_have_names_for_people() -> None:
    assert [row["name"] for row in way_rows(_report())] == [
        "autoregressive (baseline)",
        "chosen tree, 8 nodes",
        "tree of 60 nodes",
        "tree of 6 nodes",
        "untrained head, 60 nodes",
        "HF generate",
    ]
    report = _report()
    assert way_name(report, "tree_8_depth_2") == "tree of 8 nodes, depth 2"
    assert way_name(report, WITHOUT_COPIES) == "chosen tree, without copies"
    assert way_name(report, COPIES_ALONE) == "copies alone"
    assert way_name(report, HF_LOOKUP) == "HF prompt lookup, 4 tokens"


def test_losslessness_in_words() -> None:
    report = _report()
    assert lossless(report["overall"]) == "6/8 and 2 near-ties of the target's own logits"
    report["overall"].update(lossless_identical=8, lossless_near_tie=0)
    assert lossless(report["overall"]) == "8/8"


@pytest.mark.parametrize("calibration", [CALIBRATION, None])
def test_the_page_stands_alone(folder: Path, calibration: dict[str, Any] | None) -> None:
    reports = {
        "prepare_data": {"examples": 640},
        "evaluate_draft": _report(calibration=calibration),
    }
    page = _write(folder, reports, [])
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(image) for image in images] == [
        b"\x89PNG of " + name.encode() for _, name, _ in PLOTS
    ]
    assert "http://" not in page and "https://" not in page
    assert "untrained head, 60 nodes" in page and "6/8 and 2 near-ties" in page.replace(
        "&#39;", "'"
    )
    assert "3.0e-05" in page and "640" in page
    by_task = page[page.index("By task and depth, temperature 0") :]
    assert "<td>first_turn</td>" in by_task and "<td>67%</td><td>50%</td>" in by_task
    assert "8.00× (8.00–8.00)" in by_task and "Against the best fixed setting" in page
    assert "the model as transformers loads it" in page
    assert ("8 (chosen)" in page) == (calibration is not None)
    assert ("Fixed by the configuration: 8 nodes" in page) == (calibration is None)


def test_an_evaluation_alone_has_a_page_too(folder: Path) -> None:
    plots = {"evaluate_draft": folder / "evaluate_draft"}
    page = write_page(folder / "page.html", plots, {"evaluate_draft": _report()}, []).read_text()
    assert page.count("data:image/png") == 3 and "Speedup by task" in page


def test_what_a_model_wrote_is_shown_and_not_run(folder: Path) -> None:
    sample = {
        "id": "<b>",
        "task": "first_turn",
        "prompt_tokens": 4,
        "text": "<script>alert(1)</script> τ & more",
    }
    page = _write(folder, {"evaluate_draft": _report()}, [sample])
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; τ &amp; more" in page


def test_the_table_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(_report())
    shown = capsys.readouterr().out
    assert "on 2 prompts, cpu, medians of 2 repeats" in shown
    assert re.search(
        r"chosen tree, 8 nodes +│ +2 │ +8 │ +2\.00 │ +20\.0 │ +8\.00× \(8\.00–8\.00\) │ +16\.00×",
        shown,
    )
    assert re.search(r"HF generate +│ +2 │ +– │ +– │ +1\.2 │ +0\.50× ", shown)
    assert re.search(
        r"first_turn │ chosen tree, 8 nodes +│ 2\.00 │ +8\.00× \S+ │ 67% │ 50% │", shown
    )
    assert "over that of the best of 2 fixed settings" in shown
    assert re.search(r"  overall: 0\.13× \(0\.13–0\.13\) of tree of 60 nodes", shown)
    assert re.search(r"overall +│ chosen tree, 8 nodes", shown)
    assert "repetition rate of the outputs: 0.0%" in shown
    assert "a plain step reads 270 MB of weights, and the memory 27.0 GB/s: it allows 100" in shown
    assert "of which plain decoding has 2%" in shown.replace("\n", " ")
    assert "lossless: 6/8 and 2 near-ties" in shown
    assert "a/1 (tree of 60 nodes): differs from token 2 on" in shown
    assert "a/2 (chosen tree, 8 nodes, 4 at a time, arrivals): differs from token 5" in shown
    assert re.search(r" 4 │ autoregressive +│ +1 │ +1\.50 │ +10\.0 │ +1\.00×", shown)
    assert re.search(
        r"chosen tree, 8 nodes +│ +7 │ +1\.50 │ +20\.0 │ 2\.00× \(2\.00–2\.00\)", shown
    )
    assert "lossless, 4 at a time: 27/28 and 1 near-ties" in shown
    assert "4 of them with random arrivals" in shown


def test_each_temperature_has_tables_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _report()
    other["differences"][0]["way"] = CHOSEN
    report = {**_report(), "at_temperature": {"0.7": other}}
    print_table(report)
    shown = capsys.readouterr().out
    assert shown.index("temperature 0,") < shown.index("temperature 0.7,")
    assert "a/1 (chosen tree, 8 nodes, temperature 0.7): differs from token 2 on" in shown
    page = _write(folder, {"evaluate_draft": report}, [])
    assert "temperature 0, 0.7," in page and "By task and depth, temperature 0.7" in page
    assert page.count("Several requests at a time") == 2
    assert page.count("For a seed, speculation draws what plain decoding draws") == 1


def test_what_shared_a_device_has_no_speed_to_show(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _report(timed=False)
    print_table(report)
    shown = capsys.readouterr().out
    assert re.search(r"chosen tree, 8 nodes +│ +2 │ +8 │ +2\.00 │ +– │ +– │", shown)
    assert "2 prompts were answered on shared devices" in shown
    assert "their speed is left out" in _write(folder, {"evaluate_draft": report}, [])
    assert "speedup_by_task.png" not in {path.name for path in plot_evaluation(report, folder)}


def test_answers_of_one_token_have_no_accepted_length(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every answer ended with the prompt's own pass."""
    report = _report(rounds=0)
    print_table(report)
    assert re.search(
        r"chosen tree, 8 nodes +│ +2 │ +– │ +– │ +20\.0 │ +8\.00×", capsys.readouterr().out
    )
    assert "chosen tree, 8 nodes" in _write(folder, {"evaluate_draft": report}, [])
    assert all(path.exists() for path in plot_evaluation(report, folder))


def test_plots_are_pictures(tmp_path: Path) -> None:
    paths = plot_evaluation(_report(), tmp_path)
    assert {path.name for path in paths} <= {name for _, name, _ in PLOTS}
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width > 400 and len(set(picture.convert("RGB").getdata())) > 3


def test_samples_are_the_first_answers(tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(number)}) for number in range(9)]
    (tmp_path / "outputs.jsonl").write_text("\n".join(lines) + "\n")
    assert [sample["id"] for sample in read_samples(tmp_path)] == list("012345")
