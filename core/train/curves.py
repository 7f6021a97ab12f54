"""Plots of a training run, from its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from core.tracking import read_metrics
from core.train.evaluation import ACCEPTED_DEPTH, ACCEPTED_LENGTH

# (metric, label, color): training solid, held-out dashed in the same color.
LOSS_CURVES = (("loss", "loss", "tab:blue"),)
ACCURACY_CURVES = (
    ("top1", "top 1", "tab:blue"),
    ("top2", "top 2", "tab:orange"),
    ("top3", "top 3", "tab:green"),
)


def plot_curves(folder: Path) -> None:
    """Write `loss.png`, `accuracy.png` and `accepted_length.png` beside `metrics.jsonl`.

    The last one only where held-out sequences were evaluated that way.
    """
    records = read_metrics(folder)
    _plot(folder / "loss.png", records, LOSS_CURVES, "loss a supervised token")
    _plot(folder / "accuracy.png", records, ACCURACY_CURVES, "right token among the likeliest")
    _plot_accepted(folder / "accepted_length.png", records)


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
    figure, axes = _figure()
    for name, text, color in curves:
        trained = series(records, name)
        if not trained[0]:
            continue
        axes.plot(*trained, color=color, label=f"{text}, training")
        steps, values = series(records, f"held_out_{name}")
        if steps:
            axes.plot(steps, values, "o--", color=color, label=f"{text}, held out")
    axes.set(xlabel="optimizer step", ylabel=label)
    _save(figure, axes, path)


def _plot_accepted(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Simulated accepted length by training tokens, and the share of chains accepted by depth."""
    found = [record for record in records if ACCEPTED_LENGTH in record]
    if not found:
        return
    points = [record["tokens"] for record in found]
    figure, axes = _figure()
    axes.plot(points, [r[ACCEPTED_LENGTH] for r in found], "ko-", label="accepted length τ")
    axes.set(xlabel="tokens trained on", ylabel="τ of one drafted chain, held out")
    shares = axes.twinx()
    names = [name for name in found[-1] if name.startswith(ACCEPTED_DEPTH)]
    for name in names:
        depth = name.removeprefix(ACCEPTED_DEPTH)
        values = [record.get(name, 0.0) for record in found]
        shares.plot(points, values, "--", alpha=0.6, label=f"{depth} deep")
    shares.set(ylabel="share of chains accepted so deep", ylim=(0, 1))
    shares.legend(loc="lower right")
    _save(figure, axes, path)


def _figure() -> tuple[Any, Any]:
    # Without a window system, whatever the environment says.
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found: tuple[Any, Any] = plt.subplots(figsize=(7, 4), layout="constrained")
    return found


def _save(figure: Any, axes: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
