"""The HTTP interface as a FastAPI application, whatever answers behind it."""

# No `from __future__ import annotations`: FastAPI reads the types of the routes at run time.

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)

from core.config import ServeConfig
from serve.admin import add_admin
from serve.answers import Answer, Json, model_card, model_list, server_sent
from serve.completions import CompletionRequest
from serve.description import (
    GENERATING,
    GUARDED,
    Chat,
    Completion,
    DescribedAPI,
    Detokenized,
    Generated,
    Health,
    Live,
    ModelCard,
    ModelList,
    Tokenized,
    answers,
)
from serve.errors import EXCEPTION_HANDLERS, ApiError, internal_error, refused
from serve.generation import (
    Accepted,
    Event,
    Finished,
    Generation,
    Progressed,
    Rejected,
    Restarted,
)
from serve.guard import REQUEST_ID, Guard
from serve.metrics import CONTENT_TYPE, Registry
from serve.models import Model, Models, Served
from serve.openai_chat import ChatRequest
from serve.page import chat_page
from serve.strict_json import StrictRoute
from serve.tgi import GenerateRequest
from serve.tokens import DetokenizeRequest, TokenizeRequest, tokenized
from serve.traffic import Traffic

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def build_api(
    served: Sequence[Served], config: ServeConfig, traffic: Traffic | None = None
) -> FastAPI:
    """All routes.

    Args:
        served: the models; the first one answers requests that name none.
        config: of the HTTP service, which they share.
        traffic: counts requests, and ends when the service does.
    """
    traffic = traffic or Traffic(config.max_requests)
    api = DescribedAPI(
        title="Aerie",
        summary="A speculative decoder that speaks OpenAI's and TGI's protocols.",
        # Their pages would load scripts from elsewhere; /openapi.json stays.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=EXCEPTION_HANDLERS,  # type: ignore[arg-type]
    )
    api.router.route_class = StrictRoute
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
    registry = Registry()
    models = Models(served, registry)
    _add_pages(api, models, registry, traffic)
    _add_openai(api, models)
    _add_tgi(api, models)
    _add_tokens(api, models)
    add_admin(api, models)
    return api


def _add_pages(api: FastAPI, models: Models, registry: Registry, traffic: Traffic) -> None:
    chat = chat_page()

    @api.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The chat page."""
        return HTMLResponse(chat.text, headers={"Content-Security-Policy": chat.policy})

    @api.get("/health", responses={status: {"model": Health} for status in (200, 503)})
    @api.get("/ping", responses={status: {"model": Health} for status in (200, 503)})
    @api.post("/ping", responses={status: {"model": Health} for status in (200, 503)})
    async def health() -> JSONResponse:
        """200 while new requests are taken, and every model has a replica or may do without one."""
        found = await models.health()
        states = {one.state for one in found.values()}
        worst = next(state for state in ("starting", "ok", "idle") if state in states)
        body = {
            "status": "draining" if traffic.draining else worst,
            "replicas": sum(one.replicas for one in found.values()),
            "models": {
                name: {"status": one.state, "replicas": one.replicas} for name, one in found.items()
            },
        }
        return JSONResponse(body, status_code=200 if body["status"] in ("ok", "idle") else 503)

    @api.get("/live", responses={200: {"model": Live}})
    async def live() -> Json:
        """200 while this process answers, whatever becomes of the replicas."""
        return {"status": "ok"}

    @api.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """Counts and latencies in Prometheus's format."""
        return Response(registry.text(), media_type=CONTENT_TYPE)


def _add_openai(api: FastAPI, models: Models) -> None:
    created = int(time.time())

    @api.get("/v1/models", response_model=None, responses=answers(ModelList, *GUARDED))
    async def list_models() -> dict[str, Any]:
        """All that are served; the first one answers requests that name none."""
        return model_list(models.names, created)

    @api.get(
        "/v1/models/{model:path}",
        response_model=None,
        responses=answers(ModelCard, *GUARDED, 404),
    )
    async def model(model: str) -> dict[str, Any]:
        """A model by its name."""
        return model_card(models.named(model).name, created)

    @api.post(
        "/v1/chat/completions",
        response_model=None,
        responses=answers(Chat, *GENERATING, stream=True),
    )
    async def chat(body: ChatRequest) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        model = models.named(body.model)
        return await _respond(model, body.generation(), body.answer(model.name), body.stream)

    @api.post(
        "/v1/completions",
        response_model=None,
        responses=answers(Completion, *GENERATING, stream=True),
    )
    async def complete(body: CompletionRequest) -> Response:
        """Go on with a text, whole or as a stream of server-sent events."""
        model = models.named(body.model)
        return await _respond(model, body.generation(), body.answer(model.name), body.stream)


def _add_tgi(api: FastAPI, models: Models) -> None:
    # TGI's requests name no model.
    @api.post(
        "/generate",
        response_model=None,
        responses=answers(Generated, *GENERATING, stream=True),
    )
    async def generate(body: GenerateRequest) -> Response:
        """Go on with a text, as TGI does."""
        generation = body.generation(stream=body.stream)
        return await _respond(models.named(None), generation, body.answer(), body.stream)

    @api.post(
        "/generate_stream",
        response_class=StreamingResponse,
        responses=answers(None, *GENERATING, stream=True),
    )
    async def generate_stream(body: GenerateRequest) -> Response:
        """The same, an event a token."""
        generation = body.generation(stream=True)
        return await _respond(models.named(None), generation, body.answer(), True)


def _add_tokens(api: FastAPI, models: Models) -> None:
    @api.post("/tokenize", response_model=None, responses=answers(Tokenized, *GENERATING))
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text, or of messages in the chat template."""
        found = await models.named(body.model or None).tokenize(body.what, body.field)
        if isinstance(found, Rejected):
            raise refused(found)
        return tokenized(list(found.ids), found.longest)

    @api.post("/detokenize", response_model=None, responses=answers(Detokenized, *GENERATING))
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens."""
        found = await models.named(body.model or None).detokenize(tuple(body.tokens))
        if isinstance(found, Rejected):
            raise refused(found)
        return {"prompt": found}


async def _respond(model: Model, request: Generation, answer: Answer, stream: bool) -> Response:
    events = model.ask(request, stream)
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
        raise refused(first)
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
