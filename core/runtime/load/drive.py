"""Ways to put a server under load: so many clients, or so many requests a second."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

from core.runtime.load.client import Client, Question, Reply


class Questions:
    """An endless supply: all prompts in turn, every second one streamed."""

    def __init__(self, prompts: Sequence[str], max_tokens: int) -> None:
        """Begin with the first prompt."""
        self.max_tokens = max_tokens
        self._prompts = itertools.cycle(prompts)
        self._streamed = itertools.cycle((True, False))

    def __iter__(self) -> Iterator[Question]:
        return self

    def __next__(self) -> Question:
        return Question(next(self._prompts), self.max_tokens, next(self._streamed))


def lasting(seconds: float) -> Callable[[], bool]:
    """Whether so much time has not passed since this call."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() < deadline


async def closed_loop(
    client: Client,
    questions: Iterable[Question],
    clients: int,
    going: Callable[[], bool],
    told: Callable[[Reply], None] = lambda reply: None,
) -> list[Reply]:
    """Clients that each ask as soon as they are answered, as long as it is going.

    One that is refused waits a moment, as any client would.

    Args:
        client: of the server.
        questions: what they ask, in turn.
        clients: how many.
        going: whether they ask on.
        told: hears of every reply as it comes.
    """
    source, replies = iter(questions), list[Reply]()

    async def ask_on() -> None:
        while going():
            reply = await client.ask(next(source))
            replies.append(reply)
            told(reply)
            if reply.error is not None:
                await asyncio.sleep(0.5)

    await asyncio.gather(*(ask_on() for _ in range(clients)))
    return replies


async def open_loop(
    client: Client, questions: Iterable[Question], per_second: float, seconds: float
) -> list[Reply]:
    """Requests at a fixed rate, whatever becomes of those before."""
    source, tasks = iter(questions), list[asyncio.Task[Reply]]()
    began = time.monotonic()
    for number in itertools.count():
        due = number / per_second
        if due >= seconds:
            break
        await asyncio.sleep(max(0.0, began + due - time.monotonic()))
        tasks.append(asyncio.create_task(client.ask(next(source))))
    return list(await asyncio.gather(*tasks))


async def sampled(
    work: Awaitable[Any], sample: Callable[[], Awaitable[None]], every_s: float
) -> Any:
    """The work's result; meanwhile, `sample` is called again and again."""

    async def again() -> None:
        while True:
            await sample()
            await asyncio.sleep(every_s)

    sampling = asyncio.create_task(again())
    try:
        return await work
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
