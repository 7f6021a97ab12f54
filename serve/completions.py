"""OpenAI's `POST /v1/completions`: a text is gone on with, as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from serve.answers import Json, OpenAIAnswer
from serve.fields import ListOf, SampledBody, TokenId, Unicode, field_problem
from serve.generation import Finished, Generation, Progressed, Prompt

# OpenAI's defaults and limits.
MAX_TOKENS = 16
MOST_LOGPROBS = 5
# Each takes a place in the queue; with `n`, as many.
MOST_PROMPTS = 64


class CompletionRequest(SampledBody):
    """The body of a request."""

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        "best_of": (1,),
        "suffix": ("",),
    }

    prompt: Unicode | ListOf[TokenId] | ListOf[Unicode] | ListOf[ListOf[TokenId]]
    max_tokens: int = Field(MAX_TOKENS, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    echo: bool = False

    @field_validator("prompt")
    @classmethod
    def _some_prompts(cls, value: Any) -> Any:
        if isinstance(value, list) and not value:
            raise ValueError("the prompt is empty; give at least one token")
        if isinstance(value, list) and len(value) > MOST_PROMPTS and not isinstance(value[0], int):
            raise ValueError(f"got {len(value)} prompts; send {MOST_PROMPTS} a request at most")
        return value

    @model_validator(mode="after")
    def _no_scored_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            message = "echo goes without logprobs here: those of a prompt are not computed"
            raise field_problem("echo", message)
        return self

    @property
    def prompts(self) -> list[Prompt]:
        """Each of them, a text or its tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [one if isinstance(one, str) else tuple(one) for one in self.prompt]

    def generation(self) -> Generation:
        """What the decoder is asked."""
        return self.asked(self.prompts, "prompt", self.max_tokens, self.logprobs, echo=self.echo)

    def answer(self, model: str) -> CompletionAnswer:
        """What builds the response."""
        return CompletionAnswer(
            model,
            "cmpl",
            choices=self.n * len(self.prompts),
            with_spans=self.with_spans,
            with_trees=self.with_trees,
            with_usage=self.with_usage,
        )


class CompletionAnswer(OpenAIAnswer):
    """The response to a completion."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        # Where the next token's text begins, of each choice.
        self._offsets = [0] * self.choices

    @property
    def _kinds(self) -> tuple[str, str]:
        return "text_completion", "text_completion"

    def opening(self) -> list[Json | str]:
        return []

    def _whole_choice(self, rounds: Sequence[Progressed], finished: Finished) -> Json:
        text = "".join(one.text for one in rounds)
        return self._choice(finished.choice, text, rounds, finished.openai_reason)

    def _part_choice(self, progressed: Progressed) -> Json:
        return self._choice(progressed.choice, progressed.text, [progressed], None)

    def _last_choice(self, finished: Finished) -> Json:
        return self._choice(finished.choice, "", [], finished.openai_reason)

    def _choice(
        self, place: int, text: str, rounds: Sequence[Progressed], reason: str | None
    ) -> Json:
        logprobs = self._logprobs(place, rounds)
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, place: int, rounds: Sequence[Progressed]) -> Json | None:
        tokens = [token for one in rounds for token in one.tokens]
        if not tokens:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[place])
            self._offsets[place] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens],
            "text_offset": offsets,
        }
