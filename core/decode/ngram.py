"""Drafting by copying: what followed in prompt or output when the text last read as it does now.

Summaries, edits and answers from documents repeat their source; a match costs no draft head.
Source: prompt lookup decoding (Saxena 2023), with several matches, and merged into a draft tree.

Shapes: N tree nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from core.decode.tree import DraftTree

# Earlier places that are compared with the end of the text, the latest first.
LOOKED_AT = 64
# A longer match says no more about what follows.
LONGEST_MATCH = 16
Path = tuple[int, ...]


class NgramIndex:
    """Of one request's prompt and output; grows with it, a few machine words a token.

    As in LZ77, each place knows the place before it that ends with the same few tokens, so that
    a token costs one look-up, and a search follows the chain.
    """

    def __init__(self, token_ids: Sequence[int], shortest_match: int) -> None:
        """Index a text.

        Args:
            token_ids: the prompt.
            shortest_match: tokens that must agree at least, 1 or more.
        """
        self._shortest = shortest_match
        self._text: list[int] = []
        # The last place where these tokens ended, and for each place the one before it, or -1.
        self._last: dict[Path, int] = {}
        self._before: list[int] = []
        self.append(token_ids)

    def append(self, token_ids: Sequence[int]) -> None:
        """Further committed tokens."""
        for token in token_ids:
            place = len(self._text)
            self._text.append(token)
            if place + 1 < self._shortest:
                self._before.append(-1)
                continue
            key = tuple(self._text[-self._shortest :])
            self._before.append(self._last.get(key, -1))
            self._last[key] = place

    def continuations(self, most: int, length: int) -> list[Path]:
        """What may follow the text.

        Args:
            most: different continuations at most.
            length: tokens of each.
        Returns:
            Continuations of the longest match first, of equally long ones that of the latest. A
            match that overlaps the end of the text is taken to repeat.
        """
        if len(self._text) < self._shortest:
            return []
        # Sorting is stable: the chain goes from the latest to the earliest.
        places = sorted(self._earlier_places(), key=self._match_length, reverse=True)
        found: dict[Path, None] = {}
        for place in places:
            if len(found) == most:
                break
            period = self._text[place + 1 : place + 1 + length]
            found[tuple(period[i % len(period)] for i in range(length))] = None
        return list(found)

    def _earlier_places(self) -> Iterator[int]:
        """Places that end as the text does, the latest first."""
        place = self._before[-1]
        for _ in range(LOOKED_AT):
            if place < 0:
                return
            yield place
            place = self._before[place]

    def _match_length(self, place: int) -> int:
        """How many tokens up to a place are those at the end of the text."""
        length, end = self._shortest, len(self._text) - 1
        longest = min(LONGEST_MATCH, place + 1)
        while length < longest and self._text[place - length] == self._text[end - length]:
            length += 1
        return length


def merge(tree: DraftTree, continuations: Sequence[Path], total_tokens: int) -> DraftTree:
    """Make continuations branches of a draft tree.

    Drafted nodes, in order of their ranks, and copied ones, continuation by continuation, take
    turns until the tree is full; one that both propose stands once. So a smaller tree is again
    the first ranks of a larger one, which the tree policy relies on.

    Args:
        tree: a head's draft, or the root alone.
        continuations: of the committed text, likeliest first.
        total_tokens: N at most, the root included.
    """
    if not continuations and tree.size <= total_tokens:
        return tree
    paths: list[Path] = [()]
    tokens = tree.token_ids_N.tolist()
    for node in range(1, tree.size):
        paths.append((*paths[tree.parents[node]], tokens[node]))
    drafted = sorted(range(1, tree.size), key=lambda node: tree.ranks[node])
    queues = [
        (paths[node] for node in drafted),
        (path[:depth] for path in continuations for depth in range(1, len(path) + 1)),
    ]
    known = tree.scores or (0.0, *(math.nan,) * (tree.size - 1))
    scores = dict(zip(paths, known, strict=True))
    ranks: dict[Path, int] = {(): 0}
    while queues and len(ranks) < total_tokens:
        queue = queues.pop(0)
        new = next((path for path in queue if path not in ranks), None)
        if new is not None:
            ranks[new] = len(ranks)
            queues.append(queue)
    return DraftTree(
        token_ids_N=tree.token_ids_N.new_tensor([tokens[0], *(path[-1] for path in ranks if path)]),
        parents=(-1, *(ranks[path[:-1]] for path in ranks if path)),
        ranks=tuple(range(len(ranks))),
        scores=tuple(scores.get(path, math.nan) for path in ranks),
    )
