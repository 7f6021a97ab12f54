"""From a stream of tokens to a stream of text: whole characters, stop strings, guessed spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Text, and whether the draft head guessed every token it came from; None where nobody knows.
Span = tuple[str, bool | None]

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes token by token so that the pieces add up to the decoding of all tokens.

    A token may hold a part of a character only, and what a tokenizer makes of a token depends on
    the one before it (a sentencepiece drops the first word's space). So the tokens of the piece
    shown last are decoded again in front of the new ones, and what ends in U+FFFD waits for the
    rest of its character.

    Exact where decoding is local, as in byte-level BPE. A tokenizer that falls back to bytes one
    token each (Llama 2) turns a whole run of such tokens into U+FFFD if one of them is invalid;
    characters of that run which were shown before stay as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_shown = 0
        self._shown = ""

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is certain by now, which may be none."""
        self._window.append(token)
        text = self._decode()
        if text.endswith(REPLACEMENT):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """The text still held back: half characters, which can no longer be completed."""
        return self._advance(self._decode())

    def _advance(self, text: str) -> str:
        fresh = text[len(self._shown) :]
        if fresh:
            self._window = self._window[self._num_shown :]
            self._num_shown = len(self._window)
            self._shown = self._decode()
        return fresh

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._window, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


class StopFilter:
    """Cuts a text off before the first stop string, wherever the pieces' borders fall.

    What might be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held: list[Span] = []
        self.stopped = False

    def push(self, span: Span) -> list[Span]:
        """Take the next piece; returns what may be shown."""
        assert not self.stopped, "the text has ended"
        self._held.append(span)
        text = "".join(piece for piece, _ in self._held)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, _ = split(self._held, min(found))
            self._held = []
            return shown
        shown, self._held = split(self._held, len(text) - self._num_undecided(text))
        return shown

    def flush(self) -> list[Span]:
        """What was held back and turned out to be no stop string."""
        shown, self._held = self._held, []
        return shown

    def _num_undecided(self, text: str) -> int:
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class TextStream:
    """Turns committed tokens into spans of text, up to a stop string.

    Attributes:
        num_tokens: tokens taken, the one that completed a stop string included.
        stopped: whether a stop string was met; later tokens are not taken.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._filter = StopFilter(stops)
        self._all_drafted = True
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._filter.stopped

    def push(self, tokens: Iterable[int], drafted: Iterable[bool]) -> list[Span]:
        """Take the tokens of one round; returns what may be shown of them, a span a token."""
        spans: list[Span] = []
        for token, guessed in zip(tokens, drafted, strict=True):
            if self.stopped:
                break
            self.num_tokens += 1
            self._all_drafted &= guessed
            spans += self._show(self._detokenizer.push(token))
        return spans

    def finish(self) -> list[Span]:
        """What is left when the tokens have ended."""
        if self.stopped:
            return []
        spans = self._show(self._detokenizer.flush())
        return spans if self.stopped else spans + self._filter.flush()

    def _show(self, text: str) -> list[Span]:
        if not text:
            return []
        drafted, self._all_drafted = self._all_drafted, True
        return self._filter.push((text, drafted))


def split(spans: Sequence[Span], position: int) -> tuple[list[Span], list[Span]]:
    """Cut spans at a position of their joined text; no span comes out empty."""
    before: list[Span] = []
    after: list[Span] = []
    for text, drafted in spans:
        head, tail = text[: max(position, 0)], text[max(position, 0) :]
        if head:
            before.append((head, drafted))
        if tail:
            after.append((tail, drafted))
        position -= len(text)
    return before, after
