"""What every request passes before it reaches a route: its name, its key, its size, its time."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

# The path that routes are found by: the server may hang below a prefix of Ray Serve's.
from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.errors import ApiError, internal_error
from serve.keys import known_key
from serve.rates import RateLimit
from serve.traffic import Traffic

REQUEST_ID = "X-Request-ID"
# Without a key and without limits: what monitors ask, and the page, which has no key.
OPEN_PATHS = ("/", "/health", "/live", "/metrics", "/ping")
# With keys of its own, which the others' are not.
ADMIN = "/admin/"
GOOD_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
# Of a client that left, as nginx has it.
LEFT = 499

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Arrival:
    """A request that has come in.

    Attributes:
        name: its X-Request-ID, for logs.
        at: when that was, by the event loop's clock.
    """

    name: str
    at: float


_arrival: ContextVar[Arrival] = ContextVar("arrival")


def arrival() -> Arrival:
    """Of the request whose route asks."""
    return _arrival.get()


class Guard:
    """An ASGI application in front of another."""

    def __init__(
        self,
        app: Any,
        *,
        traffic: Traffic,
        hashes: Collection[str],
        admin_hashes: Collection[str],
        max_bytes: int,
        body_timeout_s: float,
        per_minute: int | None = None,
    ) -> None:
        self._app, self._traffic = app, traffic
        self._max_bytes, self._body_timeout_s = max_bytes, body_timeout_s
        self._limit = None if per_minute is None else RateLimit(per_minute)
        self._hashes, self._admin_hashes = frozenset(hashes), frozenset(admin_hashes)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        name = given if GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        came = Arrival(name, asyncio.get_running_loop().time())
        exchange = _Exchange(came, receive, send, self._max_bytes, self._body_timeout_s)
        token = _arrival.set(came)
        try:
            await self._serve(scope, exchange)
        except ClientDisconnect:
            exchange.left = True
        except Exception:
            logger.exception("request %s failed", name)
            if exchange.status is not None:
                exchange.failed = True
                raise  # so that the connection breaks off: what was sent is no whole answer
            await internal_error().response()(scope, receive, exchange.send)
        finally:
            _arrival.reset(token)
            logger.info(json.dumps(exchange.line(scope)))

    async def _serve(self, scope: Message, exchange: _Exchange) -> None:
        path, headers = get_route_path(scope), Headers(scope=scope)
        if path in OPEN_PATHS:
            await self._app(scope, exchange.receive, exchange.send)
            return
        admin = path.startswith(ADMIN)
        try:
            key = self._key(headers, admin=admin)
            self._check_size(headers)
            if refusal := self._traffic.refusal():
                raise refusal
            if not admin:
                # Without keys, who asks is an address; several clients may share one.
                self._check_rate(key or (scope.get("client") or ("",))[0])
        except ApiError as refusal:
            await refusal.response()(scope, exchange.receive, exchange.send)
            return
        with self._traffic.one():
            await self._app(scope, exchange.receive, exchange.send)

    def _key(self, headers: Headers, *, admin: bool) -> str | None:
        """The hash of the key that was given; None where none is asked for."""
        if admin and not self._admin_hashes:
            raise ApiError(403, "this server has no keys for /admin; see serve.admin_keys")
        hashes = self._admin_hashes if admin else self._hashes
        if not hashes:
            return None
        key = known_key(headers.get("Authorization", ""), hashes)
        if key is None:
            raise ApiError(
                401,
                "no valid API key; send the header `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )
        return key

    def _check_size(self, headers: Headers) -> None:
        length = headers.get("Content-Length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._max_bytes:
            raise ApiError(413, _too_large(self._max_bytes), code="request_too_large")

    def _check_rate(self, client: str) -> None:
        if self._limit is None:
            return
        wait_s = self._limit.wait_s(client, asyncio.get_running_loop().time())
        if wait_s:
            raise ApiError(
                429,
                f"too many requests from this client; the next one is taken in {wait_s:.1f} "
                "seconds",
                code="rate_limit_exceeded",
                retry_after_s=math.ceil(wait_s),
            )


class _Exchange:
    """One request and its response, as they pass.

    Attributes:
        status: that was sent; None before.
        left: whether the client has gone before the end.
        failed: whether the response breaks off.
    """

    def __init__(
        self, came: Arrival, receive: Receive, send: Send, max_bytes: int, body_timeout_s: float
    ) -> None:
        self._came, self._receive, self._send = came, receive, send
        self._max_bytes, self._body_timeout_s = max_bytes, body_timeout_s
        self._taken = self._given = 0
        self._body_came = self._ended = False
        self.status: int | None = None
        self.left = self.failed = False

    async def receive(self) -> Message:
        """The body's next part, for a while; behind the body, whether the client leaves."""
        until = None if self._body_came else self._came.at + self._body_timeout_s
        try:
            async with asyncio.timeout_at(until):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(
                408,
                f"the body did not come within {self._body_timeout_s:g} seconds; send it again, "
                "faster",
                # What may come of it yet is no request.
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.disconnect":
            self.left = not self._ended
        self._body_came = not message.get("more_body", False)
        # A body need not say how long it is, or may be longer than it says.
        self._taken += len(message.get("body", b""))
        if self._taken > self._max_bytes:
            raise HTTPException(413, _too_large(self._max_bytes))
        return message

    async def send(self, message: Message) -> None:
        """A part of the response, which bears the request's name."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID] = self._came.name
        await self._send(message)
        if message["type"] == "http.response.body":
            self._given += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)

    def line(self, scope: Message) -> dict[str, Any]:
        """What the log says of it; `bytes` are those of the response's body."""
        status = self.status
        if self.failed:
            status = 500
        elif self.left or not self._ended:
            # Ray Serve cancels what nobody waits for.
            status = LEFT
        return {
            "request_id": self._came.name,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(asyncio.get_running_loop().time() - self._came.at, 4),
            "bytes": self._given,
        }


def _too_large(max_bytes: int) -> str:
    return f"the body is longer than {max_bytes} bytes; shorten it"
