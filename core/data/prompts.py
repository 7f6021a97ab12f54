"""Prompts that an evaluation answers: JSONL of `id`, `task` and `messages`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.conversations import ROLES, Conversation, Message
from core.data.selection import text_key
from core.errors import InputError
from core.paths import TEMPORARY, write_atomically

TASKS = ("first_turn", "follow_up")


@dataclass(frozen=True)
class Prompt:
    """Messages that end with the user's; `task` groups prompts in reports."""

    id: str
    task: str
    messages: tuple[Message, ...]


def prompts_of(conversation: Conversation) -> tuple[Prompt, ...]:
    """What a user asks first, and what they ask after the real first answer, if they do."""
    ends = [i for i, message in enumerate(conversation.messages, 1) if message.role == "user"]
    return tuple(
        Prompt(f"{conversation.id}/{turn}", task, conversation.messages[:end])
        for turn, (task, end) in enumerate(zip(TASKS, ends, strict=False), start=1)
    )


def questions_of(conversation: Conversation) -> list[bytes]:
    """A key for each text of the user's."""
    return [text_key(m.content) for m in conversation.messages if m.role == "user"]


class PromptPool:
    """Collects the held-out conversations' prompts, without those that training has seen.

    Dumps hold many conversations that begin alike: a prompt whose first question any training
    conversation contains, or another prompt's conversation, is left out. Candidates wait in a
    file, so that memory holds 16 bytes a question.
    """

    def __init__(self, candidates: Path, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._trained: set[bytes] = set()
        self._candidates = candidates
        self._file = candidates.open("w", encoding="utf-8")

    def saw(self, questions: Iterable[bytes]) -> None:
        """Take note of what a training conversation asks."""
        self._trained.update(questions)

    def offer(self, questions: Sequence[bytes], prompts: Iterable[tuple[Prompt, int]]) -> None:
        """Take note of a held-out conversation's prompts, each with its length in tokens."""
        short = [_as_dict(prompt) for prompt, length in prompts if length <= self.max_tokens]
        self._file.write(json.dumps([questions[0].hex(), short]) + "\n")

    def write(self, path: Path) -> int:
        """Write the prompts in the order in which they were offered; returns how many."""
        self._file.close()
        taken, count = self._trained, 0
        aside = path.with_name(f".{path.name}{TEMPORARY}")
        with (
            self._candidates.open(encoding="utf-8") as found,
            aside.open("w", encoding="utf-8") as file,
        ):
            for line in found:
                first_question, prompts = json.loads(line)
                if bytes.fromhex(first_question) in taken:
                    continue
                taken.add(bytes.fromhex(first_question))
                for prompt in prompts:
                    file.write(json.dumps(prompt, ensure_ascii=False) + "\n")
                    count += 1
        aside.replace(path)
        return count


def _as_dict(prompt: Prompt) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "task": prompt.task,
        "messages": [message.as_dict() for message in prompt.messages],
    }


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write the file whole or not at all."""
    lines = [json.dumps(_as_dict(prompt), ensure_ascii=False) + "\n" for prompt in prompts]
    write_atomically(path, "".join(lines).encode())


def read_prompts(path: Path) -> list[Prompt]:
    """Read what `write_prompts` wrote, or a user's own file of that form.

    Raises:
        InputError: no such file, or a line that is no prompt, by its number.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a JSONL of prompts (id, task, messages)")
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                prompt = _parse(json.loads(line))
                if prompt.id in seen:
                    raise ValueError(f"id={prompt.id!r} has been used before")
                seen.add(prompt.id)
                prompts.append(prompt)
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number}: {error}; expected "
                    '{"id": "…", "task": "…", "messages": [{"role": "user", "content": "…"}]}'
                ) from error
    return prompts


def _parse(value: Any) -> Prompt:
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}, not an object")
    for key in ("id", "task"):
        if not isinstance(value.get(key), str):
            raise ValueError(f"{key}={value.get(key)!r} is no string")
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages={messages!r} is no list of messages")
    return Prompt(value["id"], value["task"], tuple(_parse_message(m) for m in messages))


def _parse_message(value: Any) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise ValueError(f"{value!r} is no message with a role of {', '.join(ROLES)}")
    if not isinstance(value.get("content"), str):
        raise ValueError(f"content={value.get('content')!r} is no string")
    return Message(value["role"], value["content"])
