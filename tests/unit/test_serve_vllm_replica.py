"""serve.vllm.replica in front of a child process that repeats what vLLM was recorded to say."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.config import Config
from core.errors import StageError
from serve.generation import Accepted, Failed, Finished, Generation, Progressed, Rejected
from serve.vllm.replica import VllmReplica
from serve.vllm.server import ServerEndedError
from tests.engines.record_vllm import PLAIN
from tests.vllm_recordings import recorded, stand_in_config
from tests.vllm_stand_in import DIES, HANGS

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return stand_in_config(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def replica(config: Config) -> Iterator[VllmReplica]:
    replica = VllmReplica(config)
    yield replica
    replica.close()


def asked(**settings: Any) -> Generation:
    return Generation((tuple(recorded()["prompt_ids"]),), prompt_field="prompt", **settings)


async def events_of(replica: VllmReplica, request: Generation) -> list[Any]:
    return [event async for event in replica.generate(request)]


def text_of(events: list[Any], choice: int = 0) -> str:
    told = [one for one in events if isinstance(one, Progressed) and one.choice == choice]
    return "".join(one.text for one in told)


def test_an_answer(replica: VllmReplica, run: Run) -> None:
    first, *events, last = run(events_of(replica, asked(**PLAIN["plain"])))
    assert first == Accepted(5)
    assert text_of(events).startswith(" Paris")
    assert isinstance(last, Finished)
    assert (last.reason, last.completion_tokens, last.seconds) == ("length", 5, None)


def test_who_wants_trees_is_answered_without(replica: VllmReplica, run: Run) -> None:
    """As the page does, which asks for them wherever it is served."""
    events = run(events_of(replica, asked(trees=True, **PLAIN["plain"])))
    assert isinstance(events[-1], Finished)
    assert all(one.tree is None for one in events if isinstance(one, Progressed))


def test_choices_are_asked_with_seeds_of_their_own(replica: VllmReplica, run: Run) -> None:
    """Each body is the one that vLLM was recorded with, or the stand-in would refuse it."""
    events = run(events_of(replica, asked(**PLAIN["sampled"])))
    ended = {event.choice for event in events if isinstance(event, Finished)}
    assert ended == {0, 1}
    assert text_of(events, 0) != text_of(events, 1) != ""


def test_a_prompt_is_repeated_where_it_is_asked_for(replica: VllmReplica, run: Run) -> None:
    echoed = text_of(run(events_of(replica, asked(echo=True, **PLAIN["plain"]))))
    assert echoed.startswith(recorded()["prompt"] + " Paris")


@pytest.mark.parametrize(
    ("request_", "param", "said"),
    [
        (asked(max_new_tokens=5000), "prompt", "longest sequence is 4096 tokens"),
        (replace(asked(), prompts=((49152,),)), "prompt", "the model has 49152 tokens"),
        (asked(choices=5), "prompt", "takes 4 at a time"),
        (asked(stop_token_ids=(49152,)), None, "the model has 49152 tokens"),
        (asked(sampling={"logit_bias": {49152: 1.0}}), None, "logit_bias names token 49152"),
    ],
)
def test_what_is_refused_before_vllm_is_asked(
    replica: VllmReplica, run: Run, request_: Generation, param: str | None, said: str
) -> None:
    (rejected,) = run(events_of(replica, request_))
    assert isinstance(rejected, Rejected)
    assert (rejected.status, rejected.param) == (400, param)
    assert said in rejected.message


def test_what_vllm_refuses_is_the_clients_error(replica: VllmReplica, run: Run) -> None:
    (rejected,) = run(events_of(replica, asked(max_new_tokens=3)))
    assert isinstance(rejected, Rejected)
    assert rejected.status == 400 and "vLLM refuses it: nobody asked" in rejected.message


def test_a_full_queue_is_said_at_once_and_has_room_again(replica: VllmReplica, run: Run) -> None:
    async def work() -> tuple[Any, list[Any], list[Any]]:
        hanging = asked(max_new_tokens=HANGS, choices=4)
        async with aclosing(replica.generate(hanging)) as events:
            await anext(events)
            load = replica.record_autoscaling_stats()
            refused = await events_of(replica, asked(**PLAIN["plain"]))
        return load, refused, await events_of(replica, asked(**PLAIN["plain"]))

    load, (refused,), answered = run(work())
    assert (load["running"], load["waiting"]) == (2, 2)
    assert load["backlog_tokens"] > 0
    assert (refused.status, refused.code, refused.retry_after_s) == (429, "queue_full", 1)
    assert isinstance(answered[-1], Finished)
    assert replica.record_autoscaling_stats()["backlog_tokens"] == 0


def test_tokens_and_back(replica: VllmReplica, run: Run) -> None:
    ids = tuple(recorded()["prompt_ids"])
    assert run(replica.tokenize(ids, "prompt")).longest == 4096
    assert run(replica.detokenize(ids)) == recorded()["prompt"]
    assert isinstance(run(replica.detokenize((49152,))), Rejected)


def test_a_server_that_dies_takes_its_replica_with_it(config: Config, run: Run) -> None:
    left = threading.Event()
    replica = VllmReplica(config, left.set)
    try:
        run(replica.check_health())
        *_, last = run(events_of(replica, asked(max_new_tokens=DIES)))
        # In service the process is gone by now; here it is told that it should be.
        assert left.is_set()
        assert isinstance(last, Failed) and last.again
        with pytest.raises(ServerEndedError, match="has ended"):
            run(replica.check_health())
    finally:
        replica.close()


def test_a_server_that_does_not_start_says_why(config: Config) -> None:
    failing = config.replace(serve={"vllm_arguments": ("--fail",)})
    left = threading.Event()
    with pytest.raises(StageError, match="there is no such model"):
        VllmReplica(failing, left.set)
    assert not left.is_set(), "who starts it is told by the error"


def test_a_server_that_takes_too_long(config: Config, tmp_path: Path) -> None:
    sleeping = tmp_path / "python"
    sleeping.write_text("#!/bin/sh\nexec sleep 1000\n")
    sleeping.chmod(0o755)
    slow = config.replace(serve={"vllm_python": str(sleeping), "vllm_start_s": 0.1})
    with pytest.raises(StageError, match=r"not ready in serve\.vllm_start_s=0\.1 seconds"):
        VllmReplica(slow)
