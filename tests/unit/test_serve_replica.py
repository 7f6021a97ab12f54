"""serve.replica in this process, with a real decoder on the tiny target."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import Config
from core.data.conversations import Message
from core.data.template import encode_prompt
from core.decode import engine
from core.models.tiny import save_tiny_target
from serve.generation import (
    Accepted,
    Conversation,
    Failed,
    Finished,
    Generation,
    Progressed,
    Rejected,
)
from serve.loop import DecodingError
from serve.replica import DecoderReplica

TIMEOUT_S = 60.0
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One event loop for all, as a replica has."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecoderReplica]:
    """Without a draft head: what is tested here is what surrounds the decoder."""
    model = tmp_path_factory.mktemp("replica") / "target"
    save_tiny_target(model)
    threads = torch.get_num_threads()
    yield DecoderReplica(
        Config().replace(
            target={"path": str(model), "dtype": "float32"},
            decode={"max_context": 400},
            serve={"cpus_per_replica": 1, "max_new_tokens": 5},
        )
    )
    torch.set_num_threads(threads)


def asked(prompt: str, **settings: Any) -> Generation:
    return Generation((Conversation((("user", prompt),)),), **settings)


async def events_of(replica: DecoderReplica, request: Generation) -> list[Any]:
    return [event async for event in replica.generate(request)]


def text_of(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, Progressed))


def decoded(replica: DecoderReplica, prompt: str, max_new_tokens: int) -> tuple[list[int], str]:
    tokenizer = replica._tokenizer
    prompt_ids = encode_prompt(tokenizer, [Message("user", prompt)])
    rounds = replica._loop.lane.decoder.generate(prompt_ids, max_new_tokens=max_new_tokens)
    tokens = [token for one in rounds for token in one.tokens]
    return tokens, str(tokenizer.decode(tokens, skip_special_tokens=True))


def test_an_answer_that_ends_by_itself(replica: DecoderReplica, run: Run) -> None:
    prompt = "Tell me a story"
    tokens, text = decoded(replica, prompt, 300)
    assert tokens[-1] in replica._target.eos_token_ids, "another prompt is needed"
    events = run(events_of(replica, asked(prompt, max_new_tokens=300)))
    assert isinstance(events[0], Accepted)
    assert text_of(events) == text
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "token"
    assert events[-1].completion_tokens == len(tokens)


def test_an_answer_that_is_cut(replica: DecoderReplica, run: Run) -> None:
    events = run(events_of(replica, asked("Hello!")))
    assert text_of(events) == decoded(replica, "Hello!", 5)[1]
    assert events[-1].reason == "length"
    assert events[-1].completion_tokens == 5
    # The prompt's pass gives one token of the five; without a head, each round gives one.
    assert events[-1].rounds == 4
    assert events[-1].accepted_length == 1.0


def test_the_context_is_used_to_its_last_token_and_no_further(
    replica: DecoderReplica, run: Run
) -> None:
    (accepted, *_) = run(events_of(replica, asked("Hello!")))
    room = 400 - 1 - accepted.prompt_tokens
    events = run(events_of(replica, asked("Hello!", max_new_tokens=room)))
    assert isinstance(events[-1], Finished)
    (rejected,) = run(events_of(replica, asked("Hello!", max_new_tokens=room + 1)))
    assert isinstance(rejected, Rejected)
    assert rejected.code == "context_length_exceeded"


def test_an_answer_without_a_limit_fills_what_room_there_is(
    replica: DecoderReplica, run: Run
) -> None:
    (accepted, *_) = run(events_of(replica, asked("x")))
    long_prompt = "x" * (400 - 1 - accepted.prompt_tokens + 1 - 2)
    events = run(events_of(replica, asked(long_prompt)))
    assert events[-1].completion_tokens == 2


async def take(events: AsyncIterator[Any], count: int) -> list[Any]:
    return [await anext(events) for _ in range(count)]


def test_the_others_go_on_while_a_prompt_is_read(
    replica: DecoderReplica, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    grammars = replica._reader._grammars
    assert grammars is not None
    compiled = grammars._compiled

    def slow(schema: str) -> Any:
        entered.set()
        assert go_on.wait(TIMEOUT_S)
        return compiled(schema)

    monkeypatch.setattr(grammars, "_compiled", slow)

    async def work() -> tuple[list[Any], list[Any]]:
        reading = asyncio.create_task(events_of(replica, asked("a", schema='{"enum": [1]}')))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        other = await events_of(replica, asked("Hello!"))
        assert not reading.done()
        go_on.set()
        return other, await reading

    other, read = run(work())
    assert text_of(other) == decoded(replica, "Hello!", 5)[1]
    assert text_of(read) == "1"


def test_a_prompt_that_is_far_too_long_is_not_even_tokenized(
    replica: DecoderReplica, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, read = replica._tokenizer, []

    def reading(text: str, **settings: Any) -> Any:
        read.append(text)
        return tokenizer(text, **settings)

    monkeypatch.setattr(replica._words, "_tokenizer", Spied(tokenizer, reading))
    most = replica._words._most_bytes
    assert most is not None
    (rejected,) = run(events_of(replica, asked("x" * (401 * most))))
    assert rejected.code == "context_length_exceeded" and "or more" in rejected.message
    assert not any(len(text) > 400 * most for text in read)
    (rejected,) = run(events_of(replica, asked("x" * 401)))
    assert rejected.code == "context_length_exceeded" and "or more" not in rejected.message
    # Who only wants to know how long it is, is told.
    ids = run(replica.tokenize("x" * 401 * most, "prompt")).ids
    assert len(ids) == 401 * most


class Spied:
    """A tokenizer whose calls are watched."""

    def __init__(self, tokenizer: Any, call: Callable[..., Any]) -> None:
        self._tokenizer, self._call = tokenizer, call

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self._call(*args, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_closing_an_answer_stops_the_decoder(replica: DecoderReplica, run: Run) -> None:
    async def give_up() -> list[Any]:
        async with aclosing(replica.generate(asked("Hello!", max_new_tokens=300))) as events:
            await take(events, 4)
        return await events_of(replica, asked("Hello!"))

    assert text_of(run(give_up())) == decoded(replica, "Hello!", 5)[1]


def test_answers_are_given_together(replica: DecoderReplica, run: Run) -> None:
    async def ask_all() -> list[list[Any]]:
        return await asyncio.gather(*(events_of(replica, asked(p)) for p in ("a", "b", "a", "c")))

    answers = [text_of(events) for events in run(ask_all())]
    assert answers == [decoded(replica, prompt, 5)[1] for prompt in ("a", "b", "a", "c")]


def test_a_full_queue_is_said_at_once(
    replica: DecoderReplica, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica._loop, "most", 1)

    async def ask_two() -> tuple[list[Any], list[Any]]:
        async with aclosing(replica.generate(asked("Hello!", max_new_tokens=300))) as events:
            await take(events, 2)
            refused = await events_of(replica, asked("Hello!"))
        return refused, await events_of(replica, asked("Hello!"))

    (refused,), answered = run(ask_two())
    assert (refused.status, refused.code, refused.retry_after_s) == (429, "queue_full", 1)
    assert isinstance(answered[-1], Finished), "and there is room when the first has left"


def test_a_failure_is_an_event(
    replica: DecoderReplica, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "target_pass", fail)
        events = run(events_of(replica, asked("Hello!")))
    assert [type(event) for event in events] == [Accepted, Failed]
    assert text_of(run(events_of(replica, asked("Hello!")))) == decoded(replica, "Hello!", 5)[1]


def test_a_stop_string_ends_the_decoding(replica: DecoderReplica, run: Run) -> None:
    _, text = decoded(replica, "Hello!", 60)
    stop = text[10:12]
    events = run(events_of(replica, asked("Hello!", max_new_tokens=60, stops=(stop,))))
    assert text_of(events) == text[: text.index(stop)]
    assert events[-1].reason == "string"
    assert events[-1].completion_tokens < 60


def test_a_template_that_refuses_is_the_clients_error(
    replica: DecoderReplica, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = "{{ raise_exception('only one message, please') }}"
    monkeypatch.setattr(replica._tokenizer, "chat_template", refusing)
    (rejected,) = run(events_of(replica, asked("Hello!")))
    assert isinstance(rejected, Rejected)
    assert "only one message, please" in rejected.message


def test_a_replica_whose_round_hangs_is_not_healthy(
    replica: DecoderReplica,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(replica.check_health())
    asked_for = []

    def hangs(most_s: float) -> bool:
        asked_for.append(most_s)
        return True

    monkeypatch.setattr(replica._loop, "hangs", hangs)
    with pytest.raises(DecodingError, match=r"serve\.max_round_s=300"):
        run(replica.check_health())
    assert asked_for == [300.0]


def test_a_failure_names_the_request_in_the_log(
    replica: DecoderReplica,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    logger = logging.getLogger("ray.serve")
    # Once Ray Serve is imported, its logger hands nothing on to the root's handlers.
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(engine, "target_pass", fail)
    run(events_of(replica, asked("Hello!", name="trace-6")))
    logger.removeHandler(caplog.handler)
    assert any("trace-6" in record.getMessage() for record in caplog.records)


def test_a_replica_with_a_broken_config_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        DecoderReplica(Config().replace(target={"path": str(tmp_path)}))
