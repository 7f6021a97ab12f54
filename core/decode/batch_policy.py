"""Which nodes of all sequences' trees are verified, and how deep trees are drafted, round by round.

A round's value is its expected tokens over its expected seconds. Drafting goes on for another
level while that promises more of it; then, of all nodes of all sequences, the likeliest are
taken, as many as give most of it, which may be none. Where a round also reads prompts, its seconds
say little of what a node is worth: what counts there is what the same seconds give in other rounds.
Whether to draft at all is decided by what rounds with drafts really gave at about this batch size
beside plain ones, so that neither a wrong estimate nor a bad head makes decoding slower for long.

Shapes: S sequences whose trees are chosen, N nodes of a tree, P nodes of all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from core.decode.acceptance import Acceptance, Floats, RequestRecord
from core.decode.costs import CostModel
from core.decode.tree import DraftTree, TreePlan

# Drafts must give so much more than plain decoding at the same batch size, or they pause.
WORTHWHILE = 1.02
# So many rounds with drafts are looked at, and then so many go without, twice as many each time.
TRIAL_ROUNDS = 8
FIRST_PAUSE, LONGEST_PAUSE = 16, 256
# Of what rounds gave, the last 20 or so count.
MEMORY = 0.95
# Of a level's probability, what is expected to go on to the next one, before any was seen.
GOES_ON = 0.6


@dataclass
class _Record:
    """What rounds with drafts gave at batch sizes near each other, and whether they pause.

    Attributes:
        plain_seconds: in which plain rounds would have given the same tokens.
        seconds: that they took.
    """

    plain_seconds: float = 0.0
    seconds: float = 0.0
    rounds: int = 0
    paused: int = 0
    next_pause: int = FIRST_PAUSE

    @property
    def gain(self) -> float:
        """Speed relative to plain rounds; 1 before enough were looked at."""
        return self.plain_seconds / self.seconds if self.rounds >= TRIAL_ROUNDS else 1.0


@dataclass
class PolicyRound:
    """One round's decisions.

    Attributes:
        records: of the S sequences.
        sequences: of the whole batch, fixed trees and prompts included.
        drafts: whether a head is asked.
        worth: tokens that a second gives in other rounds, where this one also reads prompts; None
            where it is this round that is to give most.
        expanded: of each level behind the root's children, nodes of all trees that it is of.
    """

    records: Sequence[RequestRecord]
    sequences: int
    drafts: bool
    verify_seconds: Floats
    base_tokens: int
    worth: float | None = None
    expanded: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    last_level: float = field(default=0.0)


class BatchPolicy:
    """Chooses trees for the sequences that leave it open; not thread-safe.

    Attributes:
        largest: bounds of every tree.
        acceptance: what was learned of nodes.
        costs: of passes and drafts.
        clock: seconds; drafts and passes are timed with it.
    """

    def __init__(
        self,
        costs: CostModel,
        largest: TreePlan,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin with what was measured.

        Args:
            costs: of this machine.
            largest: most nodes and expansions, and the children an expansion.
            clock: seconds.
        """
        self.costs, self.largest, self.clock = costs, largest, clock
        self.acceptance = Acceptance()
        self._records: dict[int, _Record] = {}
        self._goes_on = [GOES_ON] * (largest.depth + 1)

    def begin(
        self,
        records: Sequence[RequestRecord],
        *,
        prompt_tokens: int = 0,
        fixed_tokens: int = 0,
        others: int = 0,
    ) -> PolicyRound:
        """A round of S sequences.

        Args:
            records: of these.
            prompt_tokens: that are read in the same pass.
            fixed_tokens: of trees that are not chosen, verified in the same pass.
            others: sequences that these two are of.
        """
        count = len(records)
        base = count + prompt_tokens + fixed_tokens
        most = count * (self.largest.total_tokens - 1)
        record = self._record(count)
        drafts = not record.paused
        if record.paused:
            record.paused -= 1
        worth = max(1.0, record.gain) / self._plain_seconds(count) if prompt_tokens else None
        return PolicyRound(
            records=records,
            sequences=count + others,
            drafts=drafts,
            verify_seconds=self.costs.verify_up_to(base, most, count + others),
            base_tokens=base,
            worth=worth,
        )

    def width(self, now: PolicyRound, levels: Sequence[Floats], beams_SK: Floats) -> int:
        """How many nodes of each tree are expanded; 0 where another level promises no more.

        Args:
            now: the round.
            levels: log-probabilities of the nodes proposed so far, [S, …] each, by depth.
            beams_SK: those of the nodes that may be expanded, best first.
        """
        depth, count = len(levels), len(now.records)
        beam_SK = self._probabilities(now, beams_SK, depth)
        if depth > 1 and now.last_level > 0:
            share = min(1.0, float(beam_SK.sum()) / now.last_level)
            self._goes_on[depth - 2] += 0.1 * (share - self._goes_on[depth - 2])
        if depth > self.largest.depth:
            return 0
        known_P = np.concatenate(
            [self._probabilities(now, scores, 1 + place) for place, scores in enumerate(levels)],
            axis=1,
        ).ravel()
        next_SK = beam_SK * self._goes_on[depth - 1]
        known_seconds = self.costs.draft(now.expanded, count)
        _, here = self._best(now, known_P, known_seconds)
        # A child that would not be verified need not be found.
        ordered_P = -np.sort(-np.concatenate((known_P, next_SK.ravel())))
        taken, _ = self._best(now, ordered_P, known_seconds, ordered=True)
        least = ordered_P[taken - 1] if taken else np.inf
        width = int((next_SK >= least).sum(1).max())
        if not width:
            return 0
        expanded = [*now.expanded, count * width]
        deeper_P = np.concatenate((known_P, next_SK[:, :width].ravel()))
        _, there = self._best(now, deeper_P, self.costs.draft(expanded, count))
        if there <= here:
            return 0
        now.expanded, now.last_level = expanded, float(beam_SK[:, :width].sum())
        return width

    def choose(self, now: PolicyRound, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Of each sequence's tree, the part that is verified."""
        found = [
            self.acceptance.of_tree(tree, record)[1:]
            for tree, record in zip(trees, now.records, strict=True)
        ]
        chances_P = np.concatenate(found)
        if not len(chances_P):
            return list(trees)
        depths_P = np.concatenate([tree.depths_N.numpy()[1:] for tree in trees])
        owner_P = np.repeat(np.arange(len(trees)), [tree.size - 1 for tree in trees])
        node_P = np.concatenate([np.arange(1, tree.size) for tree in trees])
        # Parents before children: they are as likely at least, and stand higher.
        order_P = np.lexsort((node_P, owner_P, depths_P, -chances_P))
        count, _ = self._best(now, chances_P[order_P], now.draft_seconds, ordered=True)
        taken_P = order_P[:count]
        return [
            tree.part([0, *sorted(node_P[taken_P[owner_P[taken_P] == owner]].tolist())])
            for owner, tree in enumerate(trees)
        ]

    def ended(self, now: PolicyRound, tokens: int, nodes: int, verify_seconds: float) -> None:
        """Note what the round gave.

        Args:
            now: the round.
            tokens: committed to the S sequences.
            nodes: of all trees that were verified, with the other tokens of the pass.
            verify_seconds: what verification took.
        """
        self.costs.took_verify(nodes, now.sequences, verify_seconds)
        count = len(now.records)
        record = self._record(count)
        if not now.drafts:
            return
        if now.draft_seconds:
            self.costs.took_draft(now.expanded, count, now.draft_seconds)
        # Rounds that read prompts too are slow for another reason.
        if now.base_tokens > count:
            return
        plain_seconds = tokens * self._plain_seconds(count)
        record.plain_seconds = record.plain_seconds * MEMORY + plain_seconds
        record.seconds = record.seconds * MEMORY + now.draft_seconds + verify_seconds
        record.rounds += 1
        if record.rounds < TRIAL_ROUNDS:
            return
        if record.gain >= WORTHWHILE:
            record.next_pause = FIRST_PAUSE
            return
        next_pause = min(2 * record.next_pause, LONGEST_PAUSE)
        self._records[_size(count)] = _Record(paused=record.next_pause, next_pause=next_pause)

    def _record(self, count: int) -> _Record:
        return self._records.setdefault(_size(count), _Record())

    def _plain_seconds(self, count: int) -> float:
        """A token's, in plain rounds of so many sequences."""
        return self.costs.verify(count, count) / count

    def _probabilities(self, now: PolicyRound, scores_SX: Floats, depth: int) -> Floats:
        depths = np.full(scores_SX.shape, depth)
        factors_S1 = np.array([record.factor for record in now.records])[:, None]
        found: Floats = self.acceptance.probabilities(depths, scores_SX) * factors_S1
        return np.minimum(found, 1.0)

    def _best(
        self, now: PolicyRound, chances_P: Floats, draft_seconds: float, *, ordered: bool = False
    ) -> tuple[int, float]:
        """How many of these nodes to verify, likeliest first, and what the round is worth then."""
        if not ordered:
            chances_P = -np.sort(-chances_P)
        most = len(now.verify_seconds) - 1
        tokens = len(now.records) + np.concatenate(([0.0], chances_P[:most].cumsum()))
        seconds = draft_seconds + now.verify_seconds[: len(tokens)]
        values = tokens / seconds if now.worth is None else tokens - now.worth * seconds
        best = int(values.argmax())
        return best, float(values[best])


def _size(count: int) -> int:
    """Batch sizes that are judged together: about as many as 1, 2, 4, 8, …"""
    return round(math.log2(count))
