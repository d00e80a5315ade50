"""A root names one file alone, and possession is proven by those who have it."""

import hashlib
from random import Random

import pytest

from tesseract_async.experts.pieces import LEAF_BYTES, leaves_of, possession, root_of

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
