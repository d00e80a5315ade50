"""Amounts as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from tesseract_async.cli.units import parse_rate, parse_seconds, parse_share, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4 GiB", 4 * 2**30),
        ("1.5kB", 1500),
        ("500 MB", 5 * 10**8),
        ("2ti" + "B", 2 * 2**40),
        ("17", 17),
        (17, 17),
        (0.0, 0),
    ],
)
def test_sizes(text: str | int | float, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "rate"),
    [("8 Mbit/s", 1e6), ("1 MB/s", 1e6), ("1 MiB/s", 2**20), ("100 kbit/s", 12500.0), (5, 5.0), ("8 bit/s", 1.0)],
)
def test_rates(text: str | int, rate: float) -> None:
    assert parse_rate(text) == rate


def test_times_and_shares() -> None:
    assert [parse_seconds(text) for text in ("90", "90 s", "10 min", "1.5h", 3)] == [90.0, 90.0, 600.0, 5400.0, 3.0]
    assert parse_share("30 %") == pytest.approx(0.3)
    assert parse_share(0.3) == parse_share("0.3") == 0.3


@pytest.mark.parametrize("text", ["", "GiB", "-1 GB", "1 GB/s", "4 Mbit", "1e9", "1,5 GB", True, None, -3, 1e400])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["10 MB", "10 Mbit", "fast", "5 %"])
def test_a_rate_without_its_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="20 Mbit/s"):
        parse_rate(text)
