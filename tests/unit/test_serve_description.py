"""What /openapi.json promises, held against the application by schemathesis.

It makes requests that fit the description and ones that do not. Whatever is sent, the status, the
type and the body of the answer are among those that are described, what does not fit is refused,
and nothing is an error of the server's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.schemas import OpenApiSchema

from serve.fields import MOST_CHOICES
from serve.keys import key_hash
from tests.in_process import CHAT, TEXT, TGI, in_process

GENERATING = (CHAT, TEXT, TGI, "/generate_stream")
KEY = {"Authorization": "Bearer admin"}
OPERATIONS = (
    "GET /", "GET /health", "GET /ping", "POST /ping", "GET /live", "GET /metrics",
    "GET /v1/models", "GET /v1/models/{model}",
    f"POST {CHAT}", f"POST {TEXT}", f"POST {TGI}", "POST /generate_stream", "POST /tokenize",
    "POST /detokenize", "GET /admin/draft", "POST /admin/draft", "DELETE /admin/draft",
)  # fmt: skip
# A ping has no body that could be wrong.
WITH_BODY = [one for one in OPERATIONS if one.startswith("POST") and one != "POST /ping"]
CHECKED: list[Any] = CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
    ]
)
FEW, MANY = 20, 1_000
TIMEOUT_S = 120
# What an answer is kept to: a description has no word for the time that one takes.
MOST_TOKENS, MOST_ANSWERS = 4, 3


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenApiSchema]:
    with in_process(tmp_path_factory.mktemp("description")) as service:
        service = service.configured(admin_keys=(key_hash("admin"),))
        yield schemathesis.openapi.from_asgi("/openapi.json", service.api)


def explore(described: OpenApiSchema, label: str, *, examples: int) -> dict[int, int]:
    """Send so many requests to an operation; how often each status came."""
    operation = described.find_operation_by_label(label)
    assert operation is not None
    fitting = operation.as_strategy(schemathesis.GenerationMode.POSITIVE)
    others = [operation.as_strategy(schemathesis.GenerationMode.NEGATIVE)] * bool(operation.body)
    statuses: dict[int, int] = {}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(fitting, *others))
    def sent(case: schemathesis.Case) -> None:
        shorten(case)
        response = case.call_and_validate(headers=KEY, checks=CHECKED, timeout=TIMEOUT_S)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    sent()
    return statuses


def shorten(case: schemathesis.Case) -> None:
    """Keep a good request short, and of the model that there is; nothing wrong becomes right."""
    body: Any = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    if type(body.get("n")) is int and body["n"] <= MOST_CHOICES:
        body["n"] = min(body["n"], MOST_ANSWERS)
    limited, names = body, ["max_tokens", "max_completion_tokens"][: 2 if case.path == CHAT else 1]
    if case.path in (TGI, "/generate_stream"):
        if body.get("parameters") is None:
            body["parameters"] = {}
        limited, names = body["parameters"], ["max_new_tokens"]
    if case.path in GENERATING and isinstance(limited, dict):
        for name in names:
            if limited.get(name) is None:
                limited[name] = MOST_TOKENS
            elif type(limited[name]) is int:
                limited[name] = min(limited[name], MOST_TOKENS)


def test_every_operation_is_explored(described: OpenApiSchema) -> None:
    found = list(described.get_all_operations())
    labels = {one.ok().label for one in found if isinstance(one, Ok)}
    assert len(labels) == len(found) and labels == set(OPERATIONS)


def test_a_wrong_body_is_never_described_as_a_422(described: OpenApiSchema) -> None:
    raw = described.raw_schema
    for path, operations in raw["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            for status, response in operation["responses"].items():
                if int(status) >= 400 and path not in ("/health", "/ping"):
                    (content,) = response["content"].values()
                    assert content["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
    assert "HTTPValidationError" not in raw["components"]["schemas"]


@pytest.mark.parametrize("label", OPERATIONS)
def test_an_operation_does_what_is_described(described: OpenApiSchema, label: str) -> None:
    explore(described, label, examples=FEW)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.parametrize("label", WITH_BODY)
def test_an_operation_does_what_is_described_thousands_of_times(
    described: OpenApiSchema, label: str
) -> None:
    statuses = explore(described, label, examples=MANY)
    print(f"{label}: {statuses}")
    assert statuses[400] > MANY / 10
