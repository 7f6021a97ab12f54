"""What a dashboard shows, read off the events on their way to the clients.

The names are vLLM's where it has one, so that its dashboards carry over.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from serve.generation import (
    Accepted,
    Event,
    Finished,
    Progressed,
    Rejected,
    Restarted,
    Speculated,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
WHOLE_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
TREE_NODES = (1, 2, 4, 8, 16, 32, 64, 128)


class Registry:
    """Counts of one ingress; each has its own. Its models share them, and a label tells which."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._families: dict[str, Any] = {}

    def of(self, model_name: str) -> Metrics:
        """Those of a model."""
        return Metrics(self, model_name)

    def text(self) -> bytes:
        """All counts in Prometheus's format."""
        return generate_latest(self._registry)

    def family(self, kind: Any, name: str, doc: str, labels: tuple[str, ...], **more: Any) -> Any:
        """The metric of a name, which the first model's makes."""
        if name not in self._families:
            self._families[name] = kind(name, doc, labels, registry=self._registry, **more)
        return self._families[name]


class Metrics:
    """Counts of one model."""

    def __init__(self, registry: Registry, model_name: str) -> None:
        self._registry, self._model = registry, model_name
        self.running = self._one(
            Gauge, "vllm:num_requests_running", "Requests whose answer has begun"
        )
        self.waiting = self._one(
            Gauge, "vllm:num_requests_waiting", "Requests whose first token has not come"
        )
        self.prompt_tokens = self._one(Counter, "vllm:prompt_tokens", "Tokens of prompts")
        self.generation_tokens = self._one(Counter, "vllm:generation_tokens", "Tokens of answers")
        self.drafts = self._one(
            Counter, "vllm:spec_decode_num_drafts", "Draft trees that were verified"
        )
        self.draft_tokens = self._one(
            Counter,
            "vllm:spec_decode_num_draft_tokens",
            "Nodes of draft trees, without their roots",
        )
        self.accepted = self._one(
            Counter, "vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were kept"
        )
        self.accepted_per_pos = self._many(
            Counter,
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Guessed tokens that were kept, by their place in the round",
            "position",
        )
        self.success = self._many(
            Counter, "vllm:request_success", "Answers that were finished", "finished_reason"
        )
        self.refused = self._many(
            Counter, "aerie:request_refused", "Requests that were refused", "status"
        )
        self.restarted = self._one(
            Counter, "aerie:request_restarted", "Times that a request's replica died"
        )
        self.first_token = self._one(
            Histogram,
            "vllm:time_to_first_token_seconds",
            "From a request to its first token",
            buckets=FIRST_TOKEN_S,
        )
        self.between_tokens = self._one(
            Histogram,
            "vllm:inter_token_latency_seconds",
            "A round's seconds, over its tokens",
            buckets=BETWEEN_TOKENS_S,
        )
        self.whole = self._one(
            Histogram,
            "vllm:e2e_request_latency_seconds",
            "From a request to the end of its answer",
            buckets=WHOLE_S,
        )
        self.tree_size = self._one(
            Histogram,
            "aerie:tree_nodes",
            "Nodes of the trees that were verified, their roots included",
            buckets=TREE_NODES,
        )

    def _many(self, kind: Any, name: str, doc: str, *labels: str, **more: Any) -> Any:
        return self._registry.family(kind, name, doc, ("model_name", *labels), **more)

    def _one(self, kind: Any, name: str, doc: str, **more: Any) -> Any:
        return self._many(kind, name, doc, **more).labels(self._model)

    async def watched(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The same events, counted."""
        began = time.monotonic()
        # When each choice last gave tokens.
        last: dict[int, float] = {}
        stage = None
        async with aclosing(events):
            try:
                async for event in events:
                    if isinstance(event, Accepted):
                        self.prompt_tokens.inc(event.prompt_tokens)
                        stage = self._to(stage, self.waiting)
                    elif isinstance(event, Progressed) and event.num_tokens:
                        stage = self._to(stage, self.running)
                        self._count(event, began, last)
                    elif isinstance(event, Finished):
                        self.success.labels(self._model, event.openai_reason).inc()
                        self.whole.observe(time.monotonic() - began)
                    elif isinstance(event, Rejected):
                        self.refused.labels(self._model, str(event.status)).inc()
                    elif isinstance(event, Restarted):
                        self.restarted.inc()
                    elif isinstance(event, Speculated):
                        self._count_speculation(event)
                    yield event
            finally:
                self._to(stage, None)

    def _count(self, progressed: Progressed, began: float, last: dict[int, float]) -> None:
        now = time.monotonic()
        self.generation_tokens.inc(progressed.num_tokens)
        if progressed.choice in last:
            seconds = (now - last[progressed.choice]) / progressed.num_tokens
            for _ in range(progressed.num_tokens):
                self.between_tokens.observe(seconds)
        else:
            self.first_token.observe(now - began)
        last[progressed.choice] = now
        if progressed.tree_size is not None and progressed.tree_size > 1:
            self.tree_size.observe(progressed.tree_size)
            kept = (1,) * (progressed.num_guessed or 0)
            self._count_speculation(Speculated(1, progressed.tree_size - 1, kept))

    def _count_speculation(self, told: Speculated) -> None:
        self.drafts.inc(told.drafts)
        self.draft_tokens.inc(told.draft_tokens)
        self.accepted.inc(sum(told.accepted_per_place))
        for place, count in enumerate(told.accepted_per_place):
            self.accepted_per_pos.labels(self._model, str(place)).inc(count)

    def _to(self, stage: Any, next_stage: Any) -> Any:
        """One request leaves a stage for the next."""
        if stage is not next_stage:
            if stage is not None:
                stage.dec()
            if next_stage is not None:
                next_stage.inc()
        return next_stage
