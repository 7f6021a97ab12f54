"""Plots of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIZE_INCHES = (6.4, 3.8)


def plot_evaluation(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `acceptance_by_depth.png` and `speedup_by_task.png`."""
    return [_acceptance_by_depth(report, folder), _speedup_by_task(report, folder)]


def _acceptance_by_depth(report: Mapping[str, Any], folder: Path) -> Path:
    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    for way, row in report["overall"]["ways"].items():
        rates = row["acceptance_by_depth"]
        if rates:
            label = f"{way}, τ = {row['accepted_length']:.2f}"
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
        axes.legend()
    return _save(figure, folder / "acceptance_by_depth.png")


def _speedup_by_task(report: Mapping[str, Any], folder: Path) -> Path:
    rows = {**report["tasks"], "overall": report["overall"]}
    speedups = [row["speedup"] for row in rows.values()]
    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    bars = axes.bar(list(rows), speedups, width=0.5)
    axes.bar_label(bars, fmt="%.2f×")
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set(
        ylabel="tokens/s, autoregressive = 1",
        title=f"Speedup at the chosen tree of {report['chosen']['total_tokens']} nodes",
    )
    return _save(figure, folder / "speedup_by_task.png")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
