"""Hugging Face TGI's `POST /generate` and `/generate_stream`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from serve.answers import Answer, Json
from serve.fields import MOST_STOPS, Body, ListOf, Unicode, given_of
from serve.generation import Finished, Generation, Progressed, ScoredToken

# TGI's default.
MAX_NEW_TOKENS = 100
REASONS = {"length": "length", "token": "eos_token", "string": "stop_sequence"}


class Parameters(Body):
    """How to generate.

    TGI is greedy unless something asks to sample; here the server's `decode` section says what
    happens then.
    """

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        "adapter_id": ("",),
        "best_of": (1,),
        "decoder_input_details": (False,),
        "grammar": (),
        "top_n_tokens": (0,),
        "truncate": (),
        "typical_p": (1.0,),
        "watermark": (False,),
    }

    max_new_tokens: int = Field(MAX_NEW_TOKENS, ge=1)
    do_sample: bool = False
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = Field(None, ge=1, lt=2**31)
    top_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: ListOf[Annotated[Unicode, Field(min_length=1)]] = Field([], max_length=MOST_STOPS)
    return_full_text: bool = False
    details: bool = False

    def sampling(self, *, with_tokens: bool) -> Json:
        """What was given of the decoder's settings."""
        temperature = self.temperature
        if temperature is None and (self.do_sample or self.top_k or self.top_p):
            temperature = 1.0
        return given_of(
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            # The chosen token's, without others beside it.
            logprobs=0 if with_tokens else None,
        )


class GenerateRequest(Body):
    """The body of a request."""

    inputs: Unicode
    parameters: Parameters = Field(default_factory=Parameters)
    stream: bool = Field(False, description="/generate_stream streams in any case")

    def generation(self, *, stream: bool = False) -> Generation:
        """What the decoder is asked; tokens are told of in a stream and in details alone."""
        given = self.parameters
        return Generation(
            (self.inputs,),
            prompt_field="inputs",
            max_new_tokens=given.max_new_tokens,
            sampling=given.sampling(with_tokens=stream or given.details),
            seed=given.seed,
            stops=tuple(given.stop),
        )

    def answer(self) -> GenerateAnswer:
        """What builds the response."""
        return GenerateAnswer(self)


class GenerateAnswer(Answer):
    """The response: a stream has an event for each token, the last with the whole text."""

    def __init__(self, request: GenerateRequest) -> None:
        super().__init__()
        self._request = request
        self._count = 0
        self._text = ""
        self._last: Json | None = None

    def whole(self, rounds: Sequence[Progressed], finished: Sequence[Finished]) -> Json:
        self._text = "".join(one.text for one in rounds)
        body: Json = {"generated_text": self._generated()}
        if self._request.parameters.details:
            tokens = [_token(token) for one in rounds for token in one.tokens]
            body["details"] = {**self._details(finished[0]), "prefill": [], "tokens": tokens}
        return body

    def opening(self) -> list[Json | str]:
        return []

    def part(self, progressed: Progressed) -> list[Json | str]:
        self._text += progressed.text
        sent: list[Json | str] = []
        for token in progressed.tokens:
            # The last token goes out together with the text: which it is, is known at the end.
            if self._last is not None:
                sent.append(self._last)
            self._count += 1
            self._last = {
                "index": self._count,
                "token": _token(token),
                "generated_text": None,
                "details": None,
            }
        return sent

    def ended(self, finished: Finished) -> list[Json | str]:
        details = None
        if self._request.parameters.details:
            details = {**self._details(finished), "input_length": self.prompt_tokens}
        return [{**(self._last or {}), "generated_text": self._generated(), "details": details}]

    def closing(self) -> list[Json | str]:
        return []

    def _generated(self) -> str:
        before = self._request.inputs if self._request.parameters.return_full_text else ""
        return before + self._text

    def _details(self, finished: Finished) -> Json:
        return {
            "finish_reason": REASONS[finished.reason],
            "generated_tokens": finished.completion_tokens,
            "seed": self._request.parameters.seed,
        }


def _token(token: ScoredToken) -> Json:
    return {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
    }
