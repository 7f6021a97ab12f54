"""Ways of doing one thing, run in turn in one process, and how they compare.

Machines drift: a figure of now and one of ten minutes ago differ by more than most improvements.
So every repeat runs all ways, in another order each time, and ratios are taken within a repeat.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from core.progress import say

Figures = Mapping[str, float]
TERMINAL_WIDTH = 100


@dataclass(frozen=True)
class Way:
    """One way: a short name for the report, and what runs it once and returns its figures."""

    name: str
    run: Callable[[int], Figures]


@dataclass(frozen=True)
class Ratio:
    """Figure `figure` of the way `of` over that of the way `to`, and what it should be.

    Attributes:
        at_least: wanted from the median, or None.
        at_most: wanted from the median, or None.
    """

    name: str
    figure: str
    of: str
    to: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, median: float) -> bool | None:
        """Whether the median is as wanted; None where nothing is."""
        if self.at_least is None and self.at_most is None:
            return None
        above = self.at_least is None or median >= self.at_least
        return above and (self.at_most is None or median <= self.at_most)


def compare(ways: Sequence[Way], repeats: int, stage: str) -> dict[str, list[Figures]]:
    """Run all ways `repeats` times, starting with another one each time; way → its figures."""
    found: dict[str, list[Figures]] = {way.name: [] for way in ways}
    for repeat in range(repeats):
        first = repeat % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            figures = way.run(repeat)
            found[way.name].append(figures)
            shown = ", ".join(f"{name} {_number(value)}" for name, value in figures.items())
            say(stage, f"repeat {repeat + 1} of {repeats}, {way.name}: {shown}")
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, middle and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def summarize_comparison(
    found: Mapping[str, Sequence[Figures]], ratios: Sequence[Ratio]
) -> dict[str, Any]:
    """`ways`: way → figure → spread; `ratios`: name → spread, and whether it is as wanted."""
    ways = {
        way: {name: spread([run[name] for run in runs]) for name in runs[0]}
        for way, runs in found.items()
    }
    compared = {}
    for ratio in ratios:
        pairs = zip(found[ratio.of], found[ratio.to], strict=True)
        values = spread([of[ratio.figure] / to[ratio.figure] for of, to in pairs])
        wanted = {"at_least": ratio.at_least, "at_most": ratio.at_most}
        compared[ratio.name] = {
            **values,
            **{name: value for name, value in wanted.items() if value is not None},
            "holds": ratio.holds(values["median"]),
        }
    return {"ways": ways, "ratios": compared}


def print_comparison(summary: Mapping[str, Any], title: str) -> None:
    """The ways' medians, and their ratios with least and largest, as tables."""
    table = Table(title=title)
    table.add_column("way")
    names = list(dict.fromkeys(name for way in summary["ways"].values() for name in way))
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for way, figures in summary["ways"].items():
        middle = [figures[name]["median"] if name in figures else None for name in names]
        table.add_row(way, *("–" if value is None else _number(value) for value in middle))
    compared = Table()
    for column in ("ratio", "median (min to max)", "wanted", ""):
        compared.add_column(column)
    for name, ratio in summary["ratios"].items():
        bounds = [f"≥ {ratio['at_least']:g}"] if "at_least" in ratio else []
        bounds += [f"≤ {ratio['at_most']:g}"] if "at_most" in ratio else []
        verdict = {True: "yes", False: "no", None: ""}[ratio["holds"]]
        compared.add_row(name.replace("_", " "), _shown(ratio), ", ".join(bounds), verdict)
    console = Console(width=TERMINAL_WIDTH)
    console.print(table)
    console.print(compared)


def _shown(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
