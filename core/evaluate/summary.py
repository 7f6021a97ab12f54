"""From answers to the numbers of `report.json`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from core.evaluate.speculation import (
    BASELINE,
    HF_GENERATE,
    Answer,
    PromptResult,
    repetition_rate,
)

CHOSEN = "chosen"


def summarize(results: Sequence[PromptResult]) -> dict[str, Any]:
    """Figures per task and, under `overall`, of all prompts; then per way of decoding.

    The top-level keys of a row speak of the chosen tree; `ways` has the others.
    """
    tasks = sorted({result.task for result in results})
    rows = {task: [r for r in results if r.task == task] for task in tasks}
    return {
        "tasks": {task: _row(members) for task, members in rows.items()},
        "overall": _row(results),
        "differences": [
            {"id": r.id, "way": way, "position": d.position, "gap": d.gap, "near_tie": d.near_tie}
            for r in results
            for way, d in r.differences.items()
        ],
    }


def _row(results: Sequence[PromptResult]) -> dict[str, Any]:
    ways = {way: _way(way, results) for way in _ways(results)}
    chosen = ways[CHOSEN]
    baselines = [r.answers[BASELINE] for r in results]
    compared = [
        (r, way) for r in results for way in r.answers if way not in (BASELINE, HF_GENERATE)
    ]
    differing = [r.differences[way] for r, way in compared if way in r.differences]
    return {
        "prompts": len(results),
        "tokens_per_second": chosen["tokens_per_second"],
        "baseline_tokens_per_second": tokens_per_second(baselines),
        "speedup": chosen["speedup"],
        "accepted_length": chosen["accepted_length"],
        "acceptance_by_depth": chosen["acceptance_by_depth"],
        "lossless_identical": len(compared) - len(differing),
        "lossless_near_tie": sum(d.near_tie for d in differing),
        "lossless_total": len(compared),
        "repetition_rate": statistics.fmean(repetition_rate(a.token_ids) for a in baselines),
        "ways": ways,
    }


def _ways(results: Sequence[PromptResult]) -> list[str]:
    return list(dict.fromkeys(way for result in results for way in result.answers))


def _way(way: str, results: Sequence[PromptResult]) -> dict[str, Any]:
    """Figures of one way, on the prompts that it answered; so is its baseline."""
    members = [r for r in results if way in r.answers]
    answers = [r.answers[way] for r in members]
    speed = tokens_per_second(answers)
    return {
        "prompts": len(answers),
        "tree_size": answers[0].tree_size,
        "tokens_per_second": speed,
        "speedup": speed / tokens_per_second([r.answers[BASELINE] for r in members]),
        "accepted_length": accepted_length(answers),
        "acceptance_by_depth": acceptance_by_depth(answers),
    }


def tokens_per_second(answers: Sequence[Answer]) -> float:
    """Generated tokens over seconds, the prompts' passes included."""
    return sum(len(a.token_ids) for a in answers) / sum(a.seconds for a in answers)


def accepted_length(answers: Sequence[Answer]) -> float | None:
    """Accepted length τ: tokens committed a target pass, bonus included; None if not counted."""
    rounds = sum(answer.rounds for answer in answers)
    return sum(sum(answer.accepted) for answer in answers) / rounds if rounds else None


def acceptance_by_depth(answers: Sequence[Answer]) -> list[float]:
    """At index d, the share of rounds that accepted depth d+1 among those that accepted d.

    Index 0: the share of rounds in which one of the root's children was accepted.
    """
    depths = [depth for answer in answers for depth in answer.depths]
    rates: list[float] = []
    for depth in range(max(depths, default=0)):
        reached = sum(d >= depth for d in depths)
        rates.append(sum(d > depth for d in depths) / reached)
    return rates
