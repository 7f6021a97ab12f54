"""What vLLM is asked for a choice, and what its chunks are as events.

Each choice is a request of its own: its seed is then the one that Aerie would give it, and it can
be given up alone. Prompts go as tokens and answers come as tokens, so that their text is what
Aerie's own tokenizer makes of them, stop strings included.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from core.errors import StageError
from serve.generation import (
    Event,
    Finished,
    Generation,
    Progressed,
    Reason,
    Rejected,
    ScoredToken,
    Speculated,
)
from serve.replica import Words
from serve.text import Span, TextStream

if TYPE_CHECKING:
    from core.decode.sampling import SamplingSettings

Json = dict[str, Any]
# What its server calls the model; clients see `serve.model_name`.
MODEL = "target"
# How it writes a token where a log-probability belongs to it.
TOKEN = "token_id:"
DONE = "[DONE]"
# Seeds are whole numbers of so many bits, with a sign.
SEED_BITS = 64


def body_of(
    prompt_ids: Sequence[int],
    request: Generation,
    settings: SamplingSettings,
    *,
    place: int,
    limit: int,
    ends: Sequence[int],
) -> Json:
    """The body of `POST /v1/completions`. All that shapes a text is said: nothing is its default.

    Args:
        prompt_ids: at least one.
        request: whose choice it is.
        settings: of the request, over the server's own.
        place: of the choice among those of its prompt.
        limit: most tokens.
        ends: tokens that end the target's answers, besides the request's.
    """
    body: Json = {
        "model": MODEL,
        "prompt": list(prompt_ids),
        "max_tokens": limit,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
        "stop": list(request.stops),
        "stop_token_ids": sorted({*ends, *request.stop_token_ids}),
    }
    if request.seed is not None:
        body["seed"] = _wrapped(request.seed + place)
    if settings.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in settings.logit_bias.items()}
    if settings.logprobs is not None:
        body |= {"logprobs": settings.logprobs, "return_tokens_as_token_ids": True}
    if request.schema is not None:
        schema = {"name": "answer", "schema": json.loads(request.schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def _wrapped(seed: int) -> int:
    half = 1 << (SEED_BITS - 1)
    return (seed + half) % (2 * half) - half


async def chunks_of(lines: AsyncIterator[str]) -> AsyncIterator[Json]:
    """The chunks of a stream of server-sent events, up to its end.

    Raises:
        StageError: the stream ended before it should.
    """
    async for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == DONE:
            return
        yield json.loads(data)
    raise StageError("vLLM's stream ended early")


def refusal_of(chunk: Json, field: str | None = None) -> Rejected | None:
    """What a chunk, or a body, says of a request that vLLM does not take; None of another one.

    Args:
        chunk: a JSON object.
        field: the one that is likely to blame, where vLLM names none.
    """
    error = chunk.get("error")
    if not isinstance(error, dict) or not 400 <= int(error.get("code") or 500) < 500:
        return None
    return Rejected(f"vLLM refuses it: {error.get('message')}", param=error.get("param") or field)


class AnswerReader:
    """Turns the chunks of one choice into events.

    Attributes:
        ended: whether it has told how the choice ended, so that further chunks are nobody's.
    """

    def __init__(
        self, choice: int, words: Words, text: TextStream, *, top: int | None, speculates: bool
    ) -> None:
        """Begin; the time counts from here.

        Args:
            choice: its place among the request's.
            words: of the target.
            text: that its tokens are pushed into.
            top: likeliest tokens that go with each log-probability; None asks for none.
            speculates: whether there is a draft head.
        """
        self._choice, self._words, self._text, self._top = choice, words, text, top
        self._speculates = speculates
        self._began = time.monotonic()
        self._reason: Reason | None = None
        self._figures: Json | None = None
        self.ended = False

    def take(self, chunk: Json) -> Iterator[Event]:
        """The events of a chunk.

        Raises:
            StageError: it tells of a failure.
        """
        if "error" in chunk:
            raise StageError(f"vLLM failed: {chunk['error']}")
        if metrics := chunk.get("metrics"):
            self._figures = metrics.get("speculative_decoding")
        for choice in chunk["choices"]:
            yield from self._take_choice(choice)
        if self._text.stopped and self._reason is None:
            # vLLM goes on: its text has not come to the stop string. Nobody waits for the rest.
            self._reason = "string"
            yield from self.finish()

    def finish(self) -> Iterator[Event]:
        """What is told when its stream has ended.

        Raises:
            StageError: vLLM did not say why.
        """
        if self.ended:
            return
        if self._reason is None:
            raise StageError("vLLM's stream ended without a reason")
        self.ended = True
        if rest := self._text.finish():
            yield self._progressed(rest)
        if self._text.stopped:
            self._reason = "string"
        if self._figures is not None:
            yield _speculated(self._figures)
        yield self._finished(self._reason)

    def _take_choice(self, choice: Json) -> Iterator[Event]:
        ids: list[int] = choice.get("token_ids") or []
        before = self._text.num_tokens
        spans = self._text.push(ids, [False] * len(ids)) if not self._text.stopped else []
        count = self._text.num_tokens - before
        if count or spans:
            tokens = self._scored(ids[:count], choice.get("logprobs"))
            yield self._progressed(spans, tuple(ids[:count]), tokens)
        if (why := choice.get("finish_reason")) is not None:
            self._reason = _reason(why, choice.get("stop_reason"))

    def _progressed(
        self,
        spans: Sequence[Span],
        ids: tuple[int, ...] = (),
        tokens: tuple[ScoredToken, ...] = (),
    ) -> Progressed:
        # Which tokens had been guessed, and in which rounds, vLLM does not tell.
        unknown = tuple((text, None) for text, _ in spans)
        return Progressed(self._choice, unknown, ids, None, tokens, None, None)

    def _scored(self, ids: Sequence[int], logprobs: Json | None) -> tuple[ScoredToken, ...]:
        if self._top is None:
            return ()
        if logprobs is None:
            raise StageError("vLLM left out the log-probabilities that it was asked for")
        return tuple(
            self._words.scored(token, logprob, _likeliest(top or {}, self._top))
            for token, logprob, top in zip(
                ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=False
            )
        )

    def _finished(self, reason: Reason) -> Finished:
        count = self._text.num_tokens
        seconds = max(time.monotonic() - self._began, 1e-9)
        rounds, length, tree_size = _rounds(self._figures, count, self._speculates)
        return Finished(
            choice=self._choice,
            reason=reason,
            completion_tokens=count,
            rounds=rounds,
            accepted_length=length,
            tokens_per_second=count / seconds,
            tree_size=tree_size,
            seconds=None,
        )


def _rounds(
    figures: Json | None, count: int, speculates: bool
) -> tuple[int | None, float | None, float | None]:
    """Rounds, tokens that each committed, and nodes that each verified, as far as is known."""
    if not speculates:
        return max(count - 1, 0), 1.0, 1.0
    if figures is None:
        return None, None, None
    rounds = int(figures["num_spec_steps"])
    drafted = figures["num_draft_tokens"] / rounds if rounds else 0.0
    return rounds, float(figures["mean_acceptance_length"]), 1.0 + drafted


def _speculated(figures: Json) -> Speculated:
    # Rounds by how many drafts they kept; who kept three has kept the first, the second and both.
    histogram: list[int] = figures["acceptance_histogram"]
    kept = tuple(sum(histogram[place + 1 :]) for place in range(len(histogram) - 1))
    return Speculated(int(figures["num_spec_steps"]), int(figures["num_draft_tokens"]), kept)


def _reason(why: str, stop: int | str | None) -> Reason:
    if why == "length":
        return "length"
    if why == "stop":
        return "string" if isinstance(stop, str) else "token"
    raise StageError(f"vLLM ended an answer with {why!r}")


def _likeliest(top: dict[str, float], count: int) -> list[tuple[int, float]]:
    """The chosen token is among them, as one too many where it is not of the likeliest."""
    order = sorted(top.items(), key=lambda item: item[1], reverse=True)
    return [(int(token.removeprefix(TOKEN)), value) for token, value in order[:count]]
