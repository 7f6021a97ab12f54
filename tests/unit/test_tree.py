"""The draft tree against EAGLE-2's definition, written out with Python lists."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.decode.tree import PLAIN, DraftTree, TreePlan
from core.errors import ShapeError
from tests.scripted import ROOT_ID, Case, Path, ScriptedHead


def _cases(levels: st.SearchStrategy[int]) -> st.SearchStrategy[Case]:
    plans = st.builds(TreePlan, st.integers(2, 70), st.integers(0, 5), st.integers(1, 6))
    return st.builds(Case, st.integers(1, 12), st.integers(0, 10**6), levels, plans)


def _node_paths(tree: DraftTree) -> list[Path]:
    """The tokens from the root to each node, without the root."""
    paths: list[Path] = [()]
    for node in range(1, tree.size):
        paths.append((*paths[tree.parents[node]], int(tree.token_ids_N[node])))
    return paths


def _scores(head: ScriptedHead, tree: DraftTree) -> list[float]:
    """Cumulative log-probability of each node."""
    scores, paths = [0.0], _node_paths(tree)
    d2t = head.vocabulary.d2t_W.tolist()
    for node in range(1, tree.size):
        log_probs = head.logits(paths[tree.parents[node]]).double().log_softmax(-1)
        own = float(log_probs[d2t.index(int(tree.token_ids_N[node]))])
        scores.append(scores[tree.parents[node]] + own)
    return scores


@given(_cases(st.sampled_from([0, 1, 2, 5])))
@settings(max_examples=60)
def test_what_is_drafted_is_a_tree(case: Case) -> None:
    tree = case.tree()
    assert tree.size == min(case.plan.total_tokens, case.proposed)
    assert int(tree.token_ids_N[0]) == ROOT_ID and tree.parents[0] == -1
    assert all(0 <= tree.parents[node] < node for node in range(1, tree.size))
    assert sorted(tree.ranks) == list(range(tree.size)) and tree.ranks[0] == 0
    assert all(tree.ranks[tree.parents[node]] < tree.ranks[node] for node in range(1, tree.size))
    allowed = set(case.head().vocabulary.d2t_W.tolist())
    assert set(tree.token_ids_N[1:].tolist()) <= allowed
    paths = _node_paths(tree)
    assert len(set(paths)) == tree.size, "no node twice"
    depths = tree.depths_N.tolist()
    assert depths == [len(path) for path in paths]
    assert depths == sorted(depths) and depths[-1] <= case.plan.depth + 1
    assert all(len(children) <= case.width for children in tree.children)


@given(_cases(st.sampled_from([0, 2, 5])))
@settings(max_examples=40)
def test_siblings_and_ranks_are_in_order_of_probability(case: Case) -> None:
    tree = case.tree()
    scores = _scores(case.head(), tree)
    near = 1e-4  # the tree adds float32 numbers
    for children in tree.children:
        for first, second in itertools.pairwise(children):
            assert scores[first] >= scores[second] - near
    by_rank = sorted(range(tree.size), key=lambda node: tree.ranks[node])
    for first, second in itertools.pairwise(by_rank):
        assert scores[first] >= scores[second] - near


@given(_cases(st.sampled_from([0, 1, 2, 5])), st.data())
@settings(max_examples=60)
def test_a_smaller_tree_is_the_first_ranks_of_a_larger_one(case: Case, data: st.DataObject) -> None:
    """The policy reads off the largest tree what a smaller one would have held."""
    large = case.tree()
    size = data.draw(st.integers(1, large.size))
    small = case.tree(size)
    kept = [node for node in range(large.size) if large.ranks[node] < size]
    assert small.token_ids_N.tolist() == large.token_ids_N[kept].tolist()
    assert small.ranks == tuple(large.ranks[node] for node in kept)
    assert small.parents == tuple(kept.index(large.parents[node]) if node else -1 for node in kept)


Scored = tuple[float, Path]


def _by_definition(head: ScriptedHead, plan: TreePlan) -> set[Path]:
    """EAGLE-2: expand the best top-k of each level, then keep the best of all levels."""
    d2t = head.vocabulary.d2t_W.tolist()
    width = min(plan.top_k, len(d2t))

    def children(score: float, path: Path) -> list[Scored]:
        log_probs = head.logits(path).double().log_softmax(-1).tolist()
        ranked = sorted(zip(log_probs, d2t, strict=True), reverse=True)[:width]
        return [(score + value, (*path, token)) for value, token in ranked]

    level = children(0.0, ())
    everything = list(level)
    beam = level
    for _ in range(plan.depth):
        level = [child for one in beam for child in children(*one)]
        everything += level
        beam = _best(level, width)
    return {path for _, path in _best(everything, plan.total_tokens - 1)}


def _best(nodes: list[Scored], count: int) -> list[Scored]:
    nodes = sorted(nodes, reverse=True)
    # Which of two that are nearly equal is kept is up to rounding.
    assume(count >= len(nodes) or nodes[count - 1][0] - nodes[count][0] > 1e-4)
    return nodes[:count]


@given(_cases(st.just(0)))
@settings(max_examples=40)
def test_the_tree_is_eagle_2s(case: Case) -> None:
    wanted = _by_definition(case.head(), case.plan)
    assert set(_node_paths(case.tree())[1:]) == wanted


def test_all_ties_keep_the_shallower_node() -> None:
    """A draft vocabulary of one token: every node has probability 1."""
    case = Case(1, 0, 1, TreePlan(3, 5, 4))
    tree = case.tree()
    assert tree.parents == (-1, 0, 1) and tree.depths_N.tolist() == [0, 1, 2]


def test_drafting_again_gives_the_same_tree() -> None:
    case = Case(8, 5, 0, TreePlan(20, 4, 4))
    head = case.head()
    trees = [head.tree(case.plan) for _ in range(2)]
    assert trees[0].token_ids_N.tolist() == trees[1].token_ids_N.tolist()
    assert trees[0].parents == trees[1].parents


# --- The tree itself --------------------------------------------------------

#        0
#      /   \
#     1     2
#    / \     \
#   3   4     5
TREE = DraftTree(torch.tensor([7, 1, 2, 3, 4, 5]), (-1, 0, 0, 1, 1, 2), (0, 1, 2, 3, 5, 4))


def test_views_of_a_tree() -> None:
    assert TREE.size == 6
    assert TREE.depths_N.tolist() == [0, 1, 1, 2, 2, 2]
    assert TREE.children == ((1, 2), (3, 4), (5,), (), (), ())
    assert TREE.paths == [[0, 1, 3], [0, 1, 4], [0, 2, 5]]
    assert [row.nonzero()[:, 0].tolist() for row in TREE.sees_NN] == [
        [0],
        [0, 1],
        [0, 2],
        [0, 1, 3],
        [0, 1, 4],
        [0, 2, 5],
    ]


@given(_cases(st.just(0)))
@settings(max_examples=20)
def test_a_node_sees_its_path_alone(case: Case) -> None:
    tree = case.tree()
    for path in tree.paths:
        for place, node in enumerate(path):
            assert tree.sees_NN[node].nonzero()[:, 0].tolist() == path[: place + 1]
    assert {node for path in tree.paths for node in path} == set(range(tree.size))


def test_a_root_alone_is_plain_decoding() -> None:
    root = DraftTree.root_only(3)
    assert (root.size, root.paths, root.children) == (1, [[0]], ((),))
    assert PLAIN.total_tokens == 1


def test_lengths_must_agree() -> None:
    with pytest.raises(ShapeError, match="2 tokens, 1 parents and 2 ranks"):
        DraftTree(torch.tensor([1, 2]), (-1,), (0, 1))
