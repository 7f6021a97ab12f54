"""Every field of OpenAI's and TGI's descriptions: taken with its effect, harmless, or refused.

The names and types of the fields come from the descriptions (`tests/descriptions.py`). `TABLE` says
what becomes of each, so that a field which a new description adds fails here until it is decided.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.descriptions import (
    OPENAI,
    PARAMETERS,
    allows,
    parsed_answer,
    request_fields,
)
from tests.in_process import CHAT, HELLO, TEXT, TGI, Json, Service, in_process

# One of each kind of JSON, and some within others.
KINDS: tuple[Any, ...] = (
    True, 0, 1.5, -7, "x", [], {}, [1], [1.5], ["x"], [["x"]], [None], [{}], {"a": 1}, {"a": "b"},
)  # fmt: skip
LONG, SAMPLED = {"max_tokens": 30}, {"max_tokens": 30, "temperature": 1.0}
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_process(tmp_path_factory.mktemp("conformance")) as service:
        yield service


def answer(service: Service, path: str, **fields: Any) -> Json:
    """A whole answer, of OpenAI's shape."""
    if path == PARAMETERS:
        path, fields = TGI, {"parameters": {**HELLO[TGI]["parameters"], **fields}}
    body = service.answer(path, **fields)
    parsed_answer(path, body)
    return body


def text_of(service: Service, path: str, **fields: Any) -> str:
    body = answer(service, path, **fields)
    if path in (TGI, PARAMETERS):
        return body["generated_text"]
    (choice,) = body["choices"]
    return choice["text"] if path == TEXT else choice["message"]["content"]


def refusal(service: Service, path: str, status: int = 400, **fields: Any) -> Json:
    """The error, of OpenAI's shape."""
    if path == PARAMETERS:
        path, fields = TGI, {"parameters": {**HELLO[TGI]["parameters"], **fields}}
    response = service.call(path, **fields)
    assert response.status_code == status, f"{fields}: {response.text}"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    return error


def blamed(path: str, error: Json) -> str:
    """The field of the description that an error names."""
    parts = (error["param"] or "").split(".")
    return parts[parts[0] == "parameters" and path == PARAMETERS and len(parts) > 1]


# --- What becomes of a field ------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """It has the effect that the description tells of."""

    effect: Callable[[Service, str], None]

    def hold(self, service: Service, path: str, name: str) -> None:
        self.effect(service, path)


@dataclass(frozen=True)
class Harmless:
    """It asks for nothing that the text shows: with each of the values, all stays as it is."""

    values: Sequence[Any]

    def hold(self, service: Service, path: str, name: str) -> None:
        plain = text_of(service, path)
        for value in self.values:
            assert allows(request_fields(path)[name], value), f"{value} is none of OpenAI's"
            assert text_of(service, path, **{name: value}) == plain


@dataclass(frozen=True)
class Refused:
    """It asks for what Aerie does not do, except with values that ask for nothing."""

    values: Sequence[Any]
    neutral: Sequence[Any] = ()

    def hold(self, service: Service, path: str, name: str) -> None:
        for value in self.values:
            assert allows(request_fields(path)[name], value), f"{value} is none of OpenAI's"
            error = refusal(service, path, **{name: value})
            assert (blamed(path, error), error["code"]) == (name, "unsupported_parameter")
        Harmless(self.neutral).hold(service, path, name)


def changes_the_text(service: Service, path: str, *, alone: Json, with_it: Json) -> None:
    assert text_of(service, path, **alone) != text_of(service, path, **{**alone, **with_it})


def changing(with_it: Json, alone: Json = LONG) -> Taken:
    return Taken(partial(changes_the_text, alone=alone, with_it=with_it))


# --- Effects ------------------------------------------------------------------------


def is_the_prompt(service: Service, path: str) -> None:
    name = {CHAT: "messages", TEXT: "prompt", TGI: "inputs"}[path]
    other = [{"role": "user", "content": "Bye?"}] if path == CHAT else "Bye?"
    assert text_of(service, path, **{name: other}) != text_of(service, path)


