"""Many prompts to their ends: a decoder's batch, kept full.

A request draws with random numbers of its own, and its logits are those of its sequence alone up
to rounding: what it says depends neither on its neighbours nor on when it started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request

Key = TypeVar("Key")


@dataclass(frozen=True)
class Answer:
    """Generated tokens, without the one that ended them; `cut` if none did."""

    token_ids: tuple[int, ...]
    cut: bool


@dataclass
class BatchCounts:
    """What answers took.

    Attributes:
        prompt_tokens: asked, those included that an earlier turn had left in the cache.
        new_tokens: generated, end tokens included.
        passes: of the target.
        places: tokens that these would have given with a full batch of sequences that decode.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    passes: int = 0
    places: int = 0


@dataclass
class _AtWork(Generic[Key]):
    key: Key
    request: Request
    token_ids: list[int] = field(default_factory=list)


def answer_all(
    decoder: SpeculativeDecoder,
    requests: Iterable[tuple[Key, Request]],
    follow_up: Callable[[Key, Answer], Request | None],
    counts: BatchCounts,
) -> None:
    """Answer all requests, and those that follow from the answers.

    Args:
        decoder: with nothing to do.
        requests: and by what the caller knows each.
        follow_up: is given each answer, and returns what is to be asked after it, if anything.
        counts: are added to.
    Raises:
        UserError: see `SpeculativeDecoder.submit`.
    """
    size = decoder.config.batch_size
    waiting = deque(requests)
    at_work: dict[int, _AtWork[Key]] = {}
    while waiting or at_work:
        while waiting and len(at_work) < size:
            key, request = waiting.popleft()
            at_work[decoder.submit(request)] = _AtWork(key, request)
            counts.prompt_tokens += len(request.prompt_ids)
        for event in decoder.step():
            one = at_work[event.request_id]
            one.token_ids += event.round.tokens
            counts.new_tokens += len(event.round.tokens)
            if event.ending is None:
                continue
            del at_work[event.request_id]
            cut = event.ending == "length"
            answer = Answer(tuple(one.token_ids if cut else one.token_ids[:-1]), cut)
            following = follow_up(one.key, answer)
            if following is not None:
                # Before the others: the cache still holds what it begins with.
                waiting.appendleft((one.key, following))
        counts.passes += 1
        counts.places += size
