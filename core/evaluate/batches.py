"""Several requests at work at a time: what each way gets through, and whether texts stay the same.

Speed is measured in a closed loop: as soon as one request has ended, the next one comes, and time
counts only while all places are taken. Prompts of several lengths share every pass, and are at
different points of their answers. A further run has requests come at random rounds, so that they
also join batches that are half empty; it is not timed.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Event, Request
from core.decode.sampling import SamplingSettings
from core.decode.tree import TreePlan
from core.errors import InputError
from core.evaluate.speculation import GREEDY, Difference, Draw, find_difference
from core.evaluate.ways import DecoderWay

# The time of a run in pieces, whose spread says how much chance there is in it.
PIECES = 10
WARM_UP_TOKENS = 4
BatchKey = tuple[float, int, int, str, float]


@dataclass(frozen=True)
class Question:
    """What is asked in a batch.

    Attributes:
        wanted: the baseline's answer when it was asked alone.
        draw: how that was chosen.
    """

    id: str
    prompt_ids: tuple[int, ...]
    wanted: tuple[int, ...]
    draw: Draw = GREEDY


@dataclass(frozen=True)
class BatchDifference(Difference):
    """Where the answer to a question leaves the baseline's."""

    id: str = ""


@dataclass(frozen=True)
class BatchRun:
    """One run of one way; a line of `batches.jsonl`.

    Attributes:
        batch_size: requests at work at a time, at most.
        repeat: counts from 0.
        way: see `core.evaluate.ways`.
        arrivals: mean rounds between two requests; 0 is the closed loop.
        pieces: tokens and seconds of each piece of the time in which all places were taken.
        passes: trees verified in all of the run, one a request and round.
        nodes: of these trees.
        committed: tokens that they gave.
        answers: that were compared with the baseline's.
        differences: of these answers.
        temperature: of all of them.
    """

    batch_size: int
    repeat: int
    way: str
    arrivals: float
    pieces: tuple[tuple[int, float], ...]
    passes: int
    nodes: int
    committed: int
    answers: int
    differences: tuple[BatchDifference, ...]
    temperature: float = 0.0

    @property
    def key(self) -> BatchKey:
        """What tells it from the others of an evaluation."""
        return self.temperature, self.batch_size, self.repeat, self.way, self.arrivals

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BatchRun:
        """The inverse of `as_dict`."""
        pieces = tuple((int(tokens), float(seconds)) for tokens, seconds in values["pieces"])
        differences = tuple(BatchDifference(**one) for one in values["differences"])
        return cls(**{**values, "pieces": pieces, "differences": differences})


def run_batch(
    way: DecoderWay,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    *,
    repeat: int = 0,
    arrivals: float = 0.0,
    compare: bool = True,
) -> BatchRun:
    """Answer questions, several at a time, and compare the answers.

    Args:
        way: decoder and tree.
        questions: at least one, of one temperature; they are asked again until there are twice as
            many as places.
        batch_size: requests at work at most.
        max_new_tokens: limit of each.
        repeat: for the record.
        arrivals: mean rounds between two requests; 0 keeps all places taken.
        compare: whether answers are held against the baseline's.
    """
    asked = list(itertools.islice(itertools.cycle(questions), max(len(questions), 2 * batch_size)))
    loop = _Loop(way.decoder, way.plan, asked, batch_size, max_new_tokens)
    # The same rounds for every way, and in every run of an evaluation.
    draw = random.Random(f"{batch_size}/{repeat}")
    due = 0.0
    for number in itertools.count():
        while loop.has_room and (not arrivals or due <= number):
            loop.ask()
            due = number + draw.expovariate(1 / arrivals) if arrivals else 0.0
        if not loop.busy and not loop.waiting:
            break
        loop.round(timed=not arrivals and loop.full)
    target = way.decoder.target
    found = []
    for question, token_ids in loop.answers if compare else ():
        place = find_difference(
            target,
            question.prompt_ids,
            question.wanted,
            token_ids,
            sampled=question.draw.temperature > 0,
        )
        if place is not None:
            found.append(BatchDifference(**asdict(place), id=question.id))
    return BatchRun(
        batch_size=batch_size,
        repeat=repeat,
        way=way.name,
        arrivals=arrivals,
        pieces=_in_pieces(loop.timed),
        passes=loop.passes,
        nodes=loop.nodes,
        committed=loop.committed,
        answers=len(loop.answers),
        differences=tuple(found),
        temperature=questions[0].draw.temperature,
    )


