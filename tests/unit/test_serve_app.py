"""serve.app: what the ingress makes of a deployment's handle."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve as ray_serve
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve import app, recent
from serve.app import DecoderReplicas
from serve.errors import ApiError
from serve.generation import Accepted, Event, Generation, Rejected
from serve.recent import Recent

TIMEOUT_S = 60.0
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


def events_of(response: Response) -> list[Event]:
    async def work() -> list[Event]:
        async with aclosing(replicas(response).generate(ASKED)) as events:
            return [event async for event in events]

    return asyncio.run(work())


def test_a_full_router_refuses_as_a_full_replica_does() -> None:
    """So whose replica died, and who was let in by it, waits for room on another one."""
    failure = BackPressureError(num_queued_requests=4, max_queued_requests=4)
    (refused,) = events_of(Response(failure))
    assert isinstance(refused, Rejected) and refused.retry_after_s
    assert (refused.status, refused.code) == (429, "queue_full")


def test_a_model_whose_replicas_do_not_start_is_a_503() -> None:
    with pytest.raises(ApiError) as caught:
        events_of(Response(DeploymentUnavailableError(DeploymentID("Decoder"))))
    assert (caught.value.status, caught.value.code) == (503, "no_replica")
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
    assert [asked._running_replicas() for _ in found] == [2, 2, 0]


# --- Health ----------------------------------------------------------------------


class Controller:
    """What Ray Serve's says of two applications; `answers` holds it up."""

    def __init__(self) -> None:
        self.asked, self.answers = 0, threading.Event()
        self.failure: Exception | None = None
        self.answers.set()

    def status(self) -> Any:
        self.asked += 1
        assert self.answers.wait(TIMEOUT_S)
        if self.failure is not None:
            raise self.failure
        mine = {"Decoder": states(RUNNING=2, STARTING=1), "Heads": states(RUNNING=1)}
        theirs = {"Decoder": states(RUNNING=7)}
        return SimpleNamespace(
            applications={
                "mine": SimpleNamespace(deployments=mine),
                "theirs": SimpleNamespace(deployments=theirs),
            }
        )


def states(**counts: int) -> SimpleNamespace:
    return SimpleNamespace(replica_states=counts)


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    controller = Controller()
    monkeypatch.setattr(ray_serve, "status", controller.status)
    monkeypatch.setattr(app, "list_named_actors", lambda all_namespaces: [])
    return controller


def of_application(name: str, timeout_s: float = TIMEOUT_S) -> DecoderReplicas:
    handle: Any = Handle(Response(None))
    handle.app_name, handle.deployment_name = name, "Decoder"
    found = DecoderReplicas(handle, retries=0)
    found._running = Recent(found._running_replicas, timeout_s=timeout_s)
    return found


@pytest.mark.parametrize(("name", "count"), [("mine", 2), ("theirs", 7), ("none", 0)])
def test_the_replicas_of_this_application_are_counted(
    controller: Controller, name: str, count: int
) -> None:
    assert asyncio.run(of_application(name).running()) == count


def test_the_controller_is_asked_once_for_many(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = of_application("mine")

    async def work() -> None:
        assert await asyncio.gather(*(mine.running() for _ in range(20))) == [2] * 20
        assert controller.asked == 1
        monkeypatch.setattr(recent, "EVERY_S", 0.0)
        assert await mine.running() == 2
        assert controller.asked == 2

    asyncio.run(work())


def test_a_controller_that_hangs_is_not_waited_for(controller: Controller) -> None:
    mine = of_application("mine", timeout_s=0.02)

    async def work() -> None:
        controller.answers.clear()
        for _ in range(3):
            with pytest.raises(ApiError) as caught:
                await mine.running()
            assert (caught.value.status, caught.value.code) == (503, "status_unknown")
        assert controller.asked == 1, "one thread waits, not three"
        controller.answers.set()
        while (found := await first(mine)) is None:
            await asyncio.sleep(0.01)
        assert found == 2

    asyncio.run(asyncio.wait_for(work(), TIMEOUT_S))


async def first(replicas: DecoderReplicas) -> int | None:
    try:
        return await replicas.running()
    except ApiError:
        return None


def test_a_controller_that_fails_is_asked_again(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "EVERY_S", 0.0)
    mine, controller.failure = of_application("mine"), RuntimeError("it restarts")

    async def work() -> None:
        assert await first(mine) is None
        controller.failure = None
        assert await first(mine) == 2

    asyncio.run(work())
