"""The models that are served, by name: what answers each, and which head it drafts with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from core.config import ServeConfig
from serve.desk import Desk
from serve.errors import ApiError, internal_error
from serve.generation import Event, Failed, Generation, Prompt, Rejected, Tokens
from serve.guard import arrival
from serve.metrics import Metrics, Registry
from serve.retry import resumed

State = Literal["ok", "idle", "starting"]


class Backend(Protocol):
    """Decoder replicas of one model, as the interface sees them."""

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


@dataclass(frozen=True)
class Served:
    """A model behind its name.

    Attributes:
        name: in the API.
        backend: answers for it.
        desk: decides about its draft heads.
        config: its own section serve.
    """

    name: str
    backend: Backend
    desk: Desk
    config: ServeConfig


@dataclass(frozen=True)
class Health:
    """How many replicas a model has, and whether those are enough to answer."""

    state: State
    replicas: int


class Model:
    """A model that is served; its requests are counted, and have an end."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.name, self.backend, self.desk = served.name, served.backend, served.desk
        self._config, self._metrics = served.config, metrics

    def ask(self, request: Generation, streamed: bool) -> AsyncGenerator[Event, None]:
        """The events of a request, which are streamed to the client or not."""
        came, retries = arrival(), self._config.retries
        request = replace(request, name=came.name)
        events = resumed(self.backend.generate, request, streamed=streamed, retries=retries)
        return _until(self._metrics.watched(events), came.at, self._config.deadline_s)

    async def tokenize(self, prompt: Prompt, field: str) -> Tokens | Rejected:
        """The tokens that a prompt is read as."""
        return await self._within(self.backend.tokenize(prompt, field))

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Rejected:
        """The text of tokens."""
        return await self._within(self.backend.detokenize(token_ids))

    async def health(self) -> Health:
        """A model that may do without replicas is idle where it has none, and starts one if asked.

        Any other one is starting until it has one.
        """
        running = await self.backend.running()
        if running:
            return Health("ok", running)
        return Health("starting" if self._config.replicas else "idle", 0)

    async def _within(self, answer: Any) -> Any:
        """Where there is no replica, one is started for it, which may take as long as an answer."""
        try:
            async with asyncio.timeout(self._config.deadline_s):
                return await answer
        except TimeoutError:
            raise _too_late(self._config.deadline_s) from None


class Models:
    """All that are served. The first one answers requests that name none."""

    def __init__(self, served: Sequence[Served], metrics: Registry) -> None:
        self._models = {one.name: Model(one, metrics.of(one.name)) for one in served}

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def named(self, name: str | None) -> Model:
        """The one of that name; the first for None.

        Raises:
            ApiError: 404; there is none.
        """
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has "
                f"{', '.join(map(repr, self._models))}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    async def health(self) -> dict[str, Health]:
        """Of each model."""
        found = await asyncio.gather(*(model.health() for model in self._models.values()))
        return dict(zip(self._models, found, strict=True))


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
                raise _too_late(seconds) from None
            if isinstance(event, Failed):
                raise internal_error(event.message)
            yield event


def _too_late(seconds: float) -> ApiError:
    # Asked again, it would take as long again, beside all others.
    return ApiError(
        504,
        f"the answer took longer than {seconds:g} seconds, its waiting included; ask for fewer "
        "tokens, or when fewer others ask",
        code="deadline_exceeded",
        retry=False,
    )
