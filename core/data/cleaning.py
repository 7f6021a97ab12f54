"""Cleaning of conversations: small rules, each counted by what it changed or dropped.

A rule maps messages to messages; one that returns none drops the conversation.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from core.data.conversations import Conversation, Message

Messages = tuple[Message, ...]
Rule = Callable[[Messages], Messages]

# Zero-width space, word joiner, byte-order mark, soft hyphen. Not the joiners U+200C and U+200D
# nor the direction marks: Persian, Indic scripts, Hebrew and emoji are spelt with them.
INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad]")
# JSON can spell half a character, which no tokenizer and no UTF-8 file takes.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# The button above a code block, alone on its line or glued to the language and the first line.
COPY_BUTTON_LINE = re.compile(r"(?m)^[ \t]*Copy code[ \t]*(?:\n|\Z)")
COPY_BUTTON_GLUED = re.compile(r"(?m)^((?:```)?[a-z][a-z0-9+#.-]*)Copy code\n?")
SHARE_BUTTON = re.compile(r"Share Prompt\s*\Z")
# "2 / 3": which of several answers is shown. Never indented; `1 / 0` alone is somebody's code.
PAGER_LINE = re.compile(r"(?m)^(\d{1,3}) / (\d{1,3})[ \t]*(?:\n|\Z)")

# Reasons other than a rule: no turns at all, seen before, nothing to learn within max_length.
EMPTY, DUPLICATE, LATE_ANSWER = "empty", "duplicate", "answer_behind_max_length"


@dataclass
class CleaningCounts:
    """Conversations that each rule changed or dropped."""

    changed: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def all_changed(self) -> dict[str, int]:
        """With every rule, also those that changed nothing."""
        return {rule: self.changed[rule] for rule in RULES}

    def all_dropped(self) -> dict[str, int]:
        """With every rule, and the other reasons for which a conversation is dropped."""
        return {rule: self.dropped[rule] for rule in (EMPTY, *RULES, DUPLICATE, LATE_ANSWER)}


def clean(conversation: Conversation, counts: CleaningCounts) -> Conversation | None:
    """Apply all rules in order.

    Returns:
        A conversation that starts with the user (after an optional system message), alternates,
        has no blank turn and ends with the assistant; None if a rule dropped it.
    """
    messages = conversation.messages
    if not messages:
        counts.dropped[EMPTY] += 1
        return None
    for name, rule in RULES.items():
        before, messages = messages, rule(messages)
        if not messages:
            counts.dropped[name] += 1
            return None
        counts.changed[name] += messages != before
    return dataclasses.replace(conversation, messages=messages)


def remove_broken_characters(messages: Messages) -> Messages:
    """Halves of surrogate pairs."""
    return _on_content(messages, lambda text: LONE_SURROGATE.sub("", text))


def remove_invisible_characters(messages: Messages) -> Messages:
    """Zero-width characters that web pages leave behind."""
    return _on_content(messages, lambda text: INVISIBLE.sub("", text))


def remove_ui_residue(messages: Messages) -> Messages:
    """Captions of buttons and counters that were copied with the text."""
    return _on_content(messages, _without_ui_residue)


def strip_white_space(messages: Messages) -> Messages:
    """Around each turn: templates put their own there, and tokens would merge with it."""
    return _on_content(messages, str.strip)


def drop_blank_turns(messages: Messages) -> Messages:
    """Turns of which nothing is left."""
    return tuple(message for message in messages if message.content)


def drop_late_system_turns(messages: Messages) -> Messages:
    """System messages elsewhere than at the start: most templates refuse them."""
    return messages[:1] + tuple(m for m in messages[1:] if m.role != "system")


def drop_leading_assistant_turns(messages: Messages) -> Messages:
    """Answers before the first question: dumps split long conversations anywhere."""
    head, turns = _split_system(messages)
    first = next((i for i, m in enumerate(turns) if m.role == "user"), len(turns))
    return head + turns[first:] if turns[first:] else ()


def merge_repeated_roles(messages: Messages) -> Messages:
    """Successive turns of one speaker become one, since templates expect alternation."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            message = Message(message.role, f"{merged.pop().content}\n\n{message.content}")
        merged.append(message)
    return tuple(merged)


def drop_unanswered_turn(messages: Messages) -> Messages:
    """A last question without an answer teaches nothing."""
    kept = messages if messages[-1].role == "assistant" else messages[:-1]
    return kept if any(message.role == "assistant" for message in kept) else ()


RULES: dict[str, Rule] = {
    "broken_characters": remove_broken_characters,
    "invisible_characters": remove_invisible_characters,
    "ui_residue": remove_ui_residue,
    "white_space": strip_white_space,
    "blank_turns": drop_blank_turns,
    "late_system_turns": drop_late_system_turns,
    "leading_assistant_turns": drop_leading_assistant_turns,
    "repeated_roles": merge_repeated_roles,
    "unanswered_turn": drop_unanswered_turn,
}


def _on_content(messages: Messages, change: Callable[[str], str]) -> Messages:
    return tuple(Message(message.role, change(message.content)) for message in messages)


def _without_ui_residue(text: str) -> str:
    if "Copy code" in text:
        text = COPY_BUTTON_LINE.sub("", text)
        text = COPY_BUTTON_GLUED.sub(r"\1\n", text)
    text = SHARE_BUTTON.sub("", text) if "Share Prompt" in text else text
    return PAGER_LINE.sub(_unless_arithmetic, text) if " / " in text else text


def _unless_arithmetic(match: re.Match[str]) -> str:
    shown, of = int(match[1]), int(match[2])
    return "" if 1 <= shown <= of else match[0]


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    first = 1 if messages[0].role == "system" else 0
    return messages[:first], messages[first:]
