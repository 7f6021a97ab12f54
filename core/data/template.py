"""The chat template: conversations to tokens, and which of them the assistant spoke.

The loss mask covers the assistant's tokens and the token that ends its turn, since both are what
a model generates. White space that a template puts after that end token, such as ChatML's line
break, is not covered: generation has stopped by then.

A template that marks its generation (`{% generation %}`) is believed. For all others the spans
come from the rendering itself: the text of the messages before an answer, with the generation
prompt, begins the text of the messages up to and with it, and that begins the whole text.
Character spans become token spans by the tokenizer's own offsets.

Templates of models that reason render an answer differently once a question follows it: Qwen3's
leave its think block out. What such a model is trained on is the whole text, so the answer is
looked for there, by a mark in its place. It begins where the generation prompt ends: what the
template puts in front of the content, such as an empty think block, is the model's to write and
covered if the prompt leaves it out, as Qwen3's does. If the prompt has it and the whole text does
not, the answer begins with its content. The last answer always follows its whole prompt.

Roles that a template does not take are written so that it does (`adapted`): a system message in
front of the first question, a tool's answer as a marked turn of the user's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from core.data.chat_templates import BUILT_IN
from core.data.conversations import Message, Role
from core.errors import InputError

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]

GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
# What every template of a chat must take.
TWO_ROUNDS = (
    Message("user", "What is 2 + 2?"),
    Message("assistant", "It is 4."),
    Message("user", "And 3 + 3?"),
    Message("assistant", "That is 6."),
)


class TemplateError(InputError):
    """The tokenizer's chat template cannot be used, or not for this conversation."""


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> tuple[Ids, Mask]:
    """Tokenize a conversation in the tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        messages: ending with the assistant's.
        max_length: tokens are cut after so many.
    Returns:
        input_ids int32 [T] and loss_mask uint8 [T], T <= max_length. The mask is all zero only
        if the first answer starts behind the cut.
    Raises:
        TemplateError: no template, it refuses the messages, or it does not show where the
            assistant speaks.
    """
    messages = adapted(tokenizer, messages)
    if tokenizer.is_fast and GENERATION_MARK.search(chat_template(tokenizer)):
        ids, mask = _encode_marked(tokenizer, messages)
        answer_starts_at = int(mask.argmax())
    else:
        ids, mask, answer_starts_at = _encode_derived(tokenizer, messages, max_length)
    if not mask.any() and answer_starts_at < max_length:
        raise TemplateError(
            "the loss mask is all zero: the chat template renders nothing for the assistant's "
            "turns; use the template that the model was trained with"
        )
    return ids[:max_length], mask[:max_length]


