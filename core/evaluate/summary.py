"""From answers to the numbers of `report.json`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from core.evaluate.intervals import Timings, speed_ratio
from core.evaluate.speculation import (
    BASELINE,
    HF_GENERATE,
    Answer,
    Difference,
    PromptResult,
    repetition_rate,
)
from core.evaluate.ways import CHOSEN, FOREIGN


def summarize(results: Sequence[PromptResult], fixed: Sequence[str] = ()) -> dict[str, Any]:
    """Figures per task and, under `overall`, of all prompts; then per way of decoding.

    The top-level keys of a row speak of the chosen tree; `ways` has the others.

    Args:
        results: at least one.
        fixed: the ways among which `against_best_fixed` looks for the best.
    """
    tasks = sorted({result.task for result in results})
    rows = {task: [r for r in results if r.task == task] for task in tasks}
    return {
        "tasks": {task: _row(members, fixed) for task, members in rows.items()},
        "overall": _row(results, fixed),
        "differences": [
            {"id": r.id, "way": way, **difference_figures(d)}
            for r in results
            for way, d in r.differences.items()
        ],
    }


def difference_figures(difference: Difference) -> dict[str, Any]:
    """Where an answer left the baseline's, and how close the target's own choice was there."""
    return {
        "position": difference.position,
        "gap": difference.gap,
        "gap_in_steps": difference.steps,
        "near_tie": difference.near_tie,
    }


def _row(results: Sequence[PromptResult], fixed: Sequence[str]) -> dict[str, Any]:
    ways = {way: _way(way, results) for way in _ways(results)}
    chosen = ways[CHOSEN]
    baselines = [r.answers[BASELINE][0] for r in results]
    compared = [
        (r, way) for r in results for way in r.answers if way != BASELINE and way not in FOREIGN
    ]
    differing = [r.differences[way] for r, way in compared if way in r.differences]
    return {
        "prompts": len(results),
        "timed_prompts": sum(r.timed for r in results),
        "repeats": max(len(r.answers[BASELINE]) for r in results),
        "tokens_per_second": chosen["tokens_per_second"],
        "baseline_tokens_per_second": ways[BASELINE]["tokens_per_second"],
        "speedup": chosen["speedup"],
        "speedup_interval": chosen["speedup_interval"],
        "accepted_length": chosen["accepted_length"],
        "acceptance_by_depth": chosen["acceptance_by_depth"],
        "lossless_identical": len(compared) - len(differing),
        "lossless_near_tie": sum(d.near_tie for d in differing),
        "lossless_total": len(compared),
        "repetition_rate": statistics.fmean(repetition_rate(a.token_ids) for a in baselines),
        "against_best_fixed": against_best_fixed(results, fixed),
        "ways": ways,
    }


def _ways(results: Sequence[PromptResult]) -> list[str]:
    return list(dict.fromkeys(way for result in results for way in result.answers))


def _way(way: str, results: Sequence[PromptResult]) -> dict[str, Any]:
    """Figures of one way, on the prompts that it answered; so is what it is compared with."""
    members = [r for r in results if way in r.answers]
    answers = [answer for r in members for answer in r.answers[way]]
    return {
        "prompts": len(members),
        "tree_size": mean_tree_size(answers),
        "tokens_per_second": _speed(way, members),
        **_ratio("speedup", way, BASELINE, members),
        **_ratio("over_hf_generate", way, HF_GENERATE, members),
        "accepted_length": accepted_length(answers),
        "acceptance_by_depth": acceptance_by_depth(answers),
    }


def timings(way: str, results: Sequence[PromptResult]) -> Timings:
    """Tokens and seconds of a way on prompts that were timed, the prompts' passes included."""
    return Timings.of(
        [[(len(a.token_ids), a.seconds or 0.0) for a in r.answers[way]] for r in results]
    )


def _speed(way: str, results: Sequence[PromptResult]) -> float | None:
    timed = [r for r in results if r.timed]
    return timings(way, timed).speed() if timed else None


def _ratio(name: str, of: str, to: str, results: Sequence[PromptResult]) -> dict[str, Any]:
    """A ratio of speeds on the prompts that both answered, and its interval; None without any."""
    both = [r for r in results if r.timed and of in r.answers and to in r.answers]
    if not both:
        return {name: None, f"{name}_interval": None}
    ratio = speed_ratio(timings(of, both), timings(to, both))
    return {name: ratio.value, f"{name}_interval": ratio.interval}


def against_best_fixed(
    results: Sequence[PromptResult], fixed: Sequence[str]
) -> Mapping[str, Any] | None:
    """How the chosen tree compares with the best of the fixed settings.

    The best is picked on every second prompt and compared on the others: picked on the same
    prompts, the best of many would owe some of its lead to chance.
    """
    timed = [result for result in results if result.timed]
    picked_on, compared_on = timed[::2], timed[1::2]
    if not compared_on or len(fixed) < 2:
        return None
    best = max(fixed, key=lambda way: timings(way, picked_on).speed())
    ratio = speed_ratio(timings(CHOSEN, compared_on), timings(best, compared_on))
    return {
        "way": best,
        "of": len(fixed),
        "prompts": len(compared_on),
        "ratio": ratio.value,
        "ratio_interval": ratio.interval,
    }


def mean_tree_size(answers: Sequence[Answer]) -> float:
    """Nodes a target pass."""
    rounds = sum(answer.rounds for answer in answers)
    return sum(a.tree_size * a.rounds for a in answers) / rounds if rounds else 1.0


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
