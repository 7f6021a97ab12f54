"""A replica's draft heads: the one in use, one beside it on trial, and earlier ones that end.

Each has a decoder of its own over the one target, so its cache and features are nobody else's. A
decoder whose head was replaced lives until its last answer has ended.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from core.config import Config
from core.decode.engine import SpeculativeDecoder
from core.decode.load import load_head_for
from core.decode.requests import Request
from core.decode.tree import PLAIN
from core.errors import BusyError, UserError
from serve.apart import apart
from serve.canary import Tally
from serve.desk import REPORT_EVERY_S, Head, Order, Report
from serve.loop import ClosingError, DecodingLoop, Lane

# A head on trial first answers this, whose tokens nobody sees.
TRY_OUT_TOKENS = 24
# The tree of a head that comes where none was measured, since the earlier one was not worth any.
FIRST_TREE = 8

AskDesk = Callable[[Report], Awaitable[Order]]

logger = logging.getLogger("ray.serve")


@dataclass(eq=False)
class Version:
    """A head with its decoder, and what it has brought since the trial began."""

    head: Head
    lane: Lane
    tally: Tally = field(default_factory=Tally)

    def count(self, tokens: int) -> None:
        """A round committed so many."""
        self.tally += Tally.of_round(tokens)

    def count_failure(self) -> None:
        """A request could not be finished."""
        self.tally += Tally(failures=1)


class Heads:
    """Which head takes a request, as the desk orders."""

    def __init__(self, config: Config, loop: DecodingLoop, desk: AskDesk | None) -> None:
        """Begin with the decoder that the configuration gave.

        Args:
            config: sections target, draft, decode.
            loop: runs the decoders.
            desk: takes a report and gives orders; None leaves everything as it is.
        """
        self._config, self._loop, self._desk = config, loop, desk
        self._name = uuid.uuid4().hex
        self.current = Version(Head(0, config.draft.path), loop.lane)
        self.trial: Version | None = None
        self._share = 0.0
        # Numbers of heads that cannot be used here, and why.
        self._refused: dict[int, str] = {}
        self._loading: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None

    def choose(self) -> Version:
        """For a new request."""
        trial = self.trial
        if trial is None or trial.tally.failures or random.random() >= self._share:
            return self.current
        return trial

    async def start(self) -> None:
        """Get to the head that is in use elsewhere, and follow the desk from then on.

        Where that head cannot be used, the configured one stays: answers are the same with any.
        """
        if self._desk is None or self._following is not None:
            return
        self._following = asyncio.create_task(self._follow())
        order = await self._step()
        while order is not None and self._is_new(order.current):
            await asyncio.sleep(REPORT_EVERY_S / 10)
            self._obey(order)
        if order is not None and (reason := self._refused.get(order.current.number)):
            logger.error(
                "draft head %d, %s, is in use elsewhere and CANNOT BE USED HERE: %s. This replica "
                "keeps the configured one, %s; bring another head with POST /admin/draft",
                order.current.number, order.current.path, reason, self.current.head.path,
            )  # fmt: skip

    def _is_new(self, head: Head) -> bool:
        """Whether it is to be got to."""
        return head.number != self.current.head.number and head.number not in self._refused

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            await self._step()

    async def _step(self) -> Order | None:
        assert self._desk is not None
        trial = self.trial
        report = Report(
            replica=self._name,
            origin=self._config.draft.path,
            current=self.current.head,
            ready=trial.head.number if trial else None,
            # The trial's, if it was: its number is the highest.
            refused=max(self._refused.items(), default=None),
            old=self.current.tally,
            new=trial.tally if trial else Tally(),
        )
        try:
            order = await self._desk(report)
        except Exception as error:
            # It will be back: until then all stays as it is.
            logger.warning("the desk of the draft heads does not answer: %s", error)
            return None
        self._obey(order)
        return order

    def _obey(self, order: Order) -> None:
        new = self._is_new(order.current)
        wanted = order.current if new else order.trial
        if self.trial and (wanted is None or wanted.number != self.trial.head.number):
            self.trial = None
        if wanted is None:
            return
        if self.trial is None:
            self._begin_to_load(wanted)
        elif new:
            logger.warning("draft head %d is in use now", wanted.number)
            self.current, self.trial = self.trial, None
            self.current.tally = Tally()
            self._loop.lane = self.current.lane
        else:
            if order.share and not self._share:
                self.current.tally = self.trial.tally = Tally()
        self._share = order.share

    def _begin_to_load(self, head: Head) -> None:
        if head.number not in self._refused and (self._loading is None or self._loading.done()):
            self._share = 0.0
            self._loading = asyncio.create_task(self._load(head))

    async def _load(self, head: Head) -> None:
        try:
            lane = Lane(await asyncio.to_thread(apart, self._decoder, head))
            await self._try_out(lane)
        except ClosingError:
            pass  # this replica is no example for others
        except UserError as error:
            self._refused[head.number] = str(error)
        except Exception as error:
            logger.exception("draft head %d cannot be used", head.number)
            self._refused[head.number] = f"it cannot be used: {type(error).__name__}: {error}"
        else:
            self.trial = Version(head, lane)

    def _decoder(self, head: Head) -> SpeculativeDecoder:
        """Load a head beside the others; in a thread that ends with it."""
        target = self.current.lane.decoder.target
        config = self._config.replace(draft={"path": head.path})
        decoder = SpeculativeDecoder(target, load_head_for(target, config), config.decode)
        if config.decode.total_tokens == "auto" and head.path is not None:
            # Measuring would hold everybody's answers up: the tree is that of the head before.
            plan = self.current.lane.decoder.plan
            decoder.plan = plan if plan != PLAIN else decoder.plan_of(FIRST_TREE)
        return decoder

    async def _try_out(self, lane: Lane) -> None:
        """One answer, beside those of others."""
        tokens = lane.decoder.target.tokenizer("Hello!")["input_ids"]
        while True:
            try:
                visit = self._loop.join([Request(tokens, TRY_OUT_TOKENS)], lane)
                break
            except BusyError:
                await asyncio.sleep(REPORT_EVERY_S)
        async for _ in visit.events():
            pass
