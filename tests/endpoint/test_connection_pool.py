"""The pool's state: which connection is used, and when a failed dial may be repeated."""

import random
from types import SimpleNamespace
from typing import Any

from tesseract_async.endpoint.connection_pool import ConnectionPool
from tesseract_async.identity import PeerID
from tesseract_async.transport.base import PeerAddress

ALICE, BOB = PeerID(b"a" * 32), PeerID(b"b" * 32)
AT_ALICE = PeerAddress(ALICE, ("10.0.0.1:1",))


def pool() -> ConnectionPool:
    return ConnectionPool(backoff_base=0.1, backoff_max=5.0, rng=random.Random(1))


def connection(peer_id: PeerID = ALICE, dialed: PeerAddress | None = None, session: bytes = b"s") -> Any:
    return SimpleNamespace(peer_id=peer_id, dialed=dialed, session=session, is_open=True, retired=False)


def test_own_dials_come_first_and_newer_ones_before_older() -> None:
    state = pool()
    old, new = connection(), connection()
    for one in (old, new):
        state.add(one)
        assert state.find(AT_ALICE) is one
    dialed = connection(dialed=AT_ALICE)
    state.add(dialed)
    state.add(connection())
    assert state.find(AT_ALICE) is dialed
    dialed.retired = True
    assert state.find(AT_ALICE) not in (dialed, None), "it is for the calls that it has only"
    dialed.is_open, dialed.retired = False, False
    assert state.find(AT_ALICE) is not dialed
    assert state.num_connections == 4 and state.num_connections_with(ALICE) == 3
    for one in state.connections():
        state.remove(one)
        state.remove(one)
    assert state.find(AT_ALICE) is None and not state.connections()


def test_a_peer_known_by_address_only_is_found_while_its_connection_lives() -> None:
    state = pool()
    anybody = PeerAddress(None, AT_ALICE.addresses)
    assert state.find(anybody) is None
    one, two = connection(dialed=AT_ALICE), connection(dialed=AT_ALICE)
    state.add(one)
    state.add(two)
    state.remove(two)
    assert state.find(anybody) is one
    state.remove(one)
    assert state.find(anybody) is None
    state.add(connection(BOB, dialed=PeerAddress(BOB, AT_ALICE.addresses)))
    assert state.find(anybody).peer_id == BOB  # type: ignore[union-attr]


def test_a_bulk_channel_joins_the_connection_of_its_peer_only() -> None:
    state = pool()
    state.add(connection(session=b"one"))
    assert state.find_session(ALICE, b"one") is not None
    assert state.find_session(BOB, b"one") is None and state.find_session(ALICE, b"two") is None


def test_waits_double_with_jitter_up_to_a_bound_and_end_with_success() -> None:
    state = pool()
    assert state.retry_at(AT_ALICE) == 0.0
    for attempt in range(12):
        state.dial_failed(AT_ALICE, 100.0)
        wait = state.retry_at(AT_ALICE) - 100.0
        full = min(5.0, 0.1 * 2**attempt)
        assert full / 2 <= wait <= full
    state.dial_succeeded(AT_ALICE)
    assert state.retry_at(AT_ALICE) == 0.0
    for number in range(ConnectionPool.MAX_BACKOFFS + 10):
        state.dial_failed(PeerAddress(None, (f"h:{number}",)), 0.0)
    waits = [state.retry_at(PeerAddress(None, (f"h:{number}",))) for number in range(ConnectionPool.MAX_BACKOFFS + 10)]
    assert not any(waits[:10]) and all(waits[10:]), "the oldest are forgotten"
