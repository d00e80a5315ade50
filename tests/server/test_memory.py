"""Memory keeps its byte budget and forgets the oldest first; and which backwards a leaving server waits for."""

from typing import Any

import pytest

from tesseract_async.identity import PeerID
from tesseract_async.server.memory import GONE_AFTER, MAX_EXPECTED, MAX_PEERS, ExpectedBackwards, Memory

ANNA, BERT = PeerID(b"a" * 32), PeerID(b"b" * 32)


def next_change(some: ExpectedBackwards, now: float, *, gone: Any = (), elsewhere: Any = ()) -> float | None:
    return some.next_change(now, is_gone=lambda peer: peer in gone, expects=lambda uid: uid not in elsewhere)


def test_the_oldest_are_forgotten_beyond_the_budget() -> None:
    kept: Memory[int, str] = Memory(10, len)
    for key in range(5):
        assert kept.put(key, "xxxx")
    assert [kept.get(key) for key in range(5)] == [None, None, None, "xxxx", "xxxx"]
    assert kept.num_bytes == 8 and len(kept) == 2


def test_what_is_too_large_alone_is_not_kept() -> None:
    kept: Memory[int, str] = Memory(3, len)
    assert kept.put(1, "ab") and not kept.put(2, "abcd")
    assert kept.get(1) == "ab" and kept.get(2) is None


def test_replacing_and_popping_keep_the_count() -> None:
    kept: Memory[int, str] = Memory(10, len)
    kept.put(1, "abc")
    kept.put(1, "abcdef")
    assert kept.num_bytes == 6
    assert kept.pop(1) == "abcdef" and kept.pop(1) is None and kept.num_bytes == 0


def test_who_holds_most_loses_its_oldest() -> None:
    kept: Memory[int, str] = Memory(20, len)
    kept.put(100, "xxxx", owner="honest")
    for key in range(50):
        assert kept.put(key, "xxxx", owner="greedy")
    assert kept.get(100) == "xxxx" and kept.num_bytes == 20
    assert [key for key in range(50) if kept.get(key)] == [46, 47, 48, 49]
    for key in range(100, 104):
        kept.put(key, "xxxx", owner="honest")
    assert len(kept) == 5 and kept.num_bytes == 20


def test_what_is_old_is_forgotten() -> None:
    kept: Memory[int, str] = Memory(100, len, max_age=10.0)
    kept.put(1, "a", now=0.0)
    kept.put(2, "b", now=5.0)
    kept.put(1, "c", now=7.0)
    kept.expire(14.0)
    assert kept.get(1) == "c" and kept.get(2) == "b"
    kept.expire(15.0)
    assert kept.get(1) == "c" and kept.get(2) is None and kept.num_bytes == 1
    kept.expire(100.0)
    assert not len(kept) and kept.num_bytes == 0


def test_a_stranger_is_waited_for_until_the_timeout() -> None:
    some = ExpectedBackwards()
    assert next_change(some, 0.0) is None
    some.expect(b"1", "ffn.0", ANNA, 10.0)
    assert next_change(some, 10.0) == 70.0
    assert next_change(some, 69.9) == 70.0
    assert next_change(some, 70.0) is None and len(some) == 0


def test_a_caller_is_waited_for_as_long_as_its_backwards_take() -> None:
    some = ExpectedBackwards()
    for peer, lag in ((ANNA, 0.1), (BERT, 5.0)):
        for number in range(3):
            some.expect(b"%d" % number, "ffn.0", peer, 0.0)
            some.came(b"%d" % number, "ffn.0", peer, lag)
    some.expect(b"a", "ffn.0", ANNA, 10.0)
    assert next_change(some, 10.0) == pytest.approx(10.7)
    some.expect(b"b", "ffn.0", BERT, 10.0)
    assert next_change(some, 10.0) == pytest.approx(10.7)
    assert next_change(some, 10.7) == pytest.approx(20.5), "the other one is slower"
    assert next_change(some, 20.5) is None
    newcomer = PeerID(b"c" * 32)
    some.expect(b"c", "ffn.0", newcomer, 30.0)
    due = next_change(some, 30.0)
    assert due is not None and 30.7 < due < 60, "of whom nothing is known but what others take"


def test_patience_follows_the_slowest_and_forgets_it() -> None:
    some = ExpectedBackwards()
    for number, lag in enumerate([8.0] + [0.1] * 60):
        some.expect(b"%d" % number, "ffn.0", ANNA, 0.0)
        some.came(b"%d" % number, "ffn.0", ANNA, lag)
        some.expect(b"x", "ffn.0", ANNA, 100.0)
        due = next_change(some, 100.0)
        assert due is not None and due >= (116.5 if number == 0 else 100.7)
        some.came(b"x", "ffn.0", ANNA, 100.0 + lag)
    assert due < 101.0


def test_a_caller_that_is_gone_is_waited_for_until_it_would_have_dialed_again() -> None:
    some = ExpectedBackwards()
    some.expect(b"1", "ffn.0", ANNA, 0.0)
    some.expect(b"2", "ffn.0", BERT, 5.0)
    assert next_change(some, 6.0, gone=[ANNA]) == 6.0 + GONE_AFTER
    assert next_change(some, 6.5) == 60.0, "it is back"
    assert next_change(some, 7.0, gone=[ANNA]) == 7.0 + GONE_AFTER
    assert next_change(some, 7.0 + GONE_AFTER, gone=[ANNA]) == 65.0 and len(some) == 1


def test_backwards_that_go_elsewhere_are_not_waited_for() -> None:
    some = ExpectedBackwards()
    some.expect(b"1", "ffn.0", ANNA, 0.0)
    assert next_change(some, 0.0, elsewhere=["ffn.0"]) is None


def test_a_backward_that_brings_its_inputs_counts_for_the_oldest_of_its_expert() -> None:
    some = ExpectedBackwards()
    some.expect(b"1", "ffn.0", ANNA, 0.0)
    some.expect(b"2", "ffn.0", ANNA, 5.0)
    for uid, peer in (("ffn.1", ANNA), ("ffn.0", BERT)):
        some.came(None, uid, peer, 6.0)
    some.came(b"unknown", "ffn.0", ANNA, 6.0)
    assert len(some) == 2
    some.came(None, "ffn.0", ANNA, 6.0)
    assert len(some) == 1 and next_change(some, 6.0) == pytest.approx(5.0 + 2 * 6.0 + 0.5)
    some.came(b"2", "ffn.0", ANNA, 6.0)
    assert next_change(some, 6.0) is None


def test_what_is_remembered_is_bounded() -> None:
    some = ExpectedBackwards()
    for number in range(2 * MAX_PEERS):
        some.expect(b"%d" % number, "ffn.0", PeerID(number.to_bytes(32, "big")), 0.0)
        assert len(some) == min(number + 1, MAX_PEERS), "one of each"
    for number in range(MAX_EXPECTED + 10):
        some.expect(b"Anna's %d" % number, "ffn.0", ANNA, 0.0)
        assert len(some) <= MAX_EXPECTED
    assert len(some) == MAX_EXPECTED
    assert next_change(some, 60.0) is None and len(some) == 0
