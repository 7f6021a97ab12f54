"""The HTTP interface as a FastAPI application, whatever answers behind it."""

# No `from __future__ import annotations`: FastAPI reads the types of the routes at run time.

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from core.config import ServeConfig
from serve.admin import add_admin
from serve.answers import Answer, Json, model_card, model_list, server_sent
from serve.completions import CompletionRequest
from serve.desk import Desk
from serve.errors import EXCEPTION_HANDLERS, ApiError, internal_error
from serve.generation import (
    Accepted,
    Event,
    Failed,
    Finished,
    Generation,
    Progressed,
    Prompt,
    Rejected,
    Restarted,
    Tokens,
)
from serve.guard import REQUEST_ID, Guard, arrival
from serve.metrics import CONTENT_TYPE, Metrics
from serve.openai_chat import ChatRequest
from serve.retry import resumed
from serve.tgi import GenerateRequest
from serve.tokens import DetokenizeRequest, TokenizeRequest, tokenized
from serve.traffic import Traffic

PAGE = Path(__file__).parent / "web" / "index.html"
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Backend(Protocol):
    """Decoder replicas, as the interface sees them."""

    def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        """A replica's events; closing it stops the generation.

        Raises:
            ReplicaLostError: the replica died.
        """

    async def tokenize(self, prompt: Prompt, field: str) -> Tokens | Rejected:
        """The tokens that a prompt is read as."""

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Rejected:
        """The text of tokens."""

    async def running(self) -> int:
        """How many replicas run.

        Raises:
            ApiError: nobody can say.
        """


Ask = Callable[[Generation, bool], AsyncGenerator[Event, None]]
"""The events of a request, which are streamed to the client or not."""


def build_api(
    backend: Backend, desk: Desk, config: ServeConfig, traffic: Traffic | None = None
) -> FastAPI:
    """All routes; `backend` answers them, those of /admin `desk`; `traffic` counts requests."""
    traffic = traffic or Traffic(config.max_requests)
    api = FastAPI(
        title="Aerie",
        summary="A speculative decoder that speaks OpenAI's and TGI's protocols.",
        # Their pages would load scripts from elsewhere; /openapi.json stays.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=EXCEPTION_HANDLERS,  # type: ignore[arg-type]
    )
    api.add_middleware(
        Guard,
        traffic=traffic,
        hashes=config.api_keys,
        admin_hashes=config.admin_keys,
        max_bytes=config.max_request_bytes,
        body_timeout_s=config.body_timeout_s,
        per_minute=config.requests_per_minute,
    )
    if config.cors_origins:
        # In front of the guard: browsers ask without a key what they may do, and read refusals.
        api.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID, "Retry-After"),
        )
    metrics = Metrics(config.model_name)

    def ask(request: Generation, streamed: bool) -> AsyncGenerator[Event, None]:
        came = arrival()
        request = replace(request, name=came.name)
        events = resumed(backend.generate, request, streamed=streamed, retries=config.retries)
        return _until(metrics.watched(events), came.at, config.deadline_s)

    _add_pages(api, backend, metrics, traffic)
    _add_openai(api, ask, config)
    _add_tgi(api, ask)
    _add_tokens(api, backend, config)
    add_admin(api, desk)
    return api


async def _until(
    events: AsyncGenerator[Event, None], came: float, seconds: float
) -> AsyncGenerator[Event, None]:
    """The events; an error where the time since the request came is up or the decoder failed."""
    deadline = came + seconds
    async with aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events)
            except StopAsyncIteration:
                return
            except TimeoutError:
                # Asked again, it would take as long again, beside all others.
                raise ApiError(
                    504,
                    f"the answer took longer than {seconds:g} seconds, its waiting included; ask "
                    "for fewer tokens, or when fewer others ask",
                    code="deadline_exceeded",
                    retry=False,
                ) from None
            if isinstance(event, Failed):
                raise internal_error(event.message)
            yield event


