"""Spans are a set, and pieces that lie are refused."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.sharing.spans import Spans, decode_pieces


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 30))), st.integers(0, 40))
def test_spans_are_a_set(changes: list[tuple[bool, int, int]], num: int) -> None:
    spans, numbers = Spans(), set[int]()
    for adds, start, stop in changes:
        if adds:
            spans.add(start, stop)
            numbers |= set(range(start, stop))
        else:
            cut = spans.cut(start, stop)
            assert {n for one in cut for n in range(*one)} == numbers & set(range(start, stop))
            numbers -= set(range(start, stop))
        assert [n for one in spans for n in range(*one)] == sorted(numbers)
        assert spans.num == len(numbers)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
    taken = spans.take(num, most=100)
    assert [n for one in taken for n in range(*one)] == sorted(numbers)[:num]


@pytest.mark.parametrize(
    "flat", [None, [1], [0, 2, 2], [0, 3, 2], [0, -1, 2], [0, 0, 2.0], [0, 0, 2**50], [0, 0, 1] * 1025]
)
def test_pieces_that_lie_are_refused(flat: object) -> None:
    with pytest.raises(ProtocolError):
        decode_pieces(flat)
