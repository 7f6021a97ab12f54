"""One client's view of one request."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

# Beyond the longest deadline that a server might have.
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Question:
    """What is asked, at temperature 0."""

    prompt: str
    max_tokens: int
    stream: bool = True


@dataclass(frozen=True)
class Reply:
    """What came of a question.

    Attributes:
        question: what was asked.
        began: when (monotonic seconds).
        seconds: until the last byte.
        status: of HTTP; 0 where the connection failed.
        first_token_s: seconds until there was text; None for what is not streamed.
        tokens: of the answer, as the server counts them.
        text: of the answer.
        error: what went wrong; None for a whole answer.
    """

    question: Question
    began: float
    seconds: float
    status: int
    first_token_s: float | None = None
    tokens: int = 0
    text: str = ""
    error: str | None = None

    @property
    def refused(self) -> bool:
        """Whether the server had no room, and said so."""
        return self.status == 429

    @property
    def failed(self) -> bool:
        """Whether it is neither an answer nor a refusal."""
        return self.error is not None and not self.refused


class Client:
    """Asks one server in OpenAI's protocol; use as an async context manager."""

    def __init__(self, url: str, model: str) -> None:
        """Nothing is sent yet.

        Args:
            url: of the server, without /v1.
            model: its name there.
        """
        self._model = model
        # Each question may have a connection of its own, and none waits for another's.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> httpx.Response:
        """Any page."""
        return await self._http.get(path)

    async def ask(self, question: Question) -> Reply:
        """Ask, and wait for all of the answer; whatever goes wrong is in the reply."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question.prompt}],
            "max_tokens": question.max_tokens,
            "temperature": 0,
        }
        if question.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        reading = _Reading(question, time.monotonic())
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                reading.status = response.status_code
                if response.status_code != 200:
                    reading.error = (await response.aread()).decode(errors="replace")[:500]
                elif question.stream:
                    async for line in response.aiter_lines():
                        reading.take_line(line)
                    if not reading.done:
                        reading.error = reading.error or "the stream ended early"
                else:
                    reading.take_whole(json.loads(await response.aread()))
        except httpx.HTTPError as error:
            reading.error = f"{type(error).__name__}: {error}"
        return reading.reply()


class _Reading:
    """An answer while it comes."""

    def __init__(self, question: Question, began: float) -> None:
        self.question, self.began = question, began
        self.status, self.done = 0, False
        self.error: str | None = None
        self._parts: list[str] = []
        self._tokens = 0
        self._first: float | None = None

    def take_line(self, line: str) -> None:
        data = line.removeprefix("data: ")
        if data == line:
            return
        if data == "[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self.error = str(chunk["error"]["message"])
            return
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                if self._first is None:
                    self._first = time.monotonic() - self.began
                self._parts.append(text)
        if usage := chunk.get("usage"):
            self._tokens = usage["completion_tokens"]

    def take_whole(self, body: dict[str, Any]) -> None:
        self._parts = [body["choices"][0]["message"]["content"]]
        self._tokens = body["usage"]["completion_tokens"]

    def reply(self) -> Reply:
        return Reply(
            question=self.question,
            began=self.began,
            seconds=time.monotonic() - self.began,
            status=self.status,
            first_token_s=self._first,
            tokens=self._tokens,
            text="".join(self._parts),
            error=self.error,
        )
