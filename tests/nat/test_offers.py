from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.identity import Identity
from tesseract_async.nat import offers
from tesseract_async.nat.offers import (
    MAX_PER_MINUTE,
    MAX_PER_SENDER,
    MAX_PER_TARGET,
    Candidate,
    Description,
    OfferGuard,
)

ALICE, BOB, EVE = (Identity.from_seed(bytes([number]) * 32) for number in (1, 2, 3))
NOW = 1_700_000_000.0
DESCRIPTION = Description(
    "abcd",
    "p" * 22,
    b"f" * 32,
    (Candidate("host", "10.0.0.1", 4000, 2130706431, "a1"), Candidate("srflx", "2001:db8::1", 1, 7, "b")),
)


def offer(identity: Identity = ALICE, *, nonce: bytes = b"n" * 16, now: float = NOW, body: Any = None) -> bytes:
    body = DESCRIPTION.pack() if body is None else body
    return offers.encode_offer(identity, BOB.peer_id, kind=offers.CHANNEL, body=body, nonce=nonce, now=now)


def test_an_offer_and_its_answer_travel() -> None:
    data = offer()
    received = offers.decode_offer(data, BOB.peer_id)
    assert (received.sender, received.kind, received.time) == (ALICE.peer_id, offers.CHANNEL, NOW)
    assert Description.unpack(received.body) == DESCRIPTION
    reply = offers.encode_answer(BOB, received, body=DESCRIPTION.pack(), now=NOW)
    answer = offers.decode_answer(reply, data, sender=BOB.peer_id, recipient=ALICE.peer_id)
    assert answer.accepted and Description.unpack(answer.body) == DESCRIPTION
    reply = offers.encode_answer(BOB, received, body=None, reason="no " * 200, now=NOW)
    answer = offers.decode_answer(reply, data, sender=BOB.peer_id, recipient=ALICE.peer_id)
    assert not answer.accepted and answer.reason.startswith("no no") and len(answer.reason) == offers.MAX_REASON


def test_bodies_travel() -> None:
    addresses, token = ("203.0.113.1:5", "[2001:db8::1]:6"), b"t" * 16
    reverse = msgpack.unpackb(msgpack.packb({"addresses": addresses, "token": token}))
    assert offers.read_reverse(reverse) == (addresses, token)
    assert offers.read_relay({"relay": bytes(EVE.peer_id), "token": token}) == (EVE.peer_id, token)


def test_every_changed_byte_is_noticed() -> None:
    data = offer()
    for position in range(len(data)):
        forged = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        with pytest.raises(ProtocolError):
            offers.decode_offer(forged, BOB.peer_id)


def test_an_offer_for_another_peer_or_signed_by_another_one() -> None:
    with pytest.raises(InvalidRecord):
        offers.decode_offer(offer(), EVE.peer_id)
    forged = EVE.sign(offers.CONTEXT + offer()[64:]) + offer()[64:]
    with pytest.raises(InvalidRecord):
        offers.decode_offer(forged, BOB.peer_id)


def test_an_answer_by_another_peer_or_to_another_offer() -> None:
    data = offer()
    received = offers.decode_offer(data, BOB.peer_id)
    by_eve = offers.encode_answer(EVE, received, body={}, now=NOW)
    with pytest.raises(InvalidRecord):
        offers.decode_answer(by_eve, data, sender=BOB.peer_id, recipient=ALICE.peer_id)
    with pytest.raises(InvalidRecord):
        reply = offers.encode_answer(BOB, received, body={}, now=NOW)
        offers.decode_answer(reply, offer(nonce=b"m" * 16), sender=BOB.peer_id, recipient=ALICE.peer_id)
    with pytest.raises(ProtocolError):  # an offer is no answer
        offers.decode_answer(data, data, sender=ALICE.peer_id, recipient=BOB.peer_id)


