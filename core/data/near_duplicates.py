"""Conversations that are nearly the same: MinHash signatures, banding, clusters.

A text stands for the set of its runs of five words. `signature` estimates what share two such
sets have in common (Jaccard), as Broder (1997) does; bands of rows find the pairs worth comparing
(Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4). All of it by content, so that
neither order nor workers decide.

Shapes: N conversations, P permutations.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from core.data.conversations import Message

PERMUTATIONS = 128
SHINGLE_WORDS = 5
# Scripts that put no spaces between words: each character counts as one.
WORD = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+"
)
SHINGLES_AT_ONCE = 2048
# A pair at the threshold becomes a candidate with at least this probability.
RECALL = 0.99
# Bounds the work where very many share a band and yet differ, such as forms filled in.
LEADERS = 64

Signature = npt.NDArray[np.uint32]

_random = np.random.Generator(np.random.PCG64(20230401))
XORS_P = _random.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)
FACTORS_P = _random.integers(0, 2**31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
MULTIPLIERS = _random.integers(0, 2**63, SHINGLE_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(
    1
)


def signature(messages: tuple[Message, ...]) -> Signature:
    """uint32 [P]: the share of equal places of two signatures estimates their texts' overlap."""
    words = [w for message in messages for w in WORD.findall(message.content.lower())]
    hashes = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    if len(hashes) < SHINGLE_WORDS:
        hashes = np.pad(hashes, (0, SHINGLE_WORDS - len(hashes)))
    windows = np.lib.stride_tricks.sliding_window_view(hashes, SHINGLE_WORDS)
    mixed = (windows * MULTIPLIERS).sum(axis=1, dtype=np.uint64)
    mixed ^= mixed >> np.uint64(29)
    shingles = (mixed * MULTIPLIERS[0] >> np.uint64(32)).astype(np.uint32)
    result = np.full(PERMUTATIONS, 2**32 - 1, dtype=np.uint32)
    for start in range(0, len(shingles), SHINGLES_AT_ONCE):
        some = shingles[start : start + SHINGLES_AT_ONCE]
        permuted = (some[:, None] ^ XORS_P) * FACTORS_P
        np.minimum(result, permuted.min(axis=0), out=result)
    return result


@functools.lru_cache(maxsize=2**16)
def _word_hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "replace"))


def rows_per_band(similarity: float) -> int:
    """The longest bands by which a pair of this similarity is still found."""
    for rows in range(32, 1, -1):
        if 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= RECALL:
            return rows
    return 1


def open_signatures(path: Path) -> npt.NDArray[np.uint32]:
    """[N, P], as signatures were appended to a file; stays on disk."""
    if path.stat().st_size == 0:
        return np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    return np.memmap(path, dtype=np.uint32, mode="r").reshape(-1, PERMUTATIONS)


def near_duplicates(
    signatures_NP: npt.NDArray[np.uint32], rank_N: npt.NDArray[np.int64], similarity: float
) -> npt.NDArray[np.bool_]:
    """Which conversations are to give way to one that is nearly the same.

    Pairs of at least this similarity are joined; of all that are joined, also over others, the
    one of lowest rank stays.

    Args:
        signatures_NP: uint32 [N, P].
        rank_N: int64 [N], a permutation: each conversation's place by content hash.
        similarity: 0 to 1; the share of equal places in two signatures.
    Returns:
        bool [N]. Memory: some 40 bytes a conversation.
    """
    parents_N = np.arange(len(rank_N))
    rows = rows_per_band(similarity)
    for start in range(0, PERMUTATIONS - rows + 1, rows):
        for group in _groups(signatures_NP[:, start : start + rows], rank_N):
            _join_alike(signatures_NP, group, parents_N, rank_N, similarity)
    return np.fromiter(
        (_root(parents_N, i) != i for i in range(len(parents_N))), dtype=bool, count=len(parents_N)
    )


def _groups(
    band_NR: npt.NDArray[np.uint32], rank_N: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.int64]]:
    """Those that agree in a whole band, each group by rank."""
    # A hash of the rows: those of one group agree in it, and comparing weeds out the others.
    keys_N = np.zeros(len(band_NR), dtype=np.uint64)
    for column in band_NR.T:
        keys_N = (keys_N ^ column) * MULTIPLIERS[1]
        keys_N ^= keys_N >> np.uint64(31)
    order_N = np.lexsort((rank_N, keys_N))
    sorted_N = keys_N[order_N]
    changes = np.flatnonzero(sorted_N[1:] != sorted_N[:-1]) + 1
    for start, end in zip([0, *changes], [*changes, len(keys_N)], strict=True):
        if end - start > 1:
            yield order_N[start:end]


def _join_alike(
    signatures_NP: npt.NDArray[np.uint32],
    group: npt.NDArray[np.int64],
    parents_N: npt.NDArray[np.int64],
    rank_N: npt.NDArray[np.int64],
    similarity: float,
) -> None:
    """Compare all with the first, then those that differ from it with the first of them, …."""
    for _ in range(LEADERS):
        if len(group) < 2:
            return
        leader, others = group[0], group[1:]
        alike = (signatures_NP[others] == signatures_NP[leader]).mean(axis=1) >= similarity
        for other in others[alike]:
            a, b = _root(parents_N, leader), _root(parents_N, other)
            winner, loser = (a, b) if rank_N[a] <= rank_N[b] else (b, a)
            parents_N[loser] = winner
        group = others[~alike]


def _root(parents_N: npt.NDArray[np.int64], index: int) -> int:
    while parents_N[index] != index:
        parents_N[index] = parents_N[parents_N[index]]
        index = parents_N[index]
    return int(index)
