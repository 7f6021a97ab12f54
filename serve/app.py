"""The Ray Serve application: an ingress that speaks HTTP, and replicas that decode.

Import it as `from serve.app import build_app`: `import serve.app` after `from ray import serve`
binds the name `serve` anew.
"""

# No `from __future__ import annotations`: Ray Serve reads the type of `build_app`'s argument, and
# FastAPI those of the routes, at run time.

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from core.config import Config
from core.errors import ConfigError
from serve.errors import EXCEPTION_HANDLERS, ApiError, internal_error, refusal
from serve.protocol import (
    Accepted,
    Answer,
    ChatRequest,
    Event,
    Failed,
    Finished,
    Generation,
    Progressed,
    Rejected,
    model_card,
    model_list,
    server_sent,
)
from serve.replica import RETRY_AFTER_S, DecoderReplica

DECODER = "Decoder"
PAGE = Path(__file__).parent / "web" / "index.html"
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# What may be in a replica beyond those it decodes and those that wait in it: it refuses them
# itself, at once, where the router would let them wait.
MAX_REFUSED_AT_ONCE = 64
# A replica that is replaced first finishes what it has begun.
GRACEFUL_SHUTDOWN_S = 600.0
# Failed starts before a deployment is given up. A broken config fails every time.
MAX_STARTS = 2

logger = logging.getLogger("ray.serve")
# `ray_serve.ingress` copies the routes and all they refer to when it decorates `Ingress`: what it
# uses must stand above it, and what was added to `api` below it would be lost.
api = FastAPI(
    title="Aerie",
    summary="A speculative decoder that speaks OpenAI's chat protocol.",
    # Their pages would load scripts from elsewhere; /openapi.json stays.
    docs_url=None,
    redoc_url=None,
    exception_handlers=EXCEPTION_HANDLERS,  # type: ignore[arg-type]
)


def _running_replicas() -> int:
    applications = ray_serve.status().applications.values()
    return sum(
        deployment.replica_states.get("RUNNING", 0)
        for application in applications
        for name, deployment in application.deployments.items()
        if name == DECODER
    )


async def _prompt_tokens(events: AsyncIterator[Event]) -> int:
    """Wait for the first event, while a refusal can still set the status."""
    first = await anext(events)
    if isinstance(first, Rejected):
        raise refusal(
            first.status,
            first.message,
            param=first.param,
            code=first.code,
            retry_after_s=first.retry_after_s,
        )
    assert isinstance(first, Accepted)
    return first.prompt_tokens


async def _whole(events: Any, answer: Answer, prompt_tokens: int) -> dict[str, Any]:
    rounds: list[Progressed] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Finished):
                return answer.whole(prompt_tokens, rounds, event)
            if isinstance(event, Failed):
                raise internal_error(event.message)
            rounds.append(event)
    raise internal_error()


async def _stream(events: Any, answer: Answer, prompt_tokens: int) -> AsyncIterator[str]:
    async with aclosing(events):
        yield server_sent(answer.opening())
        try:
            async for event in events:
                if isinstance(event, Failed):
                    raise internal_error(event.message)
                if isinstance(event, Finished):
                    chunks = answer.closing(prompt_tokens, event)
                else:
                    chunks = answer.part(event)
                for chunk in chunks:
                    yield server_sent(chunk)
        except ApiError as error:
            # The status is sent; clients know an error by this event.
            yield server_sent(error.body())
            return
        yield server_sent("[DONE]")


@ray_serve.deployment(
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=1000,
    graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
)
@ray_serve.ingress(api)
class Ingress:
    """Turns HTTP into requests for the decoder replicas and their events into HTTP."""

    def __init__(self, decoder: DeploymentHandle, model_name: str) -> None:
        self._decoder = decoder.options(stream=True)
        self._model = model_name
        self._created = int(time.time())
        self._page = PAGE.read_text(encoding="utf-8")

    @api.get("/", response_class=HTMLResponse)
    async def page(self) -> HTMLResponse:
        """The chat page."""
        return HTMLResponse(self._page, headers={"Content-Security-Policy": PAGE_POLICY})

    @api.get("/health")
    async def health(self) -> JSONResponse:
        """200 while at least one decoder replica runs, else 503."""
        running = await asyncio.to_thread(_running_replicas)
        body = {"status": "ok" if running else "starting", "replicas": running}
        return JSONResponse(body, status_code=200 if running else 503)

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return model_list(self._model, self._created)

    @api.get("/v1/models/{name:path}")
    async def model(self, name: str) -> dict[str, Any]:
        """A model by its name."""
        self._check_model(name)
        return model_card(self._model, self._created)

    @api.post("/v1/chat/completions", response_model=None)
    async def chat(self, body: ChatRequest) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        self._check_model(body.model)
        answer = Answer(
            model=self._model,
            with_spans=body.aerie is not None and body.aerie.spans,
            with_usage=body.stream_options is not None and body.stream_options.include_usage,
        )
        events = self._events(body.generation())
        prompt_tokens = await _prompt_tokens(events)
        if body.stream:
            return StreamingResponse(
                _stream(events, answer, prompt_tokens),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        return JSONResponse(await _whole(events, answer, prompt_tokens))

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {self._model!r}",
                param="model",
                code="model_not_found",
            )

    async def _events(self, request: Generation) -> AsyncIterator[Event]:
        """A replica's events. Closing this, as a lost client does, stops the generation."""
        response = self._decoder.generate.remote(request)
        try:
            async for event in response:
                yield event
        except BackPressureError as error:
            raise refusal(
                429,
                "too many requests wait already; try again later",
                code="queue_full",
                retry_after_s=RETRY_AFTER_S,
            ) from error
        except Exception as error:
            logger.exception("the decoder failed")
            raise internal_error() from error
        finally:
            response.cancel()


def build_app(args: Config) -> ray_serve.Application:
    """The application for `serve.run`, `serve run serve.app:build_app` and Serve YAML.

    Args:
        args: reads `target`, `draft`, `decode` and `serve`.
    Raises:
        ConfigError: serve.max_replicas is below serve.replicas.
    """
    config, decode = args.serve, args.decode
    if config.max_replicas < config.replicas:
        raise ConfigError(
            f"serve.max_replicas={config.max_replicas} is below "
            f"serve.replicas={config.replicas}; raise it"
        )
    decoder: Any = ray_serve.deployment(
        DecoderReplica,
        name=DECODER,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
        },
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=config.max_replicas,
            # A replica whose batch is full wants another one beside it.
            target_ongoing_requests=decode.batch_size,
        ),
        max_ongoing_requests=decode.batch_size + decode.max_waiting + MAX_REFUSED_AT_ONCE,
        max_queued_requests=decode.max_waiting,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        max_constructor_retry_count=MAX_STARTS,
    )
    return Ingress.bind(decoder.bind(args), config.model_name)  # type: ignore[attr-defined]
