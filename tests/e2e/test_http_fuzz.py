"""Ten thousand malformed requests to the real server: it refuses them all, and stays as it was.

What is malformed is judged by the server's own description of its bodies, which the unit tests hold
against OpenAI's.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import cycle, islice
from urllib.parse import urlsplit

import httpx
import pytest

from serve.keys import key_hash
from tests.e2e.serving import Served, make_models, serving
from tests.fuzz import (
    ADMIN,
    BODIES,
    MODELS,
    Description,
    Odd,
    more_damage,
    odd_bodies,
    odd_fields,
    odd_parameters,
    odd_values,
)
from tests.in_process import CHAT, HELLO, TEXT, TGI

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak]

LEAST_MALFORMED = 10_000
NO_HTTP = 500
AT_ONCE, PARTS = 16, 5
# Bodies that never end: so many at once, for so long, while others are answered.
STALLED, STALL_S, DRIP_S = 200, 30.0, 0.5
TIMEOUT_S = 300.0
# All are sent so often. The first time fills what is kept of schemas and of shapes of batches; of
# memory then, this much growth is allowed.
TIMES, MOST_GROWTH = 2, 0.05
GOOD = json.dumps(HELLO[CHAT]).encode()
START = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
# What no client library would send.
RAW = (
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n" * 5_000,
    b"POST /v1/chat/completions HTTP/1.1\r\nHost x\r\n\r\n",
    START + b"Content-Length: x\r\n\r\n" + GOOD,
    START + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + GOOD,
    START + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + GOOD,
    START + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n5\r\nab",
    START + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    START + b"X: 1\r\n" * 5_000 + b"\r\n",
    # Less than was promised, and then nothing more.
    START + b"Content-Length: 5000\r\n\r\n" + GOOD,
)
STALLING = (
    START,
    START + b"Content-Length: 5000\r\n\r\n",
    START + b"Content-Length: 5000\r\n\r\n" + GOOD,
    START + b"Transfer-Encoding: chunked\r\n\r\n",
    START + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
)


def requests() -> Iterator[tuple[str, Odd]]:
    """Path and body of each that is posted."""
    for path in MODELS:
        yield from ((path, odd) for odd in odd_fields(path))
    for path in (CHAT, TEXT):
        yield from ((path, odd) for odd in odd_fields(path, temperature=1.0))
    yield from ((TGI, odd) for odd in odd_parameters())
    for name in ("path", "canary", "unknown"):
        yield from ((ADMIN, odd) for odd in odd_values(BODIES[ADMIN], name))
    for path in BODIES:
        yield from ((path, odd) for odd in odd_bodies(path))


def wrong_calls() -> Iterator[tuple[str, str]]:
    """Method and path of what there is no route for."""
    for path in BODIES:
        yield from ((method, path) for method in ("PUT", "PATCH", "DELETE", "OPTIONS"))
    for method in ("GET", "POST", "PUT", "DELETE"):
        for path in ("/v1/models/%00", "/v1/models/%ff", "/v1//models", "/nothing?a=%zz"):
            yield method, path


class Tally:
    """How often each kind of request got each status."""

    def __init__(self, description: Description) -> None:
        self._description = description
        self.statuses: dict[str, Counter[int]] = {}
        self.malformed = 0

    def is_malformed(self, path: str, odd: Odd) -> bool:
        return self._description.is_malformed(path, odd.body)

    def add(self, kind: str, status: int, what: str, *, malformed: bool) -> None:
        """Hold a status against what is promised; 0 is a connection that was closed."""
        refused = status == 0 or 400 <= status < 500
        assert refused or (status in (200, 202) and not malformed), f"{kind}: {what}"
        name = kind if malformed else f"{kind}, by the description"
        self.statuses.setdefault(name, Counter())[status] += 1
        self.malformed += malformed

    def show(self) -> None:
        for kind, counts in sorted(self.statuses.items()):
            print(f"{kind}: {dict(counts)}")


async def post(client: httpx.AsyncClient, tally: Tally, path: str, odd: Odd) -> None:
    malformed = tally.is_malformed(path, odd)
    await send(client, tally, odd.kind, "POST", path, odd.body, malformed=malformed)


async def send(
    client: httpx.AsyncClient,
    tally: Tally,
    kind: str,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    malformed: bool = True,
) -> None:
    response = await client.request(method, path, content=body)
    status = response.status_code
    what = f"{method} {path} {body[:200]!r}: {status} {response.text[:300]}"
    tally.add(kind, status, what, malformed=malformed)
    if status >= 400:
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}, what


async def send_raw(url: str, tally: Tally, content: bytes) -> None:
    """What a client gets which speaks no HTTP to speak of."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(content)
        await writer.drain()
        writer.write_eof()
        line = await asyncio.wait_for(reader.readline(), TIMEOUT_S)
    except ConnectionError:
        line = b""
    finally:
        writer.close()
    status = int(line.split()[1]) if line else 0
    tally.add("no HTTP", status, f"{content[:100]!r}: {line!r}", malformed=True)


