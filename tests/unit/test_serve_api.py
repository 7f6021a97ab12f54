"""The HTTP interface, field by field and error by error, in front of a real decoder replica.

No Ray: the replica is in this process, and the application is called without a socket.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from core.decode import engine
from serve.generation import Conversation, Generation
from tests.in_process import CHAT, HELLO, TEXT, TGI, Json, Service, in_process


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_process(tmp_path_factory.mktemp("api")) as service:
        yield service


def text_of(path: str, choice: Json) -> str:
    if path == TEXT:
        return choice["text"]
    return choice["message" if "message" in choice else "delta"].get("content", "")


def streamed(path: str, chunks: list[Json], place: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(text_of(path, one) for one in choices if one["index"] == place)


# --- Fields --------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.8, "seed": 4},
        {"temperature": 1, "top_p": 0.9, "seed": 4},
        {"temperature": 1, "top_k": 3, "seed": 4},
        {"temperature": 1, "min_p": 0.2, "seed": 4},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.3},
        {"logit_bias": {"40": 100}},
        {"stop": ["\n\n\n", "zzz"]},
        {"stop_token_ids": [77]},
        {"user": "someone"},
        {"stream_options": {"include_usage": True}, "stream": True},
    ],
)
def test_fields_are_taken_and_a_stream_says_the_same(
    service: Service, path: str, fields: Json
) -> None:
    chunks = service.stream(path, **fields)
    fields = {name: value for name, value in fields.items() if not name.startswith("stream")}
    body = service.answer(path, **fields)
    choice = body["choices"][0]
    assert streamed(path, chunks) == text_of(path, choice)
    reasons = [one["finish_reason"] for chunk in chunks for one in chunk["choices"]]
    assert [reason for reason in reasons if reason] == [choice["finish_reason"]]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if not chunks[-1]["choices"]:
        assert chunks[-1]["usage"] == usage


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"40": 100}},
        {"presence_penalty": 2, "frequency_penalty": 2},
        {"repetition_penalty": 5},
        {"temperature": 2, "seed": 1},
    ],
)
def test_fields_that_matter_change_the_text(service: Service, path: str, fields: Json) -> None:
    settings = {"max_tokens": 40}
    plain, changed = (service.answer(path, **settings, **more) for more in ({}, fields))
    assert text_of(path, plain["choices"][0]) != text_of(path, changed["choices"][0])


def test_a_bias_of_100_is_a_decision(service: Service) -> None:
    letter = service.answer("/detokenize", tokens=[40])["prompt"]
    choice = service.answer(TEXT, logit_bias={"40": 100})["choices"][0]
    assert choice["text"] == letter * 6


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_each_choice_has_the_next_seed(service: Service, path: str) -> None:
    sampled = {"temperature": 1.0, "max_tokens": 12}
    alone = [service.answer(path, seed=seed, **sampled)["choices"][0] for seed in (7, 8, 9)]
    body = service.answer(path, seed=7, n=3, **sampled)
    texts = [text_of(path, choice) for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert texts == [text_of(path, choice) for choice in alone] and len(set(texts)) == 3
    assert body["usage"]["completion_tokens"] == 36
    chunks = service.stream(path, seed=7, n=3, **sampled)
    assert [streamed(path, chunks, place) for place in range(3)] == texts


@pytest.mark.parametrize("prompts", [["Hello!", "Something else."], [[40, 41], [50, 51, 52]]])
def test_several_prompts_are_answered_as_each_alone(service: Service, prompts: Json) -> None:
    sampled = {"temperature": 1.0, "seed": 7, "n": 2}
    alone = [service.answer(TEXT, prompt=prompt, **sampled) for prompt in prompts]
    wanted = [choice["text"] for body in alone for choice in body["choices"]]
    body = service.answer(TEXT, prompt=prompts, **sampled)
    assert [choice["text"] for choice in body["choices"]] == wanted
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    used = [one["usage"]["prompt_tokens"] for one in alone]
    assert body["usage"]["prompt_tokens"] == sum(used)
    chunks = service.stream(TEXT, prompt=prompts, **sampled)
    assert [streamed(TEXT, chunks, place) for place in range(4)] == wanted


@pytest.mark.parametrize("prompt", ["Hello!", [40, 41, 42]])
def test_an_echo_begins_with_the_prompt(service: Service, prompt: Any) -> None:
    plain = service.answer(TEXT, prompt=prompt)["choices"][0]["text"]
    text = prompt if isinstance(prompt, str) else service.answer("/detokenize", tokens=prompt)
    before = text if isinstance(text, str) else text["prompt"]
    choice = service.answer(TEXT, prompt=prompt, echo=True)["choices"][0]
    assert choice["text"] == before + plain
    assert streamed(TEXT, service.stream(TEXT, prompt=prompt, echo=True)) == before + plain
    response = service.call(TEXT, echo=True, logprobs=1)
    assert (
        response.status_code == 400 and "echo goes without" in response.json()["error"]["message"]
    )


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_extension_tells_where_the_time_goes(service: Service, path: str) -> None:
    asked = {"aerie": {"spans": True}, "max_tokens": 12}
    chunks = service.stream(path, **asked)
    told = [one["choices"][0].get("aerie", {}) for one in chunks]
    parts = [one["seconds"] for one in told if one]
    figures = chunks[-1]["aerie"]
    assert figures["seconds"].keys() == {"prefill", "draft", "verify"}
    assert figures["seconds"]["prefill"] > 0 and figures["seconds"]["verify"] > 0
    for phase, seconds in figures["seconds"].items():
        assert sum(part[phase] for part in parts) == pytest.approx(seconds, abs=1e-3)
    assert figures["tree_size"] == 1, "this service has no draft head"
    assert service.answer(path, **asked)["aerie"].keys() == figures.keys()


def test_stop_strings_and_tokens(service: Service) -> None:
    text = service.answer(TEXT, max_tokens=40)["choices"][0]["text"]
    choice = service.answer(TEXT, max_tokens=40, stop=text[5:7])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(text[5:7])], "stop")
    details = service.answer(TGI, parameters={"max_new_tokens": 40, "details": True})["details"]
    tokens = [token["id"] for token in details["tokens"]]
    choice = service.answer(TEXT, max_tokens=40, stop_token_ids=[tokens[5]])["choices"][0]
    first = tokens.index(tokens[5]) + 1
    assert choice["text"] == service.answer("/detokenize", tokens=tokens[:first])["prompt"]
    assert choice["finish_reason"] == "stop"


def test_logprobs_of_a_chat(service: Service) -> None:
    body = service.answer(CHAT, logprobs=True, top_logprobs=3)
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == body["usage"]["completion_tokens"] == 6
    for token in content:
        assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 3
        # Greedy: what was said is the likeliest.
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]
        assert bytes(token["bytes"]).decode() == token["token"]
    chunks = service.stream(CHAT, logprobs=True, top_logprobs=3)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [token for part in parts if part for token in part["content"]] == content
    (first, *_) = service.answer(CHAT, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert first["top_logprobs"] == [] and first["logprob"] == content[0]["logprob"]


def test_logprobs_of_a_completion(service: Service) -> None:
    choice = service.answer(TEXT, logprobs=2)["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 6
    # Tokens that are half a character look the same, and share a place.
    assert all(1 <= len(one) <= 2 for one in found["top_logprobs"])
    assert found["text_offset"][:2] == [0, len(found["tokens"][0])]
    chunks = service.stream(TEXT, logprobs=2)
    parts = [chunk["choices"][0]["logprobs"] or {"text_offset": []} for chunk in chunks]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    assert offsets == found["text_offset"]


def test_the_extension_only_where_asked_for(service: Service) -> None:
    body = service.answer(CHAT, n=2, aerie={"spans": True})
    for choice in body["choices"]:
        shown = "".join(text for text, _ in choice["aerie"]["spans"])
        assert shown == text_of(CHAT, choice)
        assert choice["aerie"]["figures"]["accepted_length"] == 1.0
    assert "aerie" not in service.call(CHAT).text


def test_a_prompt_as_tokens_and_in_a_list(service: Service) -> None:
    tokens = service.answer("/tokenize")["tokens"]
    wanted = service.answer(TEXT)["choices"]
    for prompt in (tokens, [tokens], ["Hello!"]):
        assert service.answer(TEXT, prompt=prompt)["choices"] == wanted


# --- TGI, tokens, the rest -----------------------------------------------------


def test_tgi(service: Service) -> None:
    wanted = service.answer(TEXT)["choices"][0]["text"]
    assert service.answer(TGI) == {"generated_text": wanted}
    parameters = {"max_new_tokens": 6, "details": True, "return_full_text": True}
    body = service.answer(TGI, parameters=parameters)
    assert body["generated_text"] == "Hello!" + wanted
    details = body["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 6)
    assert all(token["logprob"] <= 0 for token in details["tokens"])

    events = service.stream("/generate_stream")
    assert [event["index"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event["token"]["id"] for event in events] == [t["id"] for t in details["tokens"]]
    assert [event["generated_text"] for event in events] == [None] * 5 + [wanted]


def test_tgi_says_why_it_ended(service: Service) -> None:
    text = service.answer(TEXT, max_tokens=40)["choices"][0]["text"]
    parameters = {"max_new_tokens": 40, "details": True, "stop": [text[5:7]]}
    body = service.answer(TGI, parameters=parameters)
    assert body["details"]["finish_reason"] == "stop_sequence"
    sampled = {"do_sample": True, "seed": 3, "max_new_tokens": 12}
    found = [service.answer(TGI, parameters=sampled) for _ in range(2)]
    assert found[0] == found[1] != service.answer(TGI, parameters={"max_new_tokens": 12})


def test_tokens_there_and_back(service: Service) -> None:
    body = service.answer("/tokenize", prompt="Grüße, 你好!")
    assert body["count"] == len(body["tokens"]) and body["max_model_len"] == 399
    assert service.answer("/detokenize", tokens=body["tokens"])["prompt"] == "Grüße, 你好!"
    messages = HELLO[CHAT]["messages"]
    chat = service.answer("/tokenize", prompt=None, messages=messages)
    assert chat["count"] == service.answer(CHAT)["usage"]["prompt_tokens"]


# --- Errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "param", "fields"),
    [
        *((path, "model", {"model": None}) for path in (CHAT, TEXT)),
        *((path, "temperature", {"temperature": 3}) for path in (CHAT, TEXT)),
        *((path, "n", {"n": 17}) for path in (CHAT, TEXT)),
        *((path, "max_tokens", {"max_tokens": 0}) for path in (CHAT, TEXT)),
        *((path, "stop", {"stop": [""]}) for path in (CHAT, TEXT)),
        *((path, "aerie.tree", {"aerie": {"tree": 1}}) for path in (CHAT, TEXT)),
        *((path, "aerie.speculate", {"aerie": {"speculate": 0}}) for path in (CHAT, TEXT)),
        (CHAT, "aerie.trees", {"aerie": {"trees": True}}),
        (CHAT, "messages", {"messages": []}),
        (CHAT, "tools", {"tools": [{"type": "function"}]}),
        (CHAT, "response_format.type", {"response_format": {"type": "xml"}}),
        (
            CHAT,
            "response_format",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nothing"}},
                }
            },
        ),
        (CHAT, "logprobs", {"logprobs": 2}),
        (TEXT, "logprobs", {"logprobs": 6}),
        (TEXT, "prompt", {"prompt": None}),
        (TEXT, "prompt", {"prompt": []}),
        (TEXT, "prompt", {"prompt": ["a", ""]}),
        (TEXT, "prompt", {"prompt": ["a"] * 65}),
        (TEXT, "prompt", {"prompt": ["a"] * 30, "n": 3}),
        (TEXT, "prompt", {"prompt": ""}),
        (TEXT, "prompt", {"prompt": [99999]}),
        (TEXT, "best_of", {"best_of": 2}),
        (TEXT, "echo", {"echo": 1}),
        (TEXT, "suffix", {"suffix": "."}),
        (TGI, "inputs", {"inputs": 5}),
        (TGI, "parameters.max_new_tokens", {"parameters": {"max_new_tokens": 0}}),
        (TGI, "parameters.grammar", {"parameters": {"grammar": {"type": "json"}}}),
        (TGI, "parameters.watermark", {"parameters": {"watermark": True}}),
        ("/tokenize", "unknown", {"unknown": 1}),
        ("/tokenize", "prompt", {"prompt": 5}),
        ("/detokenize", "tokens", {"tokens": [99999]}),
    ],
)
def test_a_wrong_field_is_named(service: Service, path: str, param: str, fields: Json) -> None:
    response = service.call(path, **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] is not None and error["param"].split(".list")[0] == param


@pytest.mark.parametrize(
    ("status", "method", "path", "content"),
    [
        (400, "POST", CHAT, b"{"),
        (400, "POST", TEXT, b"[" * 10_000),
        (400, "POST", TGI, b'["a list"]'),
        (400, "POST", TGI, json.dumps(HELLO[TGI]).encode("utf-16")),
        (400, "POST", TGI, b'\xef\xbb\xbf{"inputs": "Hello!"}'),
        (
            400,
            "POST",
            CHAT,
            json.dumps({**HELLO[CHAT], "prompt_cache_options": {"a": math.nan}}).encode(),
        ),
        (404, "GET", "/v1/nothing", b""),
        (404, "GET", "/v1/models/gpt", b""),
        (405, "GET", CHAT, b""),
    ],
)
def test_errors_have_the_shape_of_openai(
    service: Service, status: int, method: str, path: str, content: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    response = service.run(service.client.request(method, path, content=content, headers=headers))
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_another_model_is_not_found(service: Service, path: str) -> None:
    response = service.call(path, model="gpt")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_what_does_not_fit_names_both_lengths(service: Service) -> None:
    for path, fields in (
        (CHAT, {"messages": [{"role": "user", "content": "x" * 500}]}),
        (TEXT, {"prompt": "x" * 500}),
        (TGI, {"inputs": "x" * 500}),
    ):
        response = service.call(path, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "399" in error["message"] and " 5" in error["message"]


def test_a_full_queue_is_a_429(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.replica._loop, "most", 1)

    async def two() -> httpx.Response:
        prompt = Conversation((("user", "Hello!"),))
        first = service.replica.generate(Generation((prompt,), max_new_tokens=300))
        async with aclosing(first) as events:
            await anext(events)
            return await service.client.post(CHAT, json=HELLO[CHAT])

    response = service.run(two())
    error = response.json()["error"]
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")


def test_a_failure_is_a_500_or_the_streams_last_event(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "target_pass", fail)
        whole = service.call(CHAT)
        stream = service.call(CHAT, stream=True)
    assert whole.status_code == 500 and whole.json()["error"]["type"] == "server_error"
    last = stream.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert service.call(CHAT).status_code == 200


@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_follows_a_schema(service: Service, n: int) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}, "grade": {"enum": ["good", "bad"]}},
        "required": ["yes", "grade"],
        "additionalProperties": False,
    }
    fields = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "max_tokens": 200, "n": n, "temperature": 1.0, "seed": 5,
    }  # fmt: skip
    whole = service.answer(CHAT, **fields)["choices"]
    for choice in whole:
        assert choice["finish_reason"] == "stop"
        assert json.loads(choice["message"]["content"]).keys() == {"yes", "grade"}
    texts = [""] * n
    for chunk in service.stream(CHAT, **fields):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [choice["message"]["content"] for choice in whole]