@pytest.mark.parametrize(
    "change",
    [
        {"username": "ab"},
        {"username": "ab\r\nc"},
        {"password": "p" * 21},
        {"password": 7},
        {"fingerprint": b"f" * 31},
        {"candidates": "x"},
        {"candidates": [["host", "10.0.0.1", 1, 1, "a"]] * (offers.MAX_CANDIDATES + 1)},
        {"candidates": [["host", "evil.local", 1, 1, "a"]]},
        {"candidates": [["host", "224.0.0.1", 1, 1, "a"]]},
        {"candidates": [["host", "0.0.0.0", 1, 1, "a"]]},
        {"candidates": [["host", "fe80::1%lo", 1, 1, "a"]]},
        {"candidates": [["host", "10.0.0.1", 0, 1, "a"]]},
        {"candidates": [["host", "10.0.0.1", True, 1, "a"]]},
        {"candidates": [["prflx", "10.0.0.1", 1, 1, "a"]]},
        {"candidates": [["host", "10.0.0.1", 1, 2**32, "a"]]},
        {"candidates": [["host", "10.0.0.1", 1, 1, "a\n"]]},
        {"candidates": [["host", "10.0.0.1", 1]]},
    ],
)
def test_malformed_descriptions(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Description.unpack({**DESCRIPTION.pack(), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"token": b"short"},
        {"addresses": []},
        {"addresses": ["203.0.113.1:5"] * 9},
        {"addresses": ["localhost:5"]},
        {"addresses": ["203.0.113.1:0"]},
        {"addresses": ["203.0.113.1"]},
        {"addresses": [5]},
    ],
)
def test_malformed_reverse_bodies(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        offers.read_reverse({"addresses": ["203.0.113.1:5"], "token": b"t" * 16, **change})


@given(st.binary(max_size=300))
def test_untrusted_bytes_raise_protocol_errors_only(tail: bytes) -> None:
    payload = ALICE.public_key + tail
    for data in (tail, ALICE.sign(offers.CONTEXT + payload) + payload):
        with pytest.raises(ProtocolError):
            offers.decode_offer(data, BOB.peer_id)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=3)


LEAVES = st.none() | st.booleans() | st.integers(0, 2**40) | st.text(max_size=5) | st.binary(max_size=33)


@given(st.recursive(LEAVES, nested))
def test_untrusted_bodies_raise_protocol_errors_only(body: Any) -> None:
    for read in (Description.unpack, offers.read_reverse, offers.read_relay):
        with pytest.raises(ProtocolError):
            read(body)


def test_what_is_too_long_is_refused_at_both_ends() -> None:
    with pytest.raises(ValueError):
        offer(body={"x": bytes(offers.MAX_BYTES)})
    with pytest.raises(ProtocolError):
        offers.decode_offer(bytes(offers.MAX_BYTES + 1), BOB.peer_id)


def test_the_guard_counts_those_who_would_be_sent_to() -> None:
    guard = OfferGuard()
    answers = []
    for number in range(MAX_PER_TARGET + 2):
        sender = Identity.from_seed(bytes([number + 50]) * 32)
        data = offers.encode_offer(
            sender, BOB.peer_id, kind=offers.CHANNEL, body={}, nonce=bytes([number]) * 16, now=NOW
        )
        offer = offers.decode_offer(data, BOB.peer_id)
        answers.append(guard.refuse(offer, now=0.0, wall=NOW, target="8.8.8.8"))
    assert answers == [None] * MAX_PER_TARGET + ["too_many"] * 2
    assert guard.refuse(offer, now=20.0, wall=NOW, target="8.8.4.4") is None
    late = offers.decode_offer(data, BOB.peer_id)
    assert guard.refuse(late, now=100.0, wall=NOW, target="8.8.8.8") == "replayed"


def test_the_guard_refuses_old_repeated_and_too_many_offers() -> None:
    guard = OfferGuard()

    def refuse(identity: Identity, number: int, *, time: float = NOW, now: float = 0.0) -> str | None:
        data = offer(identity, nonce=number.to_bytes(16, "big"), now=time)
        return guard.refuse(offers.decode_offer(data, BOB.peer_id), now=now, wall=NOW + now)

    assert refuse(ALICE, 0, time=NOW - 121) == "stale"
    assert refuse(ALICE, 0, time=NOW + 121) == "stale"
    assert refuse(ALICE, 1) is None
    assert refuse(ALICE, 1) == "replayed"
    assert [refuse(ALICE, number) for number in range(2, MAX_PER_SENDER + 1)] == [None] * (MAX_PER_SENDER - 1)
    assert refuse(ALICE, 100) == "too_many"
    others = [Identity.from_seed(number.to_bytes(32, "big")) for number in range(MAX_PER_MINUTE // MAX_PER_SENDER)]
    answers = [refuse(other, number) for other in others for number in range(MAX_PER_SENDER)]
    assert answers == [None] * (MAX_PER_MINUTE - MAX_PER_SENDER) + ["too_many"] * MAX_PER_SENDER
    assert refuse(ALICE, 1, now=61.0) == "replayed"
    assert refuse(ALICE, 100, now=61.0) is None
