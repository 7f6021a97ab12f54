"""Rows of the KV cache: given, given back, and never to two at once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from core.decode.rows import RowSpace, Stretch


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=60))
@settings(max_examples=60)
def test_no_row_is_given_twice_and_none_is_lost(steps: list[tuple[bool, int]]) -> None:
    space = RowSpace(100)
    held: list[Stretch] = []
    for give_back, size in steps:
        if give_back and held:
            space.give_back(held.pop(size % len(held)))
        elif (stretch := space.take(size)) is not None:
            assert stretch.size == size
            held.append(stretch)
        rows = [row for one in held for row in range(one.first, one.end)]
        assert len(rows) == len(set(rows)) and all(0 <= row < 100 for row in rows)
        assert space.num_free == 100 - len(rows)
    for stretch in held:
        space.give_back(stretch)
    assert space.take(100) == Stretch(0, 100), "free neighbours become one"


def test_what_does_not_fit_is_not_given() -> None:
    space = RowSpace(10)
    first = space.take(4)
    assert space.take(7) is None and space.num_free == 6
    assert first is not None and space.take(6) == Stretch(4, 6)
    assert space.take(1) is None
    space.give_back(first)
    assert space.take(3) == Stretch(0, 3)
