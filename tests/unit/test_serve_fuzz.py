"""Whatever is sent, the answer is 200 or a 4xx in OpenAI's shape, and the next request works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from serve.keys import key_hash
from tests.fuzz import ADMIN, BODIES, MODELS, odd_bodies, odd_fields, odd_parameters, odd_values
from tests.in_process import CHAT, HELLO, TEXT, TGI, Service, in_process

KEY = {"Authorization": "Bearer admin"}


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
    ("path", "sampled"), [*((path, False) for path in MODELS), (CHAT, True), (TEXT, True)]
)
def test_no_value_of_any_field_breaks_the_server(
    service: Service, path: str, sampled: bool
) -> None:
    bodies = odd_fields(path, **({"temperature": 1.0} if sampled else {}))
    statuses = {send(service, "POST", path, body) for _, body in bodies}
    assert 400 in statuses and statuses <= {200, 400, 404}


def test_no_value_of_tgis_parameters_breaks_the_server(service: Service) -> None:
    for _, body in odd_parameters():
        send(service, "POST", TGI, body)


def test_admin_refuses_what_makes_no_sense(service: Service) -> None:
    for name in ("path", "canary", "unknown"):
        for _, body in odd_values(BODIES[ADMIN], name):
            assert send(service, "POST", ADMIN, body, **KEY) == 400


@pytest.mark.parametrize("path", BODIES)
def test_no_body_breaks_the_server(service: Service, path: str) -> None:
    for _, body in odd_bodies(path):
        send(service, "POST", path, body, **KEY)


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


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [{}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 1_000}]}),
        (CHAT, {"messages": [{**HELLO[CHAT]["messages"][0], **dict.fromkeys("abcdefgh", 1)}]}),
        (CHAT, {"stop": [1]}),
        (CHAT, {"metadata": {str(number): number for number in range(1_000)}}),
        (TEXT, {"logit_bias": {str(number): 1_000 for number in range(1_000)}}),
        (TEXT, {"prompt": [-1]}),
        (TEXT, {"prompt": [[-1]]}),
        (TEXT, {f"unknown_{number}": number for number in range(1_000)}),
        ("/tokenize", {"prompt": None, "messages": [1]}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_of_a_thousand_mistakes_the_first_ones_are_noted(path: str, fields: dict[str, Any]) -> None:
    """A body may have a megabyte of them: to note each takes seconds in which nobody is served."""
    many = {
        name: value * 1_000 if isinstance(value, list) else value for name, value in fields.items()
    }
    with pytest.raises(ValidationError) as caught:
        MODELS[path].model_validate({**HELLO[path], **many})
    assert caught.value.error_count() < 10
