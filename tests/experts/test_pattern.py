"""Patterns name the uids that a volunteer means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.experts.pattern import ExpertPattern


def test_a_pattern_is_its_uids() -> None:
    pattern = ExpertPattern.parse("ffn.[0:2].[5:8].7")
    assert list(pattern) == [f"ffn.{x}.{y}.7" for x in (0, 1) for y in (5, 6, 7)]
    assert len(pattern) == 6
    assert pattern.grid_size == (2, 8, 8)
    assert list(ExpertPattern.parse("my.ffn.3")) == ["my.ffn.3"]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 30))
def test_a_pattern_holds_exactly_its_uids(ranges: list[tuple[int, int]], number: int) -> None:
    pattern = ExpertPattern("ffn", tuple(range(start, start + length) for start, length in ranges))
    assert ExpertPattern.parse(str(pattern)) == pattern
    uids = list(pattern)
    assert len(uids) == len(set(uids)) == len(pattern)
    assert all(uid in pattern for uid in uids)
    other = ".".join(["ffn", *[str(number)] * len(ranges)])
    assert (other in pattern) == (other in uids)
    assert uids[0] + ".0" not in pattern and uids[0].replace("ffn", "fnn") not in pattern
    assert "nonsense" not in pattern and 3 not in pattern


@pytest.mark.parametrize(
    "text", ["", "ffn", "ffn.[3:3]", "ffn.[3:1]", "ffn.[a:b]", "[0:3]", "ffn.[0:3", "ffn.[0:2].x", "f f.[0:2]"]
)
def test_a_malformed_pattern_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="pattern|uid"):
        ExpertPattern.parse(text)


def test_ranks_are_the_order_of_iteration() -> None:
    pattern = ExpertPattern.parse("ffn.[2:5].7.[0:4]")
    assert pattern.num_uids == 12
    assert [pattern.prefix + "".join(f".{at}" for at in pattern.coords_at(rank)) for rank in range(12)] == list(pattern)
    assert [pattern.rank_of(pattern.coords_at(rank)) for rank in range(12)] == list(range(12))
    assert pattern.rank_of((5, 7, 0)) is None
    assert pattern.rank_of((2, 7)) is None
    for rank in (-1, 12):
        with pytest.raises(IndexError, match="12 members"):
            pattern.coords_at(rank)
