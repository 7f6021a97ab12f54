from __future__ import annotations

import pytest

from core.errors import InputError
from core.evaluate.comparison import (
    Ratio,
    Way,
    compare,
    print_comparison,
    spread,
    summarize_comparison,
)
from core.runtime.extraction_benchmark import steady_state


def test_every_repeat_runs_all_ways_and_begins_with_another() -> None:
    calls: list[tuple[str, int]] = []

    def way(name: str) -> Way:
        def run(repeat: int) -> dict[str, float]:
            calls.append((name, repeat))
            return {"speed": float(len(calls))}

        return Way(name, run)

    found = compare([way("a"), way("b")], 3, "test")
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert found == {
        "a": [{"speed": 1}, {"speed": 4}, {"speed": 5}],
        "b": [{"speed": 2}, {"speed": 3}, {"speed": 6}],
    }


def test_ratios_are_taken_within_a_repeat(capsys: pytest.CaptureFixture[str]) -> None:
    """The machine became ten times slower in the second repeat, which no ratio shows."""
    found = {
        "fast": [{"speed": 30.0}, {"speed": 2.8}, {"speed": 28.0}],
        "slow": [{"speed": 20.0}, {"speed": 2.0}, {"speed": 20.0}],
    }
    ratios = (
        Ratio("gain", "speed", "fast", "slow", at_least=1.3),
        Ratio("loss", "speed", "slow", "fast", at_most=0.5),
        Ratio("free", "speed", "fast", "slow"),
    )
    summary = summarize_comparison(found, ratios)
    assert summary["ways"]["fast"]["speed"] == {"min": 2.8, "median": 28.0, "max": 30.0}
    gain = summary["ratios"]["gain"]
    assert (gain["min"], gain["median"], gain["max"]) == pytest.approx((1.4, 1.4, 1.5))
    assert gain["at_least"] == 1.3 and "at_most" not in gain
    assert [summary["ratios"][name]["holds"] for name in ("gain", "loss", "free")] == [
        True,
        False,
        None,
    ]
    print_comparison(summary, "a title")
    printed = capsys.readouterr().out
    assert "a title" in printed and "≥ 1.3" in printed and "≤ 0.5" in printed


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0, 9.0]) == {"min": 1.0, "median": 2.5, "max": 9.0}


def _row(replica: str, started: float, ended: float, tokens: int = 100) -> dict[str, object]:
    return {"replica": replica, "started": started, "ended": ended, "tokens": tokens}


def test_the_steady_state_is_when_all_replicas_are_warm_and_at_work() -> None:
    rows = [
        # Warm after 5; the first shard is slow.
        _row("a", 0, 5),
        _row("a", 5, 7),
        _row("a", 7, 9),
        _row("a", 9, 11),
        # Warm after 6, idle after 10.
        _row("b", 2, 6),
        _row("b", 6, 8),
        _row("b", 8, 10),
    ]
    tokens, seconds = steady_state(rows)
    assert seconds == 4
    # Of a: half of the second, all of the third, half of the fourth; of b: two.
    assert tokens == pytest.approx(100 * (0.5 + 1 + 0.5 + 2))


def test_gaps_between_shards_count() -> None:
    tokens, seconds = steady_state([_row("a", 0, 1), _row("a", 3, 4), _row("a", 6, 7)])
    assert (tokens, seconds) == (200, 6)


def test_without_a_steady_state_nothing_is_claimed() -> None:
    with pytest.raises(InputError, match=r"benchmark\.max_tokens"):
        steady_state([_row("a", 0, 5), _row("b", 0, 9), _row("b", 9, 12)])
