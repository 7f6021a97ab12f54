"""Drafting by copying, against a search through the whole text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.decode.ngram import LONGEST_MATCH, NgramIndex, merge
from core.decode.tree import DraftTree, TreePlan
from tests.scripted import Case

Path = tuple[int, ...]


def _by_definition(text: list[int], shortest: int, most: int, length: int) -> list[Path]:
    """All earlier places, longest match first and then the latest."""
    places = []
    for end in range(shortest - 1, len(text) - 1):
        same = 0
        while same <= end and text[end - same] == text[len(text) - 1 - same]:
            same += 1
        if same >= shortest:
            places.append((min(same, LONGEST_MATCH), end))
    found: list[Path] = []
    for _, end in sorted(places, reverse=True):
        copied = list(text)
        for step in range(length):
            copied.append(copied[end + 1 + step])
        path = tuple(copied[len(text) :])
        if path not in found:
            found.append(path)
    return found[:most]


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(1, 7), max_size=8),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 8),
)
@settings(max_examples=150)
def test_continuations_are_those_of_the_whole_text(
    text: list[int], cuts: list[int], shortest: int, most: int, length: int
) -> None:
    index = NgramIndex(text[:5], shortest)
    rest = text[5:]
    for cut in cuts:
        index.append(rest[:cut])
        rest = rest[cut:]
    index.append(rest)
    wanted = _by_definition(text, shortest, most, length)
    assert index.continuations(most, length) == wanted
    assert index.continuations(most, length) == wanted, "looking does not change it"


def test_the_longest_match_comes_first_and_then_the_latest() -> None:
    text = [1, 2, 3, 7, 9, 2, 3, 8, 9, 2, 3, 6, 1, 2, 3]
    assert NgramIndex(text, 2).continuations(3, 2) == [(7, 9), (6, 1), (8, 9)]
    assert NgramIndex(text, 3).continuations(3, 2) == [(7, 9)]
    assert NgramIndex(text, 4).continuations(3, 2) == []
    assert NgramIndex([], 1).continuations(3, 2) == []


def test_a_repetition_is_taken_to_go_on() -> None:
    assert NgramIndex([5, 1, 2, 1, 2], 2).continuations(1, 5) == [(1, 2, 1, 2, 1)]


def test_a_text_of_one_token_is_searched_no_further_than_the_bound() -> None:
    index = NgramIndex([4] * 5000, 1)
    assert index.continuations(3, 3) == [(4, 4, 4)]
    # One n-gram is kept once, however often it occurs.
    assert len(index._last) == 1 and len(index._before) == 5000


# --- Merging -----------------------------------------------------------------

#        0 (9)
#      /      \
#     1 (1)    2 (2)
#    / \
#   3 (3) 4 (4)
TREE = DraftTree(torch.tensor([9, 1, 2, 3, 4]), (-1, 0, 0, 1, 1), (0, 1, 3, 2, 4))


def _paths(tree: DraftTree) -> list[Path]:
    """The tokens from the root to each node, without the root."""
    paths: list[Path] = [()]
    for node in range(1, tree.size):
        paths.append((*paths[tree.parents[node]], int(tree.token_ids_N[node])))
    return paths


def test_drafted_and_copied_nodes_take_turns() -> None:
    merged = merge(TREE, [(1, 3, 5), (6, 7)], 8)
    # 1 and (1, 3) are both drafted and copied.
    assert _paths(merged) == [(), (1,), (1, 3), (2,), (1, 3, 5), (1, 4), (6,), (6, 7)]
    assert merged.ranks == tuple(range(8))
    assert int(merged.token_ids_N[0]) == 9


def test_copied_nodes_alone_are_continuation_by_continuation() -> None:
    merged = merge(DraftTree.root_only(9), [(1, 2, 3), (1, 4), (5,)], 5)
    assert _paths(merged) == [(), (1,), (1, 2), (1, 2, 3), (1, 4)]


def test_without_a_match_the_draft_stays() -> None:
    assert merge(TREE, [], TREE.size) is TREE


def test_without_room_the_first_ranks_stay() -> None:
    assert _paths(merge(TREE, [], 3)) == [(), (1,), (1, 3)]


_continuations = st.lists(
    st.lists(st.integers(0, 5).map(lambda k: 3 * k + 1), min_size=1, max_size=6).map(tuple),
    max_size=4,
)
_cases = st.builds(
    Case,
    st.integers(1, 6),
    st.integers(0, 10**6),
    st.sampled_from([0, 2]),
    st.builds(TreePlan, st.integers(2, 40), st.integers(0, 4), st.integers(1, 5)),
)


@given(_cases, _continuations)
@settings(max_examples=60)
def test_what_is_merged_is_a_tree(case: Case, continuations: list[Path]) -> None:
    size = case.plan.total_tokens
    tree = case.tree()
    merged = merge(tree, continuations, size)
    paths = _paths(merged)
    assert len(set(paths)) == merged.size, "siblings are different tokens"
    assert all(merged.parents[node] < node for node in range(1, merged.size))
    assert sorted(merged.ranks) == list(range(merged.size)) and merged.ranks[0] == 0
    proposed = {path[:depth] for path in continuations for depth in range(len(path) + 1)}
    assert set(paths) <= proposed | set(_paths(tree))
    assert merged.size == min(size, len(proposed | set(_paths(tree))))


@given(_cases, _continuations, st.data())
@settings(max_examples=60)
def test_a_smaller_tree_is_the_first_ranks_of_a_larger_one(
    case: Case, continuations: list[Path], data: st.DataObject
) -> None:
    large = merge(case.tree(), continuations, case.plan.total_tokens)
    size = data.draw(st.integers(1, large.size))
    small = merge(case.tree(size), continuations, size)
    kept = {path for path, rank in zip(_paths(large), large.ranks, strict=True) if rank < size}
    assert set(_paths(small)) == kept


@pytest.mark.parametrize("total_tokens", [1, 2, 5])
def test_the_bound_holds(total_tokens: int) -> None:
    assert merge(TREE, [(7, 7, 7), (8,)], total_tokens).size == total_tokens
