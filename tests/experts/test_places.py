"""What members of a run say they have: there and back, from strangers, and under the key where it belongs."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import GRANT_SECONDS, Role, sign_grant
from tesseract_async.experts.place_directory import MAX_PARTS, fetch_places
from tesseract_async.experts.places import (
    MemberPart,
    MemberRole,
    Place,
    Survey,
    decode_place,
    encode_place,
    places_key,
    ranges_of,
)
from tesseract_async.experts.run import RunManifest, sign_run
from tesseract_async.experts.terms import EPOCH_ZERO
from tesseract_async.experts.trust import Trust, belongs_under_its_key
from tesseract_async.identity import Identity, PeerID, SignedRecord
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.network.entries import Entry, key_digest
from tesseract_async.network.values import encode_value

OWNER, MEMBER, STRANGER = (Identity.from_seed(bytes([n]) * 32) for n in (41, 42, 43))
RUN = sign_run(OWNER, RunManifest("digits", "ffn", (4, 64), "ffn", created=1))
TAG = RUN.tag
assert TAG is not None
KEY = places_key("ffn", TAG)
NOW = time.time()
ROLES: tuple[Role, ...] = ("host",)
GRANT = sign_grant(OWNER, TAG.run_id("ffn"), MEMBER.peer_id, ROLES, serial=int(NOW), not_after=int(NOW) + GRANT_SECONDS)
NUMBERS = {"room": 3, "files": 40, "speed": 5000.0, "moved_ago": 12.0, "uptime": 99.0}

parts = st.builds(
    MemberPart,
    st.sampled_from(MemberRole),
    *(st.integers(0, 2**32 - 1) for _ in range(3)),
    st.floats(0, 2**31, width=32),
    st.integers(0, 2**32 - 1),
)


def encode(place: Place, identity: Identity = MEMBER, **more: object) -> list[bytes]:
    given = {"addresses": ["127.0.0.1:7"], "grant": GRANT.blob if identity is MEMBER else b"", **more}
    assert TAG is not None
    return encode_place(place, prefix="ffn", tag=TAG, **given)  # type: ignore[arg-type]


def entry(value: bytes, identity: Identity = MEMBER, subkey: str = "0") -> Entry:
    return Entry(KEY, subkey, identity.peer_id, 1, NOW + 60.0, value)


async def read(entries: list[Entry]) -> dict[PeerID, Place]:
    scope = AddressScope()
    scope.set_own(["127.0.0.1"])
    trust = Trust(OWNER.peer_id, clock=lambda: NOW)
    authority = Authority(RUN)
    trust.add(authority)

    async def get_entries(key: str) -> list[Entry]:
        assert key == KEY
        return entries

    network: Any = SimpleNamespace(peer_id=OWNER.peer_id, get_entries=get_entries)
    places, addresses = await fetch_places(network, trust, authority, scope)
    assert places.keys() == addresses.keys()
    return places


@given(st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 63)), parts, max_size=80))
def test_what_is_said_is_read(some: dict[tuple[int, int], MemberPart]) -> None:
    said = {f"ffn.{a}.{b}": part for (a, b), part in some.items()}
    found: dict[str, MemberPart] = {}
    for blob in encode(Place(MEMBER.peer_id, parts=said, **NUMBERS)):  # type: ignore[arg-type]
        part = decode_place(blob)
        assert part.numbers == (3, 40, 5000, 12, 99) and part.tag == TAG and len(blob) <= 880
        found |= part.parts
    assert found == said


def test_a_primary_that_signs_for_any_number_silences_nobody_who_holds_its_state() -> None:
    liar = MemberPart(MemberRole.HOLDER, 5, 2**63 - 1, 2**63 - 1, 1e30, 2**40)
    (blob,) = encode(Place(MEMBER.peer_id, 1, 1, parts={"ffn.0.1": liar}))
    assert decode_place(blob).parts["ffn.0.1"][:4] == (MemberRole.HOLDER, 5, 2**32 - 1, 2**32 - 1)


@given(st.binary(max_size=900), st.integers(0, 900), st.integers(0, 255))
def test_garbage_is_refused(junk: bytes, at: int, byte: int) -> None:
    (good,) = encode(Place(MEMBER.peer_id, 1, 1, parts={"ffn.0.1": MemberPart(MemberRole.HOLDER, 1, 2, 3)}))
    spoiled = bytearray(good)
    spoiled[at % len(good)] = byte
    for blob in (junk, good[:4] + junk, bytes(spoiled), good[: at % len(good)], good + junk[:1], None, 7):
        try:
            decode_place(blob)
        except ProtocolError:
            pass


async def test_only_members_are_read_and_only_what_they_may_say() -> None:
    latest = int(NOW) - EPOCH_ZERO
    mine = {
        "ffn.0.1": MemberPart(MemberRole.PRIMARY, latest, 2, 3),
        "ffn.0.2": MemberPart(MemberRole.PRIMARY, latest + 1000, 2, 3),
    }
    place = Place(MEMBER.peer_id, parts=mine, **NUMBERS)  # type: ignore[arg-type]
    (blob,) = encode(place)
    (foreign,) = encode(place, STRANGER)
    found = await read([entry(blob), entry(foreign, STRANGER), entry(blob, STRANGER), entry(b"tsp\1", MEMBER, "1")])
    assert list(found) == [MEMBER.peer_id]
    # an epoch from the future ranks last; but whose clock was wrong has the expert, which nobody begins anew
    assert found[MEMBER.peer_id].parts == mine | {"ffn.0.2": MemberPart(MemberRole.HOLDER, 0, 1)}
    assert "ffn.0.2" in Survey(found).alive
    outside = {"ffn.9.1": MemberPart(MemberRole.PRIMARY, 1, 2, 3), "ffn.0.64": MemberPart(MemberRole.HOLDER, 1, 2, 3)}
    (blob,) = encode(Place(MEMBER.peer_id, parts=outside, **NUMBERS))  # type: ignore[arg-type]
    assert not (await read([entry(blob)]))[MEMBER.peer_id].parts, "no expert that the run does not have"
    many = [entry(encode(Place(MEMBER.peer_id, n, 1))[0], subkey=str(n)) for n in range(200)]
    assert (await read(many))[MEMBER.peer_id].room <= MAX_PARTS


@pytest.mark.parametrize(
    ("identity", "key", "is_held"),
    [(MEMBER, KEY, True), (MEMBER, "run-places/00", False), (STRANGER, KEY, False), (OWNER, KEY, True)],
)
def test_holders_refuse_places_of_strangers_and_under_other_keys(identity: Identity, key: str, is_held: bool) -> None:
    (blob,) = encode(Place(identity.peer_id, 1, 1), identity)
    record = SignedRecord.sign(
        identity, key_digest(key), subkey="0", value=encode_value(blob), sequence=1, expiration=int(NOW) + 60
    )
    assert belongs_under_its_key(record) is is_held


def test_addresses_that_tell_nothing_have_no_range() -> None:
    assert ranges_of(["127.0.0.1:7"]) == frozenset()
    assert ranges_of(["9.9.9.7:1", "9.9.9.9:2"]) == {"9.9.9.0/24"}
