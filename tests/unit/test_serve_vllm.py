"""serve.vllm.requests: what vLLM is asked, and what its own recorded answers become."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from core.decode.sampling import SamplingSettings
from core.errors import StageError
from serve.generation import Event, Finished, Generation, Progressed, Rejected, Speculated
from serve.metrics import Registry
from serve.replica import Words
from serve.text import TextStream
from serve.vllm.requests import AnswerReader, body_of, chunks_of, refusal_of
from tests.vllm_recordings import VOCAB, recorded, streams, tokenizer


def body(settings: dict[str, Any] | None = None, **request: Any) -> dict[str, Any]:
    asked = Generation(((5, 6),), **request)
    sampling = SamplingSettings(**(settings or {}))
    return body_of([5, 6], asked, sampling, place=1, limit=7, ends=[2])


def test_every_setting_is_said() -> None:
    assert body() == {
        "model": "target",
        "prompt": [5, 6],
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": [],
        "stop_token_ids": [2],
    }


@pytest.mark.parametrize(
    ("settings", "request_", "said"),
    [
        ({}, {"seed": 41}, {"seed": 42}),
        ({}, {"seed": 2**63 - 1}, {"seed": -(2**63)}),
        ({}, {"stops": ("a", "b")}, {"stop": ["a", "b"]}),
        ({}, {"stop_token_ids": (9, 2)}, {"stop_token_ids": [2, 9]}),
        ({"logit_bias": {3: -100.0}}, {}, {"logit_bias": {"3": -100.0}}),
        ({"logprobs": 0}, {}, {"logprobs": 0, "return_tokens_as_token_ids": True}),
        (
            {},
            {"schema": '{"type": "object"}'},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": {"type": "object"}},
                }
            },
        ),
    ],
)
def test_what_is_said_where_it_is_given(
    settings: dict[str, Any], request_: dict[str, Any], said: dict[str, Any]
) -> None:
    assert body(settings, **request_) == {**body(), **said}


def events_of(name: str, *, choice: int = 0, **given: Any) -> list[Event]:
    """A recorded stream, as a replica reads it."""
    stream, words = streams(name)[choice], Words(tokenizer(), VOCAB)
    logprobs = stream["body"].get("logprobs")
    text = TextStream(tokenizer(), given.get("stops", tuple(stream["body"]["stop"])))
    reader = AnswerReader(
        choice, words, text, top=logprobs, speculates=given.get("speculates", True)
    )

    async def lines() -> AsyncIterator[str]:
        for line in stream["lines"]:
            yield line
            yield ""

    async def read() -> list[Event]:
        events: list[Event] = []
        async for chunk in chunks_of(lines()):
            if not reader.ended:
                events += reader.take(chunk)
        return [*events, *reader.finish()]

    return asyncio.run(read())


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Progressed))


def vllms_text(name: str, choice: int = 0) -> str:
    chunks = [json.loads(line[6:]) for line in streams(name)[choice]["lines"][:-1]]
    return "".join(one["text"] for chunk in chunks for one in chunk["choices"])


@pytest.mark.parametrize("name", ["greedy", "stop", "json"])
def test_the_text_is_vllms_own(name: str) -> None:
    events = events_of(name)
    assert text_of(events) == vllms_text(name) != ""
    assert isinstance(events[-1], Finished)


def test_an_answer_that_is_cut() -> None:
    events = events_of("greedy")
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.completion_tokens) == ("length", 12)
    assert sum(event.num_tokens for event in events if isinstance(event, Progressed)) == 12


def test_what_the_drafts_brought_is_told_and_no_more() -> None:
    events = events_of("greedy")
    (told,) = [event for event in events if isinstance(event, Speculated)]
    last = events[-1]
    assert isinstance(last, Finished) and last.accepted_length is not None
    kept = sum(told.accepted_per_place)
    assert 0 < kept < told.draft_tokens == 3 * told.drafts
    assert last.rounds == told.drafts
    assert last.accepted_length == pytest.approx(1 + kept / told.drafts)
    assert last.tree_size == 4.0
    for event in events:
        if isinstance(event, Progressed):
            assert (event.tree_size, event.num_guessed, event.seconds) == (None, None, None)
            assert all(guessed is None for _, guessed in event.spans)


def test_without_a_head_every_pass_gives_a_token() -> None:
    last = events_of("plain", speculates=False)[-1]
    assert isinstance(last, Finished)
    assert (last.rounds, last.accepted_length, last.tree_size) == (4, 1.0, 1.0)


def test_a_stop_string_ends_it() -> None:
    events = events_of("stop")
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "string"
    assert "answer" not in text_of(events)
    # vLLM tells nothing of the drafts then.
    assert last.accepted_length is last.rounds is last.tree_size is None
    assert not any(isinstance(event, Speculated) for event in events)


def test_a_stop_string_that_vllm_was_not_told_of_ends_it_too() -> None:
    whole = text_of(events_of("greedy"))
    events = events_of("greedy", stops=(whole[6:9],))
    assert text_of(events) == whole[:6]
    assert isinstance(events[-1], Finished) and events[-1].reason == "string"
    assert events[-1].completion_tokens < 12


def test_a_stop_token_is_its_last() -> None:
    events = events_of("stop_token")
    last = events[-1]
    assert isinstance(last, Finished) and last.reason == "token"
    ids = [token for event in events if isinstance(event, Progressed) for token in event.ids]
    assert ids[-1] == 30 and len(ids) == last.completion_tokens
    # vLLM's text ends before it; ours has it, as our own decoder's.
    assert text_of(events) == vllms_text("stop_token") + "."


def test_an_answer_that_ends_by_itself_follows_its_schema() -> None:
    events = events_of("json")
    assert isinstance(events[-1], Finished) and events[-1].reason == "token"
    assert list(json.loads(text_of(events))) == ["name"]


def test_logprobs() -> None:
    events = events_of("logprobs")
    tokens = [one for event in events if isinstance(event, Progressed) for one in event.tokens]
    assert len(tokens) == 4
    for token in tokens:
        assert [value for _, value in token.top] == sorted(
            (value for _, value in token.top), reverse=True
        )
        # Greedy: the chosen one is the likeliest.
        assert token.top[0] == (token.text, token.logprob) and len(token.top) == 2
    assert "".join(token.text for token in tokens) == text_of(events)


def test_logprobs_of_the_chosen_token_alone() -> None:
    events = events_of("no_top")
    tokens = [one for event in events if isinstance(event, Progressed) for one in event.tokens]
    assert [token.top for token in tokens] == [(), ()]
    assert all(token.logprob < 0 for token in tokens)


def test_a_refused_schema_names_its_field() -> None:
    (line, _) = streams("bad_schema")[0]["lines"]
    refused = refusal_of(json.loads(line.removeprefix("data: ")), "response_format")
    assert isinstance(refused, Rejected)
    assert (refused.status, refused.param) == (400, "response_format")
    assert "Invalid type: nonsense" in refused.message


def test_a_failure_is_no_refusal() -> None:
    chunk = {"error": {"message": "EngineCore encountered an issue", "param": None, "code": 500}}
    assert refusal_of(chunk) is None
    reader = AnswerReader(
        0, Words(tokenizer(), VOCAB), TextStream(tokenizer()), top=None, speculates=True
    )
    with pytest.raises(StageError, match="EngineCore encountered"):
        list(reader.take(chunk))


def test_a_stream_that_breaks_off() -> None:
    async def lines() -> AsyncIterator[str]:
        for line in streams("greedy")[0]["lines"][:3]:
            yield line

    async def read() -> None:
        async for _ in chunks_of(lines()):
            pass

    with pytest.raises(StageError, match="ended early"):
        asyncio.run(read())


def test_drafts_are_counted_as_the_decoders_own() -> None:
    told_of = events_of("greedy")

    async def watched() -> str:
        async def events() -> AsyncGenerator[Event, None]:
            for event in told_of:
                yield event

        registry = Registry()
        metrics = registry.of("m")
        async for _ in metrics.watched(events()):
            pass
        return registry.text().decode()

    (told,) = [event for event in told_of if isinstance(event, Speculated)]
    text = asyncio.run(watched())
    assert f'vllm:spec_decode_num_drafts_total{{model_name="m"}} {float(told.drafts)}' in text
    first = told.accepted_per_place[0]
    assert f'accepted_tokens_per_pos_total{{model_name="m",position="0"}} {float(first)}' in text


def test_the_recording_is_of_a_known_version() -> None:
    assert recorded()["vllm"].startswith("0.32")
