"""One decoder replica: a target, its draft head, and the requests that wait for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from core.config import Config
from core.errors import UserError
from core.progress import say
from serve.protocol import Accepted, Event, Finished, Generation, Progressed, Rejected
from serve.text import TextStream

if TYPE_CHECKING:
    from core.decode.engine import SpeculativeDecoder
    from core.decode.requests import Round


class DecoderReplica:
    """A speculative decoder that serves one request at a time, in the order they come.

    The decoder runs in a thread of its own, so that the event loop answers health checks and
    takes cancellations while it computes. Everything it does goes through that one thread: a
    request that was given up closes its generation before the next one's first round begins.
    """

    def __init__(self, config: Config) -> None:
        """Load the models and warm up; a replica takes requests after that."""
        self._config = config
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoder")
        self._turn = asyncio.Lock()
        self._decoder = self._thread.submit(_load, config).result()
        self._tokenizer = self._decoder.target.tokenizer

    async def generate(self, request: Generation) -> AsyncIterator[Event]:
        """Yields `Rejected` alone, or `Accepted`, a `Progressed` a round, and `Finished`.

        Closing or cancelling the iterator stops the generation after the round that runs.
        """
        checked = self._check(request)
        if isinstance(checked, Rejected):
            yield checked
            return
        prompt_ids, max_new_tokens = checked
        yield Accepted(len(prompt_ids))
        async with self._turn:
            rounds: Any = self._decoder.generate(
                prompt_ids,
                max_new_tokens=max_new_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
            )
            try:
                async for event in self._follow(rounds, request):
                    yield event
            finally:
                # Not awaited: a cancelled request must not wait, and the thread keeps the order.
                self._thread.submit(rounds.close)

    async def _follow(self, rounds: Iterator[Round], request: Generation) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        stream = TextStream(self._tokenizer, request.stops)
        figures = _Figures(time.monotonic())
        last_token = None
        while not stream.stopped:
            one = await loop.run_in_executor(self._thread, next, rounds, None)
            if one is None:
                break
            figures.count(one)
            last_token = one.tokens[-1]
            before = stream.num_tokens
            spans = stream.push(one.tokens, one.drafted)
            yield Progressed(tuple(spans), stream.num_tokens - before, one.tree_size)
        if rest := stream.finish():
            yield Progressed(tuple(rest), 0, 0)
        ended = stream.stopped or last_token in self._decoder.target.eos_token_ids
        yield figures.finished("stop" if ended else "length", stream.num_tokens)

    def _check(self, request: Generation) -> Rejected | tuple[list[int], int]:
        """The prompt's tokens and how many may be generated, or why not."""
        from core.data.template import encode_prompt

        try:
            prompt_ids = encode_prompt(self._tokenizer, _messages(request))
        except UserError as error:
            return Rejected(str(error), param="messages")
        # The last round's tree needs room too, whether or not it is accepted.
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
        return prompt_ids, wanted or min(room, self._config.serve.max_new_tokens)


@dataclass
class _Figures:
    """Counts the rounds of one answer."""

    started: float
    passes: int = 0
    committed: int = 0

    def count(self, one: Round) -> None:
        # The prompt's own pass is no round of speculation.
        if one.tree_size:
            self.passes += 1
            self.committed += len(one.tokens)

    def finished(self, reason: Literal["stop", "length"], num_tokens: int) -> Finished:
        return Finished(
            reason=reason,
            completion_tokens=num_tokens,
            rounds=self.passes,
            accepted_length=self.committed / self.passes if self.passes else 1.0,
            tokens_per_second=num_tokens / max(time.monotonic() - self.started, 1e-9),
        )


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
