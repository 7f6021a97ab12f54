"""The same load for long: errors, memory, and whether answers are still the target's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.config import Config
from core.progress import say
from core.runtime.load.client import Client, Reply
from core.runtime.load.drive import Questions, closed_loop, lasting, sampled
from core.runtime.load.equality import check_equality
from core.runtime.load.figures import figures, print_checks, print_rows
from core.runtime.load.servers import aerie_server

SAMPLE_EVERY_S = 5.0
# By how much memory may differ between the beginning and the end.
MOST_DRIFT = 0.05
COLUMNS = ("requests", "failed", "tokens_per_second", "latency_p50_s", "latency_p95_s")


async def soak(config: Config, prompts: Sequence[str], folder: Path) -> Mapping[str, Any]:
    """Returns the report, which says of each promise whether it was kept."""
    load = config.load
    questions = Questions(prompts, load.max_tokens)
    memory: list[dict[str, float]] = []
    with aerie_server(config, folder) as server:
        async with Client(server.url, server.model) as client:
            say("load_test", f"{load.clients} clients, {load.warm_up_s:g} s to warm up")
            await closed_loop(client, questions, load.clients, lasting(load.warm_up_s))
            say("load_test", f"{load.clients} clients, {load.seconds:g} s")
            began = time.monotonic()

            async def look() -> None:
                memory.append({"seconds": time.monotonic() - began, **server.resident_mb()})

            work = closed_loop(client, questions, load.clients, lasting(load.seconds))
            replies = await sampled(work, look, SAMPLE_EVERY_S)
    report = {"load": figures(replies), "memory_mb": memory, "drift": _drifts(memory)}
    report["equality"] = check_equality(config, _spread(replies, load.sample), _threads(config))
    report["kept"] = _promises(report)
    return report


def show_soak(report: Mapping[str, Any]) -> None:
    """Print it."""
    print_rows("soak", {"all": report["load"]}, COLUMNS)
    for kind, one in report["drift"].items():
        print(
            f"  {kind}: {one['first_mb']:.0f} MB, then {one['last_mb']:.0f} ({one['drift']:+.1%})"
        )
    print_checks(report["kept"])


def _promises(report: Mapping[str, Any]) -> dict[str, bool]:
    load, same = report["load"], report["equality"]
    total = {kind: one["drift"] for kind, one in report["drift"].items()}
    unlike = same["total"] - same["identical"] - same["near_tie"]
    return {
        f"{load['failed'] + load['refused']} of {load['requests']} requests without an answer": (
            load["failed"] + load["refused"] == 0
        ),
        f"memory within {MOST_DRIFT:.0%} of that after the warm-up": (
            abs(total["all together"]) <= MOST_DRIFT
        ),
        f"{same['identical']} of {same['total']} answers equal plain decoding's "
        f"({same['near_tie']} more are near-ties)": unlike == 0,
    }


def _drifts(memory: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of each kind of process, its memory in the first and the last tenth of the time."""
    tenth = max(1, len(memory) // 10)
    kinds = [kind for kind in memory[0] if kind != "seconds"]
    series = {kind: [one.get(kind, 0.0) for one in memory] for kind in kinds}
    series["all together"] = [sum(values) for values in zip(*series.values(), strict=True)]
    drifts = {}
    for kind, values in series.items():
        first, last = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
        drifts[kind] = {"first_mb": first, "last_mb": last, "drift": last / max(first, 1e-9) - 1}
    return drifts


def _spread(replies: Sequence[Reply], count: int) -> list[Reply]:
    """So many whole answers to different questions, from the beginning to the end of the time."""
    whole = {reply.question.prompt: reply for reply in replies if reply.error is None}
    chosen = sorted(whole.values(), key=lambda reply: reply.began)
    step = max(1.0, len(chosen) / count) if count else 1.0
    places = [round(number * step) for number in range(count)]
    return [chosen[place] for place in places if place < len(chosen)]


def _threads(config: Config) -> int:
    return max(1, int(config.serve.cpus_per_replica))
