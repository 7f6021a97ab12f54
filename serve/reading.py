"""What a request is read as, whoever decodes it: tokens and settings, or why it is refused.

To read what a client may send takes up to seconds, so threads do it, in which the libraries leave
the interpreter to others. Threads do so with one tokenizer: as it is called here, without
truncation or padding, it only reads what it is.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from core.config import DecodeConfig
from core.errors import BusyError, InputError, UserError
from serve.generation import (
    LEAST_LOGPROB,
    RETRY_AFTER_S,
    Conversation,
    Generation,
    Prompt,
    Rejected,
    ScoredToken,
    Tokens,
)

if TYPE_CHECKING:
    # torch is imported where it is needed: the ingress imports this file by the replica's.
    from core.decode.grammar import Constraint, JsonGrammars
    from core.decode.sampling import SamplingSettings

# The rest of the CPUs is the decoder's.
NUM_THREADS = 2

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Room(Protocol):
    """Where answers are decoded or wait."""

    @property
    def most(self) -> int:
        """Answers that there can be at a time."""

    def check_room(self, count: int) -> None:
        """Refuse early that so many come in.

        Raises:
            BusyError: too many are there.
        """


@dataclass(frozen=True)
class Read:
    """A request that can be answered.

    Attributes:
        prompts: tokens of each.
        settings: how its answers are sampled.
        constraints: a grammar for each answer; None where it is free, or not ours to hold.
    """

    prompts: list[list[int]]
    settings: SamplingSettings
    constraints: list[Constraint | None]


class Reader:
    """Reads requests for one target."""

    def __init__(
        self, words: Words, decode: DecodeConfig, grammars: JsonGrammars | None = None
    ) -> None:
        """Remember with what, and prepare the threads.

        Args:
            words: of the target.
            decode: what holds where a request says nothing.
            grammars: of its tokens; None where whoever decodes has its own.
        """
        self._words, self._decode, self._grammars = words, decode, grammars
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="reader")

    async def read(self, request: Generation, room: Room, longest: int) -> Rejected | Read:
        """Read it, or say why it is refused.

        Args:
            request: what is asked.
            room: that its answers shall find.
            longest: tokens of prompt and answer together.
        """
        if request.num_answers > room.most:
            return Rejected(
                f"{request.num_answers} answers are asked for, and this server takes "
                f"{room.most} at a time; send several requests",
                param=request.prompt_field,
            )
        try:
            # Before anything is done for it: when most are refused, that is what counts.
            room.check_room(request.num_answers)
            settings = self._words.settings_of(request, self._decode)
        except BusyError as error:
            return not_now(error, 429, "queue_full")
        except UserError as error:
            return Rejected(str(error))
        return await self._apart(self._read, request, settings, longest)

    async def tokens(self, prompt: Prompt, field: str, longest: int) -> Tokens | Rejected:
        """The tokens that a field's prompt is read as, for a model that takes so many."""
        try:
            return Tokens(tuple(await self._apart(self._words.prompt_ids, prompt)), longest)
        except UserError as error:
            return Rejected(str(error), param=field)

    async def text(self, token_ids: Sequence[int]) -> str | Rejected:
        """The text of tokens, special ones included, or why there is none."""
        try:
            return await self._apart(self._words.text_of, token_ids)
        except UserError as error:
            return Rejected(str(error), param="tokens")

    async def echo(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt's tokens, as it stands before an answer."""
        return await self._apart(self._words.text_of, token_ids, special=False)

    def _read(
        self, request: Generation, settings: SamplingSettings, longest: int
    ) -> Rejected | Read:
        prompts: list[list[int]] = []
        try:
            for prompt in request.prompts:
                prompts.append(self._words.prompt_ids(prompt, longest))
                taken = len(prompts[-1])
                if taken + (request.max_new_tokens or 1) > longest:
                    return _too_long(request, str(taken), longest)
        except _OverlongError as error:
            return _too_long(request, f"{error.least} or more", longest)
        except UserError as error:
            return Rejected(str(error), param=request.prompt_field)
        try:
            constraints = [self._constraint(request) for _ in range(request.num_answers)]
        except UserError as error:
            return Rejected(str(error), param="response_format")
        return Read(prompts, settings, constraints)

    def _constraint(self, request: Generation) -> Constraint | None:
        if request.schema is None or self._grammars is None:
            return None
        return self._grammars.constraint(request.schema)

    async def _apart(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """The function's result, from one of the threads; it must not compute with torch."""
        work = self._threads.submit(function, *args, **kwargs)
        return await asyncio.wrap_future(work)


class _OverlongError(InputError):
    """A prompt that is too long whatever its tokens are: it has `least` at least."""

    def __init__(self, least: int) -> None:
        super().__init__(f"the prompt has {least} tokens at least")
        self.least = least


def _too_long(request: Generation, taken: str, longest: int) -> Rejected:
    wanted = request.max_new_tokens
    asked = "" if wanted is None else f", and {wanted} are to be generated"
    return Rejected(
        f"this model's longest sequence is {longest} tokens; {request.prompt_field} takes "
        f"{taken}{asked}; shorten it or ask for fewer tokens",
        param=request.prompt_field,
        code="context_length_exceeded",
    )


def not_now(error: Exception, status: int, code: str) -> Rejected:
    """A refusal of what may be taken a moment later."""
    return Rejected(str(error), status=status, code=code, retry_after_s=RETRY_AFTER_S)


class Words:
    """What a target's tokenizer makes of prompts and of tokens, whoever decodes them."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """Remember the tokenizer, and how many tokens the target has."""
        from core.data.token_bytes import most_bytes_a_token

        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._most_bytes = most_bytes_a_token(tokenizer)
        # The first call puts back what the tokenizer's file says of truncation and padding.
        tokenizer("")

    def prompt_ids(self, prompt: Prompt, longest: int | None = None) -> list[int]:
        """The tokens that a prompt is read as.

        Args:
            prompt: to read.
            longest: tokens, of which more are of no use; a text that must have more is not read.
        Raises:
            InputError: it has none, unknown ones, or, beyond doubt, more than `longest`.
            TemplateError: the chat template refuses it.
        """
        from core.data.conversations import Message
        from core.data.template import prompt_text

        if isinstance(prompt, Conversation):
            messages = [Message(role, content) for role, content in prompt.messages]
            return self._ids(prompt_text(self._tokenizer, messages), longest, special=False)
        if isinstance(prompt, str):
            ids = self._ids(prompt, longest, special=True)
        else:
            self.check_ids(prompt)
            ids = list(prompt)
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        return ids

    def check_ids(self, token_ids: Iterable[int]) -> None:
        """Refuse tokens that there are not.

        Raises:
            InputError: one of them.
        """
        size = self._vocab_size
        if (most := max(token_ids, default=0)) >= size:
            raise InputError(
                f"token {most}: the model has {size} tokens; give ids from 0 to {size - 1}"
            )

    def text_of(self, token_ids: Sequence[int], *, special: bool = True) -> str:
        """The text of tokens, with or without special ones.

        Raises:
            InputError: there is no such token.
        """
        self.check_ids(token_ids)
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=not special))

    def settings_of(self, request: Generation, decode: DecodeConfig) -> SamplingSettings:
        """How a request is sampled: as it says, and otherwise as the section decode does.

        Raises:
            UserError: there are no such settings, or it names tokens that there are not.
        """
        from core.decode.sampling import SamplingSettings

        self.check_ids(request.stop_token_ids)
        settings = replace(SamplingSettings.of(decode), **request.sampling)
        settings.check_vocabulary(self._vocab_size)
        return settings

    def scored(self, token: int, logprob: float, top: Iterable[tuple[int, float]]) -> ScoredToken:
        """A token with its log-probability, and the likeliest ones with theirs."""
        return ScoredToken(
            token,
            self.text_of([token]),
            max(logprob, LEAST_LOGPROB),
            tuple((self.text_of([one]), max(value, LEAST_LOGPROB)) for one, value in top),
            token in self._tokenizer.all_special_ids,
        )

    def _ids(self, text: str, longest: int | None, *, special: bool) -> list[int]:
        if longest is not None and self._most_bytes is not None:
            least = math.ceil(len(text.encode()) / self._most_bytes)
            if least > longest:
                raise _OverlongError(least)
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids
