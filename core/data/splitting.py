"""Conversations to examples of at most `max_length` tokens, divided between turns.

A round is a question and all that answers it. Each part of a long conversation holds as many
whole rounds as fit, and the system message in front of them. Of a round that is too long alone,
answers stay whole: the question loses its beginning, and answers behind those that fit are left
out. An answer that is too long alone loses its end.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from core.data.conversations import Conversation, Message
from core.data.template import Ids, Mask, encode_conversation, encode_prompt

WHOLE = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Part:
    """One example's worth of a conversation.

    Attributes:
        input_ids_T: int32 [T].
        loss_mask_T: uint8 [T]; all zero if the first answer starts behind max_length.
        num_turns: messages that went into it.
        cut: whether tokens at its end were left out.
        shortened: whether a question lost its beginning.
        left_out: answers of a long round that are in no part.
    """

    input_ids_T: Ids
    loss_mask_T: Mask
    num_turns: int
    cut: bool
    shortened: bool = False
    left_out: int = 0


def encode_parts(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    max_length: int,
    *,
    split: bool = True,
) -> list[Part]:
    """Tokenize a conversation in the tokenizer's template, as one example or several.

    Args:
        tokenizer: with a chat template, unless the conversation is running text.
        conversation: a chat that is cleaned, or a text.
        max_length: tokens of the longest part.
        split: whether what is too long is divided; else it is cut, and there is one part.
    Raises:
        TemplateError: as `encode_conversation`.
    """
    if conversation.kind == "text":
        return _text_parts(tokenizer, conversation, max_length, split)
    messages = conversation.messages
    ids, mask = encode_conversation(tokenizer, messages, WHOLE)
    if len(ids) <= max_length or not split:
        part = Part(ids[:max_length], mask[:max_length], len(messages), len(ids) > max_length)
        return [part]
    head = messages[:1] if messages[0].role == "system" else ()
    rounds = _rounds(messages[len(head) :])
    costs = _costs(mask, rounds, len(ids))
    extra = _head_tokens(tokenizer, head)
    parts = []
    first = 0
    while first < len(rounds):
        end = _as_many_as_fit(costs, first, extra if first else 0, max_length)
        # The estimate may be a few tokens too low; then the last round waits for the next part.
        while True:
            chosen = (*head, *(message for one in rounds[first:end] for message in one))
            ids, mask = encode_conversation(tokenizer, chosen, WHOLE)
            if len(ids) <= max_length or end == first + 1:
                break
            end -= 1
        part = Part(ids[:max_length], mask[:max_length], len(chosen), len(ids) > max_length)
        if part.cut:
            part = _LongRound(tokenizer, chosen).part(max_length) or part
        parts.append(part)
        first = end
    return parts


@dataclass(frozen=True)
class _LongRound:
    """A round that is too long for a part, with the system message if there is one."""

    tokenizer: PreTrainedTokenizerBase
    messages: Sequence[Message]

    @cached_property
    def ends(self) -> list[int]:
        """Numbers of messages up to each answer."""
        return [n for n, one in enumerate(self.messages, start=1) if one.role == "assistant"]

    @cached_property
    def asked(self) -> int | None:
        """Where the question is; a conversation may begin with an answer."""
        roles = [message.role for message in self.messages]
        return roles.index("user") if "user" in roles else None

    @cached_property
    def last(self) -> int:
        """The question's last character: so much of it is always left."""
        return 0 if self.asked is None else max(0, len(self.messages[self.asked].content) - 1)

    def part(self, max_length: int) -> Part | None:
        """As many answers as fit whole, else the first one's beginning; None if there are none."""
        if not self.ends:
            return None
        count = bisect.bisect_left(
            self.ends, True, key=lambda end: len(self.encode(end, self.last)[0]) > max_length
        )
        if not count:
            return self._begun_answer(max_length)
        end = self.ends[count - 1]
        start = bisect.bisect_left(
            range(self.last), True, key=lambda start: len(self.encode(end, start)[0]) <= max_length
        )
        ids, mask = self.encode(end, start)
        return Part(ids, mask, end, False, start > 0, len(self.ends) - count)

    def _begun_answer(self, max_length: int) -> Part:
        """The first answer without its end, behind a question that leaves it half of the room."""
        end, start = self.ends[0], 0
        ids, mask = self.encode(end, start)
        if not mask[:max_length].any():
            half = max_length // 2
            start = bisect.bisect_left(
                range(self.last),
                True,
                key=lambda start: bool(self.encode(end, start)[1][:half].any()),
            )
            ids, mask = self.encode(end, start)
        ids, mask = ids[:max_length], mask[:max_length]
        return Part(ids, mask, end, True, start > 0, len(self.ends) - 1)

    def encode(self, end: int, start: int) -> tuple[Ids, Mask]:
        """Messages up to some end, the question from some character on."""
        chosen = list(self.messages[:end])
        if self.asked is not None:
            question = chosen[self.asked]
            chosen[self.asked] = dataclasses.replace(question, content=question.content[start:])
        return encode_conversation(self.tokenizer, chosen, WHOLE)


def _text_parts(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, max_length: int, split: bool
) -> list[Part]:
    """Running text, all of it supervised, with the tokens that the model's own texts have."""
    ids_list: list[int] = tokenizer(conversation.messages[0].content)["input_ids"]
    if tokenizer.eos_token_id is not None and ids_list[-1:] != [tokenizer.eos_token_id]:
        ids_list.append(tokenizer.eos_token_id)
    ids = np.asarray(ids_list, dtype=np.int32)
    starts = range(0, len(ids), max_length) if split else [0]
    cut = not split and len(ids) > max_length
    pieces = [ids[start : start + max_length] for start in starts]
    return [Part(piece, np.ones(len(piece), dtype=np.uint8), 1, cut) for piece in pieces]


def _rounds(messages: Sequence[Message]) -> list[list[Message]]:
    rounds: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(message)
    return rounds


def _costs(mask: Mask, rounds: list[list[Message]], num_tokens: int) -> npt.NDArray[np.int64]:
    """About how many tokens each round takes: up to the end of its last answer."""
    ends = np.flatnonzero(np.diff(mask.astype(np.int8), append=np.int8(0)) < 0) + 1
    answers = [sum(message.role == "assistant" for message in one) for one in rounds]
    if len(ends) == sum(answers) and all(answers):
        return np.diff(ends[np.cumsum(answers) - 1], prepend=0)
    # Some answers are rendered as nothing, or run together: by their share of the characters.
    characters = np.array([sum(len(m.content) + 1 for m in one) for one in rounds])
    return np.ceil(characters * (num_tokens / characters.sum())).astype(np.int64)


def _head_tokens(tokenizer: PreTrainedTokenizerBase, head: Sequence[Message]) -> int:
    """About how many tokens stand in front of every part's first question, rather too few.

    What a second round adds is taken from what the first one has.
    """
    question, answer = Message("user", "a"), Message("assistant", "b")
    first = len(encode_prompt(tokenizer, [*head, question]))
    second = len(encode_prompt(tokenizer, [*head, question, answer, question]))
    return max(0, first - (second - first))


def _as_many_as_fit(costs: npt.NDArray[np.int64], first: int, extra: int, max_length: int) -> int:
    """The round behind the last that fits; at least one is taken."""
    total, end = extra + int(costs[first]), first + 1
    while end < len(costs) and total + int(costs[end]) <= max_length:
        total += int(costs[end])
        end += 1
    return end
