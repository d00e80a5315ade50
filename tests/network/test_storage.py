"""Storage: merging, expiration, quotas, and digests and pages against recomputation."""

import random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.identity import Identity, SignedRecord
from tesseract_async.network.shares import Source
from tesseract_async.network.storage import (
    ENTRY_OVERHEAD,
    MAX_COPIES_PER_RANGE,
    MAX_ENTRIES_PER_OWNER,
    MAX_ENTRIES_PER_RANGE,
    MAX_TTL,
    Storage,
    StoreOutcome,
    summary_of,
)

OWNERS = [Identity.from_seed(bytes([index] * 32)) for index in range(8)]
KEY = bytes(32)
WALL = 1_000_000.0


def record(
    owner: int = 0,
    subkey: str | None = None,
    *,
    sequence: int = 1,
    ttl: float = 60.0,
    value: bytes = b"x",
    tombstone: bool = False,
) -> SignedRecord:
    return SignedRecord.sign(
        OWNERS[owner],
        KEY,
        subkey=subkey,
        sequence=sequence,
        expiration=WALL + ttl,
        value=value,
        tombstone=tombstone,
    )


def test_owners_never_collide_and_newer_replaces_older() -> None:
    storage = Storage(1 << 20)
    assert storage.add(record(0, "a"), WALL) is StoreOutcome.STORED
    assert storage.add(record(1, "a"), WALL) is StoreOutcome.STORED
    assert storage.add(record(0, "a"), WALL) is StoreOutcome.ALREADY_HELD
    assert storage.add(record(0, "a", sequence=3, value=b"new"), WALL) is StoreOutcome.STORED
    assert storage.add(record(0, "a", sequence=2, value=b"old"), WALL) is StoreOutcome.OUTDATED
    assert sorted(item.value for item in storage.records(KEY)) == [b"new", b"x"]


def test_a_tombstone_hides_what_came_before_and_nothing_that_comes_later() -> None:
    storage = Storage(1 << 20)
    storage.add(record(sequence=1), WALL)
    assert storage.add(record(sequence=2, tombstone=True), WALL) is StoreOutcome.STORED
    assert storage.add(record(sequence=1), WALL) is StoreOutcome.OUTDATED
    assert [item.tombstone for item in storage.records(KEY)] == [True]
    assert storage.add(record(sequence=3), WALL) is StoreOutcome.STORED


def test_expired_records_go_after_the_tolerated_skew_and_leave_nothing_behind() -> None:
    storage = Storage(1 << 20)
    for sequence, ttl in ((1, 10.0), (2, 60.0)):
        storage.add(record(sequence=sequence, ttl=ttl), WALL)
    storage.add(record(1, "s", ttl=20.0), WALL)
    assert storage.expire(WALL + 45.0) == 0
    assert storage.expire(WALL + 50.0) == 1
    assert storage.expire(WALL + 89.0) == 0
    assert storage.expire(WALL + 90.0) == 1
    assert (storage.num_entries, storage.num_bytes, storage.keys()) == (0, 0, [])
    assert storage.add(record(ttl=-31.0), WALL) is StoreOutcome.EXPIRED
    assert storage.add(record(ttl=-29.0), WALL) is StoreOutcome.STORED


def test_records_that_live_too_long_are_refused() -> None:
    storage = Storage(1 << 20)
    assert storage.add(record(ttl=MAX_TTL + 31.0), WALL) is StoreOutcome.TOO_LONG
    assert storage.add(record(ttl=MAX_TTL + 29.0), WALL) is StoreOutcome.STORED
    assert storage.add(record(1, ttl=MAX_TTL + 59.0, tombstone=True), WALL) is StoreOutcome.STORED
    assert storage.add(record(2, sequence=2**62), WALL) is StoreOutcome.TOO_LONG


@pytest.mark.parametrize(
    "storage, most",
    [
        (Storage(1 << 20, max_entries_per_key=2), 2),
        (Storage(1 << 22), MAX_ENTRIES_PER_OWNER),
        (Storage(2500), 2),
    ],
)
def test_quotas_hold(storage: Storage, most: int) -> None:
    outcomes = [storage.add(record(0, str(index)), WALL) for index in range(most + 1)]
    assert outcomes == [StoreOutcome.STORED] * most + [StoreOutcome.FULL]
    assert storage.add(record(0, "1", sequence=2), WALL) is StoreOutcome.STORED


ENTRIES = st.tuples(st.integers(0, 3), st.text("ab", max_size=1), st.integers(1, 3), st.integers(0, 200))


