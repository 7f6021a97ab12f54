"""The Grafana dashboard asks for metrics that there are."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from serve.generation import Accepted, Event, Finished, Progressed, Rejected, Restarted
from serve.metrics import Metrics, Registry

BOARD = Path(__file__).parents[2] / "serve" / "dashboard" / "grafana.json"
EVENTS: list[Event] = [
    Accepted(5),
    Progressed(0, (("a", False),), (1,), 0),
    Restarted(),
    Progressed(0, (("bc", True),), (2, 3), 8, num_guessed=1),
    Finished(0, "length", 3, 1, 2.0, 10.0),
]


def run_through(metrics: Metrics, events: Sequence[Event]) -> None:
    """As the interface has the events of a request counted."""

    async def told() -> AsyncGenerator[Event, None]:
        for event in events:
            yield event

    async def work() -> None:
        assert [event async for event in metrics.watched(told())] == list(events)

    asyncio.run(work())


def test_every_metric_of_the_dashboard_exists() -> None:
    registry = Registry()
    metrics = registry.of("tiny")
    run_through(metrics, EVENTS)
    run_through(metrics, [Rejected("no")])
    text = registry.text().decode()
    there = {match[1]: match[2] for match in re.finditer(r"^([a-z0-9:_]+)\{(.*?)\}", text, re.M)}
    queries = [
        target["expr"]
        for panel in json.loads(BOARD.read_text())["panels"]
        for target in panel["targets"]
    ]
    asked = {name for query in queries for name in re.findall(r"(?:vllm|aerie):[a-z0-9_]+", query)}
    assert len(queries) > 15 and asked
    assert asked <= there.keys()
    for query in queries:
        for name, labels in re.findall(r"by \(([a-z_]+)\) \(rate\(([a-z0-9:_]+)", query):
            assert f"{name}=" in there[labels], query


def test_what_is_counted_of_an_answer() -> None:
    registry = Registry()
    metrics = registry.of("tiny")
    run_through(metrics, EVENTS)
    counts = {
        name: float(value)
        for name, value in re.findall(
            r"^([a-z0-9:_]+)\{.*?\} (\S+)$", registry.text().decode(), re.M
        )
    }
    assert counts["vllm:prompt_tokens_total"] == 5
    assert counts["vllm:generation_tokens_total"] == 3
    assert counts["vllm:spec_decode_num_drafts_total"] == 1
    assert counts["vllm:spec_decode_num_draft_tokens_total"] == 7
    assert counts["vllm:spec_decode_num_accepted_tokens_total"] == 1
    assert counts["aerie:request_restarted_total"] == 1
    assert counts["vllm:num_requests_running"] == counts["vllm:num_requests_waiting"] == 0
