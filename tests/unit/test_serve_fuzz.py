"""Whatever is sent, the answer is 200 or a 4xx in OpenAI's shape, and the next request works."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve.completions import CompletionRequest
from serve.fields import Body
from serve.keys import key_hash
from serve.openai_chat import ChatRequest
from serve.tgi import GenerateRequest, Parameters
from serve.tokens import DetokenizeRequest, TokenizeRequest
from tests.in_process import CHAT, HELLO, TEXT, TGI, Json, Service, in_process

KEY = {"Authorization": "Bearer admin"}
ADMIN = "/admin/draft"
BODIES: dict[str, Json] = {**HELLO, "/generate_stream": HELLO[TGI], ADMIN: {"path": "relative"}}
FIELDS: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    TEXT: CompletionRequest,
    TGI: GenerateRequest,
    "/generate_stream": GenerateRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
# As JSON: some have no Python value.
NASTY = (
    "null", "true", "false", "0", "-1", "1", "0.5", "-0.0", "1e400", "-1e400", "NaN", "Infinity",
    "9223372036854775807", "-9223372036854775809", "1" + "0" * 400, "1e-320", '""', '"\\u0000"',
    '"\\ud800"', '"\\udfff\\ud800"', '"🙂"', '"NaN"', '"1"', "[]", "{}", "[[]]", "[{}]", "[null]",
    "[true]", "[-1]", "[1e400]", '[""]', '["\\ud800"]', '["a", 1]', "[" + "1," * 3_000 + "1]",
    '{"": {}}', '{"a": null}', '{"-1": 1}', '{"999999": 5}', '{"٣": 1}', '{"type": "text"}',
    '{"role": "user", "content": "x"}', '[{"role": "user"}]', '[{"role": "tool", "content": "x"}]',
    '[{"role": "user", "content": null}]', '[{"role": "user", "content": [{"type": "text"}]}]',
    '[{"role": "assistant", "content": ""}]', "[" * 500 + "]" * 500, '"' + "x" * 20_000 + '"',
)  # fmt: skip

# Allowed somewhere, and the last that are.
EXTREME = ("0.00001", "0.001", "1000", "2", "-2", '{"40": 100}', '{"40": -100}', "[40]", "16")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_process(tmp_path_factory.mktemp("fuzz")) as service:
        yield service.configured(admin_keys=(key_hash("admin"),), max_request_bytes=100_000)


def send(service: Service, method: str, path: str, content: bytes, **headers: str) -> int:
    """Send it and hold the answer against what is promised; its status."""
    response: httpx.Response = service.run(
        service.client.request(
            method, path, content=content, headers={"Content-Type": "application/json", **headers}
        )
    )
    sent = f"{method} {path} {content[:200]!r}: {response.status_code} {response.text[:300]}"
    assert response.status_code == 200 or 400 <= response.status_code < 500, sent
    if response.status_code != 200 and method != "HEAD":
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}, sent
        assert error["message"] and len(error["message"]) < 5_000, sent
    assert response.headers["x-request-id"]
    return response.status_code


@pytest.fixture(autouse=True)
def _still_works(service: Service) -> Iterator[None]:
    before = service.answer(CHAT)["choices"]
    yield
    assert service.answer(CHAT)["choices"] == before
    assert not service.replica._loop._turns, "nothing is left at work"


@pytest.mark.parametrize(
    ("path", "sampled"), [*((path, False) for path in FIELDS), (CHAT, True), (TEXT, True)]
)
def test_no_value_of_any_field_breaks_the_server(
    service: Service, path: str, sampled: bool
) -> None:
    statuses = set()
    body = {**BODIES[path], **({"temperature": 1.0} if sampled else {})}
    for name in FIELDS[path].model_fields:
        for value in (*NASTY, *EXTREME):
            content = json.dumps({**body, name: "VALUE"}).replace('"VALUE"', value)
            statuses.add(send(service, "POST", path, content.encode()))
    assert 400 in statuses and statuses <= {200, 400, 404}


def test_no_value_of_tgis_parameters_breaks_the_server(service: Service) -> None:
    for name in Parameters.model_fields:
        for value in (*NASTY, *EXTREME):
            inner = json.dumps({"max_new_tokens": 2, "do_sample": True, name: "VALUE"}).replace(
                '"VALUE"', value
            )
            send(service, "POST", TGI, f'{{"inputs": "Hi", "parameters": {inner}}}'.encode())


def test_admin_refuses_what_makes_no_sense(service: Service) -> None:
    for name in ("path", "canary", "unknown"):
        for value in NASTY:
            content = json.dumps({**BODIES[ADMIN], name: "VALUE"}).replace('"VALUE"', value)
            assert send(service, "POST", ADMIN, content.encode(), **KEY) == 400


@pytest.mark.parametrize("path", BODIES)
def test_no_body_breaks_the_server(service: Service, path: str) -> None:
    good = json.dumps(BODIES[path]).encode()
    draw = random.Random(path)
    bodies = [
        b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"\x00", b"{}{}", b"[" * 50_000,
        b'{"a":' * 20_000, b"9" * 50_000, good + b"}", good[:-1], good.decode().encode("utf-16"),
        b'{"model": "tiny", "model": 1}', b"x" * 100_001,
        *(draw.randbytes(draw.randrange(200)) for _ in range(40)),
        *(damaged(good, draw) for _ in range(120)),
    ]  # fmt: skip
    for body in bodies:
        send(service, "POST", path, body, **KEY)


def damaged(body: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, dropped or doubled."""
    changed = bytearray(body)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(changed))
        kind = draw.randrange(3)
        if kind == 0:
            changed[place] = draw.randrange(256)
        elif kind == 1:
            del changed[place]
        else:
            changed[place:place] = changed[place : place + draw.randrange(1, 9)]
    return bytes(changed)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"])
def test_no_method_and_no_path_breaks_the_server(service: Service, method: str) -> None:
    paths = [*BODIES, "/v1/models/%00", "/v1/models/" + "a" * 5_000, "/v1/models/%ff", "/%2e%2e/"]
    for path in [*paths, "/v1//models", "/metrics/", "/admin/../v1/models", "/nothing?a=%zz"]:
        send(service, method, path, b"", **KEY)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Content-Type": "multipart/form-data"},
        {"Content-Encoding": "gzip"},
        {"Content-Length": "-5"},
        {"Content-Length": "9" * 30},
        {"Authorization": "Bearer " + "x" * 10_000},
        {"X-Request-ID": "a\tb"},
        {"Accept": "nonsense/\x7f"},
    ],
)
def test_no_header_breaks_the_server(service: Service, headers: dict[str, str]) -> None:
    content: Any = json.dumps(HELLO[CHAT]).encode()
    send(service, "POST", CHAT, content, **headers)