def _add_pages(api: FastAPI, backend: Backend, metrics: Metrics, traffic: Traffic) -> None:
    text = PAGE.read_text(encoding="utf-8")

    @api.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The chat page."""
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    @api.get("/health")
    @api.get("/ping")
    @api.post("/ping")
    async def health() -> JSONResponse:
        """200 while at least one decoder replica runs and new requests are taken, else 503."""
        running = await backend.running()
        status = "draining" if traffic.draining else "ok" if running else "starting"
        body = {"status": status, "replicas": running}
        return JSONResponse(body, status_code=200 if status == "ok" else 503)

    @api.get("/live")
    async def live() -> Json:
        """200 while this process answers, whatever becomes of the replicas."""
        return {"status": "ok"}

    @api.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Counts and latencies in Prometheus's format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_openai(api: FastAPI, ask: Ask, config: ServeConfig) -> None:
    name, created = config.model_name, int(time.time())

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return model_list(name, created)

    @api.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """A model by its name."""
        _check_model(model, name)
        return model_card(name, created)

    @api.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        _check_model(body.model, name)
        return await _respond(ask, body.generation(), body.answer(name), body.stream)

    @api.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest) -> Response:
        """Go on with a text, whole or as a stream of server-sent events."""
        _check_model(body.model, name)
        return await _respond(ask, body.generation(), body.answer(name), body.stream)


def _add_tgi(api: FastAPI, ask: Ask) -> None:
    @api.post("/generate", response_model=None)
    async def generate(body: GenerateRequest) -> Response:
        """Go on with a text, as TGI does."""
        return await _respond(ask, body.generation(), body.answer(), False)

    @api.post("/generate_stream", response_model=None)
    async def generate_stream(body: GenerateRequest) -> Response:
        """The same, an event a token."""
        return await _respond(ask, body.generation(stream=True), body.answer(), True)


def _add_tokens(api: FastAPI, backend: Backend, config: ServeConfig) -> None:
    @api.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text, or of messages in the chat template."""
        _check_model(body.model or config.model_name, config.model_name)
        found = await backend.tokenize(body.what, body.field)
        if isinstance(found, Rejected):
            raise _refused(found)
        return tokenized(list(found.ids), found.longest)

    @api.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens."""
        _check_model(body.model or config.model_name, config.model_name)
        found = await backend.detokenize(tuple(body.tokens))
        if isinstance(found, Rejected):
            raise _refused(found)
        return {"prompt": found}


def _check_model(name: str, served: str) -> None:
    if name != served:
        raise ApiError(
            404,
            f"the model {name[:200]!r} does not exist; this server has {served!r}",
            param="model",
            code="model_not_found",
        )


async def _respond(ask: Ask, request: Generation, answer: Answer, stream: bool) -> Response:
    events = ask(request, stream)
    try:
        answer.prompt_tokens = await _prompt_tokens(events)
    except BaseException:
        await events.aclose()
        raise
    if not stream:
        return JSONResponse(await _whole(events, request, answer))
    return StreamingResponse(
        _stream(events, answer), media_type="text/event-stream", headers=STREAM_HEADERS
    )


async def _prompt_tokens(events: AsyncGenerator[Event, None]) -> int:
    """Wait for the first event, while a refusal can still set the status."""
    first = await anext(events)
    if isinstance(first, Rejected):
        raise _refused(first)
    assert isinstance(first, Accepted)
    return first.prompt_tokens


async def _whole(events: AsyncGenerator[Event, None], request: Generation, answer: Answer) -> Json:
    rounds: list[Progressed] = []
    finished: dict[int, Finished] = {}
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Restarted):
                rounds, finished = [], {}
            elif isinstance(event, Progressed):
                rounds.append(event)
            elif isinstance(event, Finished):
                finished[event.choice] = event
    if len(finished) < request.num_answers:
        raise internal_error()
    return answer.whole(rounds, [finished[place] for place in range(request.num_answers)])


async def _stream(events: AsyncGenerator[Event, None], answer: Answer) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        for chunk in answer.opening():
            yield server_sent(chunk)
        try:
            async for event in events:
                chunks: list[Json | str] = []
                if isinstance(event, Progressed):
                    chunks = answer.part(event)
                elif isinstance(event, Finished):
                    chunks = answer.ended(event)
                for chunk in chunks:
                    yield server_sent(chunk)
        except ApiError as error:
            # The status is sent; clients know an error by this event.
            yield server_sent(error.body())
            return
        for chunk in answer.closing():
            yield server_sent(chunk)


def _refused(rejected: Rejected) -> ApiError:
    return ApiError(
        rejected.status,
        rejected.message,
        param=rejected.param,
        code=rejected.code,
        retry_after_s=rejected.retry_after_s,
    )
