"""What a request is read as, whoever decodes it: tokens and settings, or why it is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

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
    from core.decode.sampling import SamplingSettings


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
    """

    prompts: list[list[int]]
    settings: SamplingSettings


def read_request(
    request: Generation, words: Words, room: Room, decode: DecodeConfig, longest: int
) -> Rejected | Read:
    """Read it, or say why it is refused.

    Args:
        request: what is asked.
        words: of the target.
        room: that its answers shall find.
        decode: what holds where the request says nothing.
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
        prompts = [words.prompt_ids(prompt) for prompt in request.prompts]
    except BusyError as error:
        return not_now(error, 429, "queue_full")
    except UserError as error:
        return Rejected(str(error), param=request.prompt_field)
    for prompt_ids in prompts:
        if too_long := _refused_length(request, len(prompt_ids), longest):
            return too_long
    try:
        return Read(prompts, words.settings_of(request, decode))
    except UserError as error:
        return Rejected(str(error))


def _refused_length(request: Generation, num_prompt: int, longest: int) -> Rejected | None:
    """Why a prompt of so many tokens is not answered; None where it fits."""
    wanted = request.max_new_tokens
    if num_prompt + (wanted or 1) <= longest:
        return None
    asked = "" if wanted is None else f", and {wanted} are to be generated"
    return Rejected(
        f"this model's longest sequence is {longest} tokens; {request.prompt_field} takes "
        f"{num_prompt}{asked}; shorten it or ask for fewer tokens",
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
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens that a prompt is read as.

        Raises:
            UserError: it is none, or the chat template refuses it.
        """
        from core.data.conversations import Message
        from core.data.template import encode_prompt

        if isinstance(prompt, Conversation):
            messages = [Message(role, content) for role, content in prompt.messages]
            return encode_prompt(self._tokenizer, messages)
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
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

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included.

        Raises:
            InputError: there is no such token.
        """
        self.check_ids(token_ids)
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def tokens(self, prompt: Prompt, field: str, longest: int) -> Tokens | Rejected:
        """The tokens that a field's prompt is read as, for a model that takes so many."""
        try:
            return Tokens(tuple(self.prompt_ids(prompt)), longest)
        except UserError as error:
            return Rejected(str(error), param=field)

    def text(self, token_ids: Sequence[int]) -> str | Rejected:
        """As `text_of`, or why there is none."""
        try:
            return self.text_of(token_ids)
        except UserError as error:
            return Rejected(str(error), param="tokens")

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
