"""serve.openai_chat: what is accepted, what is refused and how it is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from serve.answers import server_sent
from serve.errors import ApiError, validation_error
from serve.generation import Conversation, Finished, Generation, Progressed
from serve.openai_chat import ChatAnswer, ChatRequest

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


NO_TIME = {"prefill": 0.0, "draft": 0.0, "verify": 0.0}


def refusal(**fields: Any) -> ApiError:
    """The error that a request with these fields gets."""
    try:
        request = ChatRequest.model_validate({**HELLO, **fields})
    except ApiError as error:
        return error
    except ValidationError as error:
        return validation_error(error.errors())
    raise AssertionError(f"accepted: {request}")


def generation(**fields: Any) -> Generation:
    return ChatRequest.model_validate({**HELLO, **fields}).generation()


def test_what_is_not_given_is_left_to_the_server() -> None:
    request = generation(temperature=None, stop=None, stream=None)
    assert request.prompts == (Conversation((("user", "hi"),)),)
    assert (request.sampling, request.seed, request.choices) == ({}, None, 1)
    assert (request.max_new_tokens, request.stops) == (None, ())
    assert (request.speculate, request.trees) == (True, False)


def test_what_is_given_reaches_the_decoder() -> None:
    settings = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5,
    }  # fmt: skip
    request = generation(
        **settings,
        logit_bias={"7": -100},
        logprobs=True,
        n=3,
        seed=-3,
        stop="x",
        stop_token_ids=[5],
        max_tokens=9,
        max_completion_tokens=5,
        aerie={"tree": True, "speculate": False},
    )
    assert (request.speculate, request.trees) == (False, True)
    assert request.sampling == {**settings, "logit_bias": {7: -100.0}, "logprobs": 0}
    assert (request.choices, request.seed, request.max_new_tokens) == (3, -3, 5)
    assert (request.stops, request.stop_token_ids) == (("x",), (5,))
    assert generation(top_k=-1).sampling == {"top_k": 0}, "all tokens, as vLLM says it"


def test_contents_of_parts_and_the_newer_system_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        # As the OpenAI client dumps a message that it got.
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
    ]
    expected = (("system", "be brief"), ("user", "ab"), ("assistant", "c"))
    (prompt,) = generation(messages=messages).prompts
    assert isinstance(prompt, Conversation) and prompt.messages == expected


def test_harmless_fields_are_accepted() -> None:
    harmless = {
        "user": "someone", "metadata": {"a": "b"}, "store": False, "n": 1, "logit_bias": {},
        "logprobs": False, "top_logprobs": 0, "presence_penalty": None, "tools": None,
        "response_format": {"type": "text"},
    }  # fmt: skip
    assert generation(**harmless) == generation()


def test_what_would_change_the_output_is_refused_by_name() -> None:
    error = refusal(tools=[{"type": "function"}])
    assert error.status == 400
    assert error.param == "tools"
    assert error.message.startswith("tools is supported here only as")


def test_a_format_of_the_answer_is_a_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert generation(response_format={"type": "text"}).schema is None
    assert generation(response_format={"type": "json_object"}).schema == '{"type": "object"}'
    assert json.loads(generation(response_format=named).schema or "") == schema


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"schema": "no object"}},
        {"type": "json_schema", "json_schema": {"schema": {}, "unknown": 1}},
        {"type": "json_object", "unknown": 1},
    ],
)
def test_a_format_that_is_none_is_refused(value: Any) -> None:
    error = refusal(response_format=value)
    assert error.status == 400 and (error.param or "").startswith("response_format")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("temperature", {"temperature": 2.5}),
        ("temperature", {"temperature": "0"}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 0}),
        ("seed", {"seed": 2**63}),
        ("max_tokens", {"max_tokens": 0}),
        ("stream", {"stream": "yes"}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": ["a"] * 17}),
        ("messages", {"messages": []}),
        ("messages.0.role", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages.0.content", {"messages": [{"role": "user"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": 5}]}),
        (
            "messages.0.content",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        ),
        ("messages.0.mood", {"messages": [{"role": "user", "content": "x", "mood": "Bo"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("model", {"model": None}),
        ("top_k", {"top_k": -2}),
        ("min_p", {"min_p": 1.1}),
        ("n", {"n": 0}),
        ("n", {"n": 17}),
        ("presence_penalty", {"presence_penalty": 2.1}),
        ("frequency_penalty", {"frequency_penalty": -2.1}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("logit_bias", {"logit_bias": {"word": 1}}),
        ("logit_bias.5", {"logit_bias": {"5": 101}}),
        ("stop_token_ids.0", {"stop_token_ids": [-1]}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top-k", {"top-k": 5}),
        ("aerie.colour", {"aerie": {"colour": True}}),
    ],
)
def test_wrong_values_are_refused_by_name(param: str, fields: dict[str, Any]) -> None:
    error = refusal(**fields)
    assert error.status == 400
    assert error.param == param
    assert param.rpartition(".")[2] in error.message


def test_stream_options_need_a_stream() -> None:
    assert "stream: true" in refusal(stream_options={"include_usage": True}).message


def test_an_error_can_be_sent_whatever_was_in_the_request() -> None:
    lone_surrogate = {"a\ud800": 1}
    for error in (refusal(**lone_surrogate), refusal(metadata=1, aerie=lone_surrogate)):
        assert error.status == 400
        assert b"message" in json.dumps(error.body(), ensure_ascii=False).encode()


def test_errors_have_the_shape_of_openai() -> None:
    body = ApiError(404, "no such model", param="model", code="model_not_found").body()
    assert body == {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


ROUNDS = [
    Progressed(0, (("a", False),), (1,), 1),
    Progressed(0, (), (2,), 8),
    Progressed(0, (("é", True),), (3,), 8),
]
FINISHED = Finished(0, "length", 3, rounds=3, accepted_length=1.0, tokens_per_second=10.0)


def answer(**settings: Any) -> ChatAnswer:
    answer = ChatRequest.model_validate({**HELLO, **settings}).answer("m")
    answer.prompt_tokens = 7
    return answer


def test_a_whole_answer() -> None:
    body = answer().whole(ROUNDS, [FINISHED])
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == "aé"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert "aerie" not in body
    assert "aerie" not in body["choices"][0]


SPANS = {"aerie": {"spans": True}}


def test_spans_and_figures_only_where_asked_for() -> None:
    body = answer(**SPANS).whole(ROUNDS, [FINISHED])
    assert body["choices"][0]["aerie"] == {"spans": [("a", False), ("é", True)]}
    assert body["aerie"] == {
        "accepted_length": 1.0,
        "tokens_per_second": 10.0,
        "rounds": 3,
        "tree_size": 1.0,
        "seconds": NO_TIME,
    }


def test_chunks_without_text_are_left_out_unless_spans_are_wanted() -> None:
    assert [len(answer().part(each)) for each in ROUNDS] == [1, 0, 1]
    (silent,) = answer(**SPANS).part(ROUNDS[1])
    assert isinstance(silent, dict)
    told = {"spans": (), "tokens": 1, "tree_size": 8, "seconds": NO_TIME}
    assert silent["choices"][0]["aerie"] == told


def test_usage_comes_in_a_chunk_without_choices() -> None:
    streamed = answer(stream=True, stream_options={"include_usage": True})
    (last,), (usage, done) = streamed.ended(FINISHED), streamed.closing()
    assert isinstance(last, dict) and isinstance(usage, dict)
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["usage"] is None
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 10
    assert done == "[DONE]" and answer().closing() == ["[DONE]"]


def test_events_of_a_stream() -> None:
    assert server_sent("[DONE]") == "data: [DONE]\n\n"
    assert server_sent({"text": "é\n\n"}) == 'data: {"text": "é\\n\\n"}\n\n'
