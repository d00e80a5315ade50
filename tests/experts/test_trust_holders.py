"""Holders refuse manifests that do not belong under the key where somebody wants them stored."""

import msgpack
import pytest

import tesseract_async as ta
from tesseract_async.experts.grants import Role, sign_grant
from tesseract_async.experts.manifest import MAGIC, RunTag, decode_manifest, encode_manifest, grid_key, shard_key
from tesseract_async.experts.trust import belongs_under_its_key
from tesseract_async.identity import Identity, SignedRecord
from tesseract_async.network.entries import key_digest

ALICE = Identity.generate()
UIDS = {(3, 7): True, (3, 8): False}
[(PART, _)] = encode_manifest(["198.51.100.7:31337"], UIDS, prefix="ffn", sequence=1)
ELSEWHERE = next(key for n in range(99) if (key := shard_key(f"ffn.9.{n}")) not in decode_manifest(PART).keys())


def belongs(key: str, value: object, *, tombstone: bool = False) -> bool:
    packed = b"" if tombstone else msgpack.packb(value)
    record = SignedRecord.sign(
        ALICE, key_digest(key), sequence=1, expiration=1.0, value=packed, subkey="0", tombstone=tombstone
    )
    return belongs_under_its_key(record)


def test_a_manifest_belongs_to_its_grid_and_to_the_shards_of_its_experts() -> None:
    assert set(decode_manifest(PART).keys()) == {grid_key("ffn"), shard_key("ffn.3.7"), shard_key("ffn.3.8")}
    for key in (grid_key("ffn"), shard_key("ffn.3.7"), shard_key("ffn.3.8")):
        assert belongs(key, PART)
    for key in (grid_key("attention"), ELSEWHERE, shard_key("attention.3.7"), "experts/ffn/", "anything"):
        assert not belongs(key, PART)


def test_a_large_manifest_belongs_to_every_shard_of_its_experts() -> None:
    for part, members in encode_manifest(["10.0.0.1:1"], {(x,): True for x in range(800)}, prefix="ffn", sequence=1):
        assert len(part) > 255, "another kind of byte string in msgpack"
        keys = {shard_key(f"ffn.{x}") for (x,) in members}
        assert all(belongs(key, part) for key in keys)
        other = next(key for n in range(999, 9999) if (key := shard_key(f"ffn.{n}")) not in keys)
        assert not belongs(other, part)


@pytest.mark.parametrize("value", [PART[:-1], PART + b"\0", MAGIC, PART[:4] + b"\3a b" + PART[8:], MAGIC * 100])
def test_a_damaged_manifest_belongs_nowhere(value: bytes) -> None:
    assert not belongs(grid_key("ffn"), value)


@pytest.mark.parametrize("value", [None, 1, "tsm", b"", b"tsm", b"\2tsm", {"tsm": PART}, [PART]])
def test_what_is_no_manifest_is_nobody_s_business_here(value: object) -> None:
    assert belongs("anything", value)


def test_what_is_no_msgpack_raises_nothing() -> None:
    for value in (b"\xc4", b"\xc4\xff" + MAGIC, b"\xc5\0\0" + PART, b"\xc4" + bytes([len(PART)]) + PART + b"\0"):
        record = SignedRecord.sign(ALICE, key_digest("any"), sequence=1, expiration=1.0, value=value)
        belongs_under_its_key(record)


def test_a_withdrawal_belongs_everywhere() -> None:
    assert belongs(ELSEWHERE, None, tombstone=True)


async def test_every_node_checks_before_it_holds_for_others() -> None:
    async with ta.TesseractNode() as holder, ta.TesseractNode(initial_peers=[holder.address]) as stranger:
        assert await stranger.network.wait_joined(30.0)
        assert await stranger.network.store(shard_key("ffn.3.7"), PART, ttl=60.0, subkey="0") == 2
        assert await stranger.network.store("a key", b"any value", ttl=60.0, subkey="0") == 2
        # nobody but the stranger itself takes it
        assert await stranger.network.store(ELSEWHERE, PART, ttl=60.0, subkey="0") == 1
        assert stranger.metrics.snapshot()["network_stores{outcome=invalid}"] == 1
        assert holder.metrics.snapshot()["network_datagrams_dropped{reason=invalid_record}"] >= 1, "and again"


def test_what_is_of_a_run_needs_a_grant_of_its_owner() -> None:
    owner, host, stranger = (Identity.from_seed(bytes([n]) * 32) for n in range(1, 4))
    tag = RunTag(owner.peer_id, "digits", "granted")

    def held(who: Identity, grant: bytes, *, tag: RunTag = tag, key: str | None = None) -> bool:
        ((part, _),) = encode_manifest(["10.0.0.1:1"], UIDS, prefix="ffn", sequence=1, tag=tag, grant=grant)
        value = msgpack.packb(part)
        under = key_digest(grid_key("ffn", tag) if key is None else key)
        return belongs_under_its_key(SignedRecord.sign(who, under, sequence=1, expiration=2.0, value=value, subkey="0"))

    def grant(who: Identity, *roles: Role, signer: Identity = owner, of: RunTag = tag) -> bytes:
        return sign_grant(signer, of.run_id("ffn"), who.peer_id, roles or ("host",), serial=1, not_after=2).blob

    assert held(host, grant(host)), "an expired one, too: an absent owner stops nobody"
    assert held(host, grant(host), key=shard_key("ffn.3.7", tag)) and held(owner, b"")
    assert not held(host, grant(host), key=grid_key("ffn"))
    letters, opened = RunTag(owner.peer_id, "letters", "granted"), RunTag(owner.peer_id, "digits", "open")
    for wrong in (
        b"",
        b"garbage",
        grant(host),  # another's
        grant(stranger, "train"),
        grant(stranger, signer=stranger),
        grant(stranger, of=letters),
        grant(stranger, of=opened),
    ):
        assert not held(stranger, wrong)
    assert not held(stranger, b"", tag=opened, key=grid_key("ffn", tag)) and held(stranger, b"", tag=opened)
