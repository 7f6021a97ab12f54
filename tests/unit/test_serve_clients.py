"""OpenAI's own client against the service: answers, streams, and the exception of every error.

The asynchronous client calls the application in this process, the synchronous one a socket.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import openai
import pytest

from core.decode import engine
from serve.generation import Conversation, Event, Generation
from serve.keys import key_hash
from serve.retry import ReplicaLostError
from tests.in_process import CHAT, HELLO, TEXT, Direct, Json, Service, in_process, listening


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_process(tmp_path_factory.mktemp("clients")) as service:
        yield service


def client_of(service: Service, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key=key, max_retries=0, http_client=service.client
    )


def create(client: Any, path: str, **fields: Any) -> Any:
    resource = client.chat.completions if path == CHAT else client.completions
    return resource.create(**{**HELLO[path], **fields})


def text_of(path: str, choice: Any) -> str:
    if path == TEXT:
        return choice.text
    return (choice.message if hasattr(choice, "message") else choice.delta).content or ""


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_asynchronous_client_waits_and_streams(service: Service, path: str) -> None:
    async def asked() -> tuple[str, list[str], Any]:
        client = client_of(service)
        whole = await create(client, path)
        stream = await create(client, path, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage == whole.usage
        parts = [text_of(path, choice) for chunk in chunks for choice in chunk.choices]
        return text_of(path, whole.choices[0]), parts, await client.models.list()

    whole, parts, models = service.run(asked())
    assert whole and "".join(parts) == whole and len(parts) > 2
    assert [model.id for model in models.data] == ["tiny"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_synchronous_client_waits_and_streams(service: Service, path: str) -> None:
    with listening(service) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            whole = text_of(path, create(client, path).choices[0])
            stream = create(client, path, stream=True)
            parts = [text_of(path, choice) for chunk in stream for choice in chunk.choices]
            assert whole and "".join(parts) == whole and len(parts) > 2
            assert client.models.retrieve("tiny").id == "tiny"
            with pytest.raises(openai.BadRequestError):
                create(client, path, temperature=-1)


def test_a_message_that_was_answered_can_be_sent_back(service: Service) -> None:
    """As the client's own object, with all its nulls."""

    async def asked() -> None:
        client = client_of(service)
        message = (await create(client, CHAT)).choices[0].message
        messages = [*HELLO[CHAT]["messages"], message, {"role": "user", "content": "Go on."}]
        assert (await create(client, CHAT, messages=messages)).choices

    service.run(asked())


# --- Errors ---------------------------------------------------------------------------


class Dead(Direct):
    """Every replica that is asked dies."""

    async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        raise ReplicaLostError("killed")
        yield


def failure(service: Service, path: str = CHAT, key: str = "none", **fields: Any) -> Any:
    """The exception that the client raises."""

    async def asked() -> Any:
        await create(client_of(service, key), path, **fields)

    return raised(service, asked())


def raised(service: Service, work: Any) -> Any:
    with pytest.raises(openai.APIStatusError) as caught:
        service.run(work)
    error = caught.value
    assert isinstance(error.body, dict), error.response.text
    assert error.body.keys() == {"message", "type", "param", "code"}
    assert error.response.headers["content-type"] == "application/json"
    assert error.response.headers["x-request-id"] == error.request_id
    assert not isinstance(error, openai.UnprocessableEntityError)
    return error


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "param"),
    [({"temperature": -1}, "temperature"), ({"extra_body": {"top-k": 1}}, "top-k")],
)
def test_a_wrong_field_is_a_bad_request(
    service: Service, path: str, fields: Json, param: str
) -> None:
    for stream in (False, True):
        error = failure(service, path, stream=stream, **fields)
        assert isinstance(error, openai.BadRequestError)
        assert (error.type, error.param, error.code) == ("invalid_request_error", param, None)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_too_long_a_prompt_is_a_bad_request_with_both_lengths(service: Service, path: str) -> None:
    name = "prompt" if path == TEXT else "messages"
    text = "x" * 500
    long: Any = text if path == TEXT else [{"role": "user", "content": text}]
    for stream in (False, True):
        fields = {name: long, "stream": stream}
        error = failure(service, path, **fields)
        assert isinstance(error, openai.BadRequestError)
        assert (error.code, error.param) == ("context_length_exceeded", name)
        lengths = set(map(int, re.findall(r"\d+", error.body["message"])))
        assert 399 in lengths and max(lengths) >= 500


def test_a_body_that_is_too_large(service: Service) -> None:
    small = service.configured(max_request_bytes=2_000)
    error = failure(small, TEXT, prompt="x" * 2_000)
    assert (error.status_code, error.code) == (413, "request_too_large")


def test_no_key_is_an_authentication_error(service: Service) -> None:
    keyed = service.configured(api_keys=[key_hash("right")])
    error = failure(keyed, key="wrong")
    assert isinstance(error, openai.AuthenticationError)
    assert error.code == "invalid_api_key"

    async def allowed() -> Any:
        return await create(client_of(keyed, "right"), CHAT)

    assert service.run(allowed()).choices


def test_what_does_not_exist_is_not_found(service: Service) -> None:
    client = client_of(service)
    error = failure(service, model="gpt-4o")
    assert isinstance(error, openai.NotFoundError)
    assert (error.code, error.param) == ("model_not_found", "model")
    for call in (
        client.models.retrieve("gpt-4o"),
        client.embeddings.create(model="tiny", input="x"),
        client.responses.create(model="tiny", input="x"),
    ):
        assert isinstance(raised(service, call), openai.NotFoundError)


def test_a_method_that_a_path_has_not(service: Service) -> None:
    client = client_of(service)
    for call in (client.chat.completions.list(), client.models.delete("tiny")):
        error = raised(service, _awaited(call))
        assert error.status_code == 405
        assert error.response.headers["allow"]


async def _awaited(call: Any) -> Any:
    return await call


def test_an_answer_that_takes_too_long(service: Service) -> None:
    error = failure(service.configured(deadline_s=1e-9))
    assert (error.status_code, error.code) == (504, "deadline_exceeded")


def test_too_many_requests_are_a_rate_limit_error(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def second() -> None:
        prompt = Conversation((("user", "Hello!"),))
        first = service.replica.generate(Generation((prompt,), max_new_tokens=300))
        async with aclosing(first) as events:
            await anext(events)
            await create(client_of(service), CHAT)

    monkeypatch.setattr(service.replica._loop, "most", 1)
    full = raised(service, second())
    monkeypatch.undo()
    limited = service.configured(requests_per_minute=1)
    assert limited.call(CHAT).status_code == 200
    often = failure(limited)
    for error, code in ((full, "queue_full"), (often, "rate_limit_exceeded")):
        assert isinstance(error, openai.RateLimitError)
        assert (error.type, error.code) == ("rate_limit_error", code)
        assert int(error.response.headers["retry-after"]) >= 1


def test_the_servers_own_failures_are_internal_errors(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "target_pass", fail)
        error = failure(service)
        assert isinstance(error, openai.InternalServerError)
        assert (error.status_code, error.type) == (500, "server_error")
        assert "out of memory" not in error.message

        async def streamed() -> None:
            async for _ in await create(client_of(service), CHAT, stream=True):
                pass

        # The status was sent before: the client knows it by the last event.
        with pytest.raises(openai.APIError) as caught:
            service.run(streamed())
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["type"] == "server_error"
    dead = service.behind(Dead(service.replica, service.backend.desk))
    error = failure(dead)
    assert isinstance(error, openai.InternalServerError)
    assert (error.status_code, error.code) == (503, "replica_lost")
    assert int(error.response.headers["retry-after"]) >= 1
