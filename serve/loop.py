"""A decoder at work: requests join it and leave it between its rounds."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import AerieError, BusyError
from serve.memory import Trimmer
from serve.pace import Load, Pace

if TYPE_CHECKING:
    from core.decode.engine import SpeculativeDecoder
    from core.decode.requests import Event, Request

# Rounds in a row that fail before the decoder counts as broken: one may be a request's doing.
MOST_FAILURES = 3

logger = logging.getLogger("ray.serve")


class DecodingError(AerieError):
    """The decoder failed in a round that this request was part of."""


class ClosingError(AerieError):
    """The loop ends when what it has begun is done, and takes nothing new."""


@dataclass(eq=False)
class Lane:
    """A decoder among those that the thread runs.

    Attributes:
        decoder: touched by the thread alone, once there is a turn of it.
        failures: rounds in a row that failed.
    """

    decoder: SpeculativeDecoder
    failures: int = 0


@dataclass(eq=False)
class Turn:
    """One request at a decoder.

    Attributes:
        visit: whose it is.
        lane: of the decoder.
        place: among those that came together.
        request: what is asked.
        open: whether anybody waits for more of it.
        id: the decoder's name for it; None until it is taken in.
        started: when its prompt began to be read (monotonic); None while it waits.
        tokens: given so far.
    """

    visit: Visit
    lane: Lane
    place: int
    request: Request
    open: bool = True
    id: int | None = None
    started: float | None = None
    tokens: int = 0

    def give_up(self) -> None:
        """There are no more events of it; its rows are free when the round that runs is over."""
        self.open = False


class Visit:
    """Requests that came together, on the side of the coroutine that waits for their events."""

    def __init__(self, requests: Sequence[Request], lane: Lane) -> None:
        self.lane = lane
        self.turns = tuple(
            Turn(self, lane, place, request) for place, request in enumerate(requests)
        )
        self.event_loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[Turn, Event] | None] = asyncio.Queue()

    async def events(self) -> AsyncGenerator[tuple[Turn, Event], None]:
        """The rounds of all turns as they come, until each has ended or was given up.

        Closing it gives the others up.

        Raises:
            DecodingError: the decoder failed.
        """
        try:
            while any(turn.open for turn in self.turns):
                told = await self._told.get()
                if told is None:
                    raise DecodingError("the decoder failed in mid-answer")
                turn, event = told
                if turn.open:
                    turn.open = event.ending is None
                    yield turn, event
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Nobody waits any more."""
        for turn in self.turns:
            turn.give_up()

    def tell(self, told: tuple[Turn, Event] | None) -> None:
        """Hand an event over, or None for a failure; in the event loop's thread."""
        self._told.put_nowait(told)


