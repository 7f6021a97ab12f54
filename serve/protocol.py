"""OpenAI's chat protocol as types: requests, responses, errors; and what the replicas exchange.

Differences from OpenAI's service, all documented in the README:

* `temperature` and `top_p` default to the server's `decode` section (greedy as it comes), so that
  answers are those of the evaluation unless a client asks otherwise.
* A field that would change the output and is not supported is an error, never ignored. One that
  changes nothing (`user`, `metadata`, …, or `logit_bias: {}`) is accepted.
* `aerie: {"spans": true}` in a request adds `choices[0].aerie` with the text of each token and
  whether the draft head guessed it, and `aerie` with the figures of the whole answer.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.errors import ApiError
from serve.text import Span

# Sent by many clients, without influence on the text.
IGNORED = {
    "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip

# Not supported, but harmless with these values.
NEUTRAL: dict[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


def _encodable(text: str) -> str:
    """JSON can escape half a surrogate pair, which is no character and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode at position {error.start}") from error
    return text


Unicode = Annotated[str, AfterValidator(_encodable)]
Role = Literal["system", "user", "assistant"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Request):
    """A part of a message; text is the only kind there is."""

    type: Literal["text"]
    text: Unicode


class ChatMessage(_Request):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Unicode | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _forget_nulls(cls, value: Any) -> Any:
        """A client's own message objects come back with `tool_calls: null` and the like."""
        if isinstance(value, dict):
            return {k: v for k, v in value.items() if v is not None or k in cls.model_fields}
        return value

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Request):
    """How a stream is sent."""

    include_usage: bool = False
    include_obfuscation: bool = False


class AerieOptions(_Request):
    """Aerie's extension."""

    spans: bool = False


class ChatRequest(_Request):
    """Body of `POST /v1/chat/completions`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, description="the older name of the next one")
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Unicode | list[Annotated[Unicode, Field(min_length=1)]] | None = None
    aerie: AerieOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _sort_out_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, given in value.items():
            if name in cls.model_fields:
                if given is not None:
                    kept[name] = given
            elif name in NEUTRAL:
                if given is not None and given not in NEUTRAL[name]:
                    neutral = " or ".join(json.dumps(allowed) for allowed in NEUTRAL[name])
                    # Not a ValueError: this way the error names the field.
                    raise ApiError(
                        400,
                        f"{name} is supported here only as {neutral}; leave it out",
                        param=name,
                        code="unsupported_parameter",
                    )
            elif name not in IGNORED:
                kept[name] = given  # refused as unknown
        return kept

    @field_validator("stop")
    @classmethod
    def _some_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value == "" or (isinstance(value, list) and len(value) > 16):
            raise ValueError("give up to 16 strings that are not empty")
        return value

    @model_validator(mode="after")
    def _options_belong_together(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given without stream: true; drop it or stream")
        return self

    def generation(self) -> Generation:
        """What the decoder needs of it."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Generation(
            # OpenAI's newer name for the system's role; templates know the older one.
            messages=tuple(
                ("system" if m.role == "developer" else m.role, m.text) for m in self.messages
            ),
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stops=tuple(stops),
        )


# --- Between ingress and replica ---------------------------------------------


@dataclass(frozen=True)
class Generation:
    """A request to a decoder replica; None means the server's default.

    `messages` are (role, content).
    """

    messages: tuple[tuple[Role, str], ...]
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rejected:
    """The only event of a request that is not served.

    Attributes:
        status: of HTTP.
        retry_after_s: when the same request may find room; None if it never will.
    """

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    retry_after_s: int | None = None


@dataclass(frozen=True)
class Failed:
    """Last event of a request that the decoder could not finish."""

    message: str


@dataclass(frozen=True)
class Accepted:
    """First event: the request waits for its turn or is at work."""

    prompt_tokens: int


@dataclass(frozen=True)
class Progressed:
    """One round: its text (which may be none yet), its tokens and the size of its draft tree."""

    spans: tuple[Span, ...]
    num_tokens: int
    tree_size: int

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)


@dataclass(frozen=True)
class Finished:
    """Last event.

    Attributes:
        rounds: target passes after the prompt's.
        accepted_length: τ, tokens that such a pass committed on average.
        tokens_per_second: from the start of the prefill; waiting for a turn does not count.
    """

    reason: Literal["stop", "length"]
    completion_tokens: int
    rounds: int
    accepted_length: float
    tokens_per_second: float


Event = Rejected | Accepted | Progressed | Finished | Failed


# --- Responses ---------------------------------------------------------------


@dataclass
class Answer:
    """Builds the JSON of one response, whole or in chunks."""

    model: str
    with_spans: bool = False
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, prompt_tokens: int, rounds: Sequence[Progressed], finished: Finished
    ) -> dict[str, Any]:
        """A response that is not streamed."""
        choice: dict[str, Any] = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "".join(progressed.text for progressed in rounds),
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": finished.reason,
        }
        if self.with_spans:
            choice["aerie"] = {"spans": [span for each in rounds for span in each.spans]}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": _usage(prompt_tokens, finished.completion_tokens),
            **self._figures(finished),
        }

    def opening(self) -> dict[str, Any]:
        """The first chunk says who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def part(self, progressed: Progressed) -> list[dict[str, Any]]:
        """The chunk of one round; none where there is nothing to send yet."""
        if not progressed.text and not self.with_spans:
            return []
        chunk = self._chunk({"content": progressed.text})
        if self.with_spans:
            chunk["choices"][0]["aerie"] = {
                "spans": progressed.spans,
                "tokens": progressed.num_tokens,
                "tree_size": progressed.tree_size,
            }
        return [chunk]

    def closing(self, prompt_tokens: int, finished: Finished) -> list[dict[str, Any]]:
        """The chunk with the reason, and the one with the usage where it was asked for."""
        last = self._chunk({}, finished.reason) | self._figures(finished)
        if not self.with_usage:
            return [last]
        usage = _usage(prompt_tokens, finished.completion_tokens)
        return [last, self._head("chat.completion.chunk") | {"choices": [], "usage": usage}]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.with_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _figures(self, finished: Finished) -> dict[str, Any]:
        if not self.with_spans:
            return {}
        return {
            "aerie": {
                "accepted_length": round(finished.accepted_length, 4),
                "tokens_per_second": round(finished.tokens_per_second, 2),
                "rounds": finished.rounds,
            }
        }


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_list(name: str, created: int) -> dict[str, Any]:
    """Body of `GET /v1/models`."""
    return {"object": "list", "data": [model_card(name, created)]}


def model_card(name: str, created: int) -> dict[str, Any]:
    """Body of `GET /v1/models/{name}`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "aerie"}


def server_sent(content: dict[str, Any] | str) -> str:
    """One event of a stream."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n"
