"""Clients that ask without pause while something is done to the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import pytest

from core.models.target import load_target
from core.runtime.load.client import Client, Reply
from core.runtime.load.drive import Questions, closed_loop
from tests.e2e.serving import PROMPTS, Served, greedy_answer, one_thread

# Far above what anything here takes, even on a busy machine.
TIMEOUT_S = 300.0
REPLICAS = "decoder replicas"


def wanted_texts(served_config: Any, num_tokens: int) -> dict[str, str]:
    """What the target alone answers to each of `PROMPTS`."""
    with one_thread():
        target = load_target(served_config.target)
        return {
            prompt: target.tokenizer.decode(
                greedy_answer(target, prompt, num_tokens), skip_special_tokens=True
            )
            for prompt in PROMPTS
        }


class UnderLoad:
    """Clients at work as long as the context lasts; streamed and whole answers take turns."""

    def __init__(self, served: Served, wanted: Mapping[str, str], num_tokens: int, clients: int):
        self.served, self.wanted = served, wanted
        self._num_tokens, self._clients, self._going = num_tokens, clients, True
        self._client = Client(served.url, "tiny")
        self.replies: list[Reply] = []

    async def __aenter__(self) -> UnderLoad:
        questions = Questions(PROMPTS, self._num_tokens)
        self._asking = asyncio.create_task(
            closed_loop(
                self._client, questions, self._clients, lambda: self._going, self.replies.append
            )
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self._going = False
        await asyncio.wait_for(self._asking, TIMEOUT_S)
        await self._client.__aexit__()

    async def answered(self, count: int) -> None:
        """Wait for so many further answers."""
        before = len(self.replies)
        await until(lambda: len(self.replies) >= before + count or self._asking.done())
        assert not self._asking.done(), self._asking.result()

    async def running(self) -> int:
        """Replicas that the server counts."""
        count: int = (await self._client.get("/health")).json()["replicas"]
        return count

    async def replaced(self, killed: psutil.Process, count: int) -> None:
        """Wait until there are so many replicas again, and the killed one is not among them."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            there = self.served.server.processes()[REPLICAS]
            if killed not in there and len(there) == count and await self.running() == count:
                return
            await asyncio.sleep(0.5)
        pytest.fail("the killed replica was not replaced")

    def check(self, *, besides: tuple[float, float] | None = None) -> None:
        """Hold every reply against what it should be.

        Args:
            besides: a time (monotonic) in which requests may have failed in any clear way.
        """
        for reply in self.replies:
            wanted, said = self.wanted[reply.question.prompt], f"{reply.status} {reply.error}"
            if reply.error is None:
                assert reply.text == wanted
                continue
            assert wanted.startswith(reply.text), "nothing is missing or comes twice before an end"
            if besides and reply.began < besides[1] and reply.began + reply.seconds > besides[0]:
                continue
            assert reply.question.stream and reply.status == 200, said
            assert reply.error != "the stream ended early", said


async def until(true: Callable[[], bool]) -> None:
    """Look again and again."""
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        await asyncio.sleep(0.1)
