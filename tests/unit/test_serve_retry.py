"""serve.retry: real answers of a replica whose connection breaks off, as when it is killed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from serve.generation import Event, Generation, Progressed, Rejected
from serve.retry import ReplicaLostError
from tests.in_process import CHAT, TEXT, Direct, Json, Service, in_process

LONG: dict[str, Any] = {"max_tokens": 30}
SAMPLED = {**LONG, "temperature": 1.0}
STREAM = {"stream": True, "aerie": {"spans": True}}


class Mortal(Direct):
    """Dies after so many events, once for each number."""

    def __init__(self, service: Service, *deaths: int) -> None:
        super().__init__(service.replica, service.backend.desk)
        self.deaths = list(deaths)
        self.asked: list[Generation] = []

    async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        self.asked.append(request)
        left = self.deaths.pop(0) if self.deaths else None
        async for event in super().generate(request):
            if left == 0:
                raise ReplicaLostError("killed")
            left = None if left is None else left - 1
            yield event


class Full(Mortal):
    """Behind its death stands a replica whose queue is full, and one that shuts down."""

    async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        if 0 < len(self.asked) < 3:
            self.asked.append(request)
            status = 429 if len(self.asked) == 2 else 503
            yield Rejected("not now", status=status, retry_after_s=0)
            return
        async for event in super().generate(request):
            yield event


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_process(tmp_path_factory.mktemp("retry")) as service:
        yield service


def text_of(chunks: list[Json], place: int = 0) -> str:
    choices = [one for chunk in chunks for one in chunk["choices"] if one["index"] == place]
    return "".join(map(content, choices))


def content(choice: Json) -> str:
    part = choice.get("message") or choice.get("delta") or choice
    return part.get("content") or part.get("text") or ""


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("deaths", [(0,), (1,), (2,), (13,), (31,), (13, 0, 20)])
def test_no_answer_shows_that_its_replica_died(
    service: Service, path: str, deaths: tuple[int, ...]
) -> None:
    wanted = service.answer(path, **LONG)
    mortal = Mortal(service, *deaths)
    body = service.behind(mortal).answer(path, **LONG)
    assert (body["choices"], body["usage"]) == (wanted["choices"], wanted["usage"])
    assert not mortal.deaths
    mortal = Mortal(service, *deaths)
    chunks = service.behind(mortal).stream(path, **LONG, **STREAM)
    assert text_of(chunks) == text_of([wanted])
    assert sum(one["choices"][0].get("aerie", {}).get("tokens", 0) for one in chunks) == 30
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert not mortal.deaths


def test_sampling_without_a_seed_gets_one_that_the_next_replica_keeps(service: Service) -> None:
    mortal = Mortal(service, 9)
    chunks = service.behind(mortal).stream(TEXT, **SAMPLED, logprobs=1, n=2)
    seeds = {request.seed for request in mortal.asked}
    assert len(mortal.asked) == 2 and len(seeds) == 1
    wanted = service.answer(TEXT, **SAMPLED, logprobs=1, n=2, seed=seeds.pop())
    for place in range(2):
        assert text_of(chunks, place) == wanted["choices"][place]["text"]
        told = [
            token
            for chunk in chunks
            for choice in chunk["choices"]
            if choice["index"] == place and choice["logprobs"]
            for token in choice["logprobs"]["tokens"]
        ]
        assert told == wanted["choices"][place]["logprobs"]["tokens"]


def test_rounds_of_another_size_are_cut_where_the_first_ones_ended(service: Service) -> None:
    """The second replica gives three tokens an event."""
    wanted = service.answer(TEXT, **LONG)["choices"][0]["text"]

    class Coarse(Mortal):
        async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
            together = 1 + 2 * bool(self.asked)
            held: list[Progressed] = []
            async for event in super().generate(request):
                if isinstance(event, Progressed):
                    held.append(event)
                    if len(held) < together:
                        continue
                if held:
                    yield joined(held)
                    held = []
                if not isinstance(event, Progressed):
                    yield event

    chunks = service.behind(Coarse(service, 12)).stream(TEXT, **LONG, aerie={"spans": True})
    assert text_of(chunks) == wanted
    sizes = [one["choices"][0].get("aerie", {}).get("tokens", 0) for one in chunks]
    assert sum(sizes) == 30 and {1, 3} < set(sizes)


def joined(rounds: list[Progressed]) -> Progressed:
    spans = tuple(span for one in rounds for span in one.spans)
    return Progressed(0, spans, tuple(token for one in rounds for token in one.ids), 3)


def test_another_text_is_a_clear_error_in_a_stream_and_none_in_a_whole_answer(
    service: Service,
) -> None:
    """As rounding may turn a near tie: the second replica is asked another question."""

    class Other(Mortal):
        async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
            if self.asked:
                request = Generation(("Something else.",), max_new_tokens=30, seed=1)
            async for event in super().generate(request):
                yield event

    chunks = service.behind(Other(service, 20)).broken_stream(TEXT, **LONG)
    assert chunks[-1]["error"]["code"] == "answer_interrupted"
    assert text_of([one for one in chunks if "choices" in one])
    body = service.behind(Other(service, 20)).answer(TEXT, **LONG)
    other = service.answer(TEXT, prompt="Something else.", **LONG)
    assert body["choices"][0]["text"] == other["choices"][0]["text"]


def test_too_many_deaths_are_an_error_that_says_so(service: Service) -> None:
    few = service.configured(retries=1)
    response = few.behind(Mortal(service, 5, 5)).call(CHAT, **LONG)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "replica_lost")
    assert response.headers["Retry-After"] == "1"
    chunks = few.behind(Mortal(service, 5, 5)).broken_stream(CHAT, **LONG)
    assert chunks[-1]["error"]["code"] == "replica_lost"


def test_who_was_let_in_waits_for_room_on_another_replica(service: Service) -> None:
    wanted = service.answer(TEXT, **LONG)["choices"][0]["text"]
    full = Full(service, 6)
    assert text_of(service.behind(full).stream(TEXT, **LONG)) == wanted
    assert len(full.asked) == 4


def test_what_another_replica_refuses_for_good_is_an_error_and_no_short_answer(
    service: Service,
) -> None:
    """As one of a new configuration may, with less context."""

    class Smaller(Mortal):
        async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
            if self.asked:
                yield Rejected("too long", code="context_length_exceeded")
                return
            async for event in super().generate(request):
                yield event

    for path in (CHAT, TEXT, "/generate_stream"):
        chunks = service.behind(Smaller(service, 6)).broken_stream(path)
        assert chunks[-1]["error"]["code"] == "context_length_exceeded"
    assert service.behind(Smaller(service, 6)).call(CHAT, **LONG).status_code == 400


def test_losses_are_counted(service: Service) -> None:
    mortal = service.behind(Mortal(service, 4))
    mortal.answer(TEXT, **LONG)
    text = mortal.run(mortal.client.get("/metrics")).text
    assert 'aerie:request_restarted_total{model_name="tiny"} 1.0' in text
