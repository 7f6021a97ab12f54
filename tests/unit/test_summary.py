from __future__ import annotations

import pytest

from core.evaluate.speculation import BASELINE, HF_GENERATE, Answer, Difference, PromptResult
from core.evaluate.summary import (
    acceptance_by_depth,
    accepted_length,
    against_best_fixed,
    mean_tree_size,
    summarize,
)
from core.evaluate.ways import CHOSEN


def _answer(way: str, tokens: int, seconds: float, accepted=(), depths=(), size: int = 1) -> Answer:
    return Answer(way, tuple(range(tokens)), seconds, len(accepted), accepted, depths, size)


FIRST = PromptResult(
    "a",
    "first_turn",
    5,
    "text",
    {
        BASELINE: (_answer(BASELINE, 10, 2.0, (1,) * 9, (0,) * 9),),
        CHOSEN: (_answer(CHOSEN, 10, 1.0, (3, 4, 2), (2, 3, 2), 8),),
        "tree_60": (_answer("tree_60", 10, 4.0, (5, 4), (4, 3), 60),),
        HF_GENERATE: (_answer(HF_GENERATE, 10, 2.5),),
    },
)
SECOND = PromptResult(
    "b",
    "follow_up",
    7,
    "text",
    {
        BASELINE: (_answer(BASELINE, 20, 4.0, (1,) * 19, (0,) * 19),),
        CHOSEN: (_answer(CHOSEN, 20, 3.0, (10, 9), (9, 8), 8),),
        "tree_60": (_answer("tree_60", 20, 4.0, (10, 9), (9, 8), 60),),
    },
    {CHOSEN: Difference(4, 1e-5, 20.0), "tree_60": Difference(3, 0.5, 1e6)},
)


def _twice(name: str, seconds: dict[str, tuple[float, float]], tokens: int = 10) -> PromptResult:
    """A prompt that every way answered in two repeats."""
    answers = {way: tuple(_answer(way, tokens, s) for s in both) for way, both in seconds.items()}
    return PromptResult(name, "t", 5, "text", answers)


def test_figures_are_medians_of_ratios_within_a_repeat() -> None:
    """The machine is half as fast in the second repeat, which the ratio does not see."""
    result = _twice("a", {BASELINE: (2.0, 4.0), CHOSEN: (1.0, 2.0), HF_GENERATE: (4.0, 8.0)})
    overall = summarize([result])["overall"]
    assert overall["repeats"] == 2
    assert overall["speedup"] == 2 and overall["speedup_interval"] == (2, 2)
    assert overall["baseline_tokens_per_second"] == pytest.approx((5 + 2.5) / 2)
    ways = overall["ways"]
    assert ways[CHOSEN]["over_hf_generate"] == 4
    assert ways[BASELINE]["over_hf_generate"] == 2
    assert ways[HF_GENERATE]["speedup"] == 0.5


def test_what_was_answered_on_a_shared_device_counts_but_for_its_speed() -> None:
    overall = summarize([FIRST, SECOND.untimed()])["overall"]
    assert (overall["prompts"], overall["timed_prompts"]) == (2, 1)
    assert overall["speedup"] == 2 and overall["accepted_length"] == 28 / 5
    assert overall["lossless_total"] == 4
    nothing = summarize([FIRST.untimed(), SECOND.untimed()], ["tree_60", CHOSEN])["overall"]
    for figure in ("speedup", "speedup_interval", "tokens_per_second", "against_best_fixed"):
        assert nothing[figure] is None
    assert nothing["baseline_tokens_per_second"] is None


def test_the_best_fixed_setting_is_picked_on_other_prompts() -> None:
    """`tree_2` is best on the first half, `tree_4` on the second, where it is compared."""
    names = (BASELINE, CHOSEN, "tree_2", "tree_4")
    even = dict(zip(names, [(4.0,) * 2, (2.0,) * 2, (1.0,) * 2, (3.0,) * 2], strict=True))
    odd = dict(zip(names, [(4.0,) * 2, (2.0,) * 2, (3.0,) * 2, (1.0,) * 2], strict=True))
    results = [_twice(str(n), odd if n % 2 else even) for n in range(4)]
    found = against_best_fixed(results, ["tree_2", "tree_4"])
    assert found is not None
    assert (found["way"], found["of"], found["prompts"]) == ("tree_2", 2, 2)
    assert found["ratio"] == pytest.approx(3 / 2) and found["ratio_interval"] == (1.5, 1.5)
    assert against_best_fixed(results, ["tree_2"]) is None
    assert against_best_fixed(results[:1], ["tree_2", "tree_4"]) is None


