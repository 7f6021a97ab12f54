"""How likely a drafted node is to be accepted, learned from the nodes that were.

A head's confidence in a path is the product of its probabilities. How often such a path is
accepted depends on the head, the depth and the text: it is counted, by depth and confidence, and
for each request beside what was expected of its nodes.

Shapes: N nodes of a tree, P any number of nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.decode.tree import DraftTree

Floats = NDArray[np.float64]
# Confidences are told apart by half a unit of the logarithm, down to e^-8.
BINS_A_UNIT, NUM_BINS, DEPTHS = 2, 17, 24
# Nodes of a path that was copied have no confidence, and a bin of their own.
COPIED = NUM_BINS - 1
COPIED_AT_FIRST = 0.3
# What is expected before anything was counted weighs as much as so many nodes.
PRIOR_WEIGHT = 8.0
# Counts of so many rounds ago weigh a third.
MEMORY_ROUNDS = 400
REQUEST_MEMORY_ROUNDS = 30
# A request's own nodes are at most so much less or more likely than others'.
LEAST_FACTOR, MOST_FACTOR = 0.2, 1.5
MOST_PROBABILITY = 0.98


@dataclass
class RequestRecord:
    """Accepted nodes of one request, and how many were expected; recent ones weigh more."""

    accepted: float = 4.0
    expected: float = 4.0

    @property
    def factor(self) -> float:
        """How much likelier its nodes are than those of others."""
        return min(MOST_FACTOR, max(LEAST_FACTOR, self.accepted / self.expected))


class Acceptance:
    """The counts of a decoder."""

    def __init__(self) -> None:
        """Begin with the head's own confidence."""
        middles = np.exp(-(np.arange(NUM_BINS) + 0.5) / BINS_A_UNIT)
        middles[COPIED] = COPIED_AT_FIRST
        self._prior = middles
        self._hits = np.zeros((DEPTHS, NUM_BINS))
        self._seen = np.zeros((DEPTHS, NUM_BINS))
        self._table: Floats | None = None

    def probabilities(self, depths_P: NDArray[np.int64], scores_P: Floats) -> Floats:
        """Of nodes, how likely each is to be on the accepted path, [P].

        Args:
            depths_P: from 1 on.
            scores_P: cumulative log-probabilities; NaN where a node was copied.
        """
        table = self._probability_table()
        found: Floats = table[np.minimum(depths_P, DEPTHS - 1), _bins(scores_P)]
        return found

    def of_tree(self, tree: DraftTree, record: RequestRecord) -> Floats:
        """Of a tree's nodes [N], the root's 1; a child is never likelier than its parent."""
        depths_N, scores_N = tree.depths_N.numpy(), tree_scores(tree)
        found = self.probabilities(depths_N, scores_N) * record.factor
        found = np.minimum(found, MOST_PROBABILITY)
        found[0] = 1.0
        for node in range(1, tree.size):
            found[node] = min(found[node], found[tree.parents[node]])
        return found

    def learn(self, tree: DraftTree, path: tuple[int, ...], record: RequestRecord) -> None:
        """Count a verified tree, of which `path` was accepted."""
        if tree.size == 1:
            return
        depths_N, scores_N = tree.depths_N.numpy()[1:], tree_scores(tree)[1:]
        expected = float(self.probabilities(depths_N, scores_N).sum())
        keep = 1 - 1 / REQUEST_MEMORY_ROUNDS
        record.accepted = record.accepted * keep + len(path) - 1
        record.expected = record.expected * keep + expected
        accepted_N = np.zeros(tree.size)
        accepted_N[list(path)] = 1
        place = (np.minimum(depths_N, DEPTHS - 1), _bins(scores_N))
        decay = 1 - 1 / MEMORY_ROUNDS
        self._hits *= decay
        self._seen *= decay
        np.add.at(self._hits, place, accepted_N[1:])
        np.add.at(self._seen, place, 1.0)
        self._table = None

    def _probability_table(self) -> Floats:
        """[DEPTHS, NUM_BINS]: a depth's own counts, where there are few those of all depths."""
        if self._table is None:
            hits, seen = self._hits.sum(0), self._seen.sum(0)
            of_all = (hits + PRIOR_WEIGHT * self._prior) / (seen + PRIOR_WEIGHT)
            self._table = (self._hits + PRIOR_WEIGHT * of_all) / (self._seen + PRIOR_WEIGHT)
        return self._table


def tree_scores(tree: DraftTree) -> Floats:
    """Cumulative log-probabilities of a tree's nodes [N]; NaN where there are none."""
    if tree.scores is None:
        scores = np.full(tree.size, np.nan)
        scores[0] = 0.0
        return scores
    return np.array(tree.scores, dtype=np.float64)


def _bins(scores_P: Floats) -> NDArray[np.int64]:
    copied = np.isnan(scores_P)
    bins = np.where(copied, 0.0, -scores_P * BINS_A_UNIT)
    found = np.clip(bins, 0, COPIED - 1).astype(np.int64)
    found[copied] = COPIED
    return found
