"""Uids, and manifests as bytes: round trips, sizes, and what strangers may send."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.manifest import (
    MAX_PART_BYTES,
    Manifest,
    RunTag,
    decode_manifest,
    encode_manifest,
    experts_by_grid,
    grid_key,
    join_uid,
    shard_key,
    split_uid,
)
from tesseract_async.network.address_scope import AddressScope
from tests.experts.fake_network import peer

ADDRESSES = ["198.51.100.7:31337"]


def members(manifest: Manifest) -> dict[tuple[int, ...], bool]:
    rows = zip(manifest.coords.tolist(), manifest.primary.tolist(), strict=True)
    return {tuple(coords): primary for coords, primary in rows}


def test_a_uid_is_a_prefix_and_coordinates() -> None:
    assert split_uid("ffn.3.7") == ("ffn", (3, 7))
    assert split_uid("my.model.layer-2.0") == ("my.model.layer-2", (0,))
    assert join_uid("ffn", (3, 7)) == "ffn.3.7"


@pytest.mark.parametrize(
    "uid",
    [
        "",
        "ffn",
        "3.7",
        ".3",
        "ffn.",
        "ffn..3",
        "ffn.03",
        "ffn.-1",
        "ffn. 3",
        "a b.3",
        "ffn.3.x",
        "ffn.²",
        "ffn.4294967296",
    ]
    + ["1.ffn.3", "x" * 300 + ".1", "ffn" + ".1" * 9],
)
def test_a_malformed_uid_is_named(uid: str) -> None:
    with pytest.raises(ValueError, match="uid|coordinates"):
        split_uid(uid)


def test_keys_tell_grids_and_shards_apart() -> None:
    uids = [f"ffn.{x}.{y}" for x in range(64) for y in range(64)]
    shards = {shard_key(uid) for uid in uids}
    assert len(shards) == 256
    assert grid_key("ffn") not in shards
    assert all(shard.startswith(grid_key("ffn")) for shard in shards)


experts_on_a_grid = st.integers(1, 4).flatmap(
    lambda dims: st.dictionaries(
        st.tuples(*[st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))] * dims), st.booleans(), min_size=1
    )
)


@given(
    experts_on_a_grid,
    st.lists(
        st.sampled_from(["127.0.0.1:1", "[2001:db8::1]:65535", "node.example.org:31337", "10.0.0.1:8080", "my_pc:9"]),
        min_size=1,
        max_size=8,
    ),
    st.lists(st.sampled_from([f"10.0.0.1:80/{peer(3)}", f"[::1]:1/{peer(4)}"]), max_size=4),
    st.integers(0, 2**48 - 1),
    st.integers(400, MAX_PART_BYTES),
)
def test_parts_say_together_what_was_encoded(
    experts: dict[tuple[int, ...], bool], addresses: list[str], rendezvous: list[str], sequence: int, size: int
) -> None:
    together: dict[tuple[int, ...], bool] = {}
    for part, inside in encode_manifest(
        addresses, experts, prefix="ffn", sequence=sequence, rendezvous=rendezvous, max_part_bytes=size
    ):
        assert len(part) <= size
        manifest = decode_manifest(part)
        assert (manifest.prefix, manifest.addresses, manifest.sequence) == ("ffn", tuple(addresses), sequence)
        assert manifest.rendezvous == tuple(rendezvous)
        assert sorted(members(manifest)) == inside
        assert not members(manifest).keys() & together.keys()
        together |= members(manifest)
    assert together == experts


@pytest.mark.parametrize("coordinate", [0, 255, 256, 65535, 65536, 2**32 - 1])
def test_coordinates_at_the_borders_of_their_widths_survive(coordinate: int) -> None:
    [(part, _)] = encode_manifest(ADDRESSES, {(0, coordinate): True}, prefix="ffn", sequence=1)
    assert members(decode_manifest(part)) == {(0, coordinate): True}


def test_eight_experts_take_a_few_dozen_bytes() -> None:
    # 87 KB for 512 servers are 170 bytes per server, of which a signed entry takes about 110 for itself
    experts = {(random.Random(i).randrange(64), i): True for i in range(8)}
    [(part, _)] = encode_manifest(ADDRESSES, experts, prefix="ffn", sequence=2**47)
    assert len(part) <= 60


def test_a_thousand_experts_fit_a_few_parts() -> None:
    parts = encode_manifest(ADDRESSES, {(x, y): False for x in range(32) for y in range(32)}, prefix="ffn", sequence=1)
    assert len(parts) == 3
    assert all(len(part) <= MAX_PART_BYTES for part, _ in parts)
    keys = [key for part, _ in parts for key in decode_manifest(part).keys()]
    assert len(keys) <= 256 + 3 * 3, "each part stands under the grid and its own shards"


@pytest.mark.parametrize(
    ("addresses", "experts"),
    [
        ([], {(1,): True}),
        (["127.0.0.1:1"] * 9, {(1,): True}),
        (["127.0.0.1:0"], {(1,): True}),
        (["no port"], {(1,): True}),
        (["a name with spaces:1"], {(1,): True}),
        (ADDRESSES, {}),
        (ADDRESSES, {(1,): True, (1, 2): True}),
    ],
)
def test_a_senders_own_mistake_is_a_value_error(addresses: list[str], experts: dict[tuple[int, ...], bool]) -> None:
    with pytest.raises(ValueError):
        encode_manifest(addresses, experts, prefix="ffn", sequence=1)


@given(st.one_of(st.binary(max_size=100), st.none(), st.integers(), st.lists(st.binary()), st.text()))
@example(b"")
@example(b"\1" * 1001)
def test_garbage_is_a_protocol_error(value: object) -> None:
    try:
        decode_manifest(value)
    except ProtocolError:
        pass


@given(experts_on_a_grid, st.data())
def test_damaged_manifests_are_protocol_errors_or_other_manifests(
    experts: dict[tuple[int, ...], bool], data: st.DataObject
) -> None:
    part = bytearray(encode_manifest(["127.0.0.1:1", "example.org:80"], experts, prefix="ffn", sequence=7)[0][0])
    for _ in range(data.draw(st.integers(1, 3))):
        part[data.draw(st.integers(0, min(40, len(part) - 1)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(part)))
    for damaged in (bytes(part), bytes(part[:cut]), bytes(part) + b"\0"):
        try:
            manifest = decode_manifest(damaged)
        except ProtocolError:
            continue
        # whatever came through can be said again
        again = encode_manifest(
            manifest.addresses,
            members(manifest),
            prefix=manifest.prefix,
            sequence=manifest.sequence,
            rendezvous=manifest.rendezvous,
        )
        assert members(decode_manifest(again[0][0])) == members(manifest)


def test_uids_are_grouped_by_their_grid() -> None:
    grids = dict(experts_by_grid({"ffn.1.2": True, "attention.3": False, "ffn.0.0": False}))
    assert grids == {"ffn": {(1, 2): True, (0, 0): False}, "attention": {(3,): False}}


def test_a_server_behind_a_rendezvous_needs_no_address_of_its_own() -> None:
    node = f"198.51.100.9:31337/{peer(9)}"
    [(part, _)] = encode_manifest([], {(1,): True}, prefix="ffn", sequence=1, rendezvous=[node])
    manifest = decode_manifest(part)
    assert (manifest.addresses, manifest.rendezvous) == ((), (node,))
    for wrong in ([node] * 5, ["198.51.100.9:31337"], ["198.51.100.9:31337/abc"]):
        with pytest.raises(ValueError):
            encode_manifest(ADDRESSES, {(1,): True}, prefix="ffn", sequence=1, rendezvous=wrong)


@pytest.mark.parametrize("coords", [[(3, 4), (3, 4)], [(3, 5), (3, 4)], [(4, 0), (3, 9)]], ids=str)
def test_coordinates_ascend_strictly(coords: list[tuple[int, int]]) -> None:
    """None is said twice: a megabyte of repetitions is not a million replicas."""
    [(part, _)] = encode_manifest(["10.0.0.1:1"], {(1, 1): True, (2, 2): True}, prefix="ffn", sequence=1)
    at = part.index(bytes([1, 1, 2, 2]))
    told = bytes(number for row in coords for number in row)
    with pytest.raises(ProtocolError, match="ascend"):
        decode_manifest(part[:at] + told + part[at + 4 :])


def manifest_at(*addresses: str, rendezvous: Sequence[str] = ()) -> Manifest:
    return Manifest("ffn", 1, addresses, tuple(rendezvous), np.zeros((1, 1), np.int64), np.ones(1, np.bool_))


def test_a_host_that_is_longer_than_any_name_is_no_address() -> None:
    [(part, _)] = encode_manifest([f"{'x' * 253}:1"], {(1,): True}, prefix="ffn", sequence=1)
    assert decode_manifest(part).addresses == (f"{'x' * 253}:1",)
    with pytest.raises(ProtocolError, match="a malformed host name"):
        decode_manifest(part.replace(bytes([253]) + b"x" * 253, bytes([254]) + b"x" * 254))


def test_a_manifest_names_third_parties_in_vain() -> None:
    public, node = AddressScope(["8.8.4.4"]), "/" + 64 * "1"
    many = manifest_at(*(f"9.9.9.9:{port}" for port in range(1, 9))).within(public)
    assert many.addresses == ("9.9.9.9:1",), "one computer, one port"
    hosts = manifest_at(*(f"9.9.{index}.9:1" for index in range(6)), "[2606:4700::1]:1", "example.org:1").within(public)
    assert hosts.addresses == ("9.9.0.9:1", "9.9.1.9:1", "[2606:4700::1]:1"), "two hosts of a kind"
    mixed = manifest_at("10.0.0.1:1", "9.9.9.9:1", rendezvous=[f"10.0.0.1:1{node}", f"9.9.9.8:1{node}"]).within(public)
    assert mixed.addresses == ("9.9.9.9:1",) and mixed.rendezvous == (f"9.9.9.8:1{node}",)
    for address in ("10.0.0.1:1", "127.0.0.1:1", "169.254.169.254:80", "[::ffff:10.0.0.1]:1", "[64:ff9b::a00:1]:1"):
        with pytest.raises(ProtocolError, match="cannot be dialed from here"):
            manifest_at(address).within(public)
    home = AddressScope(["192.168.1.7"])
    assert manifest_at("192.168.1.9:1", "192.168.7.9:1", "9.9.9.9:1").within(home).addresses == (
        "192.168.1.9:1",
        "192.168.7.9:1",
        "9.9.9.9:1",
    )


def test_an_expert_of_a_run_costs_little_more_than_six_bytes() -> None:
    tag = RunTag(peer(1), "digits", "granted")
    experts = {(i // 10, i % 10): True for i in range(100)}
    sizes = []
    for some in (experts, dict(list(experts.items())[:20])):
        ((part, _),) = encode_manifest(["192.0.2.1:4000"], some, prefix="ffn", sequence=1, tag=tag, grant=b"g" * 165)
        sizes.append(len(part))
    assert (sizes[0] - sizes[1]) / 80 <= 6.2
