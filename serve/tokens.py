"""vLLM's `POST /tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from serve.fields import Body, ListOf, TokenId, Unicode
from serve.generation import Prompt
from serve.openai_chat import ChatMessage, conversation


class TokenizeRequest(Body):
    """A text, or messages that go through the chat template; `model` may be left out."""

    model: str | None = None
    prompt: Unicode | None = None
    messages: ListOf[ChatMessage] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    @property
    def what(self) -> Prompt:
        if self.prompt is not None:
            return self.prompt
        return conversation(self.messages or [])

    @property
    def field(self) -> str:
        return "prompt" if self.messages is None else "messages"


class DetokenizeRequest(Body):
    """Tokens of a text; `model` may be left out."""

    model: str | None = None
    tokens: ListOf[TokenId]


def tokenized(tokens: list[int], longest: int) -> dict[str, Any]:
    """Body of the first one's response."""
    return {"count": len(tokens), "max_model_len": longest, "tokens": tokens}
