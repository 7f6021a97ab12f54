"""serve.app: what the ingress makes of a deployment's handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError

from serve import app
from serve.app import DecoderReplicas
from serve.errors import ApiError
from serve.generation import Accepted, Event, Generation

ASKED = Generation(("Hello!",))


class Response:
    """As Ray's: what an assignment failed with, `cancel` raises again."""

    def __init__(self, failure: Exception | None) -> None:
        self.failure, self.cancelled = failure, False

    async def __aiter__(self) -> AsyncIterator[Event]:
        if self.failure is not None:
            raise self.failure
        yield Accepted(1)
        yield Accepted(2)

    def cancel(self) -> None:
        self.cancelled = True
        if self.failure is not None:
            raise self.failure


class Handle:
    """A handle all of whose calls get one response."""

    app_name, deployment_name = "aerie", "Decoder"

    def __init__(self, response: Response) -> None:
        self.response = response
        self.generate = self

    def options(self, **settings: Any) -> Handle:
        return self

    def remote(self, request: Generation) -> Response:
        return self.response


def replicas(response: Response) -> DecoderReplicas:
    handle: Any = Handle(response)
    return DecoderReplicas(handle, retries=0)


def test_a_full_router_is_a_429_as_a_full_replica_is() -> None:
    failure = BackPressureError(num_queued_requests=4, max_queued_requests=4)

    async def work() -> None:
        async with aclosing(replicas(Response(failure)).generate(ASKED)) as events:
            async for _ in events:
                pass

    with pytest.raises(ApiError) as caught:
        asyncio.run(work())
    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    assert caught.value.retry_after_s


@pytest.mark.parametrize("whole", [True, False])
def test_what_nobody_waits_for_is_cancelled(whole: bool) -> None:
    response = Response(None)

    async def work() -> list[Event]:
        async with aclosing(replicas(response).generate(ASKED)) as events:
            if whole:
                return [event async for event in events]
            return [await anext(events)]

    assert len(asyncio.run(work())) == (2 if whole else 1)
    assert response.cancelled == (not whole)


def test_replicas_go_on_where_serve_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a deploy that failed it names the application without its deployments."""
    decoder = SimpleNamespace(replica_states={"RUNNING": 2, "STARTING": 1})
    found = [{"Decoder": decoder, "Ingress": None}, {}, {"Ingress": None}]
    statuses = iter(
        SimpleNamespace(applications={"aerie": SimpleNamespace(deployments=one)}) for one in found
    )
    names = ("aerie#Decoder#a", "aerie#Decoder#b", "aerie#Decoder:x#a", "other#Decoder#a")
    actors = [{"name": f"SERVE_REPLICA::{name}", "namespace": "serve"} for name in names]
    monkeypatch.setattr(ray_serve, "status", lambda: next(statuses))
    monkeypatch.setattr(app, "list_named_actors", lambda all_namespaces: actors)
    asked = replicas(Response(None))
    assert [asyncio.run(asked.running()) for _ in found] == [2, 2, 0]