def check_rounds(tokenizer: PreTrainedTokenizerBase) -> None:
    """Encode a conversation of two rounds, to find a template that cannot be used in time.

    Raises:
        TemplateError: as `encode_conversation`.
    """
    try:
        encode_conversation(tokenizer, TWO_ROUNDS, max_length=2**31 - 1)
    except TemplateError as error:
        raise TemplateError(f"tried on a conversation of two rounds: {error}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages, with the generation prompt: what the assistant answers to.

    Raises:
        TemplateError: no template, or it refuses the messages.
    """
    text = prompt_text(tokenizer, messages)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text of which `encode_prompt` gives the tokens; its special ones are in it.

    Raises:
        TemplateError: no template, or it refuses the messages.
    """
    return render(tokenizer, adapted(tokenizer, messages), generation_prompt=True)


def adapted(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages in roles that the tokenizer's template takes.

    Raises:
        TemplateError: no template.
    """
    roles = {message.role for message in messages}
    if "tool" in roles and not _takes(tokenizer, "tool"):
        answer = "<tool_response>\n{}\n</tool_response>"
        messages = [
            Message("user", answer.format(m.content)) if m.role == "tool" else m for m in messages
        ]
    if "system" in roles and not _takes(tokenizer, "system"):
        # Then it reads as what the user says first.
        messages = [Message("user", m.content) if m.role == "system" else m for m in messages]
    if roles <= {"user", "assistant"}:
        return tuple(messages)
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role == "user":
            message = Message("user", f"{merged.pop().content}\n\n{message.content}")
        merged.append(message)
    return tuple(merged)


def _takes(tokenizer: PreTrainedTokenizerBase, role: Role) -> bool:
    # By the template's text too: a tokenizer may be given another one.
    return _probe(tokenizer, chat_template(tokenizer), role)


@functools.lru_cache(maxsize=64)
def _probe(tokenizer: PreTrainedTokenizerBase, _: str, role: Role) -> bool:
    """Whether a message of that role shows in the rendering."""
    mark, question, answer = "6d61726b", Message("user", "a"), Message("assistant", "b")
    tried = {
        "system": (Message("system", mark), question, answer),
        "tool": (question, answer, Message("tool", mark), answer),
    }[role]
    try:
        return mark in render(tokenizer, tried, generation_prompt=False)
    except TemplateError:
        return False


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool
) -> str:
    """The text of the messages in the tokenizer's chat template.

    Raises:
        TemplateError: no template, or it refuses the messages.
    """
    text = _apply(tokenizer, messages, tokenize=False, add_generation_prompt=generation_prompt)
    assert isinstance(text, str)
    return text


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's source.

    Raises:
        TemplateError: the tokenizer has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise TemplateError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; name its "
            f"family's by target.template={'|'.join(BUILT_IN)}, use the instruct variant of the "
            "model, or put a chat_template.jinja into its folder"
        )
    return str(template)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template."""
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's token ids: vocabulary, merges, normalization, …."""
    if tokenizer.is_fast:
        content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        # State that calls leave behind.
        del content["truncation"], content["padding"]
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: bool) -> Any:
    chat_template(tokenizer)
    try:
        return tokenizer.apply_chat_template([m.as_dict() for m in messages], **options)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(message.role for message in messages[:6])
        raise TemplateError(
            f"the tokenizer's chat template refuses a conversation of {roles}"
            f"{', …' if len(messages) > 6 else ''}: {error}; leave such conversations out, or use "
            "another template"
        ) from error


def _encode_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[Ids, Mask]:
    encoding = _apply(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
    return (
        np.asarray(encoding["input_ids"], dtype=np.int32),
        np.asarray(encoding["assistant_masks"], dtype=np.uint8),
    )


def _encode_derived(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> tuple[Ids, Mask, int]:
    """Ids and mask up to the cut at least, and the token at which the first answer starts."""
    text = render(tokenizer, messages, generation_prompt=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids = np.asarray(encoding["input_ids"], dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.uint8)
    if tokenizer.is_fast:
        starts = np.asarray([start for start, _ in encoding["offset_mapping"]])

    def first_token_from(place: int) -> int:
        if tokenizer.is_fast:
            return int(starts.searchsorted(place))
        return _num_prefix_tokens(tokenizer, ids, text[:place])

    first_answer: int | None = None
    for begin, end in _answers(tokenizer, messages, text):
        start = first_token_from(begin)
        first_answer = start if first_answer is None else first_answer
        if start >= max_length:
            break
        mask[start : first_token_from(end)] = 1
    return ids, mask, first_answer or 0


def _answers(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str
) -> Iterator[tuple[int, int]]:
    """Where each of the assistant's turns begins and ends in the text, in characters."""
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = render(tokenizer, messages[:number], generation_prompt=True)
        through = render(tokenizer, messages[: number + 1], generation_prompt=False)
        if text.startswith(through) and through.startswith(before):
            begin, end = len(before), len(through)
        else:
            found = _located(tokenizer, messages, number, text, before)
            if found is None:
                raise TemplateError(
                    f"the chat template renders message {number} differently once others follow "
                    "it, so that the assistant's tokens cannot be told; put {% generation %} and "
                    "{% endgeneration %} around the assistant's content in the template"
                )
            begin, end = found
        # What is left at the end is the end token, and white space behind it that is not spoken.
        yield begin, begin + len(text[begin:end].rstrip())


def _located(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    number: int,
    text: str,
    before: str,
) -> tuple[int, int] | None:
    """Where an answer stands in a text that its own prompt and turn do not begin.

    Args:
        number: which of the messages is the answer.
        text: of all messages.
        before: the text of those before the answer, with the generation prompt.
    Returns:
        Where the answer begins, and where its turn ends; None if the text does not show it.
    """
    found = _content(tokenizer, messages, number, text)
    if found is None:
        return None
    content, end = found
    if text.startswith(before):
        return len(before), end
    history = render(tokenizer, messages[:number], generation_prompt=False)
    opening = before.removeprefix(history)
    # Earlier messages are rendered differently, but the prompt's end is there.
    if opening and text[:content].endswith(opening):
        return content, end
    # The prompt goes on, with a think block or its beginning, where this answer has its content.
    # Not so the last one, which must be what the model is asked for.
    follows = len(history) < content and before.startswith(text[:content])
    return (content, end) if follows and number < len(messages) - 1 else None


def _content(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], number: int, text: str
) -> tuple[int, int] | None:
    """Where an answer's content begins in the whole text, and where its turn ends.

    The text around it is the same with a mark in its place. What ends a turn is what stands
    behind the mark when nothing follows.
    """
    mark = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    marked = (*messages[:number], Message("assistant", mark), *messages[number + 1 :])
    whole = render(tokenizer, marked, generation_prompt=False).split(mark)
    alone = render(tokenizer, marked[: number + 1], generation_prompt=False).split(mark)
    if not len(whole) == len(alone) == 2:
        return None
    (front, behind), (_, ending) = whole, alone
    same = text.startswith(front) and text[len(front) :].endswith(behind)
    if not (same and ending.strip() and behind.startswith(ending)):
        return None
    return len(front), len(text) - len(behind) + len(ending)


def _num_prefix_tokens(tokenizer: PreTrainedTokenizerBase, ids: Ids, prefix: str) -> int:
    """Tokens of the beginning of a text, for tokenizers that give no offsets."""
    prefix_ids = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    if not np.array_equal(ids[: len(prefix_ids)], prefix_ids):
        raise TemplateError(
            f"the tokenizer {tokenizer.name_or_path!r} joins the assistant's first or last token "
            "with what stands beside it; use its fast variant (tokenizer.json)"
        )
    return len(prefix_ids)
