"""Every field of a message in OpenAI's description: taken, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.descriptions import allows, message_fields, parsed_answer
from tests.in_process import CHAT, HELLO, Json, Service, in_process

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
FILE = {"type": "file", "file": {"file_id": "x"}}
REFUSAL = {"type": "refusal", "refusal": "no"}
TEXT_PART = {"type": "text", "text": "Hello!"}
SPOKEN = ("system", "developer", "user", "assistant")
# By role and field: what is taken, and what is refused.
MESSAGES: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    **{(role, "role"): ([role], []) for role in SPOKEN},
    **{(role, "role"): ([], [role]) for role in ("tool", "function")},
    **{(role, "name"): (["Ann"], []) for role in SPOKEN},
    **{(role, "content"): (["Hello!", [TEXT_PART] * 2], []) for role in SPOKEN[:2]},
    ("user", "content"): (["Hello!", [TEXT_PART]], [[TEXT_PART, IMAGE], [SOUND], [FILE]]),
    ("assistant", "content"): (["Hello!", [TEXT_PART]], [None, [REFUSAL]]),
    ("assistant", "audio"): ([None], [{"id": "x"}]),
    ("assistant", "function_call"): ([None], [{"name": "look", "arguments": "{}"}]),
    ("assistant", "refusal"): ([None], ["no"]),
    ("assistant", "tool_calls"): (
        [[]],
        [[{"id": "x", "type": "function", "function": {"name": "look", "arguments": "{}"}}]],
    ),
}
# Of roles that are refused as a whole.
TOOLS = {("tool", "content"), ("tool", "tool_call_id"), ("function", "content"),
         ("function", "name")}  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_process(tmp_path_factory.mktemp("messages")) as service:
        yield service


def text_of(service: Service, messages: list[Json]) -> str:
    body = service.answer(CHAT, messages=messages)
    parsed_answer(CHAT, body)
    return body["choices"][0]["message"]["content"]


def test_the_table_of_messages_has_all_that_there_is() -> None:
    assert set(message_fields()) == set(MESSAGES) | TOOLS


@pytest.mark.parametrize(("role", "name"), MESSAGES)
def test_a_field_of_a_message(service: Service, role: str, name: str) -> None:
    taken, refused = MESSAGES[role, name]
    first = HELLO[CHAT]["messages"]
    for value in taken:
        message = {"role": role, "content": "Hello!", name: value}
        if value is not None:
            assert allows(message_fields()[role, name], value), f"{value} is none of OpenAI's"
        assert text_of(service, [message, *first])
    for value in refused:
        assert allows(message_fields()[role, name], value), f"{value} is none of OpenAI's"
        message = {"role": role, "content": "Hello!", name: value}
        response = service.call(CHAT, messages=[*first, message])
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith(f"messages.1.{name}")


def test_a_name_and_parts_leave_the_text_as_it_is(service: Service) -> None:
    plain = text_of(service, HELLO[CHAT]["messages"])
    part = {**TEXT_PART, "prompt_cache_breakpoint": {"mode": "explicit"}}
    for message in ({"content": "Hello!", "name": "Ann"}, {"content": [part]}):
        assert text_of(service, [{"role": "user", **message}]) == plain


def test_the_developer_is_the_system(service: Service) -> None:
    def told(role: str) -> str:
        return text_of(service, [{"role": role, "content": "Be brief."}, *HELLO[CHAT]["messages"]])

    assert told("developer") == told("system") != told("user")
