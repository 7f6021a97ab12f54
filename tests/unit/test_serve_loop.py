"""serve.loop: a real decoder on the tiny target, in a thread, and coroutines that come and go."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from core.config import DecodeConfig
from core.decode import engine
from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request
from core.decode.sampling import SamplingSettings
from core.errors import BusyError
from core.models.target import Target
from serve.loop import MOST_FAILURES, ClosingError, DecodingError, DecodingLoop, Turn, Visit

Text = tuple[int, ...]
PROMPTS = [(1, *range(40 + number, 52 + number)) for number in range(6)]
TIMEOUT_S = 60.0


@contextmanager
def looping(target: Target, **settings: Any) -> Iterator[DecodingLoop]:
    config = DecodeConfig(max_context=1000, **settings)
    loop = DecodingLoop(SpeculativeDecoder(target, None, config))
    yield loop
    loop.close()
    loop._thread.join(TIMEOUT_S)
    assert not loop._thread.is_alive(), "what was begun ends, and then the thread"


def endless(target: Target, prompt: Text, count: int = 900) -> Request:
    """Of many more tokens than a test waits for."""
    bias = dict.fromkeys(target.eos_token_ids, -math.inf)
    return Request(prompt, count, SamplingSettings(logit_bias=bias))


def solo(target: Target, requests: Sequence[Request]) -> list[Text]:
    decoder = SpeculativeDecoder(target, None, DecodeConfig(max_context=1000))
    return [
        tuple(token for event in decoder.stream(request) for token in event.round.tokens)
        for request in requests
    ]


async def texts(visit: Visit) -> list[Text]:
    found: list[list[int]] = [[] for _ in visit.turns]
    async for turn, event in visit.events():
        found[turn.place] += event.round.tokens
    return [tuple(tokens) for tokens in found]


def run(work: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), TIMEOUT_S))


def counted(loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rounds have begun."""
    step, rounds = loop.lane.decoder.step, [0]

    def count() -> Any:
        rounds[0] += 1
        return step()

    monkeypatch.setattr(loop.lane.decoder, "step", count)
    return rounds


