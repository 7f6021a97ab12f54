"""From runs of batches to the numbers of `report.json`, and to the table of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from core.evaluate.batches import BatchRun
from core.evaluate.intervals import Timings, speed_ratio
from core.evaluate.names import times, way_name
from core.evaluate.speculation import BASELINE
from core.evaluate.summary import difference_figures
from core.evaluate.ways import CHOSEN


def summarize_batches(runs: Sequence[BatchRun]) -> list[dict[str, Any]]:
    """A row for each batch size, smallest first: throughput by way, and what stayed the same."""
    return [
        _row(size, [run for run in runs if run.batch_size == size])
        for size in sorted({run.batch_size for run in runs})
    ]


def _row(batch_size: int, runs: Sequence[BatchRun]) -> dict[str, Any]:
    loops = [run for run in runs if not run.arrivals]
    by_way = {
        way: [run for run in loops if run.way == way]
        for way in dict.fromkeys(run.way for run in loops)
    }
    timings = {way: _timings(members) for way, members in by_way.items()}
    found = {}
    for way, members in by_way.items():
        # Round by round, the two do other work.
        ratio = speed_ratio(timings[way], timings[BASELINE], paired=False)
        passes = sum(run.passes for run in members)
        found[way] = {
            "tokens_per_second": timings[way].speed(),
            "speedup": ratio.value if way != BASELINE else 1.0,
            "speedup_interval": ratio.interval if way != BASELINE else None,
            "tree_size": sum(run.nodes for run in members) / max(1, passes),
            "accepted_length": sum(run.committed for run in members) / max(1, passes),
        }
    differences = [
        {"id": one.id, "way": run.way, "arrivals": run.arrivals, **difference_figures(one)}
        for run in runs
        for one in run.differences
    ]
    answers = sum(run.answers for run in runs)
    return {
        "batch_size": batch_size,
        "tokens_per_second": found[CHOSEN]["tokens_per_second"],
        "baseline_tokens_per_second": found[BASELINE]["tokens_per_second"],
        "speedup": found[CHOSEN]["speedup"],
        "speedup_interval": found[CHOSEN]["speedup_interval"],
        "lossless_identical": answers - len(differences),
        "lossless_near_tie": sum(one["near_tie"] for one in differences),
        "lossless_total": answers,
        "arrivals_total": sum(run.answers for run in runs if run.arrivals),
        "differences": differences,
        "ways": found,
    }


def _timings(runs: Sequence[BatchRun]) -> Timings:
    """Pieces by repeats; a run of fewer pieces than another has been shorter, and bounds both."""
    count = min(len(run.pieces) for run in runs)
    return Timings.of([[run.pieces[piece] for run in runs] for piece in range(count)])


def batch_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each batch size and way, as it is shown."""
    return [
        {
            "batch_size": row["batch_size"],
            "name": "autoregressive" if way == BASELINE else way_name(report, way),
            "nodes": f"{figures['tree_size']:.3g}",
            "tau": f"{figures['accepted_length']:.2f}",
            "speed": f"{figures['tokens_per_second']:.1f}",
            "gain": times(figures, "speedup"),
        }
        for row in report.get("batches", ())
        for way, figures in row["ways"].items()
    ]


def batch_table(report: Mapping[str, Any]) -> Table:
    """The same for the terminal."""
    table = Table(title="Requests at work at a time, in a closed loop")
    for heading in ("requests", "way", "nodes", "τ", "tokens/s", "speedup (95%)"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    before = None
    for row in batch_rows(report):
        size = row["batch_size"]
        if before not in (None, size):
            table.add_section()
        cells = (row[key] for key in ("name", "nodes", "tau", "speed", "gain"))
        table.add_row("" if size == before else str(size), *cells)
        before = size
    return table
