"""The HTTP interface in front of a real decoder replica, in this process.

No Ray, and a socket only where something needs one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from core.config import Config
from core.decode import engine
from core.models.tiny import save_tiny_target
from serve.api import build_api
from serve.desk import HeadDesk
from serve.generation import Event, Generation, Prompt, Rejected, Tokens
from serve.models import Served
from serve.replica import DecoderReplica

CHAT, TEXT, TGI = "/v1/chat/completions", "/v1/completions", "/generate"
HELLO: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 6},
    TEXT: {"model": "tiny", "prompt": "Hello!", "max_tokens": 6},
    TGI: {"inputs": "Hello!", "parameters": {"max_new_tokens": 6}},
    "/tokenize": {"prompt": "Hello!"},
    "/detokenize": {"tokens": [40, 41]},
}
Json = dict[str, Any]


class Direct:
    """One replica, without Ray in between."""

    def __init__(self, replica: DecoderReplica, desk: HeadDesk) -> None:
        self.replica, self.desk = replica, desk

    def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        return self.replica.generate(request)

    async def tokenize(self, prompt: Prompt, field: str) -> Tokens | Rejected:
        return await self.replica.tokenize(prompt, field)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Rejected:
        return await self.replica.detokenize(token_ids)

    async def running(self) -> int:
        return 1


class Service:
    """The application, called as by a client."""

    def __init__(self, backend: Direct, config: Config, runner: asyncio.Runner) -> None:
        self.backend, self.config, self._runner = backend, config, runner
        self.replica = backend.replica
        served = Served(config.serve.model_name, backend, backend.desk, config.serve)
        self.api = build_api([served], config.serve)
        transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    def configured(self, **settings: Any) -> Service:
        """The same replica behind an application of other settings."""
        return Service(self.backend, self.config.replace(serve=settings), self._runner)

    def behind(self, backend: Direct) -> Service:
        """The same application in front of something else."""
        return Service(backend, self.config, self._runner)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def call(self, path: str, **fields: Any) -> httpx.Response:
        return self.run(self.client.post(path, json={**HELLO[path], **fields}))

    def answer(self, path: str, **fields: Any) -> Json:
        response = self.call(path, **fields)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, **fields: Any) -> list[Json]:
        """The events of a stream."""
        events = self._events(path, fields)
        if "/v1/" in path:
            assert events.pop() == "[DONE]"
        return [json.loads(one) for one in events]

    def broken_stream(self, path: str, **fields: Any) -> list[Json]:
        """The events of a stream that ends with an error."""
        events = [json.loads(one) for one in self._events(path, fields)]
        assert "error" in events[-1]
        return events

    def _events(self, path: str, fields: Json) -> list[str]:
        stream = {} if "stream" in path else {"stream": True}
        response = self.run(
            self.client.post(path, json={**HELLO.get(path, HELLO[TGI]), **stream, **fields})
        )
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return [event.removeprefix("data: ") for event in response.text.split("\n\n")[:-1]]


@contextmanager
def failing_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While this lasts, every pass of the target fails."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "target_pass", fail)
        yield


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """The application behind a socket, for clients that are no Python; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(service.api, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@contextmanager
def in_process(folder: Path, *, canary_gain: float = 0.0, **decode: Any) -> Iterator[Service]:
    """A service with the tiny target; `check_health` makes its replica follow the desk.

    Args:
        folder: for the target.
        canary_gain: of the desk.
        decode: further settings of that section.
    """
    save_tiny_target(folder / "target")
    config = Config().replace(
        target={"path": str(folder / "target"), "dtype": "float32"},
        decode={"max_context": 400, **decode},
        serve={"cpus_per_replica": 1, "model_name": "tiny"},
    )
    threads = torch.get_num_threads()
    with asyncio.Runner() as runner:
        desk = HeadDesk(None, rounds=20, gain=canary_gain)
        yield Service(Direct(DecoderReplica(config, desk.report), desk), config, runner)
    torch.set_num_threads(threads)
