"""`PieceFetch` in virtual time: against the best that could be done, and against sources that lie, freeze and leave.

A root names one file alone, and possession is proven by those who have it.
"""

import hashlib
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.experts.pieces import (
    LEAF_BYTES,
    LIST,
    PIECE_BYTES,
    Ask,
    PieceFetch,
    leaves_of,
    num_leaves,
    piece_size,
    possession,
    root_from,
    root_of,
    split_list,
)
from tests.experts.piece_world import MBIT, ROUND_TRIP, SILENCE, Place, Simulation, throttled


def best(size: int, rates: Sequence[float]) -> float:
    """The shortest time for the pieces after the list, by trying how many each source sends."""
    count, per = num_leaves(size), [PIECE_BYTES / rate for rate in rates]

    def least(left: int, of: Sequence[float]) -> float:
        if len(of) == 1:
            return left * of[0]
        return min(max(some * of[0], least(left - some, of[1:])) for some in range(left + 1))

    return least(count, per)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2 * PIECE_BYTES, 9 * PIECE_BYTES),
    st.lists(st.sampled_from([1.0, 2.0, 5.0, 25.0, 100.0, 1000.0]), min_size=1, max_size=3),
)
def test_it_takes_little_longer_than_the_best_that_could_be_done(size: int, rates: list[float]) -> None:
    simulation = Simulation(size, [Place(rate * MBIT) for rate in rates])
    took = simulation.run()
    assert simulation.fetch.is_done and sorted(set(simulation.taken)) == list(range(num_leaves(size) + 1))
    fastest = PIECE_BYTES / (max(rates) * MBIT)
    # round trips, a piece more, and that nothing is known at first: what was asked of a slow one is asked again
    assert took <= 1.1 * best(size, [rate * MBIT for rate in rates]) + 4 * fastest + 8 * ROUND_TRIP + 2.5


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_the_others_do_one_honest_source_is_enough(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12 * PIECE_BYTES))
    times, rates = st.floats(0.0, 30.0), st.floats(0.5, 200.0)
    liars = st.frozensets(st.integers(0, 13), max_size=4)

    def place() -> st.SearchStrategy[Place]:
        return st.builds(
            Place,
            rates.map(lambda rate: rate * MBIT),
            freezes_at=times | st.just(float("inf")),
            thaws_at=st.floats(30.0, 60.0) | st.just(float("inf")),
            lies=liars,
            leaves_at=times | st.just(float("inf")),
        )

    places = [Place(data.draw(rates) * MBIT), *data.draw(st.lists(place(), max_size=4))]
    simulation = Simulation(size, places)
    took = simulation.run()
    assert simulation.fetch.is_done
    assert simulation.fetch.dropped.get(0) in (None, "others were faster"), "no honest one is called a liar"
    alone = (size + 32 * 13) / places[0].rate
    assert took <= alone + (len(places) + 1) * (SILENCE + 10)


def test_four_throttled_sources_are_almost_four_times_as_fast_and_a_frozen_one_costs_little() -> None:
    one, four = throttled(1), throttled(4)
    assert one / four >= 3.8
    for share in (0.25, 0.5, 0.75, 0.95, 0.99):
        assert throttled(4, frozen=1, at=share * four) - four <= 10.0
    # of that, most is what three take longer than four; and two than four
    assert throttled(4, frozen=2, at=four / 2) - four <= 0.5 * four + 3.0


def test_nobody_who_sends_is_left_because_it_is_slow() -> None:
    """It is the only one; the slowest that is waited for sends a piece in `SILENCE`."""
    simulation = Simulation(3 * PIECE_BYTES, [Place(PIECE_BYTES / (SILENCE - 1))])
    simulation.run()
    assert simulation.fetch.is_done
    slower = Simulation(3 * PIECE_BYTES, [Place(PIECE_BYTES / (SILENCE + 1))])
    slower.run()
    assert slower.fetch.is_hopeless and slower.fetch.dropped == {0: "it stopped sending"}


