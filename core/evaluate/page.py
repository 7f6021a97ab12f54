"""The report of a whole run: a page to look at, and a table for the terminal."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from core.evaluate.speculation import BASELINE
from core.evaluate.summary import CHOSEN
from core.paths import write_atomically

TEMPLATE = Path(__file__).with_name("page.html.jinja")
TERMINAL_WIDTH = 100
SHOWN_PROMPTS = 6

PLOTS = (
    ("draft/loss.png", "Training loss"),
    ("draft/accuracy.png", "How often the target's choice is among the head's first n"),
    ("evaluation/acceptance_by_depth.png", "Acceptance by depth"),
    ("evaluation/speedup_by_task.png", "Speedup by task"),
)


def write_page(
    folder: Path, reports: Mapping[str, Mapping[str, Any]], samples: list[dict[str, Any]]
) -> Path:
    """Write `report.html` with the plots inside it, so that the file alone can be passed on.

    Args:
        folder: the quick start's output; plots are looked up below it.
        reports: stage → report.
        samples: lines of `outputs.jsonl` to show.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    plots = [
        {"title": title, "data": base64.b64encode((folder / name).read_bytes()).decode()}
        for name, title in PLOTS
    ]
    page = environment.from_string(TEMPLATE.read_text()).render(
        evaluation=reports["evaluate_draft"],
        ways=way_rows(reports["evaluate_draft"]),
        lossless=lossless(reports["evaluate_draft"]),
        reports=reports,
        plots=plots,
        samples=samples,
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path


def read_samples(evaluation: Path) -> list[dict[str, Any]]:
    """The first answers of an evaluation's `outputs.jsonl`."""
    with (evaluation / "outputs.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, SHOWN_PROMPTS)]


def way_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each way of decoding: name, nodes, prompts, τ, tokens/s, speedup."""
    names = {
        BASELINE: "autoregressive (baseline)",
        CHOSEN: f"chosen tree, {report['chosen']['total_tokens']} nodes",
        "hf_generate": "HF generate",
    }
    rows = []
    for way, row in report["overall"]["ways"].items():
        kind, _, size = way.rpartition("_")
        fallback = f"{'tree of' if kind == 'tree' else 'untrained head,'} {size} nodes"
        rows.append({"name": names.get(way, fallback), **row})
    return rows


def lossless(report: Mapping[str, Any]) -> str:
    """`64/64`, or with the near-ties that make up the difference."""
    row = report["overall"]
    text = f"{row['lossless_identical']}/{row['lossless_total']}"
    if row["lossless_near_tie"]:
        text += f" and {row['lossless_near_tie']} near-ties of the target's own logits"
    if wrong := losses(report):
        text += f"; {wrong} DIFFER WITHOUT A NEAR-TIE"
    return text


def losses(report: Mapping[str, Any]) -> int:
    """Answers that differ from the target's own where its choice was clear."""
    row = report["overall"]
    return int(row["lossless_total"] - row["lossless_identical"] - row["lossless_near_tie"])


def print_table(report: Mapping[str, Any]) -> None:
    """The evaluation's result on standard output."""
    overall = report["overall"]
    table = Table(title=f"Evaluation on {overall['prompts']} held-out prompts, {report['device']}")
    for heading in ("way", "prompts", "τ", "tokens/s", "speedup"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in way_rows(report):
        tau = "–" if row["accepted_length"] is None else f"{row['accepted_length']:.2f}"
        table.add_row(
            row["name"],
            str(row["prompts"]),
            tau,
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}×",
        )
    console = Console(width=TERMINAL_WIDTH)
    console.print(table)
    for task, row in report["tasks"].items():
        tau = "–" if row["accepted_length"] is None else f"{row['accepted_length']:.2f}"
        console.print(f"{task}: speedup {row['speedup']:.2f}×, τ {tau}")
    console.print(f"repetition rate of the outputs: {overall['repetition_rate']:.1%}")
    console.print(f"lossless: {lossless(report)}")
    for one in report["differences"]:
        console.print(
            f"  {one['id']} ({one['way']}): differs from token {one['position']} on, where the "
            f"target's own two best logits are {one['gap']:.1e} apart"
        )
    if losses(report):
        console.print(
            "  in float32 this is an error of Aerie: please report it"
            if report["settings"]["dtype"] == "float32"
            else f"  in {report['settings']['dtype']} a tree's pass rounds otherwise than a single "
            "token's; evaluate with target.dtype=float32 to tell rounding from an error"
        )
