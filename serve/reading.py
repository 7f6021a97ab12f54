"""What is done for a request before the decoder: its prompts become tokens, its schema a grammar.

It takes up to seconds for what a client may send, so threads do it, in which the libraries leave
the interpreter to others. Threads do so with one tokenizer: as it is called here, without
truncation or padding, it only reads what it is.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from core.errors import InputError, UserError
from serve.generation import Conversation, Generation, Prompt, Rejected

if TYPE_CHECKING:
    from core.decode.grammar import Constraint

# The rest of the CPUs is the decoder's.
NUM_THREADS = 2

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _OverlongError(InputError):
    """A prompt that is too long whatever its tokens are: it has `least` at least."""

    def __init__(self, least: int) -> None:
        super().__init__(f"the prompt has {least} tokens at least")
        self.least = least


class Reader:
    """Reads requests for one target."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """Prepare; for the grammars, that takes a second.

        Args:
            tokenizer: of transformers.
            vocab_size: rows of the target's logits.
            eos_token_ids: that end an answer.
        """
        # torch is imported here and not above: the ingress imports this file by the replica's.
        from core.data.token_bytes import most_bytes_a_token
        from core.decode.grammar import JsonGrammars

        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._grammars = JsonGrammars(tokenizer, vocab_size, eos_token_ids)
        self._most_bytes = most_bytes_a_token(tokenizer)
        # The first call puts back what the tokenizer's file says of truncation and padding.
        tokenizer("")
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="reader")

    async def apart(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """The function's result, from one of the threads; it must not compute with torch."""
        work = self._threads.submit(function, *args, **kwargs)
        return await asyncio.wrap_future(work)

    def read(
        self, request: Generation, longest: int
    ) -> Rejected | tuple[list[list[int]], list[Constraint | None]]:
        """Tokens of each prompt and a grammar for each answer, or why there are none.

        Args:
            request: what is asked.
            longest: tokens of prompt and answer together.
        """
        prompts: list[list[int]] = []
        try:
            for prompt in request.prompts:
                prompts.append(self.prompt_ids(prompt, longest))
                taken = len(prompts[-1])
                if taken + (request.max_new_tokens or 1) > longest:
                    return _too_long(request, str(taken), longest)
        except _OverlongError as error:
            return _too_long(request, f"{error.least} or more", longest)
        except UserError as error:
            return Rejected(str(error), param=request.prompt_field)
        try:
            return prompts, [self._constraint(request) for _ in range(request.num_answers)]
        except UserError as error:
            return Rejected(str(error), param="response_format")

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
        """Refuse what is no token of the target.

        Raises:
            InputError: there is one.
        """
        if (most := max(token_ids, default=0)) >= self._vocab_size:
            raise InputError(
                f"token {most}: the model has {self._vocab_size} tokens; give ids from 0 to "
                f"{self._vocab_size - 1}"
            )

    def text(self, token_ids: Iterable[int], *, special: bool) -> str:
        """Of tokens, with or without special ones.

        Raises:
            InputError: see `check_ids`.
        """
        ids = list(token_ids)
        self.check_ids(ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special))

    def _ids(self, text: str, longest: int | None, *, special: bool) -> list[int]:
        if longest is not None and self._most_bytes is not None:
            least = math.ceil(len(text.encode()) / self._most_bytes)
            if least > longest:
                raise _OverlongError(least)
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _constraint(self, request: Generation) -> Constraint | None:
        return None if request.schema is None else self._grammars.constraint(request.schema)


def _too_long(request: Generation, taken: str, longest: int) -> Rejected:
    wanted = request.max_new_tokens
    asked = "" if wanted is None else f", and {wanted} are to be generated"
    return Rejected(
        f"this model's longest sequence is {longest} tokens; {request.prompt_field} takes "
        f"{taken}{asked}; shorten it or ask for fewer tokens",
        param=request.prompt_field,
        code="context_length_exceeded",
    )
