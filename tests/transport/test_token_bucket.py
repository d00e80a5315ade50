"""The bucket against its promise: never more than burst + rate * time, and never slower than needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.transport.token_bucket import TokenBucket


def test_a_burst_passes_and_then_the_rate_holds() -> None:
    bucket = TokenBucket(100.0, burst=50.0)
    assert bucket.take(50, 0.0) == 0.0
    assert bucket.take(10, 0.0) == pytest.approx(0.1)
    assert bucket.wait(0.05) == pytest.approx(0.05)
    assert bucket.wait(0.1) == 0.0
    assert bucket.take(50, 1000.0) == 0.0  # a long rest is worth one burst
    assert bucket.take(1, 1000.0) == pytest.approx(0.01)


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(100.0, burst=1.0, now=10.0)
    assert bucket.take(101, 10.0) == pytest.approx(1.0)
    assert bucket.wait(5.0) == pytest.approx(1.0)
    assert bucket.wait(10.5) == pytest.approx(0.5)


@given(
    st.floats(1.0, 1e6),
    st.floats(1.0, 1e6),
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.0, 10.0)), min_size=1, max_size=50),
)
def test_who_waits_as_told_keeps_to_the_rate(rate: float, burst: float, pieces: list[tuple[int, float]]) -> None:
    bucket = TokenBucket(rate, burst=burst)
    now, passed, waited = 0.0, 0, 0.0
    for size, idle in pieces:
        # all that passed before this piece fits the promise
        assert passed <= (burst + rate * now) * (1 + 1e-9)
        wait = bucket.take(size, now)
        passed += size
        waited += wait
        now += wait + idle
    # and nobody waits longer than the bytes take at this rate
    assert waited <= passed / rate * (1 + 1e-9)


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_senseless_rates_are_refused(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        TokenBucket(rate, burst=burst)