async def all_of(works: Iterator[Callable[[], Awaitable[None]]]) -> None:
    """Do them, some at a time."""

    async def some() -> None:
        for work in works:
            await work()

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))


def enough(tally: Tally) -> list[tuple[str, Odd]]:
    """All kinds of bodies, and more damage until so many are malformed."""
    found = list(requests())
    count = sum(tally.is_malformed(*one) for one in found)
    more = more_damage()
    while count < LEAST_MALFORMED:
        found.append(next(more))
        count += tally.is_malformed(*found[-1])
    return found


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that takes short bodies and texts alone."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = make_models(folder).replace(
        serve={"admin_keys": (key_hash("admin"),), "max_request_bytes": 100_000},
        decode={"max_context": 400, "cache_tokens": 8_000},
    )
    with serving(config, folder) as served:
        yield served


@asynccontextmanager
async def client_of(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer admin"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=TIMEOUT_S) as client:
        yield client


async def answer(client: httpx.AsyncClient) -> object:
    response = await client.post(CHAT, content=GOOD)
    return response.json()["choices"]


def test_ten_thousand_malformed_requests(limited: Served) -> None:
    async def work() -> None:
        async with client_of(limited) as client:
            good = await answer(client)
            openapi = (await client.get("/openapi.json")).json()
            tally = Tally(Description(openapi))
            bodies = enough(tally)
            works: list[Callable[[], Awaitable[None]]] = [
                *(lambda one=one: post(client, tally, *one) for one in bodies),
                *(
                    lambda one=one: send(client, tally, "no such route", *one)
                    for one in wrong_calls()
                ),
                *(
                    lambda one=one: send_raw(limited.url, tally, one)
                    for one in islice(cycle(RAW), NO_HTTP)
                ),
            ]
            before = limited.server.processes()
            sizes = []
            part = len(works) // PARTS + 1
            for turn in range(TIMES):
                random.Random(turn).shuffle(works)
                for start in range(0, len(works), part):
                    await all_of(iter(works[start : start + part]))
                    sizes.append(limited.server.resident_mb())
            print(f"{TIMES * len(works)} requests, {tally.malformed} of them malformed")
            tally.show()
            for kind in sizes[0]:
                print(f"{kind}, MB after each part: {[round(one[kind]) for one in sizes]}")
            assert await answer(client) == good
            assert limited.server.processes() == before, "no process was replaced"
            assert tally.malformed >= TIMES * LEAST_MALFORMED
            for kind, first in sizes[PARTS - 1].items():
                assert sizes[-1][kind] < first * (1 + MOST_GROWTH), kind

    asyncio.run(work())


def test_bodies_that_never_end_hold_up_nobody(limited: Served) -> None:
    """Connections that stay open with half a request in them; some go on byte by byte."""

    async def stalled(content: bytes, over: asyncio.Event) -> int:
        address = urlsplit(limited.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(content)
            line = asyncio.ensure_future(reader.readline())
            while not (over.is_set() or line.done()):
                if content.endswith(GOOD):
                    writer.write(b" ")
                    await writer.drain()
                await asyncio.wait([line], timeout=DRIP_S)
            if not line.done():
                writer.write_eof()
            got = await asyncio.wait_for(line, TIMEOUT_S)
        except ConnectionError:
            return 0
        finally:
            writer.close()
        status = int(got.split()[1]) if got else 0
        assert status == 0 or 400 <= status < 500, f"{content[-60:]!r}: {got!r}"
        return status

    async def work() -> None:
        async with client_of(limited) as client:
            good = await answer(client)
            before, over = limited.server.processes(), asyncio.Event()
            waiting = [
                asyncio.create_task(stalled(content, over))
                for content in islice(cycle(STALLING), STALLED)
            ]
            await asyncio.sleep(1)
            until = asyncio.get_running_loop().time() + STALL_S
            answered = 0
            while asyncio.get_running_loop().time() < until:
                assert await answer(client) == good
                answered += 1
            left = sum(not one.done() for one in waiting)
            over.set()
            statuses = Counter(await asyncio.gather(*waiting))
            print(
                f"{answered} answers beside {STALLED} stalled requests, {left} of them to the end"
            )
            print(f"how they ended: {dict(statuses)}")
            assert await answer(client) == good
            assert limited.server.processes() == before, "no process was replaced"

    asyncio.run(work())
