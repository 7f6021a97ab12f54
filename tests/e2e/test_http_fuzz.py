"""Ten thousand malformed requests to the real server: it refuses them all, and stays as it was."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from serve.keys import key_hash
from tests.e2e.serving import Served, make_models, serving
from tests.fuzz import ADMIN, BODIES, FIELDS, odd_bodies, odd_fields, odd_parameters, odd_values
from tests.in_process import CHAT, HELLO, TEXT, TGI

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak]

LEAST_REQUESTS = 10_000
AT_ONCE = 16
TIMEOUT_S = 300.0
# Of memory, from the middle to the end.
WARM_UP, MOST_GROWTH = 4, 0.05
GOOD = json.dumps(HELLO[CHAT]).encode()
START = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
# What no client library would send, and for how many seconds the client dawdles in between.
RAW: tuple[tuple[tuple[bytes, float], ...], ...] = (
    ((b"\x16\x03\x01\x02\x00\x01\x00", 0),),
    ((b"GET\r\n\r\n", 0),),
    ((b"GET / HTTP/9.9\r\n\r\n", 0),),
    ((b"\r\n" * 5_000, 0),),
    ((b"POST /v1/chat/completions HTTP/1.1\r\nHost x\r\n\r\n", 0),),
    ((START + b"Content-Length: x\r\n\r\n" + GOOD, 0),),
    ((START + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + GOOD, 0),),
    ((START + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + GOOD, 0),),
    ((START + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n5\r\nab", 0),),
    ((START + b"X: " + b"a" * 200_000 + b"\r\n\r\n", 0),),
    ((START + b"X: 1\r\n" * 5_000 + b"\r\n", 0),),
    # Less than was promised, and then nothing more.
    ((START + b"Content-Length: 5000\r\n\r\n" + GOOD, 0),),
    # A body that comes byte by byte, and whose end is missing.
    ((START + b"Content-Length: 12\r\n\r\n", 0.2), *((b"{", 0.2),) * 5),
    ((START + b"Transfer-Encoding: chunked\r\n\r\n", 0.2), *((b"1\r\n{\r\n", 0.2),) * 5),
)


def requests() -> Iterator[tuple[str, str, bytes]]:
    """Method, path and body of each."""
    for path in FIELDS:
        yield from (("POST", path, body) for body in odd_fields(path))
    for path in (CHAT, TEXT):
        yield from (("POST", path, body) for body in odd_fields(path, temperature=1.0))
    yield from (("POST", TGI, body) for body in odd_parameters())
    for name in ("path", "canary", "unknown"):
        yield from (("POST", ADMIN, body) for body in odd_values(BODIES[ADMIN], name))
    for path in BODIES:
        # As many as it takes.
        for body in odd_bodies(path, random_ones=150, damaged_ones=350):
            yield "POST", path, body
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        for path in (*BODIES, "/v1/models/%00", "/v1/models/%ff", "/v1//models", "/nothing?a=%zz"):
            yield method, path, b""


async def send(client: httpx.AsyncClient, request: tuple[str, str, bytes]) -> int:
    method, path, body = request
    response = await client.request(method, path, content=body)
    status = response.status_code
    sent = f"{method} {path} {body[:200]!r}: {status} {response.text[:300]}"
    assert status == 200 or 400 <= status < 500, sent
    if status != 200:
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}, sent
    return status


async def send_raw(url: str, parts: tuple[tuple[bytes, float], ...]) -> int:
    """The status that a client gets which speaks no HTTP to speak of; 0 if it is hung up on."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        for part, pause_s in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        writer.write_eof()
        line = await asyncio.wait_for(reader.readline(), TIMEOUT_S)
    except ConnectionError:
        return 0
    finally:
        writer.close()
    status = int(line.split()[1]) if line else 0
    assert status == 0 or 400 <= status < 500, f"{parts[0][0][:100]!r}: {line!r}"
    return status


async def all_of(works: Iterator[Callable[[], Awaitable[int]]]) -> Counter[int]:
    """Do them, some at a time; how often each status came."""
    statuses: Counter[int] = Counter()

    async def some() -> None:
        for work in works:
            statuses[await work()] += 1

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return statuses


def test_ten_thousand_malformed_requests(tmp_path: Path) -> None:
    config = make_models(tmp_path).replace(
        serve={"admin_keys": (key_hash("admin"),), "max_request_bytes": 100_000},
        decode={"max_context": 400, "cache_tokens": 8_000},
    )

    async def work(served: Served) -> None:
        headers = {"Content-Type": "application/json", "Authorization": "Bearer admin"}
        async with httpx.AsyncClient(
            base_url=served.url, headers=headers, timeout=TIMEOUT_S
        ) as client:
            good = await answer(client)
            bodies = list(requests())
            random.Random(0).shuffle(bodies)
            raw = list(islice(cycle(RAW), max(500, LEAST_REQUESTS - len(bodies))))
            works: list[Callable[[], Awaitable[int]]] = [
                *(lambda one=one: send(client, one) for one in bodies),
                *(lambda one=one: send_raw(served.url, one) for one in raw),
            ]
            random.Random(1).shuffle(works)
            assert len(works) >= LEAST_REQUESTS
            before = served.server.processes()
            statuses: Counter[int] = Counter()
            sizes = []
            tenth = len(works) // 10 + 1
            for start in range(0, len(works), tenth):
                statuses += await all_of(iter(works[start : start + tenth]))
                sizes.append(served.server.resident_mb())
            print(f"{len(works)} requests: {dict(statuses)}")
            for kind in sizes[0]:
                print(f"{kind}, MB after each tenth: {[round(one[kind]) for one in sizes]}")
            assert await answer(client) == good
            assert served.server.processes() == before, "no process was replaced"
            assert statuses[400] > LEAST_REQUESTS / 2
            for kind, first in sizes[WARM_UP].items():
                assert sizes[-1][kind] < first * (1 + MOST_GROWTH), kind

    with serving(config, tmp_path) as served:
        asyncio.run(work(served))


async def answer(client: httpx.AsyncClient) -> object:
    response = await client.post(CHAT, content=GOOD)
    return response.json()["choices"]
