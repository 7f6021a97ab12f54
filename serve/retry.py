"""An answer outlives its replica: begun anew on another one, it goes on where it broke off.

What a request with a seed (or a greedy one) is answered does not depend on the replica, nor on
who shares its rounds. So every request gets a seed here, if it has none, and a second replica
decodes the same tokens once more; those that were sent already are left out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from core.errors import AerieError
from serve.errors import ApiError, refused
from serve.generation import (
    RETRY_AFTER_S,
    Accepted,
    Event,
    Failed,
    Finished,
    Generation,
    Progressed,
    Rejected,
    Restarted,
)
from serve.text import split

# Of a refusal that another try may not meet: a full queue, a replica that shuts down.
PASSING = (429, 503)

logger = logging.getLogger("ray.serve")


class ReplicaLostError(AerieError):
    """The replica died; nothing is known of what it was asked."""


def lost_for_good(retries: int) -> ApiError:
    """What a client is told when trying again did not help."""
    return ApiError(
        503,
        f"the replica that answered died, and so did {retries} that took over; try again later",
        code="replica_lost",
        retry_after_s=RETRY_AFTER_S,
    )


async def resumed(
    start: Callable[[Generation], AsyncGenerator[Event, None]],
    request: Generation,
    *,
    streamed: bool,
    retries: int,
) -> AsyncGenerator[Event, None]:
    """A replica's events, as if it had not died.

    Args:
        start: asks a replica, and raises `ReplicaLostError` where it dies.
        request: what is asked.
        streamed: whether what was told has been sent, and cannot be taken back. If it can, the
            answer begins anew after `Restarted`; if not, it goes on after it.
        retries: how many other replicas may be asked.
    Raises:
        ApiError: too many died, or what one of them began another one refuses or does not go on
            with.
    """
    if request.seed is None:
        request = replace(request, seed=secrets.randbits(62))
    told, left = _Told(), retries
    while True:
        pause_s: float = 0
        try:
            async with aclosing(start(request)) as events:
                async for event in events:
                    if isinstance(event, Rejected) and event.status in PASSING and told.accepted:
                        # The client was let in: it waits once more, up to its deadline.
                        pause_s = event.retry_after_s or 0
                        break
                    if isinstance(event, Rejected) and event.status == 503 and left:
                        left -= 1
                        break
                    if isinstance(event, Rejected) and told.accepted:
                        # As one of another configuration does, while an update goes on.
                        raise refused(event)
                    if isinstance(event, Failed) and event.again and left:
                        raise ReplicaLostError(event.message)
                    fresh = told.new_of(event)
                    if fresh is not None:
                        yield fresh
                else:
                    return
        except ReplicaLostError as error:
            logger.warning(
                "request %s is begun anew, %d times more at most: %s", request.name, left, error
            )
            if not left:
                raise lost_for_good(retries) from error
            left -= 1
            if told.accepted:
                yield Restarted()
            told.restart(keep=streamed)
        await asyncio.sleep(pause_s)


@dataclass
class _Choice:
    """What was told of a choice, and how far the present replica has come in it."""

    ids: list[int] = field(default_factory=list)
    length: int = 0
    finished: bool = False
    ids_again: int = 0
    length_again: int = 0


class _Told:
    """What was told, so that nothing is told twice."""

    def __init__(self) -> None:
        self.accepted = False
        self._choices: dict[int, _Choice] = {}

    def restart(self, *, keep: bool) -> None:
        """Another replica begins from the start."""
        if not keep:
            self._choices = {}
        for choice in self._choices.values():
            choice.ids_again = choice.length_again = 0

    def new_of(self, event: Event) -> Event | None:
        """The event, or what is new in it; None where that is nothing."""
        if isinstance(event, Accepted):
            before, self.accepted = self.accepted, True
            return None if before else event
        if isinstance(event, Progressed):
            return self._progressed(event, self._choices.setdefault(event.choice, _Choice()))
        if isinstance(event, Finished):
            choice = self._choices.setdefault(event.choice, _Choice())
            before, choice.finished = choice.finished, True
            return None if before else event
        return event

    def _progressed(self, event: Progressed, choice: _Choice) -> Progressed | None:
        known = choice.ids[choice.ids_again :][: event.num_tokens]
        if list(event.ids[: len(known)]) != known:
            raise ApiError(
                503,
                "the replica that answered died, and another one came to a different text; "
                "what was sent is all there is of this answer: ask again",
                code="answer_interrupted",
            )
        # Which text is shown after a token depends on the tokens alone, not on the rounds.
        text = len(event.text)
        known_text = min(choice.length - choice.length_again, text)
        choice.ids_again += event.num_tokens
        choice.length_again += text
        choice.ids += event.ids[len(known) :]
        choice.length = max(choice.length, choice.length_again)
        if not known and not known_text:
            return event
        if len(known) == event.num_tokens and known_text == text:
            return None
        return replace(
            event,
            spans=tuple(split(event.spans, known_text)[1]),
            ids=event.ids[len(known) :],
            tokens=event.tokens[len(known) :],
            num_guessed=event.num_guessed and max(0, event.num_guessed - len(known)),
        )
