"""Prompts that an evaluation answers: Aerie's own JSONL, and the question files of the field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data.conversations import ROLES, Conversation, Message
from core.data.selection import text_key
from core.errors import InputError
from core.paths import file_written_aside, write_atomically

TASKS = ("first_turn", "follow_up")
# MT-bench's categories, which Spec-Bench and the papers after it report as one task.
MT_BENCH = "mt_bench"
MT_BENCH_CATEGORIES = frozenset(
    {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
)
FORMS = (
    'one of {"id": "…", "task": "…", "messages": [{"role": "user", "content": "…"}]}, '
    '{"question_id": 81, "category": "writing", "turns": ["…", "…"]}, {"prompt": "…"}, or "…"'
)


@dataclass(frozen=True)
class Prompt:
    """Messages that end with the user's, and what the user asks on top of the answers.

    Attributes:
        task: groups prompts in reports.
        follow_ups: further turns of the user's, each asked when the one before is answered.
        category: a finer group within the task; selections take from each in turn.
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    follow_ups: tuple[str, ...] = ()
    category: str | None = None

    def ids(self, turns: int | None = None) -> list[str]:
        """A name for each turn that is asked; `turns` is how many at most."""
        asked = 1 + len(self.follow_ups[: None if turns is None else turns - 1])
        return [self.id] if asked == 1 else [f"{self.id}/{turn + 1}" for turn in range(asked)]

    def after(self, answers: Sequence[str]) -> tuple[Message, ...]:
        """The messages that ask the turn after so many answers."""
        messages = list(self.messages)
        for answer, question in zip(answers, self.follow_ups, strict=False):
            messages += [Message("assistant", answer), Message("user", question)]
        return tuple(messages)


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
        with (
            self._candidates.open(encoding="utf-8") as found,
            file_written_aside(path) as file,
        ):
            for line in found:
                first_question, prompts = json.loads(line)
                if bytes.fromhex(first_question) in taken:
                    continue
                taken.add(bytes.fromhex(first_question))
                for prompt in prompts:
                    file.write(_line(prompt))
                    count += 1
        return count


def _as_dict(prompt: Prompt) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "task": prompt.task,
        "messages": [message.as_dict() for message in prompt.messages],
    }


def _line(prompt: dict[str, Any]) -> bytes:
    return json.dumps(prompt, ensure_ascii=False).encode() + b"\n"


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write the file whole or not at all."""
    write_atomically(path, b"".join(_line(_as_dict(prompt)) for prompt in prompts))


def read_prompts(*paths: Path) -> list[Prompt]:
    """Read prompt files, whose forms are told apart line by line.

    They may be what `write_prompts` wrote, question files of MT-bench, FastChat, EAGLE and
    Spec-Bench, or plain prompts, whose task is the file's name.

    Raises:
        InputError: no such file, or a line that is no prompt, by its number.
    """
    prompts: list[Prompt] = []
    seen: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a JSONL of prompts, a line {FORMS}")
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                prompt = _parse(json.loads(line), path.stem, number)
                names = {prompt.id, *prompt.ids()}
                if used := names & seen.keys():
                    name = min(used)
                    raise ValueError(f"id={name!r} has been used before, in {seen[name]}")
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}; expected {FORMS}") from error
            seen.update(dict.fromkeys(names, path))
            prompts.append(prompt)
    return prompts


def _parse(value: Any, file: str, number: int) -> Prompt:
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}, not an object")
    if "turns" in value:
        return _parse_question(value)
    if "messages" not in value and "prompt" in value:
        text = _text(value, "prompt")
        named = {"id": f"{file}/{number}", "task": file, **value}
        return Prompt(_text(named, "id"), _text(named, "task"), (Message("user", text),))
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages={messages!r} is no list of messages")
    parsed = tuple(_parse_message(message) for message in messages)
    return Prompt(_text(value, "id"), _text(value, "task"), parsed)


def _parse_question(value: dict[str, Any]) -> Prompt:
    """A line of a question file; its number alone is unique within a category at best."""
    category, number, turns = _text(value, "category"), value.get("question_id"), value["turns"]
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise ValueError(f"question_id={number!r} is no number")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"turns={turns!r} is no list of questions")
    for turn in turns:
        if not isinstance(turn, str) or not turn.strip():
            raise ValueError(f"turns holds {turn!r}, which is no question")
    first, *others = turns
    return Prompt(
        id=f"{category}/{number}",
        task=MT_BENCH if category in MT_BENCH_CATEGORIES else category,
        messages=(Message("user", first),),
        follow_ups=tuple(others),
        category=category,
    )


def _text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{key}={text!r} is no text")
    return text


def _parse_message(value: Any) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise ValueError(f"{value!r} is no message with a role of {', '.join(ROLES)}")
    if not isinstance(value.get("content"), str):
        raise ValueError(f"content={value.get('content')!r} is no string")
    return Message(value["role"], value["content"])
