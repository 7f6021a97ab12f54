"""Plots of a training run, from its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from core.tracking import read_metrics

# (metric, label, color): training solid, held-out dashed in the same color.
LOSS_CURVES = (("loss", "loss", "tab:blue"),)
ACCURACY_CURVES = (
    ("top1", "top 1", "tab:blue"),
    ("top2", "top 2", "tab:orange"),
    ("top3", "top 3", "tab:green"),
)


def plot_curves(folder: Path) -> None:
    """Write `loss.png` and `accuracy.png` beside `metrics.jsonl`."""
    records = read_metrics(folder)
    _plot(folder / "loss.png", records, LOSS_CURVES, "loss a supervised token")
    _plot(folder / "accuracy.png", records, ACCURACY_CURVES, "target's token among the head's top")


def series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    found = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]


def _plot(
    path: Path,
    records: Sequence[dict[str, Any]],
    curves: Sequence[tuple[str, str, str]],
    label: str,
) -> None:
    # Without a window system, whatever the environment says.
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, text, color in curves:
        axes.plot(*series(records, name), color=color, label=f"{text}, training")
        steps, values = series(records, f"held_out_{name}")
        if steps:
            axes.plot(steps, values, "o--", color=color, label=f"{text}, held out")
    axes.set(xlabel="optimizer step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
