"""OpenAI's errors, and how every failure of the HTTP service becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve.generation import Rejected

# pydantic's type of a problem that `serve.fields.field_problem` makes.
FIELD_PROBLEM = "field_problem"

# OpenAI's `type` of an error by its status; all others are the request's own fault.
KINDS = {
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error in OpenAI's shape.

    Args:
        status: of HTTP.
        message: what is wrong, what was got, what to do.
        param: the field of the request.
        code: OpenAI's machine-readable code.
        retry_after_s: sent as the header `Retry-After`.
        retry: whether asking again may help; if not, `x-should-retry` keeps OpenAI's clients from
            it, which by themselves ask again after 408, 409, 429 and whatever is 500 or more.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s
        self.param, self.code, self.retry = param, code, retry

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {
            "error": {
                "message": self.message,
                "type": KINDS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole response."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if not self.retry:
            headers["x-should-retry"] = "false"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def refused(rejected: Rejected) -> ApiError:
    """What a client is told about a request that is not served."""
    return ApiError(
        rejected.status,
        rejected.message,
        param=rejected.param,
        code=rejected.code,
        retry_after_s=rejected.retry_after_s,
    )


def validation_error(problems: Sequence[Any]) -> ApiError:
    """pydantic's findings as one error; never repeats what was sent, which may be large."""
    messages, param, code = [], None, None
    for problem in problems[:5]:
        location = [str(part)[:100] for part in problem["loc"] if not _is_tag(part)]
        if problem["type"] == FIELD_PROBLEM:
            location.append(problem["ctx"]["field"])
            code = code or problem["ctx"]["code"]
        param = param or (".".join(location) or None)
        if problem["type"] == "json_invalid":
            messages.append(f"the body is not valid JSON: {problem['ctx']['error']}")
        elif problem["type"] == "extra_forbidden":
            messages.append(f"unknown field {'.'.join(location)!r}; remove it")
        elif problem["type"] == FIELD_PROBLEM:
            messages.append(problem["ctx"]["message"])
        elif problem["type"] == "value_error":
            where = f"{'.'.join(location)}: " if location else ""
            messages.append(f"{where}{problem['ctx']['error']}")
        else:
            messages.append(f"{'.'.join(location) or 'the body'}: {problem['msg']}")
    message = "; ".join(messages).encode(errors="replace").decode()
    param = param and param.encode(errors="replace").decode()
    return ApiError(400, message, param=param, code=code)


def _is_tag(part: int | str) -> bool:
    """Whether a part of a location is pydantic's name for a type, and not the client's field."""
    return isinstance(part, str) and (
        part in ("body", "str") or part.startswith(("list[", "function-"))
    )


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response()


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


def internal_error(message: str = "internal error; see the server's log") -> ApiError:
    """What a client is told about a failure that is not its own."""
    return ApiError(500, message)


# What no handler is for, the guard answers.
EXCEPTION_HANDLERS = {
    ApiError: _on_api_error,
    RequestValidationError: _on_validation_error,
    HTTPException: _on_http_error,
}
