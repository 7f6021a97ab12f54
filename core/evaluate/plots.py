"""Plots of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from core.evaluate.names import way_name
from core.evaluate.peers import LLAMA_CPP, VLLM, VLLM_CHAIN, VLLM_NGRAM
from core.evaluate.speculation import BASELINE, HF_GENERATE, HF_LOOKUP
from core.evaluate.ways import CHOSEN, COPIES_ALONE, WITHOUT_COPIES

SIZE_INCHES = (6.4, 3.8)
WIDE_INCHES = (9.6, 3.8)
SHOWN_WAYS = {
    CHOSEN: "chosen tree",
    WITHOUT_COPIES: "without copies",
    COPIES_ALONE: "copies alone",
    HF_GENERATE: "HF generate",
    HF_LOOKUP: "HF prompt lookup",
    VLLM: "vLLM",
    VLLM_NGRAM: "vLLM, copies",
    VLLM_CHAIN: "vLLM, head's chains",
    LLAMA_CPP: "llama.cpp",
}


def plot_evaluation(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `acceptance_by_depth.png`, `speedup_by_task.png`, and of batches `throughput.png`."""
    paths = [_acceptance_by_depth(report, folder)]
    if report["overall"]["timed_prompts"]:
        paths.append(_speedup_by_task(report, folder))
    if report.get("batches"):
        paths.append(_throughput(report, folder))
    return paths


def _acceptance_by_depth(report: Mapping[str, Any], folder: Path) -> Path:
    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    for way, row in report["overall"]["ways"].items():
        rates = row["acceptance_by_depth"]
        if rates:
            label = f"{way_name(report, way)}, τ = {row['accepted_length']:.2f}"
            axes.plot(range(1, len(rates) + 1), rates, marker="o", label=label)
    axes.set(
        xlabel="depth of the drafted token",
        ylabel="accepted, where the one before was",
        ylim=(0, 1),
        title="Acceptance by depth",
    )
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)
    return _save(figure, folder / "acceptance_by_depth.png")


def _speedup_by_task(report: Mapping[str, Any], folder: Path) -> Path:
    """Bars of the chosen tree and, where they were measured, of what it is held against."""
    rows = {**report["tasks"], "overall": report["overall"]}
    shown = [way for way in SHOWN_WAYS if way in report["overall"]["ways"]]
    width = 0.8 / len(shown)
    size = WIDE_INCHES if len(shown) > 1 else SIZE_INCHES
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for number, way in enumerate(shown):
        places = [
            (place, task["ways"][way])
            for place, task in enumerate(rows.values())
            if way in task["ways"] and task["ways"][way]["speedup"] is not None
        ]
        at = [place + (number - (len(shown) - 1) / 2) * width for place, _ in places]
        speedups = [row["speedup"] for _, row in places]
        bars = axes.bar(at, speedups, width, label=SHOWN_WAYS[way])
        axes.errorbar(
            at, speedups, _error_bars([row for _, row in places]), fmt="none", ecolor="black",
            elinewidth=1, capsize=2,
        )  # fmt: skip
        # At the bottom, where no error bar reaches.
        for bar, value in zip(bars, speedups, strict=True):
            at_bar = bar.get_x() + bar.get_width() / 2
            axes.text(at_bar, 0.03, f"{value:.2f}×", color="white", fontsize=7, ha="center",
                      va="bottom", rotation=90 if len(shown) > 1 else 0)  # fmt: skip
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(rows)), list(rows), rotation=20 if len(rows) > 4 else 0)
    axes.set(
        ylabel="tokens/s, autoregressive = 1",
        title="Speedup by task",
    )
    if len(shown) > 1:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, folder / "speedup_by_task.png")


def _error_bars(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far the intervals reach below and above; nothing where there are none."""
    reach = []
    for row in rows:
        value = row["speedup"]
        low, high = row["speedup_interval"] or (value, value)
        # The median of few repeats may lie outside of what the samples give.
        reach.append((max(0.0, value - low), max(0.0, high - value)))
    return [[below for below, _ in reach], [above for _, above in reach]]


def _throughput(report: Mapping[str, Any], folder: Path) -> Path:
    """Tokens a second, and over plain decoding's, by requests at work; with the policy's trees."""
    rows = report["batches"]
    sizes = [row["batch_size"] for row in rows]
    figure, (speed, gain) = plt.subplots(1, 2, figsize=WIDE_INCHES, layout="constrained")
    ways = list(rows[0]["ways"])
    for number, way in enumerate(ways):
        figures = [row["ways"][way] for row in rows]
        name = way_name(report, way)
        line = "--" if way == BASELINE else "-"
        speed.plot(
            sizes, [one["tokens_per_second"] for one in figures], line, marker="o", label=name
        )
        ratios = [one["speedup"] for one in figures]
        bars = None if way == BASELINE else _error_bars(figures)
        # Side by side, so that error bars can be told apart.
        beside = [size * (1 + 0.04 * (number - (len(ways) - 1) / 2)) for size in sizes]
        gain.errorbar(beside, ratios, bars, marker="o", linestyle=line, capsize=3)
        if way == CHOSEN:
            for size, one in zip(sizes, figures, strict=True):
                gain.annotate(
                    f"{one['tree_size']:.1f} nodes", (size, one["speedup"]), fontsize=7,
                    textcoords="offset points", xytext=(4, 6),
                )  # fmt: skip
    for axes in (speed, gain):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("requests at work at a time")
        axes.grid(alpha=0.3)
    speed.set(ylabel="tokens/s of all together", ylim=(0, None))
    gain.set(ylabel="tokens/s, autoregressive = 1")
    speed.legend(fontsize=7)
    return _save(figure, folder / "throughput.png")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
