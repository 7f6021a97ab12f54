"""How many replicas there are while the load rises and falls, and what the policy went by."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from core.config import Config
from core.errors import ConfigError
from core.progress import say
from core.runtime.load.client import Client, Reply
from core.runtime.load.drive import Questions, closed_loop, lasting, sampled
from core.runtime.load.figures import figures, print_checks, print_rows
from core.runtime.load.servers import aerie_server

SAMPLE_EVERY_S = 0.5
# To come back to the least number of replicas when nothing is asked any more.
SETTLE_S = 120.0
LOG = "autoscaling.jsonl"
COLUMNS = ("requests", "answered", "refused", "failed", "tokens_per_second", "latency_p95_s")


async def autoscaling(config: Config, prompts: Sequence[str], folder: Path) -> Mapping[str, Any]:
    """Go through `load.profile`; returns the report, and writes `autoscaling.png`.

    Raises:
        ConfigError: there is no profile, or only one replica.
    """
    if not config.load.profile or config.serve.max_replicas <= config.serve.replicas:
        raise ConfigError(
            "autoscaling needs load.profile=[{seconds: …, clients: …, max_tokens: …}, …] and "
            f"serve.max_replicas={config.serve.max_replicas} above serve.replicas; "
            "configs/load_autoscaling.yaml has both"
        )
    config = config.replace(serve={"autoscaling_log": str(folder / LOG)})
    # Of a run that was interrupted.
    (folder / LOG).unlink(missing_ok=True)
    seen: list[dict[str, float]] = []
    parts: dict[str, Any] = {}
    began = time.time()
    with aerie_server(config, folder) as server:
        async with Client(server.url, server.model) as client:

            async def look() -> None:
                replicas = len(server.processes()["decoder replicas"])
                ready = (await client.get("/health")).json()["replicas"]
                seen.append({"time": time.time(), "replicas": ready, "processes": replicas})

            await sampled(_phases(config, prompts, client, parts), look, SAMPLE_EVERY_S)
            await _settled(config.serve.replicas, look, seen)
    decisions = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    report = {
        "began": began,
        "parts": parts,
        "seen": seen,
        "changes": _changes(seen),
        "otherwise": _otherwise(decisions, config.serve.max_replicas),
    }
    report["kept"] = _promises(report, config)
    _plot(report, decisions, config, folder / "autoscaling.png")
    return report


async def _phases(
    config: Config, prompts: Sequence[str], client: Client, parts: dict[str, Any]
) -> None:
    for number, phase in enumerate(config.load.profile, start=1):
        name = f"{number}: {phase.clients} × {phase.max_tokens} tokens, {phase.seconds:g} s"
        say("load_test", f"phase {name}")
        questions = Questions(prompts, phase.max_tokens)
        if phase.clients:
            replies: list[Reply] = await closed_loop(
                client, questions, phase.clients, lasting(phase.seconds)
            )
        else:
            await asyncio.sleep(phase.seconds)
            replies = []
        parts[name] = figures(replies)


async def _settled(least: int, look: Any, seen: list[dict[str, float]]) -> None:
    deadline = time.monotonic() + SETTLE_S
    while seen[-1]["replicas"] > least and time.monotonic() < deadline:
        await asyncio.sleep(SAMPLE_EVERY_S)
        await look()


def show_autoscaling(report: Mapping[str, Any]) -> None:
    """Print it."""
    print_rows("autoscaling", report["parts"], COLUMNS)
    print(
        "replicas:", " → ".join(f"{c['replicas']} ({c['at_s']:.0f} s)" for c in report["changes"])
    )
    for one in report["otherwise"]:
        print(
            f"  {one['from_s']:.0f} to {one['to_s']:.0f} s: Serve's own policy would have "
            f"{one['serve_default']}, this one wants {one['wanted']} "
            f"({one['requests']:.0f} requests, {one['reason']})"
        )
    print_checks(report["kept"])


def _changes(seen: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    changes: list[dict[str, float]] = []
    for one in seen:
        if not changes or changes[-1]["replicas"] != one["replicas"]:
            at_s = one["time"] - seen[0]["time"]
            changes.append({"at_s": at_s, "replicas": one["replicas"]})
    return changes


def _otherwise(decisions: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """Stretches of at least two seconds in which the two policies disagree, within the bounds."""
    stretches: list[dict[str, Any]] = []
    last = None
    for one in decisions:
        pair = min(most, one["wanted"]), max(1, min(most, one["serve_default"]))
        at_s = one["time"] - decisions[0]["time"]
        if last == pair and pair[0] != pair[1]:
            stretches[-1]["to_s"] = at_s
        elif pair[0] != pair[1]:
            kept = {name: one[name] for name in ("requests", "backlog_s", "reason")}
            both = {"wanted": pair[0], "serve_default": pair[1]}
            stretches.append({"from_s": at_s, "to_s": at_s, **both, **kept})
        last = pair
    return [one for one in stretches if one["to_s"] - one["from_s"] >= 2]


def _promises(report: Mapping[str, Any], config: Config) -> dict[str, bool]:
    numbers = [int(change["replicas"]) for change in report["changes"]]
    lost = sum(part["failed"] + part["refused"] for part in report["parts"].values())
    least, most = config.serve.replicas, config.serve.max_replicas
    return {
        f"replicas went {least} → {most} → {least} ({' → '.join(map(str, numbers))})": (
            numbers[0] == numbers[-1] == least and max(numbers) == most
        ),
        f"{lost} requests lost": lost == 0,
    }


def _plot(
    report: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]], config: Config, path: Path
) -> None:
    start = decisions[0]["time"]
    at = [one["time"] - start for one in decisions]
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(9.6, 8), sharex=True, layout="constrained"
    )
    seen = report["seen"]
    top.step(
        [one["time"] - start for one in seen],
        [one["replicas"] for one in seen],
        where="post",
        linewidth=3,
        label="replicas",
    )
    most = config.serve.max_replicas
    for name, label in (("wanted", "wanted"), ("serve_default", "Serve's own policy")):
        values = [max(1, min(most, one[name])) for one in decisions]
        top.step(at, values, where="post", label=label, linestyle="--")
    for one in report["otherwise"]:
        top.axvspan(one["from_s"], one["to_s"], alpha=0.12, color="tab:red")
    top.set(ylabel="replicas", title="Autoscaling; shaded: Serve's own policy decides otherwise")
    middle.plot(at, [one["backlog_s"] for one in decisions], label="work for one replica")
    middle.axhline(config.serve.target_backlog_s, linestyle=":", label="serve.target_backlog_s")
    middle.set(ylabel="seconds", ylim=(0, None))
    bottom.plot(at, [one["requests"] for one in decisions], label="requests in hand")
    bottom.plot(at, [one["produced_per_second"] for one in decisions], label="tokens a second")
    bottom.set(xlabel="seconds", ylim=(0, None))
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
