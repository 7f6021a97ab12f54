"""serve.guard and serve.traffic: what becomes of a request from its first byte to its last."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator, MutableMapping
from typing import Any

import httpx
import openai
import pytest

from serve.api import build_api
from serve.generation import Accepted, Event, Finished, Generation, Progressed
from serve.models import Served
from serve.traffic import Traffic
from tests.in_process import CHAT, HELLO, Direct, Json, Service, in_process

Message = MutableMapping[str, Any]
TIMEOUT_S = 60.0
ASKED = json.dumps(HELLO[CHAT]).encode()
STREAMED = json.dumps({**HELLO[CHAT], "stream": True}).encode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_process(tmp_path_factory.mktemp("exchange")) as service:
        yield service


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[Json]]:
    """What is logged of requests; filled when they have ended."""
    logger, found = logging.getLogger("ray.serve"), []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("{"):
                found.append(json.loads(record.getMessage()))

    handler = Handler()
    # Once Ray Serve is imported, its logger hands nothing on to the root's handlers.
    logger.addHandler(handler)
    caplog.set_level(logging.INFO, logger="ray.serve")
    yield found
    logger.removeHandler(handler)


class Canned(Direct):
    """In place of replicas: events of an answer, pauses (s), a failure, or None for ever."""

    def __init__(self, service: Service, *events: Event | Exception | float | None) -> None:
        super().__init__(service.replica, service.backend.desk)
        self.events: tuple[Event | Exception | float | None, ...] = events
        self.asked: list[Generation] = []

    async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        self.asked.append(request)
        for event in self.events:
            if event is None:
                await asyncio.Event().wait()
            elif isinstance(event, Exception):
                raise event
            elif isinstance(event, float):
                await asyncio.sleep(event)
            else:
                yield event


ROUND = Progressed(0, (("Hello", False),), (7,), 1)
END = Finished(0, "length", 1, rounds=1, accepted_length=1.0, tokens_per_second=1.0)


class Wire:
    """One request, part by part, as a server hands it to an application."""

    def __init__(self, service: Service, path: str = CHAT) -> None:
        self.service = service
        self.scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "client": ("10.0.0.1", 1), "server": ("test", 80),
            "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"trace-9")],
        }  # fmt: skip
        self.coming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.changed = asyncio.Event()
        self.waits = False

    def body(self, content: bytes, *, more: bool = False) -> None:
        self.coming.put_nowait({"type": "http.request", "body": content, "more_body": more})

    def leave(self) -> None:
        self.coming.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        self.waits = True
        return await self.coming.get()

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self.changed.set()

    async def until(self, parts: int) -> None:
        """So many parts of the response were sent."""
        while len(self.sent) < parts:
            self.changed.clear()
            await self.changed.wait()

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.service.api(self.scope, self.receive, self.send))

    @property
    def status(self) -> int:
        return self.sent[0]["status"]


# --- Deadlines -------------------------------------------------------------------


def test_an_answer_past_its_deadline_is_given_up_for_good(service: Service) -> None:
    hasty = service.configured(deadline_s=1e-9)
    response = hasty.call(CHAT)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (504, "deadline_exceeded")
    assert error["type"] == "timeout_error"
    # That would only add to the load.
    assert not openai.OpenAI(api_key="none")._should_retry(response)
    assert service.call(CHAT).status_code == 200


@pytest.mark.parametrize("events", [(None,), (Accepted(1), None), (Accepted(1), ROUND, None)])
def test_so_is_one_that_waits_for_its_turn(service: Service, events: tuple[Any, ...]) -> None:
    hasty = service.configured(deadline_s=0.02).behind(Canned(service, *events))
    assert hasty.config.serve.deadline_s == 0.02
    response = hasty.call(CHAT)
    assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
    if events[0] is not None:
        assert hasty.broken_stream(CHAT)[-1]["error"]["type"] == "timeout_error"


# --- Bodies ----------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", ASKED[:10]])
def test_a_body_that_does_not_come_is_not_waited_for(service: Service, begun: bytes) -> None:
    hasty = service.configured(body_timeout_s=0.02)

    async def work() -> Wire:
        wire = Wire(hasty)
        if begun:
            wire.body(begun, more=True)
        await asyncio.wait_for(wire.start(), TIMEOUT_S)
        return wire

    wire = service.run(work())
    body = b"".join(message.get("body", b"") for message in wire.sent)
    response = httpx.Response(wire.status, headers=wire.sent[0]["headers"], content=body)
    assert response.status_code == 408
    assert "did not come within 0.02 seconds" in response.json()["error"]["message"]
    assert response.headers["connection"] == "close"
    assert openai.OpenAI(api_key="none")._should_retry(response), "the network's fault"


def test_a_body_that_has_come_is_answered_however_long_that_takes(service: Service) -> None:
    backend = Canned(service, Accepted(1), ROUND, 0.05, END)
    hasty = service.configured(body_timeout_s=0.02).behind(backend)

    async def work() -> Wire:
        wire = Wire(hasty)
        wire.body(STREAMED)
        # The application asks meanwhile whether the client is still there.
        await wire.start()
        return wire

    wire = service.run(work())
    assert wire.status == 200 and not wire.sent[-1].get("more_body")


def test_stalled_requests_leave_room_for_monitors(service: Service) -> None:
    small = service.configured(max_requests=3)

    async def work() -> tuple[list[int], httpx.Response, int]:
        stalled = [Wire(small) for _ in range(3)]
        tasks = [wire.start() for wire in stalled]
        while not all(wire.waits for wire in stalled):
            await asyncio.sleep(0)
        refused = await small.client.post(CHAT, json=HELLO[CHAT])
        paths = ("/health", "/live", "/metrics", "/")
        seen = [(await small.client.get(path)).status_code for path in paths]
        for wire in stalled:
            wire.body(ASKED)
        await asyncio.gather(*tasks)
        assert [wire.status for wire in stalled] == [200] * 3
        return seen, refused, (await small.client.post(CHAT, json=HELLO[CHAT])).status_code

    seen, refused, after = service.run(work())
    assert seen == [200] * 4 and after == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


# --- What the log says -------------------------------------------------------------


def test_a_failure_has_a_name_and_stands_in_the_log(service: Service, lines: list[Json]) -> None:
    broken = service.behind(Canned(service, ZeroDivisionError("a mistake")))
    response = broken.run(
        broken.client.post(CHAT, json=HELLO[CHAT], headers={"X-Request-ID": "trace-8"})
    )
    assert (response.status_code, response.headers["x-request-id"]) == (500, "trace-8")
    assert response.json()["error"]["type"] == "server_error"
    (line,) = lines
    assert (line["status"], line["request_id"]) == (500, "trace-8")


def test_an_answer_that_breaks_off_is_a_failure(service: Service, lines: list[Json]) -> None:
    broken = service.behind(Canned(service, Accepted(1), ROUND, ZeroDivisionError("a mistake")))

    async def work() -> None:
        wire = Wire(broken)
        wire.body(STREAMED)
        # The server closes the connection, so that this is no whole answer.
        with pytest.raises(ZeroDivisionError):
            await wire.start()

    service.run(work())
    assert lines[0]["status"] == 500


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_client_that_leaves_is_logged_as_such(
    service: Service, lines: list[Json], cancelled: bool
) -> None:
    """It is gone by a message, or, in Ray Serve, by cancelling."""
    endless = service.behind(Canned(service, Accepted(1), ROUND, None))

    async def work() -> int:
        wire = Wire(endless)
        wire.body(STREAMED)
        task = wire.start()
        await wire.until(3)
        if cancelled:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            wire.leave()
            await task
        return sum(len(message.get("body", b"")) for message in wire.sent)

    given = service.run(work())
    (line,) = lines
    assert (line["status"], line["bytes"], line["request_id"]) == (499, given, "trace-9")
    assert given > 0


def test_one_that_leaves_before_its_body_has_come_too(service: Service, lines: list[Json]) -> None:
    async def work() -> None:
        wire = Wire(service)
        wire.leave()
        await wire.start()

    service.run(work())
    assert [line["status"] for line in lines] == [499]


def test_whole_answers_are_logged_with_their_bytes(service: Service, lines: list[Json]) -> None:
    response = service.call(CHAT)
    assert [(line["status"], line["bytes"]) for line in lines] == [(200, len(response.content))]


def test_replicas_know_what_the_log_calls_a_request(service: Service, lines: list[Json]) -> None:
    backend = Canned(service, Accepted(1), ROUND, END)
    service.behind(backend).call(CHAT)
    assert [one.name for one in backend.asked] == [lines[0]["request_id"]]


# --- An application that is stopped --------------------------------------------------


def test_who_is_let_in_is_answered_and_nobody_else(service: Service) -> None:
    traffic = Traffic(10)
    gate = asyncio.Event()

    class Slow(Canned):
        async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
            await gate.wait()
            async for event in super().generate(request):
                yield event

    backend = Slow(service, Accepted(1), ROUND, END)
    serve = service.config.serve
    served = Served(serve.model_name, backend, service.backend.desk, serve)
    api = build_api([served], serve, traffic)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test")

    async def work() -> tuple[httpx.Response, httpx.Response]:
        running = asyncio.create_task(client.post(CHAT, json=HELLO[CHAT]))
        while not traffic.at_work:
            await asyncio.sleep(0)
        assert traffic.drain() == 1
        refused = await client.post(CHAT, json=HELLO[CHAT])
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        assert (await client.get("/live")).status_code == 200
        gate.set()
        answered = await running
        assert traffic.drain() == 0
        return answered, refused

    answered, refused = service.run(work())
    assert answered.status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) >= 1


# --- Other origins -------------------------------------------------------------------


def test_pages_of_other_origins_may_ask_where_that_is_configured(service: Service) -> None:
    origin = "https://chat.example.org"
    keyed = service.configured(cors_origins=[origin], api_keys=["0" * 64])
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }

    def ask(method: str, headers: Json, asked: Service = keyed) -> httpx.Response:
        return asked.run(asked.client.request(method, CHAT, headers=headers))

    allowed = ask("OPTIONS", preflight)
    assert allowed.status_code == 200, "without a key"
    assert allowed.headers["access-control-allow-origin"] == origin
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    refused = ask("POST", {"Origin": origin})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == origin, "the page can read why"
    assert "X-Request-ID" in refused.headers["access-control-expose-headers"]
    for stranger in (
        ask("OPTIONS", {**preflight, "Origin": "https://evil.example"}),
        ask("OPTIONS", preflight, service),
        ask("POST", {"Origin": origin}, service),
    ):
        assert "access-control-allow-origin" not in stranger.headers
