"""OpenAI's `POST /v1/chat/completions`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from serve.answers import Json, OpenAIAnswer, scored
from serve.fields import (
    MOST_TOP_LOGPROBS,
    Body,
    DictOf,
    ListOf,
    SampledBody,
    Unicode,
    field_problem,
)
from serve.generation import Conversation, Finished, Generation, Progressed


class TextPart(Body):
    """A part of a message; text is the only kind there is."""

    type: Literal["text"]
    text: Unicode
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description="changes nothing")


class ChatMessage(Body):
    """One message of the conversation."""

    # A client's own message objects come back with `tool_calls: null` and the like.
    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})
    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        "audio": (),
        "function_call": (),
        "refusal": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Unicode | ListOf[TextPart]
    name: Unicode | None = Field(
        None, description="changes nothing: templates have no place for it"
    )

    @model_validator(mode="before")
    @classmethod
    def _forget_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v for k, v in value.items() if v is not None or k in cls.model_fields}
        return value

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Prediction(Body):
    """What a client expects of the answer; the draft head guesses without it."""

    type: Literal["content"]
    content: Unicode | ListOf[TextPart]


class JsonSchema(Body):
    """A schema by name; `strict` changes nothing, since answers always follow it."""

    name: Unicode | None = None
    description: Unicode | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema and type: "json_schema" belong together; give both')
        try:
            self.schema_text  # noqa: B018
        except RecursionError as error:
            raise ValueError("the schema is nested too deeply") from error
        return self

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that it stands for, as JSON."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return json.dumps({"type": "object"}) if self.type == "json_object" else None


def conversation(messages: Sequence[ChatMessage]) -> Conversation:
    """The messages as templates know them: the system's role has a newer name at OpenAI."""
    return Conversation(
        tuple(("system" if m.role == "developer" else m.role, m.text) for m in messages)
    )


class ChatRequest(SampledBody):
    """The body of a request."""

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        # Models that think before they answer do it in the text, or do not.
        "reasoning_effort": ("none",),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: ListOf[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="the older name of the next one")
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = Field(
        None, description="there is one here, the default"
    )

    # Sent by many clients, without influence on the text.
    metadata: DictOf[Unicode] | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    prompt_cache_key: Unicode | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    safety_identifier: Unicode | None = None

    @model_validator(mode="after")
    def _logprobs_belong_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs is given without logprobs: true; drop it or add that"
            raise field_problem("top_logprobs", message)
        return self

    def generation(self) -> Generation:
        """What the decoder is asked."""
        limit = self.max_completion_tokens or self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        asked = self.asked([conversation(self.messages)], "messages", limit, logprobs)
        schema = self.response_format.schema_text if self.response_format else None
        return replace(asked, schema=schema)

    def answer(self, model: str) -> ChatAnswer:
        """What builds the response."""
        answer = ChatAnswer(
            model,
            "chatcmpl",
            choices=self.n,
            with_spans=self.with_spans,
            with_trees=self.with_trees,
            with_usage=self.with_usage,
        )
        answer.with_tier = self.service_tier is not None
        return answer


class ChatAnswer(OpenAIAnswer):
    """The response to a chat, which tells of its tier where one was asked for."""

    with_tier = False

    def _head(self, kind: str) -> Json:
        tier = {"service_tier": "default"} if self.with_tier else {}
        return {**super()._head(kind), **tier}

    @property
    def _kinds(self) -> tuple[str, str]:
        return "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Json | str]:
        """The first chunk of each choice says who speaks."""
        return [
            self._chunk(_choice(place, {"role": "assistant", "content": ""}))
            for place in range(self.choices)
        ]

    def _whole_choice(self, rounds: Sequence[Progressed], finished: Finished) -> Json:
        return {
            "index": finished.choice,
            "message": {
                "role": "assistant",
                "content": "".join(one.text for one in rounds),
                "refusal": None,
            },
            "logprobs": _logprobs(rounds),
            "finish_reason": finished.openai_reason,
        }

    def _part_choice(self, progressed: Progressed) -> Json:
        delta = {"content": progressed.text}
        return {**_choice(progressed.choice, delta), "logprobs": _logprobs([progressed])}

    def _last_choice(self, finished: Finished) -> Json:
        return {**_choice(finished.choice, {}), "finish_reason": finished.openai_reason}


def _choice(place: int, delta: Json) -> Json:
    return {"index": place, "delta": delta, "logprobs": None, "finish_reason": None}


def _logprobs(rounds: Sequence[Progressed]) -> Json | None:
    content = [token for one in rounds for token in scored(one.tokens)]
    return {"content": content, "refusal": None} if content else None