def is_the_model(service: Service, path: str) -> None:
    assert answer(service, path)["model"] == "tiny"
    error = refusal(service, path, 404, model="gpt")
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def repeats_by_seed(service: Service, path: str) -> None:
    sampled = {"do_sample": True, "max_new_tokens": 30} if path == PARAMETERS else SAMPLED
    texts = [text_of(service, path, **sampled, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def limits(service: Service, path: str, *, name: str) -> None:
    for most in (1, 9):
        body = answer(service, path, **{"max_tokens": None, name: most})
        assert body["usage"]["completion_tokens"] == most
        assert body["choices"][0]["finish_reason"] == "length"


def has_choices(service: Service, path: str) -> None:
    body = answer(service, path, n=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]


def ends_at_strings(service: Service, path: str) -> None:
    whole = text_of(service, path, **LONG)
    for stop in (whole[5:7], ["not in there", whole[5:7]]):
        body = answer(service, path, **LONG, stop=stop)
        assert body["choices"][0]["finish_reason"] == "stop"
        assert text_of(service, path, **LONG, stop=stop) == whole[: whole.index(whole[5:7])]


def streams(service: Service, path: str) -> None:
    for chunk in service.stream(path, logprobs=True if path == CHAT else 1, n=2):
        parsed_answer(path, chunk, chunk=True)


def tells_of_usage(service: Service, path: str) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    for chunk in (chunks := service.stream(path, stream_options=options)):
        parsed_answer(path, chunk, chunk=True)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == answer(service, path)["usage"]
    assert refusal(service, path, stream_options=options)["param"] == "stream_options"


def scores_tokens(service: Service, path: str) -> None:
    for fields, most in (({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 2}, 2)):
        (choice,) = answer(service, CHAT, **fields)["choices"]
        found = choice["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in found] == [most] * 6
    assert answer(service, CHAT, logprobs=False)["choices"][0]["logprobs"] is None
    assert refusal(service, CHAT, top_logprobs=2)["param"] == "top_logprobs"


def scores_text(service: Service, path: str) -> None:
    (choice,) = answer(service, TEXT, logprobs=2)["choices"]
    assert len(choice["logprobs"]["tokens"]) == 6


def follows_a_format(service: Service, path: str) -> None:
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    text = text_of(service, CHAT, response_format=named, max_tokens=200)
    assert json.loads(text).keys() == {"yes"}
    text = text_of(service, CHAT, response_format={"type": "json_object"}, **LONG)
    assert text.lstrip().startswith("{")
    plain = text_of(service, CHAT)
    assert text_of(service, CHAT, response_format={"type": "text"}) == plain


def names_the_tier(service: Service, path: str) -> None:
    for tier in ("auto", "default", "priority"):
        assert answer(service, CHAT, service_tier=tier)["service_tier"] == "default"
    assert "service_tier" not in answer(service, CHAT)


def begins_with_the_prompt(service: Service, path: str) -> None:
    assert text_of(service, TEXT, echo=True) == "Hello!" + text_of(service, TEXT)
    assert refusal(service, TEXT, echo=True, logprobs=1)["param"] == "echo"


def streams_tgis_way(service: Service, path: str) -> None:
    whole = answer(service, TGI)["generated_text"]
    events = service.stream(TGI, parameters={"max_new_tokens": 6, "details": True})
    for event in events:
        parsed_answer(TGI, event, chunk=True)
    assert events[-1]["generated_text"] == whole
    assert [event["index"] for event in events] == [1, 2, 3, 4, 5, 6]


def tells_details(service: Service, path: str) -> None:
    assert answer(service, path, details=True)["details"]["generated_tokens"] == 6
    assert "details" not in answer(service, path, details=False)


def tells_the_whole(service: Service, path: str) -> None:
    assert text_of(service, path, return_full_text=True) == "Hello!" + text_of(service, path)


def generates_so_many(service: Service, path: str) -> None:
    for most in (1, 9):
        details = answer(service, path, max_new_tokens=most, details=True)["details"]
        assert (details["generated_tokens"], details["finish_reason"]) == (most, "length")


def ends_at_tgis_strings(service: Service, path: str) -> None:
    whole = text_of(service, path, max_new_tokens=30)
    stopped = {"max_new_tokens": 30, "stop": [whole[5:7]], "details": True}
    assert answer(service, path, **stopped)["details"]["finish_reason"] == "stop_sequence"


MOST = {"max_new_tokens": 30}
SAMPLING: dict[str, Taken | Harmless | Refused] = {
    "frequency_penalty": changing({"frequency_penalty": 2}),
    "logit_bias": changing({"logit_bias": {"40": 100}}),
    "model": Taken(is_the_model),
    "n": Taken(has_choices),
    "presence_penalty": changing({"presence_penalty": 2}),
    "seed": Taken(repeats_by_seed),
    "stop": Taken(ends_at_strings),
    "stream": Taken(streams),
    "stream_options": Taken(tells_of_usage),
    "temperature": changing({"temperature": 2.0}, {**LONG, "seed": 3}),
    "top_p": changing({"top_p": 0.01}, {**SAMPLED, "seed": 3}),
    "user": Harmless(["someone"]),
}
TABLE: dict[str, dict[str, Taken | Harmless | Refused]] = {
    CHAT: {
        **SAMPLING,
        "audio": Refused([{"format": "mp3", "voice": "alloy"}]),
        "function_call": Refused([{"name": "look"}], neutral=["none", "auto"]),
        "functions": Refused([[{"name": "look"}]], neutral=[[]]),
        "logprobs": Taken(scores_tokens),
        "max_completion_tokens": Taken(partial(limits, name="max_completion_tokens")),
        "max_tokens": Taken(partial(limits, name="max_tokens")),
        "messages": Taken(is_the_prompt),
        "metadata": Harmless([{}, {"purpose": "a test"}]),
        "modalities": Refused([["text", "audio"], ["audio"]], neutral=[["text"]]),
        "moderation": Refused([{"model": "omni-moderation-latest"}]),
        "parallel_tool_calls": Harmless([True, False]),
        "prediction": Harmless([{"type": "content", "content": "I say"}]),
        "prompt_cache_key": Harmless(["mine"]),
        "prompt_cache_options": Harmless([{"mode": "implicit", "ttl": "30m"}]),
        "prompt_cache_retention": Harmless(["in_memory", "24h"]),
        "reasoning_effort": Refused(["minimal", "low", "medium", "high"], neutral=["none"]),
        "response_format": Taken(follows_a_format),
        "safety_identifier": Harmless(["someone"]),
        "service_tier": Taken(names_the_tier),
        "store": Refused([True], neutral=[False]),
        "tool_choice": Refused(["required"], neutral=["none", "auto"]),
        "tools": Refused([[TOOL]], neutral=[[]]),
        "top_logprobs": Taken(scores_tokens),
        "verbosity": Refused(["low", "high"], neutral=["medium"]),
        "web_search_options": Refused([{}]),
    },
    TEXT: {
        **SAMPLING,
        "best_of": Refused([2], neutral=[1]),
        "echo": Taken(begins_with_the_prompt),
        "logprobs": Taken(scores_text),
        "max_tokens": Taken(partial(limits, name="max_tokens")),
        "prompt": Taken(is_the_prompt),
        "suffix": Refused(["the end"], neutral=[""]),
    },
    TGI: {
        "inputs": Taken(is_the_prompt),
        "parameters": Taken(lambda service, path: generates_so_many(service, PARAMETERS)),
        "stream": Taken(streams_tgis_way),
    },
    PARAMETERS: {
        "adapter_id": Refused(["mine"], neutral=[""]),
        "best_of": Refused([2], neutral=[1]),
        "decoder_input_details": Refused([True], neutral=[False]),
        "details": Taken(tells_details),
        "do_sample": changing({"do_sample": True}, {**MOST, "seed": 3}),
        "frequency_penalty": changing({"frequency_penalty": 2}, MOST),
        "grammar": Refused([]),
        "max_new_tokens": Taken(generates_so_many),
        "repetition_penalty": changing({"repetition_penalty": 5}, MOST),
        "return_full_text": Taken(tells_the_whole),
        "seed": Taken(repeats_by_seed),
        "stop": Taken(ends_at_tgis_strings),
        "temperature": changing({"temperature": 2.0}, {**MOST, "seed": 3}),
        "top_k": changing({"top_k": 1}, {**MOST, "seed": 3, "do_sample": True}),
        "top_n_tokens": Refused([2], neutral=[0]),
        "top_p": changing({"top_p": 0.01}, {**MOST, "seed": 3, "do_sample": True}),
        "truncate": Refused([5]),
        "typical_p": Refused([0.5], neutral=[1.0]),
        "watermark": Refused([True], neutral=[False]),
    },
}
FIELDS = [(path, name) for path in TABLE for name in request_fields(path)]


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_a_field_does_what_the_table_says(service: Service, path: str, name: str) -> None:
    assert name in TABLE[path], "the description has this field: decide what becomes of it"
    TABLE[path][name].hold(service, path, name)


def test_the_table_has_no_field_that_the_descriptions_have_not() -> None:
    assert set(FIELDS) == {(path, name) for path, table in TABLE.items() for name in table}


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_a_value_of_another_type_is_refused_by_name(service: Service, path: str, name: str) -> None:
    """And one of the right type is answered, or refused by the same name."""
    for value in KINDS:
        sent = {name: value}
        where = (TGI, {"parameters": sent}) if path == PARAMETERS else (path, sent)
        response = service.call(where[0], **where[1])
        if response.status_code == 200:
            assert allows(request_fields(path)[name], value), f"{name}: {value!r} is taken"
        else:
            status = 404 if (name, value) == ("model", "x") else 400
            assert blamed(path, refusal(service, path, status, **sent)) == name


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_null_is_the_same_as_nothing(service: Service, path: str, name: str) -> None:
    if name in ("messages", "model", "prompt", "inputs"):
        nothing: Json = {name: None}
        assert blamed(path, refusal(service, path, **nothing)) == name
    else:
        limit = {"max_tokens": 6} if path in OPENAI and name != "max_tokens" else {}
        assert text_of(service, path, **limit, **{name: None}).startswith(text_of(service, path))