def test_what_is_sent_twice_is_little() -> None:
    simulation = Simulation(100 * PIECE_BYTES, [Place(rate * MBIT) for rate in (3, 25, 25, 80)])
    simulation.run()
    assert simulation.num_sent <= 101 + 6


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_pieces_are_right_or_wrong_alone(size: int) -> None:
    data = Random(size).randbytes(size)
    leaves = leaves_of([data])
    fetch: PieceFetch[str] = PieceFetch(root_of(data), size, silence=SILENCE)
    assert root_from(leaves, size) == fetch.root
    parts = (
        [data]
        if len(leaves) == 1
        else [b"".join(leaves), *(data[a : a + PIECE_BYTES] for a in range(0, size, PIECE_BYTES))]
    )
    for piece, part in enumerate(parts):
        assert len(part) == piece_size(piece, size) and fetch.is_right(piece, part)
        for wrong in (part + b"\0", part[:-1], bytes(len(part)), b""):
            assert wrong == part or not fetch.is_right(piece, wrong)
        if piece == LIST and len(parts) > 1:
            fetch.take_list(split_list(part))
    if len(parts) > 2:
        assert not fetch.is_right(1, parts[2])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 4 * PIECE_BYTES), st.integers(0, 5))
def test_no_bytes_of_a_stranger_raise_anything(data: bytes, size: int, piece: int) -> None:
    fetch: PieceFetch[str] = PieceFetch(bytes(32), size, silence=SILENCE)
    fetch.take_list([bytes(32)] * num_leaves(size))
    if piece <= num_leaves(size):
        assert not fetch.is_right(piece, data)


def test_pieces_that_are_here_are_not_asked_for() -> None:
    fetch: PieceFetch[str] = PieceFetch(bytes(32), 3 * PIECE_BYTES, silence=SILENCE)
    fetch.add("a")
    assert fetch.asks(0.0) == [Ask("a", LIST)]
    fetch.arrived("a", LIST, 0.1)
    fetch.take_list([bytes(32)] * 3, {1, 3})
    assert fetch.asks(0.1) == [Ask("a", 2)]
    fetch.arrived("a", 2, 0.2)
    assert fetch.is_done


def test_a_source_that_fails_again_and_again_is_left_and_one_that_is_busy_is_asked_later() -> None:
    fetch: PieceFetch[str] = PieceFetch(bytes(32), 1, silence=SILENCE)
    fetch.add("a")
    now, waits = 0.0, []
    while not fetch.is_hopeless:
        assert fetch.asks(now) == [Ask("a", LIST)] and fetch.asks(now) == []
        fetch.failed("a", LIST, "no room", now, retry_after=1.5)
        if not fetch.is_hopeless:
            waits.append(fetch.wake_at(now) - now)
            assert fetch.asks(now + waits[-1] - 0.01) == []
            now += waits[-1]
    assert waits == [1.5, 1.5, 2.0] and fetch.dropped == {"a": "no room"}
    fetch.add("a")
    assert fetch.is_hopeless, "once left, for this file"


SIZES = [0, 1, 4096, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES, 5 * LEAF_BYTES + 7]


def tree(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1: the left half is the largest power of two."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + tree(leaves[:half]) + tree(leaves[half:])).digest()


@pytest.mark.parametrize("size", SIZES)
def test_a_root_is_that_of_the_tree_over_the_leaves(size: int) -> None:
    data = Random(size).randbytes(size)
    leaves = [data[at : at + LEAF_BYTES] for at in range(0, size, LEAF_BYTES)] or [b""]
    assert root_of(data) == hashlib.sha256(b"\2" + size.to_bytes(8, "big") + tree(leaves)).digest()


def test_a_file_that_comes_in_parts_has_the_same_leaves() -> None:
    data, random = Random(3).randbytes(3 * LEAF_BYTES + 9), Random(4)
    for _ in range(5):
        cuts = sorted(random.sample(range(len(data)), 6)) + [LEAF_BYTES, 2 * LEAF_BYTES]
        ends = [*sorted(cuts), len(data)]
        parts = [data[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        assert leaves_of(parts) == leaves_of([data]) and len(leaves_of(parts)) == 4
    assert leaves_of([]) == leaves_of([b"", b""]) == leaves_of([b""])


def test_roots_differ_by_every_byte_and_by_length() -> None:
    data = bytes(2 * LEAF_BYTES)
    others = [data[:-1], data + b"\0", b"\1" + data[1:], data[:LEAF_BYTES], data[:-1] + b"\1"]
    assert len({root_of(one) for one in (data, *others)}) == 6
    inner = b"\1" + root_of(b"a") + root_of(b"b")
    assert root_of(inner) != root_of(b"ab"), "a file is no inner node"


def test_possession_needs_the_file_and_the_nonce() -> None:
    data = Random(1).randbytes(3 * LEAF_BYTES)
    assert possession(data, b"n" * 16) == possession(bytearray(data), b"n" * 16) != possession(data, b"m" * 16)
    half = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    assert possession(half, b"n" * 16) != possession(data, b"n" * 16)
    assert possession(b"", b"n") != possession(b"\0", b"n")
