"""One decoder replica: a target, its draft head, and the requests that they answer together."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from core.config import Config
from core.errors import BusyError, UserError
from core.progress import say
from serve.loop import ClosingError, DecodingError, DecodingLoop, Turn
from serve.protocol import Accepted, Event, Failed, Finished, Generation, Progressed, Rejected
from serve.text import TextStream

if TYPE_CHECKING:
    from core.decode.engine import SpeculativeDecoder
    from core.decode.requests import Event as DecoderEvent
    from core.decode.requests import Request, Round

# When the queue is full: by then some answer has ended, or the client should wait longer yet.
RETRY_AFTER_S = 1


class DecoderReplica:
    """A speculative decoder that answers many requests at once.

    The decoder runs in a thread of its own (`serve.loop`), so that the event loop answers health
    checks, takes cancellations and turns tokens into text while it computes.
    """

    def __init__(self, config: Config) -> None:
        """Load the models and warm up; a replica takes requests after that."""
        self._config = config
        self._decoder = _load(config)
        self._tokenizer = self._decoder.target.tokenizer
        self._loop = DecodingLoop(self._decoder)

    def __del__(self) -> None:
        """Called by Ray Serve too, when a replica that is replaced has answered everything."""
        # A load that failed has left no loop.
        if "_loop" in self.__dict__:
            self._loop.close()

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises here."""
        if not self._loop.healthy:
            raise DecodingError("the decoder fails in every round")

    async def generate(self, request: Generation) -> AsyncIterator[Event]:
        """Yields `Rejected` alone, or `Accepted`, a `Progressed` a round, and `Finished`.

        `Failed` may come in place of the rest. Closing or cancelling the iterator gives the
        request up: its place and its rows are free when the round that runs is over.
        """
        asked = self._check(request)
        if isinstance(asked, Rejected):
            yield asked
            return
        try:
            visit = self._loop.join([asked])
        except BusyError as error:
            yield Rejected(str(error), status=429, code="queue_full", retry_after_s=RETRY_AFTER_S)
            return
        except ClosingError as error:
            yield Rejected(
                str(error), status=503, code="shutting_down", retry_after_s=RETRY_AFTER_S
            )
            return
        answer = _Answer(TextStream(self._tokenizer, request.stops))
        try:
            yield Accepted(len(asked.prompt_ids))
            async with aclosing(visit.events()) as events:
                async for turn, event in events:
                    for one in answer.take(turn, event):
                        yield one
        except DecodingError:
            yield Failed("the decoder failed while it answered; try again, or see the server's log")
        finally:
            # Also where nobody came to wait for its events.
            visit.give_up()

    def _check(self, request: Generation) -> Rejected | Request:
        """What the decoder is asked, or why it is not."""
        from core.data.template import encode_prompt
        from core.decode.requests import Request
        from core.decode.sampling import SamplingSettings

        try:
            prompt_ids = encode_prompt(self._tokenizer, _messages(request))
        except UserError as error:
            return Rejected(str(error), param="messages")
        longest = self._decoder.longest(self._decoder.plan)
        room = longest - len(prompt_ids)
        wanted = request.max_new_tokens
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f", and {wanted} are to be generated"
            return Rejected(
                f"this model's longest sequence is {longest} tokens; the messages take "
                f"{len(prompt_ids)}{asked}; shorten the messages or lower max_tokens",
                param="messages",
                code="context_length_exceeded",
            )
        given = {"temperature": request.temperature, "top_p": request.top_p}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return Request(
            prompt_ids,
            wanted or min(room, self._config.serve.max_new_tokens),
            SamplingSettings.of(self._config.decode.model_copy(update=changes)),
            request.seed,
        )


@dataclass
class _Answer:
    """Turns the rounds of one request into events, and counts them."""

    text: TextStream
    passes: int = 0
    committed: int = 0

    def take(self, turn: Turn, event: DecoderEvent) -> Iterator[Event]:
        done = event.round
        self._count(done)
        before = self.text.num_tokens
        spans = self.text.push(done.tokens, done.drafted)
        if self.text.stopped:
            # The rounds that the decoder would still do are nobody's.
            turn.give_up()
        yield Progressed(tuple(spans), self.text.num_tokens - before, done.tree_size)
        if turn.open:
            return
        if rest := self.text.finish():
            yield Progressed(tuple(rest), 0, 0)
        assert turn.started is not None
        reason: Literal["stop", "length"] = (
            "length" if event.ending == "length" and not self.text.stopped else "stop"
        )
        yield Finished(
            reason=reason,
            completion_tokens=self.text.num_tokens,
            rounds=self.passes,
            accepted_length=self.committed / self.passes if self.passes else 1.0,
            tokens_per_second=self.text.num_tokens / max(time.monotonic() - turn.started, 1e-9),
        )

    def _count(self, done: Round) -> None:
        # The prompt's own pass is no round of speculation.
        if done.tree_size:
            self.passes += 1
            self.committed += len(done.tokens)


def _load(config: Config) -> SpeculativeDecoder:
    # torch is imported here and not above: the ingress imports this file, and needs none of it.
    from core.decode.load import load_decoder

    loaded = load_decoder(config, num_threads=max(1, int(config.serve.cpus_per_replica)))
    if loaded.calibration is not None:
        say("serve", f"draft tree: {loaded.calibration.plan.total_tokens} nodes")
    return loaded.decoder


def _messages(request: Generation) -> list[Any]:
    from core.data.conversations import Message

    return [Message(role, content) for role, content in request.messages]
