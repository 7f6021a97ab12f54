from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.decode.sampling import SamplingSettings
from core.decode.tree import DraftTree
from core.decode.verify import Verification, verify_greedy, verify_sampling
from core.errors import ShapeError

#        0 (7)
#      /      \
#     1 (1)    2 (2)
#    / \         \
#   3 (3) 4 (4)   5 (1)
TREE = DraftTree(torch.tensor([7, 1, 2, 3, 4, 1]), (-1, 0, 0, 1, 1, 2), (0, 1, 2, 3, 4, 5))
SAMPLING = SamplingSettings(temperature=1.0)


def _logits(*best: int, size: int = 8) -> torch.Tensor:
    """Logits whose argmax in row i is best[i]."""
    logits_NV = torch.zeros(len(best), size)
    logits_NV[torch.arange(len(best)), torch.tensor(best)] = 5.0
    return logits_NV


@pytest.mark.parametrize(
    ("best", "path", "bonus"),
    [
        ((1, 4, 0, 0, 6, 0), (0, 1, 4), 6),
        ((1, 3, 0, 5, 0, 0), (0, 1, 3), 5),
        ((2, 0, 1, 0, 0, 3), (0, 2, 5), 3),
        # A child of another node does not count, nor does the same token on another branch.
        ((1, 2, 0, 0, 0, 0), (0, 1), 2),
        ((2, 0, 4, 0, 0, 0), (0, 2), 4),
        ((5, 1, 1, 1, 1, 1), (0,), 5),
    ],
)
def test_greedy_follows_the_argmax(
    best: tuple[int, ...], path: tuple[int, ...], bonus: int
) -> None:
    found = verify_greedy(TREE, _logits(*best))
    assert found == Verification(path, bonus)
    assert found.accepted_length == len(path)
    assert found.num_accepted_draft_tokens == len(path) - 1


def test_a_root_alone_gives_the_targets_own_token() -> None:
    assert verify_greedy(DraftTree.root_only(3), _logits(6)) == Verification((0,), 6)


@st.composite
def _trees(draw: st.DrawFn) -> DraftTree:
    size = draw(st.integers(1, 20))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))]
    tokens = [draw(st.integers(0, 7)) for _ in range(size)]
    seen: set[tuple[int, int]] = set()
    kept: dict[int, int] = {}
    # Siblings are different tokens: drop the twins and what hangs from them.
    for node in range(size):
        if node == 0 or (parents[node] in kept and (parents[node], tokens[node]) not in seen):
            seen.add((parents[node], tokens[node]))
            kept[node] = len(kept)
    return DraftTree(
        torch.tensor([tokens[node] for node in kept]),
        tuple(kept[parents[node]] if node else -1 for node in kept),
        tuple(range(len(kept))),
    )


@given(_trees(), st.integers(0, 10**6))
@settings(max_examples=100)
def test_greedy_takes_the_longest_path_that_the_target_would_say(
    tree: DraftTree, seed: int
) -> None:
    logits_NV = torch.randint(3, (tree.size, 8), generator=torch.Generator().manual_seed(seed))
    found = verify_greedy(tree, logits_NV.float())
    best = logits_NV.argmax(-1).tolist()
    tokens = tree.token_ids_N.tolist()
    agreeing = [
        path[: place + 1]
        for path in tree.paths
        for place in range(len(path))
        if all(tokens[path[i + 1]] == best[path[i]] for i in range(place))
    ]
    assert list(found.path) == max(agreeing, key=lambda path: len(path))
    assert found.bonus_id == best[found.path[-1]]


@given(
    _trees(), st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.5, 1.0])
)
@settings(max_examples=60)
def test_sampling_gives_a_path_of_possible_tokens(
    tree: DraftTree, seed: int, temperature: float, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_NV = 3 * torch.randn(tree.size, 8, generator=generator)
    settings_ = SamplingSettings(temperature, top_p)
    found = verify_sampling(tree, logits_NV, settings_, generator)
    assert found.path[0] == 0
    assert all(tree.parents[b] == a for a, b in zip(found.path, found.path[1:], strict=False))
    # The bonus token is none of the children that were rejected.
    children = {int(tree.token_ids_N[c]) for c in tree.children[found.path[-1]]}
    assert found.bonus_id not in children


def test_a_certain_token_is_always_accepted_and_an_impossible_one_never() -> None:
    generator = torch.Generator().manual_seed(0)
    certain = torch.full((6, 8), float("-inf"))
    certain[0, 2] = certain[2, 1] = certain[5, 3] = 0.0
    for _ in range(50):
        found = verify_sampling(TREE, certain, SAMPLING, generator)
        assert found == Verification((0, 2, 5), 3)


def test_one_draw_decides_alike_for_a_seed() -> None:
    logits_NV = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    outcomes = [
        [
            verify_sampling(TREE, logits_NV, SAMPLING, torch.Generator().manual_seed(seed))
            for seed in range(30)
        ]
        for _ in range(2)
    ]
    assert outcomes[0] == outcomes[1]
    assert len({found.path for found in outcomes[0]}) >= 3


def test_logits_are_left_as_they_were() -> None:
    logits_NV = torch.randn(6, 8)
    before = logits_NV.clone()
    verify_sampling(TREE, logits_NV, SAMPLING, torch.Generator().manual_seed(0))
    assert torch.equal(logits_NV, before)


def test_rows_must_be_those_of_the_tree() -> None:
    with pytest.raises(ShapeError, match="5 rows of logits for 6 tree nodes"):
        verify_greedy(TREE, torch.zeros(5, 8))
    with pytest.raises(ShapeError, match="7 rows of logits for 6 tree nodes"):
        verify_sampling(TREE, torch.zeros(7, 8), SAMPLING, torch.Generator())
