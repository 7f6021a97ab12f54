"""Trees chosen for a batch, round by round: with costs, clocks and drafts that are given."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from core.config import DecodeConfig
from core.decode.acceptance import Acceptance, RequestRecord
from core.decode.batch_policy import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    TRIAL_ROUNDS,
    BatchPolicy,
    PolicyRound,
)
from core.decode.costs import BatchCosts, CostModel, least_of_larger
from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request
from core.decode.tree import DraftTree, TreePlan
from core.models.target import Target
from tests.oracle import OracleDrafter
from tests.scripted import ScriptedHead

LARGEST = TreePlan(24, 4, 4)
FREE = BatchCosts({1: 1.0, 64: 1.0}, 0.0, {1: 0.0}, {1: 0.0})
# A node more costs as much as a plain step, and so does a sequence.
DEAR = BatchCosts({1: 1.0, 64: 64.0}, 0.0, {1: 0.0}, {1: 0.0})


def _policy(costs: BatchCosts, largest: TreePlan = LARGEST) -> BatchPolicy:
    return BatchPolicy(CostModel(costs), largest, clock=lambda: 0.0)


def _tree(*scores: float) -> DraftTree:
    """A chain whose nodes have these cumulative probabilities."""
    size = len(scores) + 1
    return DraftTree(
        torch.arange(size),
        tuple(range(-1, size - 1)),
        tuple(range(size)),
        (0.0, *np.log(scores).tolist()),
    )


def _begin(policy: BatchPolicy, count: int, prompt: int = 0, fixed: int = 0) -> PolicyRound:
    return policy.begin(
        [RequestRecord() for _ in range(count)],
        prompt_tokens=prompt,
        fixed_tokens=fixed,
        others=int(prompt + fixed > 0),
    )


def test_nodes_are_taken_while_they_are_worth_their_cost() -> None:
    trees = [_tree(0.9, 0.8, 0.7, 0.6)]
    for costs, size in ((FREE, 5), (DEAR, 1)):
        policy = _policy(costs)
        assert policy.choose(_begin(policy, 1), trees)[0].size == size


def test_the_likeliest_nodes_of_all_sequences_are_taken() -> None:
    """A pass of up to eight tokens costs the same, one more doubles it."""
    policy = _policy(BatchCosts({1: 1.0, 8: 1.0, 9: 2.0, 64: 20.0}, 0.0, {1: 0.0}, {1: 0.0}))
    trees = [_tree(0.9, 0.8, 0.75, 0.7), _tree(0.3, 0.1, 0.05), _tree(0.9, 0.05, 0.04)]
    found = policy.choose(_begin(policy, 3), trees)
    assert sum(tree.size for tree in found) == 8
    assert [tree.size for tree in found] == [5, 1, 2]
    # What else the pass reads leaves less room; of equally likely nodes, the shallow ones stay.
    found = policy.choose(_begin(policy, 3, fixed=3), trees)
    assert [tree.size for tree in found] == [2, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_chosen_is_the_best_of_all_sets_of_that_order(seed: int) -> None:
    draw = random.Random(seed)
    head = ScriptedHead(20, seed, levels=0)
    tree = head.tree(TreePlan(24, 3, 4))
    sizes = sorted(draw.sample(range(2, 60), 5))
    steps = np.cumsum([draw.random() for _ in range(6)])
    verify = dict(zip([1, *sizes], (1 + steps).tolist(), strict=True))
    policy = _policy(BatchCosts(verify, 0.05, {1: 0.1}, {1: 0.1}))
    now = _begin(policy, 2)
    now.draft_seconds = 0.3
    found = policy.choose(now, [tree, tree])
    chances = np.concatenate([policy.acceptance.of_tree(tree, RequestRecord())[1:]] * 2)
    ordered = -np.sort(-chances)
    rates = [
        (2 + ordered[:n].sum()) / (0.3 + policy.costs.verify(2 + n, 2))
        for n in range(len(ordered) + 1)
    ]
    assert sum(one.size - 1 for one in found) == int(np.argmax(rates))
    for one in found:
        assert one.parents[0] == -1 and all(p < n for n, p in enumerate(one.parents))
        assert one.ranks == tuple(range(one.size)) or sorted(one.ranks) == list(range(one.size))


def test_trees_grow_while_a_level_promises_more() -> None:
    levels = [np.log(np.array([[0.9, 0.05]])), np.log(np.array([[0.85, 0.04, 0.02, 0.01]]))]
    for expand, deeper in ((0.01, True), (5.0, False)):
        policy = _policy(BatchCosts({1: 1.0, 64: 1.5}, 0.0, {1: 0.1}, {1: expand}))
        now = _begin(policy, 1)
        first = policy.width(now, levels[:1], levels[0])
        assert bool(first) is deeper
        assert now.expanded == [first][:deeper]
        if deeper:
            second = policy.width(now, levels, levels[1][:, :2])
            assert second and now.expanded == [first, second]
    at_the_end = [*levels, levels[1], levels[1], levels[1]]
    assert not policy.width(_begin(policy, 1), at_the_end, levels[1][:, :2])


def test_only_nodes_are_expanded_whose_children_would_be_verified() -> None:
    beams = np.log(np.array([[0.9, 0.6, 0.2, 0.001], [0.9, 0.1, 0.003, 0.001]]))
    # What a node more takes of a plain step's time decides whose children are worth it.
    for share, width in ((0.0, 4), (0.02, 3), (0.15, 1), (0.4, 0)):
        costs = BatchCosts({1: 1.0, 101: 1.0 + 100 * share}, 0.0, {1: 0.1}, {1: 0.001})
        policy = _policy(costs, TreePlan(60, 4, 4))
        now = _begin(policy, 2)
        assert policy.width(now, [beams], beams) == width
        assert now.expanded == [2 * width][: width > 0]


def test_drafts_that_give_nothing_pause_longer_each_time() -> None:
    policy = _policy(BatchCosts({1: 1.0, 64: 2.0}, 0.0, {1: 0.5}, {1: 0.1}))
    drafted = []
    for _ in range(2000):
        now = _begin(policy, 1)
        drafted.append(now.drafts)
        if now.drafts:
            now.draft_seconds = 0.5
        policy.ended(now, 1, 1, 1.0)
    assert drafted[:TRIAL_ROUNDS] == [True] * TRIAL_ROUNDS
    assert drafted[TRIAL_ROUNDS : TRIAL_ROUNDS + FIRST_PAUSE] == [False] * FIRST_PAUSE
    # One round in thirty or so is tried in the end, at half of its time too much.
    assert (
        sum(drafted[1000:]) <= 1000 * TRIAL_ROUNDS / (LONGEST_PAUSE + TRIAL_ROUNDS) + TRIAL_ROUNDS
    )
    assert sum(drafted[1000:]) > 0


def test_drafts_that_pay_go_on_and_batch_sizes_are_told_apart() -> None:
    policy = _policy(BatchCosts({1: 1.0, 64: 2.0}, 0.0, {1: 0.5}, {1: 0.1}))
    for _ in range(100):
        for count, tokens in ((1, 3), (8, 8)):
            now = _begin(policy, count)
            if now.drafts:
                now.draft_seconds = 0.5
            policy.ended(now, tokens, 2 * count, 1.0 + 0.02 * count)
    assert _begin(policy, 1).drafts
    assert not _begin(policy, 8).drafts


def test_beside_a_prompt_a_node_is_worth_what_its_seconds_give_elsewhere() -> None:
    """A prompt of 90 tokens takes long; drafting more would still be the slower use of time."""
    costs = BatchCosts({1: 1.0, 101: 11.0}, 0.0, {1: 0.0}, {1: 0.0})
    trees = [_tree(0.9, 0.5, 0.06, 0.04)]
    for prompt, fixed, size in ((0, 0, 3), (90, 0, 3), (0, 1, 3), (0, 90, 5)):
        policy = _policy(costs)
        assert policy.choose(_begin(policy, 1, prompt, fixed), trees)[0].size == size
    # Where other rounds give more than plain ones, less is worth its time.
    policy = _policy(costs)
    for _ in range(TRIAL_ROUNDS):
        policy.ended(_begin(policy, 1), 6, 1, 1.0)
    assert policy.choose(_begin(policy, 1, 90), trees)[0].size == 2


def test_batch_sizes_near_each_other_share_what_was_seen() -> None:
    policy = _policy(BatchCosts({1: 1.0, 64: 2.0}, 0.0, {1: 0.5}, {1: 0.1}))
    for count in (16, 15, 13, 14, 16, 15, 14, 16):
        now = _begin(policy, count)
        now.draft_seconds = 0.5
        policy.ended(now, count, 2 * count, 1.4)
    assert not _begin(policy, 12).drafts
    assert _begin(policy, 8).drafts


def test_acceptance_is_learned_by_depth_and_confidence_and_request() -> None:
    acceptance = Acceptance()
    sure, unsure = _tree(0.9, 0.85), _tree(0.3, 0.2)
    good, bad = RequestRecord(), RequestRecord()
    before = acceptance.of_tree(sure, RequestRecord())
    for _ in range(200):
        acceptance.learn(sure, (0, 1), good)
        acceptance.learn(unsure, (0,), bad)
    fresh = RequestRecord()
    chances = acceptance.of_tree(sure, fresh)
    assert chances[1] > 0.95 > before[1] and chances[2] < 0.2 < before[2]
    assert acceptance.of_tree(unsure, fresh)[1] < 0.1
    # Of two requests, the one whose nodes failed so far is trusted less.
    for _ in range(30):
        acceptance.learn(sure, (0,), bad)
    assert bad.factor < 0.5 < good.factor
    assert acceptance.of_tree(sure, bad)[1] < acceptance.of_tree(sure, good)[1]


def test_a_child_is_never_likelier_than_its_parent() -> None:
    acceptance = Acceptance()
    odd = _tree(0.3, 0.29)
    for _ in range(100):
        acceptance.learn(_tree(0.3), (0,), RequestRecord())
        acceptance.learn(odd, (0, 1, 2), RequestRecord())
    chances = acceptance.of_tree(odd, RequestRecord())
    assert chances[0] == 1.0 and chances[1] >= chances[2] > 0.3


def test_costs_are_lines_between_what_was_measured_and_follow_the_machine() -> None:
    costs = CostModel(BatchCosts({1: 1.0, 9: 2.0, 17: 4.0}, 0.25, {1: 0.5, 3: 0.7}, {1: 0.1}))
    assert costs.verify(5, 1) == pytest.approx(1.5)
    assert costs.verify(25, 1) == pytest.approx(6.0)
    assert costs.verify(9, 3) == pytest.approx(2.5)
    assert costs.verify_up_to(8, 2, 1).tolist() == pytest.approx([1.875, 2.0, 2.25])
    assert costs.draft([1, 1], 2) == pytest.approx(0.6 + 0.2)
    for _ in range(100):
        costs.took_verify(9, 1, 4.0)
        costs.took_draft([1, 1], 1, 1.4)
    assert costs.verify(9, 1) == pytest.approx(4.0, rel=0.01)
    # Sizes that did not occur are expected to be as much slower.
    assert costs.verify(1, 1) == pytest.approx(2.0, rel=0.01)
    assert costs.draft([1, 1], 1) == pytest.approx(1.4, rel=0.01)


def test_a_pass_takes_no_longer_than_one_over_more_tokens() -> None:
    measured = {1: 10.0, 2: 30.0, 4: 12.0, 8: 90.0, 16: 25.0, 32: 40.0}
    assert least_of_larger(measured) == {1: 10.0, 2: 12.0, 4: 12.0, 8: 25.0, 16: 25.0, 32: 40.0}
    rising = {1: 1.0, 2: 1.5, 60: 9.0}
    assert least_of_larger(rising) == rising


def test_one_interruption_changes_little() -> None:
    costs = CostModel(BatchCosts({1: 1.0}, 0.0, {1: 0.5}, {1: 0.1}))
    costs.took_verify(1, 1, 1000.0)
    assert costs.verify(1, 1) < 1.25


def _answers(decoder: SpeculativeDecoder, requests: Sequence[Request]) -> tuple[list, list[int]]:
    ids = [decoder.submit(request) for request in requests]
    texts: dict[int, list[int]] = {one: [] for one in ids}
    sizes: list[int] = []
    while decoder.busy:
        for event in decoder.step():
            texts[event.request_id] += event.round.tokens
            sizes.append(event.round.tree_size)
    return list(texts.values()), sizes


@pytest.mark.parametrize("costs", ["free", "dear", "changing"])
def test_output_is_that_of_plain_decoding_whatever_is_chosen(
    tiny_target: Target, costs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes from the root alone to the largest tree, of drafts that are right most of the time."""
    prompts = [(1, 40 + number, *range(50, 50 + 3 * number)) for number in range(6)]
    plain = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=128))
    wanted, _ = _answers(plain, [Request(prompt, 16) for prompt in prompts])
    drafter = OracleDrafter(
        {prompt: (*answer, *(3,) * 8) for prompt, answer in zip(prompts, wanted, strict=True)},
        tiny_target.vocab_size,
        0.8,
    )
    decoder = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=128), drafter=drafter)
    now, draw = [0.0], random.Random(0)

    def clock() -> float:
        # The tracked costs follow it, so that choices go to and fro.
        now[0] += draw.choice((0.1, 1.0, 30.0)) if costs == "changing" else 0.5
        return now[0]

    measured = {
        "free": FREE,
        "dear": DEAR,
        "changing": BatchCosts({1: 1.0, 8: 1.2, 64: 9.0}, 0.1, {1: 0.1}, {1: 0.1}),
    }
    decoder.policy = BatchPolicy(CostModel(measured[costs]), TreePlan(12, 3, 3), clock=clock)
    if costs != "changing":
        monkeypatch.setattr(decoder.policy, "ended", lambda *given: None)
    found, sizes = _answers(decoder, [Request(prompt, 16) for prompt in prompts])
    assert found == wanted
    if costs == "dear":
        assert set(sizes) == {0, 1}
    else:
        assert max(sizes) > 6
        assert costs == "free" or len(set(sizes)) > 4
