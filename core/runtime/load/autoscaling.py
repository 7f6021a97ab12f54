"""How many replicas there are while the load rises and falls, and what the policy went by."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
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
    if not config.load.profile or config.serve.most_replicas <= config.serve.replicas:
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
    with aerie_server(config, folder) as server:
        began = time.time()
        async with Client(server.url, server.model) as client:

            async def look() -> None:
                replicas = len(server.processes()["decoder replicas"])
                ready = (await client.get("/health")).json()["replicas"]
                seen.append({"time": time.time(), "replicas": ready, "processes": replicas})

            await sampled(_phases(config, prompts, client, parts), look, SAMPLE_EVERY_S)
            await _settled(config.serve.replicas, look, seen)
    report: dict[str, Any] = {
        "parts": parts,
        "seen": _since(seen, began),
        "decisions": _since(map(json.loads, (folder / LOG).read_text().splitlines()), began),
    }
    report["changes"] = _changes(report["seen"])
    report["otherwise"] = _otherwise(report["decisions"], config.serve.most_replicas)
    report["kept"] = _promises(report, config)
    _plot(report, config, folder / "autoscaling.png")
    return report


def _since(moments: Iterable[Mapping[str, Any]], began: float) -> list[dict[str, Any]]:
    """What came after a time, with the seconds since then."""
    seconds = [{**one, "at_s": one["time"] - began} for one in moments]
    return [one for one in seconds if one["at_s"] >= 0]


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
            f"  {one['from_s']:.0f} to {one['to_s']:.0f} s: this policy wants {one['wanted']}, "
            f"Serve's own would have {one['serve_default']} "
            f"(up to {one['requests']:.0f} requests, {one['backlog_s']:.1f} s of work)"
        )
    print_checks(report["kept"])


def _changes(seen: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    changes: list[dict[str, float]] = []
    for one in seen:
        if not changes or changes[-1]["replicas"] != one["replicas"]:
            changes.append({"at_s": one["at_s"], "replicas": one["replicas"]})
    return changes


def _otherwise(decisions: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """Where one policy wants more than the other for two seconds or longer, within the bounds."""
    stretches: list[dict[str, Any]] = []
    last = 0
    for one in decisions:
        wanted, default = (max(1, min(most, one[name])) for name in ("wanted", "serve_default"))
        sign = (wanted > default) - (wanted < default)
        if sign and sign != last:
            stretches.append({"from_s": one["at_s"], "requests": 0, "backlog_s": 0.0})
        if sign:
            stretch = stretches[-1]
            stretch["to_s"] = one["at_s"]
            for name in ("requests", "backlog_s"):
                stretch[name] = max(stretch[name], one[name])
            # As far apart as they were.
            if abs(wanted - default) >= abs(
                stretch.get("wanted", 0) - stretch.get("serve_default", 0)
            ):
                stretch |= {"wanted": wanted, "serve_default": default}
        last = sign
    return [one for one in stretches if one["to_s"] - one["from_s"] >= 2]


def _promises(report: Mapping[str, Any], config: Config) -> dict[str, bool]:
    numbers = [int(change["replicas"]) for change in report["changes"]]
    lost = sum(part["failed"] + part["refused"] for part in report["parts"].values())
    least, most = config.serve.replicas, config.serve.most_replicas
    return {
        f"replicas went {least} → {most} → {least} ({' → '.join(map(str, numbers))})": (
            numbers[0] == numbers[-1] == least and max(numbers) == most
        ),
        f"{lost} requests lost": lost == 0,
    }


def _plot(report: Mapping[str, Any], config: Config, path: Path) -> None:
    decisions, seen = report["decisions"], report["seen"]
    at = [one["at_s"] for one in decisions]
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(9.6, 8), sharex=True, layout="constrained"
    )
    top.step(
        [one["at_s"] for one in seen],
        [one["replicas"] for one in seen],
        where="post",
        linewidth=3,
        label="replicas that run",
    )
    most = config.serve.most_replicas
    for name, label in (("wanted", "wanted"), ("serve_default", "wanted by Serve's own policy")):
        values = [max(1, min(most, one[name])) for one in decisions]
        top.step(at, values, where="post", label=label, linestyle="--")
    for one in report["otherwise"]:
        top.axvspan(one["from_s"], one["to_s"], alpha=0.12, color="tab:red")
    top.set(ylabel="replicas", title="Autoscaling; shaded: Serve's own policy decides otherwise")
    middle.plot(at, [one["backlog_s"] for one in decisions], label="work for one replica")
    middle.axhline(config.serve.target_backlog_s, linestyle=":", label="serve.target_backlog_s")
    middle.set(ylabel="seconds", ylim=(0, None))
    bottom.plot(at, [one["produced_per_second"] for one in decisions], label="tokens a second")
    bottom.set(xlabel="seconds", ylabel="tokens a second", ylim=(0, None))
    requests = bottom.twinx()
    requests.plot(at, [one["requests"] for one in decisions], color="tab:green", label="requests")
    requests.set(ylabel="requests in hand", ylim=(0, None))
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    for axes, place in ((top, 0), (middle, 0), (bottom, "upper left"), (requests, "upper right")):
        axes.legend(fontsize=8, loc=place)
    figure.savefig(path, dpi=110)
    plt.close(figure)