@dataclass
class _Loop:
    """Requests that come one after the other, and what became of them."""

    decoder: SpeculativeDecoder
    plan: TreePlan | None
    pending: Sequence[Question]
    batch_size: int
    max_new_tokens: int
    waiting: deque[Question] = field(init=False)
    at_work: dict[int, tuple[Question, list[int]]] = field(default_factory=dict)
    answers: list[tuple[Question, list[int]]] = field(default_factory=list)
    timed: list[tuple[int, float]] = field(default_factory=list)
    passes: int = 0
    nodes: int = 0
    committed: int = 0

    def __post_init__(self) -> None:
        self.waiting = deque(self.pending)

    @property
    def has_room(self) -> bool:
        """Whether another request is there and may come."""
        return bool(self.waiting) and len(self.at_work) < self.batch_size

    @property
    def full(self) -> bool:
        """Whether all places are taken."""
        return len(self.at_work) == self.batch_size

    @property
    def busy(self) -> bool:
        """Whether any request is at work."""
        return bool(self.at_work)

    def ask(self) -> None:
        """Let the next request come."""
        question = self.waiting.popleft()
        settings = replace(
            SamplingSettings.of(self.decoder.config), temperature=question.draw.temperature
        )
        request = Request(
            question.prompt_ids,
            self.max_new_tokens,
            settings,
            seed=question.draw.seed,
            plan=self.plan,
        )
        self.at_work[self.decoder.submit(request)] = (question, [])

    def round(self, *, timed: bool) -> None:
        """One round of the decoder."""
        started = time.perf_counter()
        events = self.decoder.step()
        seconds = time.perf_counter() - started
        if timed:
            self.timed.append((sum(len(event.round.tokens) for event in events), seconds))
        for event in events:
            self._note(event)

    def _note(self, event: Event) -> None:
        done = event.round
        question, token_ids = self.at_work[event.request_id]
        token_ids += done.tokens
        if done.tree_size:
            self.passes += 1
            self.nodes += done.tree_size
            self.committed += len(done.tokens)
        if event.ending is not None:
            del self.at_work[event.request_id]
            self.answers.append((question, token_ids))


def warm_up_batch(way: DecoderWay, questions: Sequence[Question], batch_size: int) -> None:
    """Passes of a new size, and cache rows that nobody has touched, are slow at first."""
    run_batch(way, questions[: 2 * batch_size], batch_size, WARM_UP_TOKENS, compare=False)


def _in_pieces(rounds: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Rounds by tokens and seconds, summed up in at most `PIECES` of equally many."""
    count = min(PIECES, len(rounds))
    edges = [len(rounds) * piece // count for piece in range(count + 1)] if count else []
    return tuple(
        (sum(tokens for tokens, _ in part), sum(seconds for _, seconds in part))
        for part in (rounds[begin:end] for begin, end in itertools.pairwise(edges))
    )


def check_batch(way: DecoderWay, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Make sure that so many of the longest prompts fit into the cache together.

    Args:
        way: decoder and tree; the decoder has no requests.
        prompts: as many as are at work at a time.
        new_tokens: limit of each.
    Raises:
        InputError: they do not.
    """
    decoder = way.decoder
    for prompt in prompts:
        decoder.submit(Request(prompt, new_tokens, plan=way.plan))
    decoder.scheduler.admit()
    started = len(decoder.scheduler.running)
    decoder.reset()
    if started < len(prompts):
        raise InputError(
            f"eval.batch_sizes: of {len(prompts)} requests at a time, the longest prompts' and "
            f"{new_tokens} new tokens each, {started} fit decode.cache_tokens="
            f"{decoder.config.cache_tokens} and decode.batch_size={decoder.config.batch_size}; "
            "raise them"
        )
