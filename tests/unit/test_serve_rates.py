"""serve.rates: buckets of requests."""

from __future__ import annotations

import pytest

from serve.rates import MOST_CLIENTS, RateLimit


def test_a_rate_limit_saves_up_a_minute() -> None:
    limit = RateLimit(60)
    waits = [limit.wait_s("a", 0.0) for _ in range(61)]
    assert waits[:60] == [0.0] * 60 and waits[60] == pytest.approx(1)
    assert limit.wait_s("b", 0.0) == 0, "another client's is another"
    assert limit.wait_s("a", 0.5) == pytest.approx(0.5)
    assert limit.wait_s("a", 1.0) == 0 and limit.wait_s("a", 1.0) > 0
    assert [limit.wait_s("a", 1_000.0) for _ in range(61)].count(0.0) == 60


def test_a_rate_limit_remembers_so_many_clients() -> None:
    limit = RateLimit(1)
    assert limit.wait_s("first", 0.0) == 0
    assert limit.wait_s("first", 0.0) > 0
    for number in range(MOST_CLIENTS):
        limit.wait_s(str(number), 0.0)
    assert limit.wait_s("first", 0.0) == 0
