"""What every request passes before it reaches a route: its name, its key, its size."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from serve.errors import ApiError
from serve.keys import is_known

REQUEST_ID = "X-Request-ID"
# Without a key: what monitors ask, and the page, which has none.
OPEN_PATHS = ("/", "/health", "/metrics")
# With keys of its own, which the others' are not.
ADMIN = "/admin/"
GOOD_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("ray.serve")


class Guard:
    """An ASGI application in front of another."""

    def __init__(
        self, app: Any, *, hashes: Collection[str], admin_hashes: Collection[str], max_bytes: int
    ) -> None:
        self._app, self._max_bytes = app, max_bytes
        self._hashes, self._admin_hashes = frozenset(hashes), frozenset(admin_hashes)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        name = given if GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        began, status = time.monotonic(), 499  # until there is an answer, the client may leave

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            if refusal is not None:
                await refusal.response()(scope, receive, named)
            else:
                await self._app(scope, self._limited(receive), named)
        finally:
            line = {
                "request_id": name,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.monotonic() - began, 4),
            }
            logger.info(json.dumps(line))

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        admin = path.startswith(ADMIN)
        if admin and not self._admin_hashes:
            return ApiError(403, "this server has no keys for /admin; see serve.admin_keys")
        hashes = self._admin_hashes if admin else self._hashes
        if hashes and path not in OPEN_PATHS:
            if not is_known(headers.get("Authorization", ""), hashes):
                return ApiError(
                    401,
                    "no valid API key; send the header `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                )
        length = headers.get("Content-Length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._max_bytes:
            return ApiError(413, self._too_large(), code="request_too_large")
        return None

    def _limited(self, receive: Receive) -> Receive:
        """For a body that does not say how long it is, or is longer than it says."""
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"the body is longer than {self._max_bytes} bytes; shorten it"
