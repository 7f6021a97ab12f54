"""The report of a whole run: a page to look at, and a table for the terminal."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from core.evaluate.batch_summary import batch_rows, batch_table
from core.evaluate.names import times, way_name
from core.evaluate.speculation import BASELINE, HF_GENERATE
from core.paths import write_atomically

TEMPLATE = Path(__file__).with_name("page.html.jinja")
TERMINAL_WIDTH = 120
SHOWN_PROMPTS = 6
SHOWN_DIFFERENCES = 12

# Stage, file in its folder, title.
PLOTS = (
    ("train_draft", "loss.png", "Training loss"),
    (
        "train_draft",
        "accuracy.png",
        "How often the target's choice is among the head's first n",
    ),
    ("train_draft", "accepted_length.png", "Held-out accepted length over training"),
    ("evaluate_draft", "acceptance_by_depth.png", "Acceptance by depth"),
    ("evaluate_draft", "speedup_by_task.png", "Speedup by task"),
    ("evaluate_draft", "throughput.png", "Throughput with several requests at work"),
)


def write_page(
    path: Path,
    folders: Mapping[str, Path],
    reports: Mapping[str, Mapping[str, Any]],
    samples: list[dict[str, Any]],
) -> Path:
    """Write a page with the plots inside it, so that the file alone can be passed on.

    Args:
        path: the page.
        folders: stage → where its plots are looked up; not every run makes every plot.
        reports: stage → report, that of `evaluate_draft` among them.
        samples: lines of `outputs.jsonl` to show.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    evaluation = reports["evaluate_draft"]
    measured = by_temperature(evaluation)
    plots = [
        {"title": title, "data": base64.b64encode((folders[stage] / name).read_bytes()).decode()}
        for stage, name, title in PLOTS
        if stage in folders and (folders[stage] / name).exists()
    ]
    page = environment.from_string(TEMPLATE.read_text()).render(
        evaluation=evaluation,
        ways=way_rows(evaluation),
        best_fixed=best_fixed(evaluation),
        memory=memory_bound(evaluation) if "memory" in evaluation else None,
        lossless=lossless(evaluation["overall"]),
        measured=[_shown_temperature(one) for one in measured],
        differences=[row for one in measured for row in difference_rows(one)],
        reports=reports,
        plots=plots,
        samples=samples,
    )
    write_atomically(path, page.encode())
    return path