@settings(deadline=None, max_examples=50)
@given(st.lists(ENTRIES, max_size=40), st.integers(150, 900), st.integers(0, 2**64 - 1))
def test_digests_and_pages_agree_with_recomputation(
    entries: list[tuple[int, str, int, int]], room: int, start: int
) -> None:
    with patch("tesseract_async.network.storage.SMALL", 3):
        check_against_recomputation(entries, room, start)
    check_against_recomputation(entries, room, start)


def check_against_recomputation(entries: list[tuple[int, str, int, int]], room: int, start: int) -> None:
    storage = Storage(1 << 20)
    best: dict[tuple[int, str], SignedRecord] = {}
    for owner, subkey, sequence, size in entries:
        made = record(owner, subkey, sequence=sequence, value=bytes(size))
        storage.add(made, WALL)
        held = best.get((owner, subkey))
        if held is None or made.supersedes(held):
            best[owner, subkey] = made
    expected = list(best.values())
    assert sorted(item.body for item in storage.records(KEY)) == sorted(item.body for item in expected)
    assert storage.summary(KEY) == (summary_of(expected) if expected else None)
    read: list[bytes] = []
    cursor: int | None = start
    while cursor is not None:
        bodies, following = storage.page(KEY, cursor, 2**64, room)
        assert len(bodies) <= 1 or sum(len(body) + 3 for body in bodies) <= room
        assert following is None or following > cursor
        read += bodies
        cursor = following
    in_order = sorted((item for item in expected if item.slot >= start), key=lambda item: item.slot)
    assert read == [item.body for item in in_order]
    storage.expire(WALL + 1000.0)
    assert (storage.num_entries, storage.num_bytes, storage.summary(KEY)) == (0, 0, None)


def test_replacing_an_entry_again_and_again_fills_no_memory() -> None:
    storage = Storage(1 << 20)
    for sequence in range(1, 500):
        assert storage.add(record(sequence=sequence), WALL) is StoreOutcome.STORED
    assert len(storage._expirations) < 80
    assert storage.expire(WALL + 90.0) == 1 and storage.keys() == []


def test_a_range_has_its_share_of_a_dictionary_and_no_more() -> None:
    storage = Storage(1 << 28)
    here, there = Source(b"\x08\x08\x08", copied=False), Source(b"\x08\x08\x09", copied=False)
    names = [(index % 2, str(index)) for index in range(MAX_ENTRIES_PER_RANGE + 1)]
    outcomes = [storage.add(record(*name), WALL, here) for name in names]
    assert outcomes == [StoreOutcome.STORED] * MAX_ENTRIES_PER_RANGE + [StoreOutcome.FULL]
    assert storage.add(record(*names[-1]), WALL, there) is StoreOutcome.STORED
    assert storage.add(record(2, "d"), WALL, None) is StoreOutcome.STORED


