"""The choices of one request at vLLM's server, each a stream of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence

import httpx

from core.errors import StageError
from serve.generation import Rejected
from serve.vllm.requests import Json, chunks_of, refusal_of

# A choice's place, and its next chunk, its end, or what went wrong.
Told = tuple[int, Json | Exception | None]


class Visit:
    """The choices of a request at vLLM, told of in the order in which they come."""

    def __init__(self, client: httpx.AsyncClient, bodies: Sequence[Json]) -> None:
        """Ask for all of them."""
        self._client = client
        self._told: asyncio.Queue[Told] = asyncio.Queue()
        self._open = set(range(len(bodies)))
        self._opened = [asyncio.get_running_loop().create_future() for _ in bodies]
        self._first: list[Told] = []
        self._tasks = [
            asyncio.create_task(self._ask(place, body)) for place, body in enumerate(bodies)
        ]

    async def begin(self, *, with_first: bool) -> Rejected | None:
        """Wait until all are taken; why one was not.

        Args:
            with_first: wait for the first chunk too: what depends on more than a body's form, as
                a schema, vLLM refuses in its stream.
        Raises:
            httpx.HTTPError: the server is gone.
            StageError: it failed.
        """
        for refused in await asyncio.gather(*self._opened, return_exceptions=True):
            if isinstance(refused, BaseException):
                raise refused
            if refused is not None:
                return refused
        while with_first and len({place for place, _ in self._first}) < len(self._tasks):
            place, told = await self._told.get()
            if isinstance(told, dict) and (refused := refusal_of(told, "response_format")):
                return refused
            self._first.append((place, told))
        return None

    async def chunks(self) -> AsyncGenerator[tuple[int, Json | None], None]:
        """Chunks with the choice's place, and None when its stream has ended.

        Raises:
            httpx.HTTPError: the server is gone.
            StageError: a stream ended early.
        """
        while self._open:
            place, told = self._first.pop(0) if self._first else await self._told.get()
            if place not in self._open:
                continue
            if isinstance(told, Exception):
                raise told
            if told is None:
                self._open.discard(place)
            yield place, told

    def give_up(self, place: int) -> None:
        """Nobody waits for more of a choice; vLLM notices that its connection has closed."""
        self._open.discard(place)
        self._tasks[place].cancel()

    async def close(self) -> None:
        """Give up all that have not ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, place: int, body: Json) -> None:
        opened = self._opened[place]
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    opened.set_result(_refused(response.status_code, await response.aread()))
                    return
                opened.set_result(None)
                async for chunk in chunks_of(response.aiter_lines()):
                    self._told.put_nowait((place, chunk))
                self._told.put_nowait((place, None))
        except Exception as error:
            if opened.done():
                self._told.put_nowait((place, error))
            else:
                opened.set_exception(error)


def _refused(status: int, body: bytes) -> Rejected:
    """What vLLM says instead of a stream.

    Raises:
        StageError: it is not the request's fault.
    """
    said = body.decode(errors="replace")
    try:
        refused = refusal_of(json.loads(said))
    except ValueError:
        refused = None
    if refused is None:
        raise StageError(f"vLLM answers with HTTP {status}: {said[:1000]}")
    return refused
