"""What people write as arguments and options, and what it means."""

from typing import Any

import click
import pytest

from tesseract_async.cli.types import GRID, PAIR, PEERS, RATE, SECONDS, SHARE, SIZE, Parsed, UserPath, seconds
from tesseract_async.identity import PeerID


def read(kind: Parsed, text: Any) -> Any:
    return kind.convert(text, None, None)


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
    assert read(SIZE, text) == size


@pytest.mark.parametrize(
    ("text", "rate"),
    [("8 Mbit/s", 1e6), ("1 MB/s", 1e6), ("1 MiB/s", 2**20), ("100 kbit/s", 12500.0), (5, 5.0), ("8 bit/s", 1.0)],
)
def test_rates(text: str | int, rate: float) -> None:
    assert read(RATE, text) == rate


def test_times_and_shares() -> None:
    times = [read(SECONDS, text) for text in ("90", "90 s", "10 min", "1.5h", 3)]
    assert times == [90.0, 90.0, 600.0, 5400.0, 3.0]
    assert read(SHARE, "30 %") == pytest.approx(0.3)
    assert read(SHARE, 0.3) == read(SHARE, "0.3") == 0.3
    with pytest.raises(click.BadParameter, match="0.5 is not between 1 and 5"):
        read(seconds(1, 5), "0.5")


@pytest.mark.parametrize("text", ["", "GiB", "-1 GB", "1 GB/s", "4 Mbit", "1e9", "1,5 GB", True, -3, 1e400])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(click.BadParameter, match="not a size"):
        read(SIZE, text)


@pytest.mark.parametrize("text", ["10 MB", "10 Mbit", "fast", "5 %"])
def test_a_rate_without_its_time_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="20 Mbit/s"):
        read(RATE, text)


def test_names_with_values_and_grids() -> None:
    pairs = ("a=1", "a=1.5", "a=true", "a=None", "a=b=c")
    assert [read(PAIR, text)[1] for text in pairs] == [1, 1.5, True, None, "b=c"]
    assert read(GRID, "4x32") == (4, 32)
    for kind, text in ((PAIR, "wide"), (PAIR, "=3"), (GRID, "4y4"), (GRID, "0x4")):
        with pytest.raises(click.BadParameter, match="is not like"):
            read(kind, text)


def test_peers_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (PeerID(bytes([number]) * 32) for number in (1, 2))
    assert read(PEERS, f"{one}, {two}") == {one, two}
    monkeypatch.setenv("HOME", "/home/ada")
    assert UserPath().convert("~/key.pem", None, None) == "/home/ada/key.pem"
