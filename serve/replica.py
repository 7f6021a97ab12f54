"""One decoder replica: a target, its draft head, and the requests that they answer together."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING

from core.config import Config
from core.decode.phases import NO_SECONDS
from core.errors import BusyError
from core.progress import say
from serve.apart import apart
from serve.generation import (
    Accepted,
    Event,
    Failed,
    Finished,
    Generation,
    Progressed,
    Prompt,
    Reason,
    Rejected,
    ScoredToken,
    ShownTree,
    Tokens,
)
from serve.loop import ClosingError, DecodingError, DecodingLoop, Turn
from serve.reading import Reader, Words, not_now
from serve.text import TextStream

if TYPE_CHECKING:
    from core.decode.engine import SpeculativeDecoder
    from core.decode.requests import Event as DecoderEvent
    from core.decode.requests import Request, Round
    from core.decode.sampler import TokenLogprobs
    from serve.heads import AskDesk, Version

logger = logging.getLogger("ray.serve")


class DecoderReplica:
    """A speculative decoder that answers many requests at once.

    The decoder runs in a thread of its own (`serve.loop`), so that the event loop answers health
    checks, takes cancellations and turns tokens into text while it computes.
    """

    def __init__(self, config: Config, desk: AskDesk | None = None) -> None:
        """Load the models and warm up; a replica takes requests after that.

        Args:
            config: sections target, draft, decode and serve.
            desk: says which draft head to use; None keeps the configured one.
        """
        # torch is imported here and not above: the ingress imports this file, and needs none of it.
        from core.decode.grammar import JsonGrammars
        from serve.heads import Heads

        self._config = config
        decoder = apart(_load, config)
        self._target, self._tokenizer = decoder.target, decoder.target.tokenizer
        vocab_size = self._target.vocab_size
        self._words = Words(self._tokenizer, vocab_size)
        grammars = JsonGrammars(self._tokenizer, vocab_size, self._target.eos_token_ids)
        self._reader = Reader(self._words, config.decode, grammars)
        self._loop = DecodingLoop(decoder)
        self.heads = Heads(config, self._loop, desk)

    def __del__(self) -> None:
        """Called by Ray Serve too, when a replica that is replaced has answered everything."""
        # A load that failed has left no loop.
        if "_loop" in self.__dict__:
            self._loop.close()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises here.

        It asks for the first time before the replica gets requests.
        """
        await self.heads.start()
        if not self._loop.healthy:
            raise DecodingError("the decoder fails in every round")
        if self._loop.hangs(most_s := self._config.serve.max_round_s):
            raise DecodingError(
                f"a round of the decoder runs for more than serve.max_round_s={most_s:g} seconds"
            )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve about once a second, for `serve.autoscaling`."""
        return asdict(self._loop.load())

    async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        """Yields `Rejected` alone, or `Accepted`, a `Progressed` a round, a `Finished` a choice.

        `Failed` may come in place of the rest. Closing or cancelling the iterator gives the
        request up: its places and its rows are free when the round that runs is over.
        """
        version = self.heads.choose()
        asked = await self._check(request, version.lane.decoder)
        if isinstance(asked, Rejected):
            yield asked
            return
        try:
            visit = self._loop.join(asked, version.lane)
        except BusyError as error:
            yield not_now(error, 429, "queue_full")
            return
        except ClosingError as error:
            yield not_now(error, 503, "shutting_down")
            return
        answers = [
            _Answer(turn, self._words, TextStream(self._tokenizer, request.stops), version)
            for turn in visit.turns
        ]
        try:
            yield Accepted(sum(len(one.prompt_ids) for one in asked[:: request.choices]))
            if request.echo:
                for turn in visit.turns:
                    text = await self._reader.echo(turn.request.prompt_ids)
                    yield Progressed(turn.place, ((text, False),), (), 0)
            async with aclosing(visit.events()) as events:
                async for turn, event in events:
                    for one in answers[turn.place].take(event):
                        yield one
        except DecodingError as error:
            logger.error("request %s: %s", request.name, error)
            version.count_failure()
            yield Failed(
                "the decoder failed while it answered; try again, or see the server's log",
                again=version is not self.heads.current,
            )
        finally:
            # Also where nobody came to wait for its events.
            visit.give_up()

    async def tokenize(self, prompt: Prompt, field: str) -> Tokens | Rejected:
        """The tokens that a prompt is read as."""
        return await self._reader.tokens(prompt, field, _longest(self.heads.current.lane.decoder))

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Rejected:
        """The text of tokens, special ones included."""
        return await self._reader.text(token_ids)

    async def _check(
        self, request: Generation, decoder: SpeculativeDecoder
    ) -> Rejected | list[Request]:
        """What the decoder is asked, a request a choice, or why it is not."""
        from core.decode.requests import Request
        from core.decode.tree import PLAIN

        longest = _longest(decoder)
        read = await self._reader.read(request, self._loop, longest)
        if isinstance(read, Rejected):
            return read
        most = self._config.serve.max_new_tokens
        answers = [(ids, place) for ids in read.prompts for place in range(request.choices)]
        return [
            Request(
                prompt_ids,
                request.max_new_tokens or min(longest - len(prompt_ids), most),
                read.settings,
                None if request.seed is None else request.seed + place,
                frozenset(request.stop_token_ids),
                None if request.speculate else PLAIN,
                with_trees=request.trees,
                constraint=constraint,
            )
            for (prompt_ids, place), constraint in zip(answers, read.constraints, strict=True)
        ]


def _longest(decoder: SpeculativeDecoder) -> int:
    """Most tokens of prompt and answer together."""
    return decoder.longest(decoder.plan)


class _Answer:
    """Turns the rounds of one choice into events, and counts them."""

    def __init__(self, turn: Turn, words: Words, text: TextStream, version: Version) -> None:
        self._turn, self._words, self._text = turn, words, text
        self._version = version
        self._passes = self._committed = self._nodes = 0
        self._seconds = NO_SECONDS

    def take(self, event: DecoderEvent) -> Iterator[Event]:
        done, turn, text = event.round, self._turn, self._text
        # The prompt's own pass is no round of speculation.
        if done.tree_size:
            self._passes += 1
            self._committed += len(done.tokens)
            self._nodes += done.tree_size
            # Rounds that were to be plain say nothing of the head.
            if turn.request.plan is None:
                self._version.count(len(done.tokens))
        before = text.num_tokens
        spans = text.push(done.tokens, done.drafted)
        count = text.num_tokens - before
        if text.stopped:
            # The rounds that the decoder would still do are nobody's.
            turn.give_up()
        tokens = tuple(self._scored(one) for one in done.logprobs[:count])
        guessed = sum(done.drafted[:count])
        seconds, self._seconds = event.seconds - self._seconds, event.seconds
        yield Progressed(
            turn.place,
            tuple(spans),
            done.tokens[:count],
            done.tree_size,
            tokens,
            guessed,
            seconds,
            self._shown_tree(done, count),
        )
        if turn.open:
            return
        if rest := text.finish():
            yield Progressed(turn.place, tuple(rest), (), 0)
        if text.stopped:
            yield self._finished("string")
        else:
            yield self._finished("length" if event.ending == "length" else "token")

    def _finished(self, reason: Reason) -> Finished:
        assert self._turn.started is not None
        count = self._text.num_tokens
        return Finished(
            choice=self._turn.place,
            reason=reason,
            completion_tokens=count,
            rounds=self._passes,
            accepted_length=self._committed / self._passes if self._passes else 1.0,
            tokens_per_second=count / max(time.monotonic() - self._turn.started, 1e-9),
            tree_size=self._nodes / self._passes if self._passes else 1.0,
            seconds=self._seconds,
        )

    def _shown_tree(self, done: Round, count: int) -> ShownTree | None:
        """The round's tree, of whose tokens the answer took so many."""
        if done.tree is None:
            return None
        bonus = len(done.path)
        return ShownTree(
            done.tree.parents,
            tuple(self._words.text_of([token]) for token in done.tree.token_ids_N.tolist()),
            done.path[: count + 1],
            self._words.text_of([done.tokens[bonus - 1]]) if count >= bonus else None,
        )

    def _scored(self, token: TokenLogprobs) -> ScoredToken:
        return self._words.scored(token.token_id, token.logprob, token.top)


def _load(config: Config) -> SpeculativeDecoder:
    from core.decode.load import load_decoder

    loaded = load_decoder(config, num_threads=max(1, int(config.serve.cpus_per_replica)))
    if loaded.calibration is not None:
        say("serve", f"draft tree: {loaded.calibration.plan.total_tokens} nodes")
    loaded.decoder.occupy_memory()
    return loaded.decoder
