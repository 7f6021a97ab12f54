"""Who decodes next: waiting requests, those at work, and rows that ended ones left behind.

A request starts when it is its turn, there is a place in the batch, and its rows are free. Rows
of an answer that has ended are kept while nobody needs them: a request that begins with the same
tokens, such as the next turn of a conversation, takes over what they hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from core.config import DecodeConfig
from core.decode.requests import DecodedSequence
from core.decode.rows import RowSpace, Stretch
from core.errors import BusyError

# Below, looking for rows to take over costs more than the prompt.
SHORTEST_PREFIX = 8


@dataclass(frozen=True, eq=False)
class KeptRows:
    """What an answer that has ended left behind.

    Attributes:
        tokens: whose rows are held, of the target's cache.
        read: how many of them the draft head's holds too.
        stretch: where.
    """

    tokens: tuple[int, ...]
    read: int
    stretch: Stretch

    def shared(self, sequence: DecodedSequence) -> int:
        """Tokens that a new sequence need not compute: never the last one of its prompt."""
        prompt = sequence.request.prompt_ids
        pairs = zip(self.tokens, prompt, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if sequence.drafted:
            # The head's row of a token was made of the token behind it too.
            same = max(0, min(same - 1, self.read))
        return min(same, len(prompt) - 1)

    def goes_on_in(self, sequence: DecodedSequence) -> bool:
        """Whether a new sequence begins with all of this text: then nobody else will want it."""
        return tuple(sequence.request.prompt_ids[: len(self.tokens)]) == self.tokens


class Scheduler:
    """Which requests wait, which are at work, and whose the rows are.

    Attributes:
        running: sequences at work, in the order in which they started.
        waiting: sequences that have not started.
        kept: rows left behind, the ones used longest ago first.
    """

    def __init__(self, config: DecodeConfig, move: Callable[[Stretch, Stretch, int], None]) -> None:
        """Begin with all rows free.

        Args:
            config: sizes of cache, batch, queue and chunks.
            move: copies the first so many rows of one stretch to another, in all caches.
        """
        self.config, self._move = config, move
        self.space = RowSpace(config.cache_tokens)
        self.waiting: deque[DecodedSequence] = deque()
        self.running: list[DecodedSequence] = []
        self.kept: list[KeptRows] = []

    def add(self, sequence: DecodedSequence) -> None:
        """Queue a sequence.

        Raises:
            BusyError: too many wait already.
        """
        assert sequence.num_rows <= self.space.num_rows, "the decoder lets none in that cannot fit"
        if len(self.waiting) >= self.config.max_waiting:
            raise BusyError(
                f"{len(self.waiting)} requests wait already; try again later, or raise "
                "decode.max_waiting"
            )
        self.waiting.append(sequence)

    def admit(self) -> None:
        """Start what can start, in the order of arrival; none overtakes another."""
        while self.waiting and len(self.running) < self.config.batch_size:
            if not self._start(self.waiting[0]):
                return
            self.running.append(self.waiting.popleft())

    def chunks(self) -> list[tuple[DecodedSequence, int]]:
        """The prompts that this round reads on, and how many tokens of each."""
        left = self.config.prefill_chunk
        chosen = []
        for sequence in self.running:
            if sequence.prefilling and left:
                count = min(left, len(sequence.tokens) - sequence.cached)
                chosen.append((sequence, count))
                left -= count
        return chosen

    def end(self, sequence: DecodedSequence) -> None:
        """Take a sequence out, wherever it is; its rows are kept for a while."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        stretch = sequence.stretch
        assert stretch is not None
        # An answer that was cut has cached more than it gave.
        held = min(sequence.cached, len(sequence.tokens))
        if self.config.reuse_prefixes and held >= SHORTEST_PREFIX:
            tokens = tuple(sequence.tokens[:held])
            self.kept.append(KeptRows(tokens, min(sequence.read, held), stretch))
        else:
            self.space.give_back(stretch)

    def _start(self, sequence: DecodedSequence) -> bool:
        """Give a sequence its rows; False if there are too few for now."""
        source = self._source(sequence)
        others = [kept for kept in self.kept if kept is not source]
        stretch = self.space.take(sequence.num_rows)
        for kept in others:
            if stretch is not None:
                break
            self._drop(kept)
            stretch = self.space.take(sequence.num_rows)
        if source and (stretch is None or source.goes_on_in(sequence)):
            # The rows can be written over while they move.
            self._drop(source)
            stretch = stretch or self.space.take(sequence.num_rows)
        if stretch is None:
            return False
        if source:
            shared = source.shared(sequence)
            self._move(source.stretch, stretch, shared)
            sequence.cached = shared
            sequence.read = shared if sequence.drafted else 0
        sequence.stretch = stretch
        return True

    def _source(self, sequence: DecodedSequence) -> KeptRows | None:
        """The rows that spare most of a prompt; they count as used now."""
        best = max(self.kept, key=lambda kept: kept.shared(sequence), default=None)
        if best is None or best.shared(sequence) < SHORTEST_PREFIX:
            return None
        self.kept.remove(best)
        self.kept.append(best)
        return best

    def _drop(self, kept: KeptRows) -> None:
        self.kept.remove(kept)
        self.space.give_back(kept.stretch)
