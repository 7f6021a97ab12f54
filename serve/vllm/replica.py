"""A decoder replica that lets vLLM decode: to the ingress it is as `serve.replica`'s."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import httpx

from core.config import Config
from core.errors import BusyError, StageError
from core.progress import say
from serve.generation import (
    Accepted,
    Event,
    Failed,
    Generation,
    Progressed,
    Prompt,
    Rejected,
    Tokens,
)
from serve.reading import Read, Reader, Words, not_now
from serve.text import TextStream
from serve.vllm import settings as vllm
from serve.vllm.ledger import Entry, Ledger
from serve.vllm.requests import AnswerReader, Json, body_of
from serve.vllm.server import HOST, Server
from serve.vllm.visit import Visit

if TYPE_CHECKING:
    from core.decode.sampling import SamplingSettings

# A request that meets a server's end waits so long for the replica to notice it too, and to leave.
LEAVE_S = 5.0
# vLLM takes as long as it wants for an answer; whoever waits for it has a deadline.
TIMEOUT = httpx.Timeout(30.0, read=None, pool=None)
NO_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64)


@dataclass(frozen=True)
class _Asked:
    """A request as vLLM is asked it, a body a choice."""

    prompt_tokens: int
    echoes: tuple[str, ...]
    bodies: tuple[Json, ...]
    top: int | None


class VllmReplica:
    """Forwards requests to a server of vLLM's that is its child."""

    def __init__(self, config: Config, on_end: Callable[[], None] | None = None) -> None:
        """Export the draft head, start the server and wait for it; it takes requests after that.

        Args:
            config: sections target, draft, decode and serve.
            on_end: called, in a thread, when the server ends by itself.
        Raises:
            UserError: target, head or vLLM's environment are not as they should be.
            StageError: the server did not start.
        """
        from transformers import AutoConfig, GenerationConfig

        from core.models.target import eos_token_ids, load_tokenizer, target_folder

        vllm.check(config)
        self._config = config
        self._speculates = vllm.chain(config) > 0
        target = target_folder(config.target.path)
        about = AutoConfig.from_pretrained(target)
        self._tokenizer = load_tokenizer(target, config.target.template)
        self._vocab_size = int(about.get_text_config().vocab_size)
        self._words = Words(self._tokenizer, self._vocab_size)
        # Without grammars: vLLM has its own.
        self._reader = Reader(self._words, config.decode)
        generation = None
        if (target / "generation_config.json").exists():
            generation = GenerationConfig.from_pretrained(target)
        self._ends = sorted(eos_token_ids(generation, about, self._tokenizer))
        self._longest = vllm.longest(config, about)
        decode = config.decode
        self._ledger = Ledger(decode.batch_size, decode.max_waiting)
        self._server = Server(on_end)
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(self._server.socket), limits=NO_LIMITS),
            base_url=HOST,
            timeout=TIMEOUT,
        )
        head = None
        if self._speculates:
            head = vllm.export(config, target, about, self._server.folder / "head")
        command = vllm.command(config, target, about, head)
        command += ["--uds", str(self._server.socket)]
        say("serve", f"starting vLLM: {' '.join(command)}")
        self._server.start(command, vllm.environment(config), config.serve.vllm_start_s)

    def __del__(self) -> None:
        """Called by Ray Serve too, when a replica that is replaced has answered everything."""
        if "_server" in self.__dict__:
            self.close()

    def close(self) -> None:
        """End the server."""
        self._server.close()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises here.

        Raises:
            ServerEndedError: vLLM's server has ended or is not well.
        """
        await self._server.check(self._client)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve about once a second, for `serve.autoscaling`."""
        return asdict(self._ledger.load())

    async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        """As `DecoderReplica.generate`, with what vLLM does not tell left out."""
        asked = await self._check(request)
        if isinstance(asked, Rejected):
            yield asked
            return
        try:
            entries = self._ledger.join([body["max_tokens"] for body in asked.bodies])
        except BusyError as error:
            yield not_now(error, 429, "queue_full")
            return
        readers = [
            AnswerReader(
                place,
                self._words,
                TextStream(self._tokenizer, request.stops),
                top=asked.top,
                speculates=self._speculates,
            )
            for place in range(len(entries))
        ]
        visit = Visit(self._client, asked.bodies)
        try:
            refused = await visit.begin(with_first=request.schema is not None)
            if refused is not None:
                yield refused
                return
            yield Accepted(asked.prompt_tokens)
            for place, text in enumerate(asked.echoes):
                yield Progressed(place, ((text, None),), (), None, (), None, None)
            async with aclosing(visit.chunks()) as chunks:
                async for place, chunk in chunks:
                    for event in self._read(readers[place], entries[place], chunk):
                        yield event
                    if readers[place].ended:
                        visit.give_up(place)
                        self._ledger.leave(entries[place])
        except (httpx.HTTPError, StageError) as error:
            say("serve", f"a request failed: {error!r}")
            # The replica leaves with its server, and Ray Serve knows then that it is gone. If the
            # request came back before, it would only meet the same end.
            gone = await asyncio.to_thread(self._server.wait_for_end, LEAVE_S)
            yield Failed(
                "vLLM failed while it answered; try again, or see the server's log",
                again=gone or isinstance(error, httpx.HTTPError),
            )
        finally:
            for entry in entries:
                self._ledger.leave(entry)
            await visit.close()

    async def tokenize(self, prompt: Prompt, field: str) -> Tokens | Rejected:
        """The tokens that a prompt is read as."""
        return await self._reader.tokens(prompt, field, self._longest)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Rejected:
        """The text of tokens, special ones included."""
        return await self._reader.text(token_ids)

    def _read(self, reader: AnswerReader, entry: Entry, chunk: Json | None) -> list[Event]:
        events = list(reader.finish() if chunk is None else reader.take(chunk))
        for event in events:
            if isinstance(event, Progressed) and event.num_tokens:
                self._ledger.note(entry, event.num_tokens)
        return events

    async def _check(self, request: Generation) -> Rejected | _Asked:
        """What vLLM is asked, or why it is not."""
        read = await self._reader.read(request, self._ledger, self._longest)
        if isinstance(read, Rejected):
            return read
        if unmapped := self._unmapped(request, read.settings):
            return unmapped
        echoes = [await self._reader.echo(ids) for ids in (read.prompts if request.echo else [])]
        return self._asked(request, read, echoes)

    def _unmapped(self, request: Generation, settings: SamplingSettings) -> Rejected | None:
        """Why vLLM cannot do it; None where it can."""
        if not self._speculates:
            return None
        if not request.speculate:
            return Rejected(
                "aerie.speculate=false is not supported here: vLLM drafts for every request; "
                "leave it out",
                param="aerie",
                code="unsupported_parameter",
            )
        if not settings.greedy and vllm.only_greedy(self._config):
            return Rejected(
                f"temperature={settings.temperature} is not supported here: {vllm.ONLY_GREEDY}; "
                "ask with temperature 0",
                param="temperature",
                code="unsupported_parameter",
            )
        for field, given in (("min_p", settings.min_p), ("logit_bias", settings.logit_bias)):
            if given:
                return Rejected(
                    f"{field} is not supported here: vLLM has none with a draft head; leave it out",
                    param=field,
                    code="unsupported_parameter",
                )
        return None

    def _asked(self, request: Generation, read: Read, echoes: Sequence[str]) -> _Asked:
        most = self._config.serve.max_new_tokens
        return _Asked(
            prompt_tokens=sum(map(len, read.prompts)),
            echoes=tuple(text for text in echoes for _ in range(request.choices)),
            bodies=tuple(
                body_of(
                    ids,
                    request,
                    read.settings,
                    place=place,
                    limit=request.max_new_tokens or min(self._longest - len(ids), most),
                    ends=self._ends,
                )
                for ids in read.prompts
                for place in range(request.choices)
            ),
            top=read.settings.logprobs,
        )


def leave() -> None:
    """End this process, as a crash would: Ray Serve replaces it, and its requests are retried."""
    os._exit(1)
