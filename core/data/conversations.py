"""Conversations: who said what. Every reader of a format makes these, every stage reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from core.errors import InputError

# `tool` is what a called function answered; the call itself is the assistant's.
Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)

# What a record is for: turns of which the assistant's are learnt; running text, learnt whole;
# questions without an answer, which only become prompts.
Kind = Literal["chat", "text", "prompt"]


class RecordError(InputError):
    """A record is no conversation; the others can go on."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, str]:
        """As chat templates and JSON have it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """The turns of one conversation; `id` is empty where the record has none.

    A `text` is one message of the assistant's.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    kind: Kind = "chat"


def pack_messages(messages: tuple[Message, ...]) -> str:
    """Messages as one string, for tables; `unpack_messages` is the way back."""
    # ASCII only, so that even half a surrogate pair survives.
    return json.dumps([(message.role, message.content) for message in messages])


def unpack_messages(packed: str) -> tuple[Message, ...]:
    """What `pack_messages` packed."""
    return tuple(Message(role, content) for role, content in json.loads(packed))


def shown(value: Any, longest: int = 60) -> str:
    """A value as JSON for a message, cut to a length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= longest else text[: longest - 1] + "…"
