from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.decode.policy import (
    SIZES,
    PlanEstimate,
    RoundCosts,
    RoundRecord,
    candidate_plans,
    choose,
    estimate,
    median_seconds,
)
from core.decode.tree import PLAIN, TreePlan
from core.decode.verify import verify_greedy
from tests.scripted import Case, ScriptedHead

COSTS = RoundCosts(verify={1: 0.010, 4: 0.012, 8: 0.020}, extend=0.001, expand=0.002)


def test_a_record_says_what_smaller_trees_would_have_committed() -> None:
    record = RoundRecord((1, 5, 20))
    for total_tokens, length in ((1, 1), (2, 2), (5, 2), (6, 3), (20, 3), (21, 4)):
        assert record.accepted_length(TreePlan(total_tokens, 5, 10)) == length
    for depth, length in ((0, 2), (1, 3), (2, 4), (5, 4)):
        assert record.accepted_length(TreePlan(60, depth, 10)) == length
    assert RoundRecord(()).accepted_length(TreePlan(60, 5, 10)) == 1


@given(st.integers(0, 10**6), st.integers(1, 40))
@settings(max_examples=60)
def test_the_record_of_a_large_tree_is_what_a_smaller_one_commits(seed: int, size: int) -> None:
    """By drafting and verifying both, with a target that often agrees with the head."""
    case = Case(6, seed, 0, TreePlan(40, 3, 4))
    head = case.head()

    def accept(total_tokens: int):
        tree = case.tree(total_tokens)
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, tree.size):
            paths.append((*paths[tree.parents[node]], int(tree.token_ids_N[node])))
        logits_NV = torch.stack([_target(head, path) for path in paths])
        return tree, verify_greedy(tree, logits_NV)

    tree, found = accept(40)
    record = RoundRecord.of(tree, found.path)
    _, smaller = accept(size)
    assert record.accepted_length(TreePlan(size, 3, 4)) == smaller.accepted_length


def _target(head: ScriptedHead, path: tuple[int, ...]) -> torch.Tensor:
    """Logits [100] of a target that says the head's first or second choice."""
    order = head.logits(path).argsort(descending=True)
    chosen = head.vocabulary.d2t_W[order[hash(path) % 2]]
    return torch.nn.functional.one_hot(chosen, 100).float()


def test_candidates_are_all_that_can_be_filled() -> None:
    plans = candidate_plans(TreePlan(20, 3, 4))
    assert PLAIN not in plans
    assert {plan.total_tokens for plan in plans} == {size for size in SIZES if size <= 20}
    for plan in plans:
        assert plan.top_k == 4 and plan.depth <= 3
        # Deep enough to hold so many nodes, and no deeper than a chain of them.
        assert plan.total_tokens <= 1 + 4 + plan.depth * 16
        assert plan.total_tokens >= plan.depth + 2
    assert len(set(plans)) == len(plans)


def test_costs_of_a_round() -> None:
    assert COSTS.seconds(PLAIN) == 0.010
    assert COSTS.seconds(TreePlan(8, 3, 4)) == pytest.approx(0.020 + 0.001 + 3 * 0.002)
    assert COSTS.seconds(TreePlan(4, 0, 4)) == pytest.approx(0.013)


def test_estimates_are_tokens_over_time_best_first() -> None:
    records = [RoundRecord((1, 2)), RoundRecord((6,)), RoundRecord(())]
    plans = [TreePlan(8, 1, 4), TreePlan(4, 1, 4)]
    best, other = estimate(plans, records, COSTS)
    assert best.plan == plans[1] and other.plan == plans[0]
    assert best.accepted_length == pytest.approx(5 / 3)
    assert other.accepted_length == pytest.approx(2)
    assert best.speedup == pytest.approx(5 / 3 * 0.010 / 0.015)
    assert other.speedup == pytest.approx(2 * 0.010 / 0.023)


def test_plain_decoding_is_kept_unless_a_tree_is_worthwhile() -> None:
    plan = TreePlan(8, 1, 4)
    assert choose([]) == PLAIN
    assert choose([PlanEstimate(plan, 2.0, 0.9)]) == PLAIN
    assert choose([PlanEstimate(plan, 2.0, 1.01)]) == PLAIN
    assert choose([PlanEstimate(plan, 2.0, 1.3), PlanEstimate(PLAIN, 1.0, 1.0)]) == plan


def test_timing_warms_up_and_takes_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    now, durations = [0.0], iter([100.0, 5.0, 1.0, 2.0, 9.0, 3.0])

    def work() -> None:
        now[0] += next(durations)

    monkeypatch.setattr("core.decode.policy.time.perf_counter", lambda: now[0])
    assert median_seconds({"work": work}, runs=5) == {"work": 3.0}


def test_works_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down in the middle does so for all of them."""
    now, calls = [0.0], 0

    def work() -> None:
        nonlocal calls
        calls += 1
        now[0] += 1.0 if calls <= 6 else 10.0

    monkeypatch.setattr("core.decode.policy.time.perf_counter", lambda: now[0])
    found = median_seconds({1: work, 2: work}, runs=5)
    assert found[1] == found[2] == 10.0