def test_those_who_come_together_and_later_are_answered_as_if_alone(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [endless(tiny_target, prompt, 20) for prompt in PROMPTS]
    wanted = solo(tiny_target, requests)
    with looping(tiny_target, batch_size=4) as loop:
        rounds = counted(loop, monkeypatch)

        async def work() -> list[Text]:
            first = asyncio.create_task(texts(loop.join(requests[:2])))
            await asyncio.sleep(0)
            later = [asyncio.create_task(texts(loop.join([one]))) for one in requests[2:]]
            answers = await asyncio.gather(first, *later)
            return [text for found in answers for text in found]

        assert run(work) == wanted
    # Six answers of 20 rounds each: four places, then two.
    assert rounds[0] <= 3 * 20


def test_who_leaves_makes_room_within_a_round(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows for one alone: the second can only begin when those of the first are free."""
    with looping(tiny_target, cache_tokens=950) as loop:
        rounds = counted(loop, monkeypatch)

        async def work() -> tuple[int, Turn]:
            leaving = loop.join([endless(tiny_target, PROMPTS[0])])
            waiting = loop.join([endless(tiny_target, PROMPTS[1])])
            events = leaving.events()
            await anext(events)
            await anext(events)
            assert waiting.turns[0].started is None, "it waits"
            await events.aclose()
            begun = rounds[0]
            came = waiting.events()
            turn, _ = await anext(came)
            await came.aclose()
            return rounds[0] - begun, turn

        waited, turn = run(work)
        # The round that may be at work, and the one that begins with the waiting prompt.
        assert waited <= 2 + 1 and turn.started is not None
    assert not loop.lane.decoder.busy, "both were given up"


def test_a_cancelled_coroutine_gives_its_turn_up(tiny_target: Target) -> None:
    with looping(tiny_target, batch_size=1) as loop:
        requests = [endless(tiny_target, prompt, 5) for prompt in PROMPTS[:2]]

        async def work() -> list[Text]:
            visit = loop.join([endless(tiny_target, PROMPTS[3])])
            first = asyncio.create_task(texts(visit))
            while visit.turns[0].started is None:
                await asyncio.sleep(0.001)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            return await texts(loop.join(requests))

        assert run(work) == solo(tiny_target, requests)


def test_one_of_several_is_given_up_and_the_others_go_on(tiny_target: Target) -> None:
    requests = [endless(tiny_target, PROMPTS[0]), endless(tiny_target, PROMPTS[1], 8)]
    with looping(tiny_target) as loop:

        async def work() -> list[int]:
            visit, places = loop.join(requests), []
            async for turn, _ in visit.events():
                places.append(turn.place)
                if turn.place == 0:
                    turn.give_up()
            return places

        assert run(work) == [0] + [1] * 8


def test_a_full_queue_refuses_at_once_and_takes_all_or_none(tiny_target: Target) -> None:
    with looping(tiny_target, batch_size=1, max_waiting=1) as loop:

        async def work() -> list[Text]:
            first, second = (loop.join([endless(tiny_target, p)]) for p in PROMPTS[:2])
            with pytest.raises(BusyError, match=r"2 of at most 2 requests"):
                loop.join([endless(tiny_target, PROMPTS[2])])
            second.give_up()
            short = [endless(tiny_target, prompt, 3) for prompt in PROMPTS[3:5]]
            with pytest.raises(BusyError, match=r"2 more do not fit"):
                loop.join(short)
            first.give_up()
            return await texts(loop.join(short))

        assert [len(text) for text in run(work)] == [3, 3]


def test_a_failure_reaches_everyone_and_leaves_nothing_behind(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with looping(tiny_target, batch_size=2) as loop:
        request = endless(tiny_target, PROMPTS[0], 4)

        async def work() -> list[Text]:
            # Two at work, two that wait.
            visits = [loop.join([endless(tiny_target, prompt)]) for prompt in PROMPTS[:4]]
            while visits[1].turns[0].started is None:
                await asyncio.sleep(0.001)
            with monkeypatch.context() as broken:
                broken.setattr(engine, "target_pass", fail)
                told = await asyncio.gather(*map(texts, visits), return_exceptions=True)
                assert [type(one) for one in told] == [DecodingError] * 4
            return await texts(loop.join([request]))

        assert run(work) == solo(tiny_target, [request])
        assert loop.healthy and not loop.lane.decoder.busy


def test_a_decoder_that_always_fails_is_not_healthy(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine, "target_pass", fail)
    with looping(tiny_target) as loop:

        async def work() -> None:
            for _ in range(MOST_FAILURES):
                assert loop.healthy
                with pytest.raises(DecodingError):
                    await texts(loop.join([endless(tiny_target, PROMPTS[0])]))

        run(work)
        assert not loop.healthy


def test_a_round_that_hangs_is_told_to_those_who_wait(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    with looping(tiny_target) as loop:
        step = loop.lane.decoder.step

        def hang() -> Any:
            entered.set()
            assert go_on.wait(TIMEOUT_S)
            return step()

        monkeypatch.setattr(loop.lane.decoder, "step", hang)

        async def work() -> None:
            assert not loop.hangs(0), "no round runs"
            waiting = asyncio.create_task(texts(loop.join([endless(tiny_target, PROMPTS[0])])))
            while not entered.is_set():
                await asyncio.sleep(0.001)
            assert not loop.hangs(TIMEOUT_S), "it may take so long"
            assert not waiting.done()
            assert loop.hangs(0)
            with pytest.raises(DecodingError):
                await waiting
            with pytest.raises(ClosingError):
                loop.join([endless(tiny_target, PROMPTS[1])])
            go_on.set()

        run(work)
    assert not loop.hangs(0)


def test_what_was_begun_is_finished_before_the_end(tiny_target: Target) -> None:
    request = endless(tiny_target, PROMPTS[0], 30)
    with looping(tiny_target, batch_size=1) as loop:

        async def work() -> list[Text]:
            visit = loop.join([request, request])
            loop.close()
            with pytest.raises(ClosingError):
                loop.join([request])
            return await texts(visit)

        assert run(work) == solo(tiny_target, [request, request])
    assert not loop.healthy


def test_the_load_is_what_is_left_to_do(tiny_target: Target) -> None:
    async def work(loop: DecodingLoop) -> None:
        before = loop.load()
        assert (before.running, before.waiting, before.backlog_tokens) == (0, 0, 0)
        visit = loop.join([endless(tiny_target, prompt, 40) for prompt in PROMPTS[:3]])
        with pytest.raises(BusyError):
            loop.join([endless(tiny_target, PROMPTS[3])])
        seen = []
        async for _ in visit.events():
            seen.append(loop.load())
        # The thread goes on while the events are read, so the first ones may tell of later rounds.
        assert all(one.running + one.waiting <= 3 and one.refused == 1 for one in seen)
        assert 0 < seen[0].backlog_tokens < 120
        lefts = [one.backlog_tokens for one in seen]
        assert lefts == sorted(lefts, reverse=True)
        after = loop.load()
        assert (after.running, after.waiting, after.backlog_tokens) == (0, 0, 0)
        assert after.tokens == 120 and after.tokens_per_second > 0

    with looping(tiny_target, batch_size=2, max_waiting=1) as loop:
        run(lambda: work(loop))