class DecodingLoop:
    """Runs a decoder in a thread while there is work, and tells each event to who waits for it.

    For a time there may be several, which take turns: while a draft head is tried, and while a
    replaced one ends its answers. The thread alone touches them. Others leave a turn in `_turns`,
    or mark theirs as given up; the thread sees to it between two rounds.
    """

    def __init__(self, decoder: SpeculativeDecoder) -> None:
        """Start the thread, which waits."""
        self.lane = Lane(decoder)
        config = decoder.config
        self.most = config.batch_size + config.max_waiting
        self._changed = threading.Condition()
        self._turns: list[Turn] = []
        self._pace = Pace()
        self._refused = 0
        self._closing = False
        # When the round that runs began (monotonic); None between rounds.
        self._round_began: float | None = None
        # A daemon: a process that has to end does not wait for an answer.
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def join(self, requests: Sequence[Request], lane: Lane | None = None) -> Visit:
        """Take requests in, all of them or none; call it in an event loop.

        Args:
            requests: to be decoded together.
            lane: where; None is `self.lane`.
        Raises:
            BusyError: too many are at work or wait.
            ClosingError: the loop ends.
        """
        visit = Visit(requests, lane or self.lane)
        with self._changed:
            if self._closing:
                raise ClosingError("this replica is shutting down; try again")
            self._check_room(len(requests))
            self._turns += visit.turns
            self._changed.notify()
        return visit

    def check_room(self, count: int) -> None:
        """Refuse early what `join` would refuse, before any work is done for it.

        Raises:
            BusyError: too many are at work or wait.
        """
        with self._changed:
            self._check_room(count)

    def _check_room(self, count: int) -> None:
        there = sum(turn.open for turn in self._turns)
        if there + count > self.most:
            self._refused += 1
            raise BusyError(
                f"{there} of at most {self.most} requests are decoded or wait already, and "
                f"{count} more do not fit; try again later"
            )

    def close(self) -> None:
        """Take nothing new, and end when what was begun is done; does not wait for that."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    @property
    def healthy(self) -> bool:
        """Whether a new request has a chance."""
        return self._thread.is_alive() and self.lane.failures < MOST_FAILURES

    def hangs(self, most_s: float) -> bool:
        """Whether a round has run for longer; those who wait are then told, and nobody else let in.

        The round itself cannot be ended but with its process.
        """
        began = self._round_began
        if began is None or time.monotonic() - began <= most_s:
            return False
        self.close()
        with self._changed:
            visits = {turn.visit for turn in self._turns if turn.open}
        for visit in visits:
            _hand_over(visit, None)
        return True

    def load(self) -> Load:
        """What is to be done, and how fast that goes."""
        pace = self._pace
        with self._changed:
            turns = [turn for turn in self._turns if turn.open]
            running = sum(turn.started is not None for turn in turns)
            backlog = sum(pace.left(turn.tokens, turn.request.max_new_tokens) for turn in turns)
            return Load(
                running=running,
                waiting=len(turns) - running,
                backlog_tokens=backlog,
                tokens=pace.tokens,
                refused=self._refused,
                tokens_per_second=pace.tokens_per_second,
                full_tokens_per_second=pace.full_tokens_per_second,
            )

    # In the thread

    def _run(self) -> None:
        trimmer = Trimmer()
        try:
            while turns := self._wait():
                trimmer.look()
                for lane in dict.fromkeys(turn.lane for turn in turns):
                    self._round(lane, [turn for turn in turns if turn.lane is lane])
        finally:
            self.close()
            with self._changed:
                turns = list(self._turns)
            self._fail(turns)

    def _wait(self) -> list[Turn]:
        """Until there is work; none if there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._turns or self._closing)
            return list(self._turns)

    def _round(self, lane: Lane, turns: Sequence[Turn]) -> None:
        began = self._round_began = time.monotonic()
        try:
            self._let_go([turn for turn in turns if not turn.open])
            self._take_in([turn for turn in turns if turn.open and turn.id is None])
            events = lane.decoder.step()
        except Exception:
            logger.exception("a round of the decoder failed; all of its requests are given up")
            lane.failures += 1
            with self._changed:
                turns = [turn for turn in self._turns if turn.lane is lane]
            self._fail(turns)
            lane.decoder.reset()
            return
        finally:
            self._round_began = None
        lane.failures = 0
        self._tell(lane, events, began)

    def _let_go(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            if turn.id is not None:
                turn.lane.decoder.cancel(turn.id)
        self._forget(turns)

    def _take_in(self, turns: Sequence[Turn]) -> None:
        """In their order, as far as the decoder's queue goes; a round makes room in it."""
        for turn in turns:
            try:
                turn.id = turn.lane.decoder.submit(turn.request)
            except BusyError:
                return

    def _tell(self, lane: Lane, events: Sequence[Event], began: float) -> None:
        waiting = {sequence.id for sequence in lane.decoder.scheduler.waiting}
        with self._changed:
            turns = [turn for turn in self._turns if turn.lane is lane]
            by_id = {turn.id: turn for turn in turns if turn.id is not None}
            for number, turn in by_id.items():
                if turn.started is None and number not in waiting:
                    turn.started = began
            told = [(by_id[event.request_id], event) for event in events]
            for turn, event in told:
                turn.tokens += len(event.round.tokens)
            at_work = sum(turn.started is not None for turn in by_id.values())
            tokens = sum(len(event.round.tokens) for event in events)
            self._pace.note(at_work, tokens, time.monotonic() - began)
        self._forget([turn for turn, event in told if event.ending is not None])
        for turn, event in told:
            _hand_over(turn.visit, (turn, event))

    def _fail(self, turns: Sequence[Turn]) -> None:
        self._forget(turns)
        for visit in {turn.visit for turn in turns}:
            _hand_over(visit, None)

    def _forget(self, turns: Sequence[Turn]) -> None:
        with self._changed:
            for turn in turns:
                if turn.tokens:
                    self._pace.ended(turn.tokens, turn.request.max_new_tokens)
            self._turns = [turn for turn in self._turns if turn not in turns]


def _hand_over(visit: Visit, told: tuple[Turn, Event] | None) -> None:
    # An event loop that has ended has nobody who waits.
    with suppress(RuntimeError):
        visit.event_loop.call_soon_threadsafe(visit.tell, told)
