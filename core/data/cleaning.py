"""Cleaning of conversations: small rules, each counted by what it changed or dropped.

A rule maps messages to messages; one that returns none drops the conversation. The rules are
Vicuna's (FastChat's `data/clean_sharegpt.py`), with what later dumps turned out to need.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.data.conversations import Conversation, Kind, Message, pack_messages
from core.data.html import html_to_markdown
from core.data.language import language_of

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

EMAIL = re.compile(r"\b[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
# Seven digits at least, with an international prefix or the separators of a written number: bare
# digits are mostly sizes and ids.
PHONE = re.compile(
    r"(?<![\w.+/-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w/-]|\.\d)"
)
EMAIL_MARK, PHONE_MARK = "<EMAIL>", "<PHONE>"

# Reasons other than a rule: no turns at all, seen before, much like another one, nothing to learn
# within max_length.
EMPTY, DUPLICATE, NEAR_DUPLICATE = "empty", "duplicate", "near_duplicate"
LATE_ANSWER = "answer_behind_max_length"
REASONS = (DUPLICATE, NEAR_DUPLICATE, LATE_ANSWER)

SAMPLES = 3
SAMPLE_CHARACTERS = 160
SAMPLE_LEAD = 40


@dataclass
class CleaningCounts:
    """Conversations that each rule changed or dropped, and a few of them to look at.

    The samples are those of the smallest content hash, so that they depend on nothing else.
    """

    changed: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    # "changed" or "dropped" → rule → content hash → the sample.
    samples: dict[str, dict[str, dict[str, Any]]] = field(
        default_factory=lambda: {"changed": {}, "dropped": {}}
    )

    def note(self, what: str, rule: str, content: str, sample: Callable[[], Any]) -> None:
        """Count a conversation under a rule; `sample` is made only if it will be kept."""
        (self.changed if what == "changed" else self.dropped)[rule] += 1
        self.sample(what, rule, content, sample)

    def sample(self, what: str, rule: str, content: str, sample: Callable[[], Any]) -> None:
        """Keep a sample, made only if it is among those of the smallest hash."""
        kept = self.samples[what].setdefault(rule, {})
        if content in kept or (len(kept) == SAMPLES and content > max(kept)):
            return
        kept[content] = sample()
        if len(kept) > SAMPLES:
            del kept[max(kept)]

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what another process counted, as its `as_dict` gave it."""
        self.changed.update(other["changed"])
        self.dropped.update(other["dropped"])
        for what, rules in other["samples"].items():
            for rule, samples in rules.items():
                for content, sample in samples.items():
                    self.sample(what, rule, content, functools.partial(_itself, sample))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `merge`."""
        return {"changed": self.changed, "dropped": self.dropped, "samples": self.samples}

    def all_changed(self, rules: Iterable[str]) -> dict[str, int]:
        """With every rule, also those that changed nothing."""
        return {rule: self.changed[rule] for rule in rules}

    def all_dropped(self, rules: Iterable[str]) -> dict[str, int]:
        """With every rule, and the other reasons for which a conversation is dropped."""
        return {rule: self.dropped[rule] for rule in (EMPTY, *rules, *REASONS)}

    def shown_samples(self) -> dict[str, dict[str, list[Any]]]:
        """For the report: samples in the order of their content hash."""
        return {
            what: {rule: [found[key] for key in sorted(found)] for rule, found in rules.items()}
            for what, rules in self.samples.items()
        }


def _itself(sample: Any) -> Any:
    return sample


def clean(
    conversation: Conversation, counts: CleaningCounts, rules: Mapping[str, Rule] | None = None
) -> Conversation | None:
    """Apply all rules in order.

    Args:
        conversation: as it was read.
        counts: where each change is noted.
        rules: by name; all that are on by default, if None.
    Returns:
        With all rules, a chat that starts with the user (after an optional system message), has
        no blank turn nor two of one speaker in a row, and ends with the assistant. None if a rule
        dropped it.
    """
    messages = conversation.messages
    content: str | None = None
    if not messages:
        counts.note("dropped", EMPTY, _key(conversation), lambda: {"id": conversation.id})
        return None
    for name, rule in (RULES if rules is None else rules).items():
        if name in NOT_FOR[conversation.kind]:
            continue
        before, messages = messages, rule(messages)
        if messages is before or messages == before:
            continue
        content = content or _key(conversation)
        what = "changed" if messages else "dropped"
        counts.note(what, name, content, _sampler(conversation.id, before, messages))
        if not messages:
            return None
    return dataclasses.replace(conversation, messages=messages)


def rules_for(
    off: Iterable[str], only_languages: Iterable[str], drop_languages: Iterable[str], pii: bool
) -> dict[str, Rule]:
    """The rules in their order: the usual ones without those that are off, and what was asked."""
    rules = {name: rule for name, rule in RULES.items() if name not in set(off)}
    only, dropped = frozenset(only_languages), frozenset(drop_languages)
    if only or dropped:
        rules[LANGUAGE] = lambda messages: _unless_language(messages, only, dropped)
    if pii:
        rules[PERSONAL_DATA] = mask_personal_data
    return rules


def _key(conversation: Conversation) -> str:
    packed = pack_messages(conversation.messages)
    return hashlib.sha256(packed.encode()).hexdigest()


def _sampler(own_id: str, before: Messages, after: Messages) -> Callable[[], dict[str, str]]:
    return lambda: {"id": own_id, **_difference(before, after)}


def _difference(before: Messages, after: Messages) -> dict[str, str]:
    """The texts around the place where two conversations part."""
    texts = ["\n".join(f"{m.role}: {m.content}" for m in messages) for messages in (before, after)]
    old, new = (text.encode("utf-8", "replace").decode() for text in texts)
    place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
    place = min(len(old), len(new)) if place is None else place
    start = max(0, place - SAMPLE_LEAD)
    end = start + SAMPLE_CHARACTERS
    shown = {"before": old[start:end]}
    return {**shown, "after": new[start:end]} if after else shown


def remove_broken_characters(messages: Messages) -> Messages:
    """Halves of surrogate pairs."""
    return _on_content(messages, lambda text: LONE_SURROGATE.sub("", text))


def convert_html(messages: Messages) -> Messages:
    """Turns that are HTML, as pages were copied, become Markdown; code blocks are kept."""
    return _on_content(messages, html_to_markdown)


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
    if turns and first == 0:
        return messages
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
    spoken = [number for number, m in enumerate(messages, start=1) if m.role == "assistant"]
    return messages[: spoken[-1]] if spoken else ()


def mask_personal_data(messages: Messages) -> Messages:
    """E-mail addresses and telephone numbers become `<EMAIL>` and `<PHONE>`."""
    return _on_content(messages, _without_personal_data)


# `broken_characters` comes first and is never off: no tokenizer takes them.
BROKEN_CHARACTERS, LANGUAGE, PERSONAL_DATA = "broken_characters", "language", "personal_data"
RULES: dict[str, Rule] = {
    BROKEN_CHARACTERS: remove_broken_characters,
    "html": convert_html,
    "invisible_characters": remove_invisible_characters,
    "ui_residue": remove_ui_residue,
    "white_space": strip_white_space,
    "blank_turns": drop_blank_turns,
    "late_system_turns": drop_late_system_turns,
    "leading_assistant_turns": drop_leading_assistant_turns,
    "repeated_roles": merge_repeated_roles,
    "unanswered_turn": drop_unanswered_turn,
}
# In the order in which reports list them.
ALL_RULES = (*RULES, LANGUAGE, PERSONAL_DATA)
# Running text has no turns, and a prompt has no answer.
NOT_FOR: dict[Kind, frozenset[str]] = {
    "chat": frozenset(),
    "text": frozenset(
        ["late_system_turns", "leading_assistant_turns", "repeated_roles", "unanswered_turn"]
    ),
    "prompt": frozenset(["unanswered_turn"]),
}


def _on_content(messages: Messages, change: Callable[[str], str]) -> Messages:
    return tuple(Message(message.role, change(message.content)) for message in messages)


def _unless_language(messages: Messages, only: frozenset[str], dropped: frozenset[str]) -> Messages:
    language = language_of(messages)
    return () if language in dropped or (only and language not in only) else messages


def _without_personal_data(text: str) -> str:
    text = EMAIL.sub(EMAIL_MARK, text) if "@" in text else text
    return PHONE.sub(PHONE_MARK, text)


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
