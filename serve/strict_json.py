"""Bodies as JSON is defined: in UTF-8, and with numbers that are numbers.

Python's parser also takes UTF-16, UTF-32, NaN and Infinity, which other parsers on the way may
read otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute


class StrictRequest(Request):
    """A request that reads its body strictly."""

    async def json(self) -> Any:
        """The body.

        Raises:
            json.JSONDecodeError: it is no JSON.
        """
        body = await self.body()
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            raise json.JSONDecodeError("it is not in UTF-8", "", error.start) from error
        return json.loads(text, parse_constant=_no_number)


def _no_number(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no number", "", 0)


class StrictRoute(APIRoute):
    """A route whose body is read so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, with the stricter request."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strictly
