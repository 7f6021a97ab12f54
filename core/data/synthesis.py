"""Prompts that a target makes up: where they begin and end in its template, and which are kept.

An instruction-tuned model that is shown the beginning of a user's turn goes on with what a user
would say. Source: Magpie (Xu et al. 2024), section 2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from core.data.conversations import Message
from core.data.selection import text_key
from core.data.template import TemplateError, render

# Stands in for a user's words, where the template is to be cut.
MARK = "AERIE USER TURN"
WORD = re.compile(r"\w+")
# Texts of at least so many words that use each of them so often on average go in circles.
REPETITION_WORDS, REPETITION_RATE = 20, 3.5


@dataclass(frozen=True)
class UserTurn:
    """How a template lays out a user's turn.

    Attributes:
        prefix_ids: tokens before the user's words, the template's own system prompt included.
        suffix: text behind them, without white space around it; may be empty.
        stop_token_ids: tokens that end the turn, besides the model's own end tokens.
    """

    prefix_ids: tuple[int, ...]
    suffix: str
    stop_token_ids: frozenset[int]


def user_turn(tokenizer: PreTrainedTokenizerBase) -> UserTurn:
    """Read the layout off the tokenizer's chat template.

    Raises:
        TemplateError: no template, or it does not show the user's words as they are.
    """
    text = render(tokenizer, (Message("user", MARK),), generation_prompt=False)
    prefix, found, suffix = text.partition(MARK)
    if not found or not prefix:
        raise TemplateError(
            "the tokenizer's chat template puts nothing before a user's words, so that the target "
            "cannot be led to make up prompts; give conversations with data.path instead"
        )
    suffix = suffix.strip()
    ids: list[int] = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    prefix_ids: list[int] = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    return UserTurn(tuple(prefix_ids), suffix, frozenset(ids[:1]) & special)


@dataclass
class PromptFilter:
    """Decides, one by one, which made-up prompts are kept.

    Attributes:
        turn: of the template.
        special_tokens: texts that no user types.
        min_words: fewest words.
        dropped: how many were, by reason.
    """

    turn: UserTurn
    special_tokens: Sequence[str]
    min_words: int
    dropped: Counter[str] = field(default_factory=Counter)
    _seen: set[bytes] = field(default_factory=set)

    def keep(self, text: str, *, cut: bool) -> str | None:
        """The user's words in a generated text; None if it is dropped.

        Args:
            text: generated after the prefix, without an end token.
            cut: whether it stopped for its length alone.
        """
        words, reason = self._judge(text, cut)
        if reason:
            self.dropped[reason] += 1
            return None
        return words

    def _judge(self, text: str, cut: bool) -> tuple[str, str]:
        if self.turn.suffix and self.turn.suffix in text:
            text, cut = text.partition(self.turn.suffix)[0], False
        text = text.strip()
        words = WORD.findall(text.lower())
        if cut:
            return text, "too_long"
        if len(words) < self.min_words:
            return text, "too_short"
        if "\ufffd" in text or any(token and token in text for token in self.special_tokens):
            return text, "special_tokens"
        if len(words) >= REPETITION_WORDS and len(words) / len(set(words)) > REPETITION_RATE:
            return text, "repetitive"
        # Punctuation, case and order aside, as the near copies of a model differ.
        key = text_key(" ".join(sorted(set(words))))
        if key in self._seen:
            return text, "duplicate"
        self._seen.add(key)
        return text, ""
