from __future__ import annotations

import numpy as np
import pytest

from core.evaluate.intervals import Timings, speed_ratio


def _timings(seconds_PR) -> Timings:
    return Timings.of([[(10, float(s)) for s in row] for row in seconds_PR])


def test_a_ratio_is_the_median_of_those_within_a_repeat() -> None:
    """Two repeats are ten times slower, each for both; the medians of the speeds say 20."""
    of, to = _timings([[1, 10, 1]]), _timings([[2, 20, 20]])
    assert speed_ratio(of, to).value == 2
    assert of.speed() / to.speed() == pytest.approx(20)


def test_a_prompts_weight_is_its_time() -> None:
    assert _timings([[1], [9]]).speed() == 2


def test_a_single_measurement_has_no_interval() -> None:
    assert speed_ratio(_timings([[1]]), _timings([[2]])).interval is None
    assert speed_ratio(_timings([[1], [1]]), _timings([[2], [2]])).interval == (2, 2)


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_holds_the_truth_at_least_as_often_as_it_says(paired: bool) -> None:
    """Prompts take very different times; intervals are much narrower than those differ."""
    random = np.random.default_rng(5)
    held, widths = 0, []
    for _ in range(60):
        work = random.lognormal(0, 0.5, (40, 1)) if paired else np.ones((40, 1))
        noise = random.lognormal(0, 0.2, (2, 40, 3))
        low, high = speed_ratio(
            _timings(work * noise[0]), _timings(1.5 * work * noise[1]), paired=paired
        ).interval or (0, 0)
        held += low <= 1.5 <= high
        widths.append(high - low)
    assert held >= 0.95 * 60
    assert 0.05 < np.mean(widths) < 0.4


def test_the_same_measurements_have_the_same_interval() -> None:
    of, to = _timings([[1, 2], [2, 3]]), _timings([[2, 2], [5, 4]])
    assert speed_ratio(of, to) == speed_ratio(of, to)
