"""The shared bound on bytes: never exceeded, first come first served, nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.endpoint.budget import Budget, Reservation


def test_room_is_granted_in_line() -> None:
    budget = Budget(10)
    granted: list[str] = []
    first = budget.reserve(8, lambda: granted.append("first"))
    large = budget.reserve(9, lambda: granted.append("large"))
    small = budget.reserve(1, lambda: granted.append("small"))
    assert first.held and not large.held and not small.held, "a small wish does not overtake a large one"
    assert budget.try_reserve(1) is None
    first.release()
    assert granted == ["large", "small"] and budget.used == 10 and budget.num_waiting == 0
    with pytest.raises(ValueError, match="never fit"):
        budget.reserve(11, lambda: None)


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40))
def test_the_bound_holds_and_everybody_is_served(wishes: list[tuple[int, bool]]) -> None:
    budget = Budget(12)
    line: list[Reservation] = []
    granted: list[int] = []
    for number, (size, leave) in enumerate(wishes):
        reservation = budget.reserve(size, lambda number=number: granted.append(number))
        line.append(reservation)
        if leave:
            line[size % len(line)].release()
            line[size % len(line)].release()
        assert budget.used == sum(one.size for one in line if one.held) <= 12
    for reservation in line:
        reservation.release()
    assert budget.used == 0 and budget.num_waiting == 0
    assert granted == sorted(granted)