def copies(count: int) -> list[SignedRecord]:
    """Entries of one key, of several owners each."""
    return [record(index % 8, str(index // 8)) for index in range(count)]


def test_what_a_holder_copies_counts_by_itself() -> None:
    storage = Storage(1 << 28)
    own, copied = Source(b"\x08\x08\x08", copied=False), Source(b"\x08\x08\x08", copied=True)
    outcomes = [storage.add(one, WALL, copied) for one in copies(MAX_COPIES_PER_RANGE + 1)]
    assert outcomes == [StoreOutcome.STORED] * MAX_COPIES_PER_RANGE + [StoreOutcome.FULL]
    assert storage.add(record(3, "own"), WALL, own) is StoreOutcome.STORED


def keyed(index: int, *, ttl: float = 60.0, owner: int = 0, subkey: str | None = None) -> SignedRecord:
    """A record under a key whose first two bytes are `index`: the greater, the farther from a node with the id 0."""
    return SignedRecord.sign(
        OWNERS[owner],
        index.to_bytes(2, "big") + bytes(30),
        subkey=subkey,
        sequence=1,
        expiration=WALL + ttl,
        value=b"x",
    )


def source(number: int, *, copied: bool = False) -> Source:
    return Source(bytes([number >> 8, number & 255, 7]), copied)


def test_one_address_range_fills_a_32nd_of_a_holder_and_one_block_an_eighth() -> None:
    storage = Storage(640 * 1024)
    held = [storage.add(keyed(index), WALL, source(1)) is StoreOutcome.STORED for index in range(600)]
    assert sum(held) == 20 * 1024 // (1000 + len(keyed(0).body))
    for number in range(100):  # of the same block
        for index in range(20):
            storage.add(keyed(1000 + 20 * number + index), WALL, Source(bytes([0, 1, 8 + number]), copied=False))
    assert 0.11 < storage.num_bytes / (640 * 1024) <= 0.125
    assert storage.add(keyed(9999), WALL, source(2)) is StoreOutcome.STORED, "there is room for others"
    storage.expire(WALL + 1000.0)  # what has expired counts no more
    assert storage.add(keyed(0, ttl=2000.0), WALL + 1000.0, source(1)) is StoreOutcome.STORED
    assert storage.num_entries == 1


def test_a_full_holder_makes_room_for_sources_that_have_little() -> None:
    """Entries of the largest source go: those far from the node, and long-lived, first."""
    storage = Storage(640 * 1024)
    for number in range(1, 40):
        for index in range(17):
            storage.add(keyed(20 * number + index, ttl=50000.0), WALL, source(256 * number))
    assert storage.add(keyed(1, owner=1, subkey="late"), WALL, source(1)) is StoreOutcome.STORED
    assert storage.add(keyed(2, owner=1, subkey="late"), WALL, source(256)) is StoreOutcome.FULL, (
        "it has as much as any"
    )
    for index in range(10):
        assert storage.add(keyed(index, owner=2, subkey="late"), WALL, source(1)) is StoreOutcome.STORED
    assert storage.num_bytes <= 640 * 1024
    assert all(any(one.owner == OWNERS[2].peer_id for one in storage.records(keyed(index).key)) for index in range(10))


def test_sixteen_ranges_do_not_fill_a_key_for_others() -> None:
    storage = Storage(1 << 28, max_entries_per_key=160)
    for number in range(16):
        for index in range(10):
            assert storage.add(record(0, f"{number}.{index}"), WALL, source(256 * number)) is StoreOutcome.STORED
    for number in range(16, 30):
        assert storage.add(record(1, str(number), ttl=9.0), WALL, source(256 * number)) is StoreOutcome.STORED
    assert len(storage.records(KEY)) == 160
    assert len(storage.records(KEY)) == storage.num_entries and storage.summary(KEY) == summary_of(storage.records(KEY))
    held = {one.subkey for one in storage.records(KEY) if one.owner == OWNERS[1].peer_id}
    assert held >= {str(number) for number in range(16, 30)}
    assert storage.add(record(0, "more"), WALL, source(0)) is StoreOutcome.FULL


def test_an_entry_that_its_owner_renews_is_no_copy_any_more() -> None:
    storage = Storage(1 << 28)
    copier = source(1, copied=True)
    for one in copies(MAX_COPIES_PER_RANGE):
        storage.add(one, WALL, copier)
    assert storage.add(record(0, "x"), WALL, copier) is StoreOutcome.FULL
    assert storage.add(record(0, "0", sequence=2), WALL, source(9)) is StoreOutcome.STORED
    assert storage.add(record(0, "x"), WALL, copier) is StoreOutcome.STORED
    assert storage.add(record(0, "0", sequence=3), WALL, copier) is StoreOutcome.STORED
    assert storage.add(record(0, "y"), WALL, copier) is StoreOutcome.FULL, "copied again, it stays its owner's"


def test_a_holder_s_accounts_agree_with_what_it_holds() -> None:
    rng = random.Random(1)
    storage = Storage(64 * 1100, max_entries_per_key=20)
    for step in range(3000):
        wall = WALL + step / 10
        one = SignedRecord.sign(
            rng.choice(OWNERS),
            bytes([rng.randrange(4)]) * 32,
            subkey=str(rng.randrange(12)),
            sequence=step,
            expiration=wall + rng.choice([5.0, 500.0]),
            value=bytes(rng.randrange(200)),
        )
        where = rng.choice([None, *(Source(bytes([rng.randrange(40), 1, 1]), rng.random() < 0.5) for _ in range(3))])
        storage.add(one, wall, where)
        storage.expire(wall)
        assert storage.num_bytes == sum(len(item.body) + ENTRY_OVERHEAD for item in storage) <= 64 * 1100
    sources = [storage.shares.source_of((item.key, (item.subkey, item.owner))) for item in storage]
    assert len(storage.shares) == sum(one is not None for one in sources) > 0
    storage.expire(WALL + 1e6)
    assert not storage.num_entries and not len(storage.shares)
    assert storage.shares.crowding(source(1), 0) is None and storage.shares.crowding_in(KEY, source(1)) is None
