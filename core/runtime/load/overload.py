"""More requests than can be answered: how fast some are refused, and how the others fare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.config import Config
from core.progress import say
from core.runtime.load.client import Client
from core.runtime.load.drive import Questions, closed_loop, lasting, open_loop
from core.runtime.load.figures import figures, print_checks, print_rows
from core.runtime.load.servers import aerie_server

MOST_REFUSAL_S = 0.25
MOST_SLOWER = 1.5
COLUMNS = (
    "requests", "answered", "refused", "failed", "requests_per_second", "tokens_per_second",
    "latency_p50_s", "latency_p95_s", "refusal_p50_s", "refusal_p95_s",
)  # fmt: skip


async def overload(config: Config, prompts: Sequence[str], folder: Path) -> Mapping[str, Any]:
    """Measure capacity, overload the server, and measure again; returns the report.

    Capacity is what the server answers when as many clients as it has places ask without pause.
    """
    load, places = config.load, config.decode.batch_size * config.serve.replicas
    questions = Questions(prompts, load.max_tokens)
    parts: dict[str, Any] = {}
    with aerie_server(config, folder) as server:
        async with Client(server.url, server.model) as client:
            say("load_test", f"{places} clients, {load.warm_up_s:g} s to warm up")
            await closed_loop(client, questions, places, lasting(load.warm_up_s))
            say("load_test", f"{places} clients, {load.seconds:g} s: the capacity")
            replies = await closed_loop(client, questions, places, lasting(load.seconds))
            parts["at capacity"] = figures(replies)
            rate = load.overload * parts["at capacity"]["requests_per_second"]
            say("load_test", f"{rate:.1f} requests a second, {load.seconds:g} s")
            replies = await open_loop(client, questions, rate, load.seconds)
            parts["overloaded"] = figures(replies)
            say("load_test", f"{places} clients again, {load.seconds:g} s")
            replies = await closed_loop(client, questions, places, lasting(load.seconds))
            parts["afterwards"] = figures(replies)
    return {"parts": parts, "kept": _promises(parts)}


def show_overload(report: Mapping[str, Any]) -> None:
    """Print it."""
    print_rows("overload", report["parts"], COLUMNS)
    print_checks(report["kept"])


def _promises(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    before, during, after = parts["at capacity"], parts["overloaded"], parts["afterwards"]
    failed = sum(part["failed"] for part in parts.values())
    refusal = during["refusal_p95_s"]
    slower = {
        name: _ratio(during[f"latency_{name}_s"], before[f"latency_{name}_s"])
        for name in ("p50", "p95")
    }
    again = _ratio(after["latency_p50_s"], before["latency_p50_s"])
    return {
        f"{failed} requests failed": failed == 0,
        f"95% of the refusals within {MOST_REFUSAL_S * 1000:.0f} ms "
        f"({(refusal or 0) * 1000:.0f} ms)": refusal is not None and refusal < MOST_REFUSAL_S,
        f"answers at most {MOST_SLOWER:g} times as slow as at capacity "
        f"(median {slower['p50']:.2f}, 95% {slower['p95']:.2f})": slower["p50"] <= MOST_SLOWER
        and slower["p95"] <= MOST_SLOWER,
        f"afterwards as before (median {again:.2f} times as slow, {after['refused']} refused)": (
            again <= MOST_SLOWER and not after["refused"]
        ),
    }


def _ratio(one: float | None, other: float | None) -> float:
    return one / other if one and other else float("inf")