def test_tree_sizes_are_means_over_passes() -> None:
    answers = [
        _answer("x", 10, 1.0, (1,) * 3, (0,) * 3, 8),
        _answer("x", 10, 1.0, (1,), (0,), 4),
        _answer("x", 1, 1.0),
    ]
    assert mean_tree_size(answers) == 7
    assert mean_tree_size(answers[2:]) == 1


def test_accepted_length_is_tokens_a_pass() -> None:
    answers = [_answer("x", 10, 1.0, (3, 4, 2)), _answer("x", 20, 1.0, (10, 9))]
    assert accepted_length(answers) == 28 / 5
    assert accepted_length([_answer("x", 10, 1.0)]) is None


def test_acceptance_by_depth_is_conditional() -> None:
    answers = [_answer("x", 1, 1.0, (1,) * 5, (0, 1, 1, 3, 3))]
    assert acceptance_by_depth(answers) == [4 / 5, 2 / 4, 2 / 2]
    assert acceptance_by_depth([_answer("x", 1, 1.0)]) == []


def test_overall() -> None:
    overall = summarize([FIRST, SECOND])["overall"]
    assert overall["prompts"] == 2
    assert overall["baseline_tokens_per_second"] == 30 / 6
    assert overall["tokens_per_second"] == 30 / 4
    assert overall["speedup"] == pytest.approx(6 / 4)
    assert overall["accepted_length"] == 28 / 5
    assert overall["repetition_rate"] == 0
    assert list(overall["ways"]) == [BASELINE, CHOSEN, "tree_60", HF_GENERATE]
    assert overall["ways"][BASELINE]["speedup"] == 1
    assert overall["ways"][BASELINE]["accepted_length"] == 1


def test_a_way_is_compared_on_the_prompts_that_it_answered() -> None:
    row = summarize([FIRST, SECOND])["overall"]["ways"][HF_GENERATE]
    assert row["prompts"] == 1 and row["accepted_length"] is None
    assert row["speedup"] == pytest.approx(2.0 / 2.5)


def test_losslessness_counts_every_answer_of_ours() -> None:
    report = summarize([FIRST, SECOND])
    overall = report["overall"]
    assert overall["lossless_total"] == 4, "neither the baseline itself nor HF's"
    assert (overall["lossless_identical"], overall["lossless_near_tie"]) == (2, 1)
    assert report["differences"] == [
        {
            "id": "b",
            "way": CHOSEN,
            "position": 4,
            "gap": 1e-5,
            "gap_in_steps": 20.0,
            "near_tie": True,
        },
        {
            "id": "b",
            "way": "tree_60",
            "position": 3,
            "gap": 0.5,
            "gap_in_steps": 1e6,
            "near_tie": False,
        },
    ]


def test_tasks_have_rows_of_their_own() -> None:
    tasks = summarize([FIRST, SECOND])["tasks"]
    assert list(tasks) == ["first_turn", "follow_up"]
    assert tasks["first_turn"]["speedup"] == 2
    assert tasks["follow_up"]["speedup"] == pytest.approx(4 / 3)
    assert tasks["first_turn"]["lossless_identical"] == 2


def test_keys_are_stable() -> None:
    """Reports are read by others."""
    report = summarize([FIRST, SECOND])
    assert set(report) == {"tasks", "overall", "differences"}
    assert set(report["overall"]) == {
        "prompts",
        "timed_prompts",
        "repeats",
        "tokens_per_second",
        "baseline_tokens_per_second",
        "speedup",
        "speedup_interval",
        "accepted_length",
        "acceptance_by_depth",
        "lossless_identical",
        "lossless_near_tie",
        "lossless_total",
        "repetition_rate",
        "against_best_fixed",
        "ways",
    }
    assert set(report["overall"]["ways"][CHOSEN]) == {
        "prompts",
        "tree_size",
        "tokens_per_second",
        "speedup",
        "speedup_interval",
        "over_hf_generate",
        "over_hf_generate_interval",
        "accepted_length",
        "acceptance_by_depth",
    }
