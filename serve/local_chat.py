"""A conversation with a model in this process, without a server: `aerie chat --model <folder>`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from core.config import Config
from core.data.conversations import Message, Role
from core.data.template import encode_prompt
from core.decode.load import load_decoder
from serve.text import Span, TextStream

ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant"}


class LocalChat:
    """See `serve.chat.Chat`, which asks a server instead."""

    def __init__(self, config: Config, max_tokens: int) -> None:
        """Load the target, and the draft head if the config names one.

        Args:
            config: sections target, draft and decode.
            max_tokens: longest answer.
        Raises:
            UserError: no such model, or a head of another one.
        """
        self.messages: list[dict[str, str]] = []
        self.figures: dict[str, Any] = {}
        self._max_tokens = max_tokens
        self._decoder = load_decoder(config).decoder

    def ask(self, text: str) -> Iterator[Span]:
        """Yields spans of the answer; the question is kept only if it was answered.

        Raises:
            UserError: the conversation has become too long.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokenizer = self._decoder.target.tokenizer
        said = [Message(ROLES[one["role"]], one["content"]) for one in messages]
        prompt = encode_prompt(tokenizer, said)
        stream, started, rounds, answer = TextStream(tokenizer), time.perf_counter(), 0, ""
        for done in self._decoder.generate(prompt, max_new_tokens=self._max_tokens):
            rounds += 1
            for span in stream.push(done.tokens, done.drafted):
                answer += span[0]
                yield span
        for span in stream.finish():
            answer += span[0]
            yield span
        seconds = max(time.perf_counter() - started, 1e-9)
        self.figures = {
            "tokens_per_second": stream.num_tokens / seconds,
            "accepted_length": stream.num_tokens / max(rounds, 1),
            "rounds": rounds,
        }
        self.messages = [*messages, {"role": "assistant", "content": answer}]