def read_samples(evaluation: Path) -> list[dict[str, Any]]:
    """The first answers of an evaluation's `outputs.jsonl`."""
    with (evaluation / "outputs.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, SHOWN_PROMPTS)]


def by_temperature(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The report as it would be of each temperature alone, that of its top level first."""
    settings = report["settings"]
    others = report.get("at_temperature", {}).items()
    return [
        dict(report),
        *(
            {**report, **found, "settings": {**settings, "temperature": float(temperature)}}
            for temperature, found in others
        ),
    ]


def _shown_temperature(report: Mapping[str, Any]) -> dict[str, Any]:
    by_task = task_rows(report)
    return {
        "temperature": f"{report['settings']['temperature']:g}",
        "by_task": by_task,
        "depths": depths_shown(by_task),
        "lossless": lossless(report["overall"]),
        "batches": [{**row, "lossless": lossless(row)} for row in report.get("batches", ())],
        "batch_rows": batch_rows(report),
    }


def way_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each way of decoding: its name, and the figures as they are shown."""
    ways = report["overall"]["ways"].items()
    return [_shown_row(report, way, row) for way, row in ways]


def task_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Such a row for each task and way; the baseline is 1 in all of them by definition."""
    return [
        {"task": task, **_shown_row(report, way, row)}
        for task, figures in {**report["tasks"], "overall": report["overall"]}.items()
        for way, row in figures["ways"].items()
        if way != BASELINE
    ]


def _shown_row(report: Mapping[str, Any], way: str, row: Mapping[str, Any]) -> dict[str, Any]:
    tau, speed = row["accepted_length"], row["tokens_per_second"]
    return {
        **row,
        "name": way_name(report, way),
        "tau": "–" if tau is None else f"{tau:.2f}",
        "nodes": "–" if tau is None else f"{row['tree_size']:.3g}",
        "speed": "–" if speed is None else f"{speed:.1f}",
        "gain": times(row, "speedup") if way != BASELINE else "1.00×",
        "over_hf": times(row, "over_hf_generate") if way != HF_GENERATE else "1.00×",
    }


def best_fixed(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By task: the chosen tree's speed over the best fixed setting's, where several are there."""
    rows = {**report["tasks"], "overall": report["overall"]}
    return [
        {
            "task": task,
            "name": way_name(report, found["way"]),
            "of": found["of"],
            "ratio": times(found, "ratio"),
        }
        for task, row in rows.items()
        if (found := row["against_best_fixed"])
    ]


def memory_bound(report: Mapping[str, Any]) -> str:
    """How near plain decoding comes to what the memory's speed allows."""
    memory, speed = report["memory"], report["overall"]["baseline_tokens_per_second"]
    limit = memory["tokens_per_second_limit"]
    text = (
        f"a plain step reads {memory['weight_bytes_per_token'] / 1e6:,.0f} MB of weights, and the "
        f"memory {memory['bytes_per_second'] / 1e9:.1f} GB/s: it allows {limit:.0f} tokens/s"
    )
    return text if speed is None else f"{text}, of which plain decoding has {speed / limit:.0%}"


def depths_shown(rows: Sequence[Mapping[str, Any]]) -> int:
    """Columns that acceptance by depth takes."""
    return max((len(row["acceptance_by_depth"]) for row in rows), default=0)


def lossless(row: Mapping[str, Any]) -> str:
    """`64/64`, or with the near-ties that make up the difference."""
    text = f"{row['lossless_identical']}/{row['lossless_total']}"
    if row["lossless_near_tie"]:
        text += f" and {row['lossless_near_tie']} near-ties of the target's own logits"
    if wrong := losses(row):
        text += f"; {wrong} DIFFER WITHOUT A NEAR-TIE"
    return text


def losses(row: Mapping[str, Any]) -> int:
    """Answers that differ from the target's own where its choice was clear."""
    return int(row["lossless_total"] - row["lossless_identical"] - row["lossless_near_tie"])


def difference_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All answers that are not the baseline's, the widest gap first; those of batches too."""
    temperature = report["settings"]["temperature"]
    drawn = f", temperature {temperature:g}" if temperature else ""
    found = [
        {**one, "where": way_name(report, one["way"]) + drawn} for one in report["differences"]
    ]
    for row in report.get("batches", ()):
        for one in row["differences"]:
            where = f"{way_name(report, one['way'])}, {row['batch_size']} at a time{drawn}"
            found.append({**one, "where": where + (", arrivals" if one["arrivals"] else "")})
    return sorted(found, key=lambda one: -one["gap"])


def print_table(report: Mapping[str, Any]) -> None:
    """The evaluation's result on standard output."""
    overall = report["overall"]
    repeats = overall["repeats"]
    title = f"Evaluation on {overall['prompts']} prompts, {report['device']}"
    table = Table(title=title + (f", medians of {repeats} repeats" if repeats > 1 else ""))
    for heading in ("way", "prompts", "nodes", "τ", "tokens/s", "speedup (95%)", "× HF generate"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in way_rows(report):
        cells = (row[key] for key in ("nodes", "tau", "speed", "gain", "over_hf"))
        table.add_row(row["name"], str(row["prompts"]), *cells)
    console = Console(width=TERMINAL_WIDTH)
    console.print(table)
    if untimed := overall["prompts"] - overall["timed_prompts"]:
        console.print(f"{untimed} prompts were answered on shared devices: their speed is left out")
    console.print(f"repetition rate of the outputs: {overall['repetition_rate']:.1%}")
    if "memory" in report:
        console.print(memory_bound(report))
    for one in by_temperature(report):
        _print_temperature(console, one)


def _print_temperature(console: Console, report: Mapping[str, Any]) -> None:
    """What was measured at one temperature, task by task and in batches."""
    console.print(_task_table(report))
    if rows := best_fixed(report):
        console.print(
            f"the chosen tree's speed over that of the best of {rows[0]['of']} fixed settings, "
            "which is picked on the other half of the prompts:"
        )
        for row in rows:
            console.print(f"  {row['task']}: {row['ratio']} of {row['name']}")
    batches = report.get("batches", ())
    if batches:
        console.print(batch_table(report))
    console.print(f"lossless: {lossless(report['overall'])}")
    for row in batches:
        of_them = f", {row['arrivals_total']} of them with random arrivals"
        console.print(f"lossless, {row['batch_size']} at a time: {lossless(row)}{of_them}")
    _print_differences(console, report)


def _print_differences(console: Console, report: Mapping[str, Any]) -> None:
    rows, dtype = difference_rows(report), report["settings"]["dtype"]
    sampled = report["settings"]["temperature"] > 0
    for one in rows[:SHOWN_DIFFERENCES]:
        gap = (
            f"{one['gap']:.1e} apart, {one['gap_in_steps']:.3g} steps of {dtype}"
            if not sampled
            else "no matter, as tokens are drawn"
        )
        console.print(
            f"  {one['id']} ({one['where']}): differs from token {one['position']} on, where the "
            f"target's own two best logits are {gap}"
        )
    if len(rows) > SHOWN_DIFFERENCES:
        console.print(
            f"  and {len(rows) - SHOWN_DIFFERENCES} more, with smaller gaps (report.json)"
        )
    if any(not one["near_tie"] for one in rows):
        console.print(
            "  in float32 this is an error of Aerie: please report it"
            if dtype == "float32"
            else f"  in {dtype} a tree's pass rounds otherwise than a single token's; evaluate "
            "with target.dtype=float32 to tell rounding from an error"
        )


def _task_table(report: Mapping[str, Any]) -> Table:
    rows = task_rows(report)
    temperature = f"{report['settings']['temperature']:g}"
    table = Table(
        title=f"By task at temperature {temperature}, and share accepted at each depth where the "
        "one before was"
    )
    for heading in ("task", "way", "τ", "speedup", *map(str, range(1, depths_shown(rows) + 1))):
        table.add_column(heading, justify="left" if heading in ("task", "way") else "right")
    before = None
    for row in rows:
        # A task's name once, above a line of its own.
        task = "" if row["task"] == before else row["task"]
        if task and before:
            table.add_section()
        before = row["task"]
        shares = [f"{100 * share:.0f}%" for share in row["acceptance_by_depth"]]
        table.add_row(task, row["name"], row["tau"], row["gain"], *shares)
    return table
