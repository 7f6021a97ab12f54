"""Servers side by side under the same load: with and without a draft head, and vLLM's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from core.config import Config
from core.progress import say
from core.runtime.load.client import Client, Question
from core.runtime.load.drive import Questions, closed_loop, lasting
from core.runtime.load.figures import figures, print_checks, print_rows
from core.runtime.load.servers import Server, aerie_server, vllm_server

SPECULATIVE, PLAIN, VLLM = "Aerie, speculative", "Aerie, plain", "vLLM"
COLUMNS = (
    "tokens_per_second", "latency_p50_s", "latency_p95_s",
    "first_token_p50_s", "first_token_p95_s", "failed",
)  # fmt: skip


async def comparison(config: Config, prompts: Sequence[str], folder: Path) -> Mapping[str, Any]:
    """Put each server under load in turn, for every number of clients; returns the report.

    All servers run the whole time and wait while another one answers. Each repeat asks all of
    them the same questions, from the same one on.
    """
    load, found = config.load, dict[str, Any]()
    async with AsyncExitStack() as stack:
        servers = _start(config, folder, stack)
        clients = {
            name: await stack.enter_async_context(Client(server.url, server.model))
            for name, server in servers.items()
        }
        for name, client in clients.items():
            say("load_test", f"{name}: {load.warm_up_s:g} s to warm up")
            await closed_loop(
                client,
                Questions(prompts, load.max_tokens),
                max(load.client_counts),
                lasting(load.warm_up_s),
            )
        for repeat in range(load.repeats):
            for count in load.client_counts:
                names = list(clients)
                for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                    say("load_test", f"{name}: {count} clients, {load.seconds:g} s")
                    questions = list(islice(_from(prompts, load.max_tokens, repeat), 10_000))
                    replies = await closed_loop(
                        clients[name], questions, count, lasting(load.seconds)
                    )
                    found.setdefault(f"{name}, {count}", []).append(figures(replies))
    rows = {name: _median(repeats) for name, repeats in found.items()}
    failed = sum(row["failed"] + row["refused"] for row in rows.values())
    return {
        "rows": rows,
        "repeats": found,
        "dtype": config.target.dtype,
        "kept": {f"{failed:.0f} requests failed": failed == 0},
    }


def show_comparison(report: Mapping[str, Any]) -> None:
    """Print it."""
    print_rows(f"clients in turn, {report['dtype']}", report["rows"], COLUMNS)
    print_checks(report["kept"])


def _start(config: Config, folder: Path, stack: AsyncExitStack) -> dict[str, Server]:
    plain = config.replace(draft={"path": None}, decode={"total_tokens": 1})
    servers = {}
    if config.draft.path:
        servers[SPECULATIVE] = stack.enter_context(aerie_server(config, folder, "speculative"))
    servers[PLAIN] = stack.enter_context(aerie_server(plain, folder, "plain"))
    if config.load.vllm_python:
        servers[VLLM] = stack.enter_context(vllm_server(config.load.vllm_python, config, folder))
    return servers


def _from(prompts: Sequence[str], max_tokens: int, repeat: int) -> Sequence[Question]:
    """Streamed all, so that each has the time to its first token."""
    start = repeat * 50 % len(prompts)
    ordered = [*prompts[start:], *prompts[:start]]
    return [Question(prompt, max_tokens) for prompt in ordered * (10_000 // len(ordered) + 1)]


def _median(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name, value in repeats[0].items() if isinstance(value, int | float)]
    return {name: statistics.median(one[name] for one in repeats) for name in names}
