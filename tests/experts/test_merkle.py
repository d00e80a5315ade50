"""Roots do not depend on how a file comes, name it alone, and possession is proven by those who have it."""

from __future__ import annotations

from random import Random

import pytest

from tesseract_async.experts.merkle import LEAF_BYTES, MerkleRoot, possession, root_of

SIZES = [0, 1, 4096, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES, 5 * LEAF_BYTES + 7]


@pytest.mark.parametrize("size", SIZES)
def test_a_root_does_not_depend_on_the_pieces(size: int) -> None:
    random = Random(size)
    data = random.randbytes(size)
    tree, at = MerkleRoot(), 0
    while at < size:
        step = random.randint(1, LEAF_BYTES * 2)
        tree.update(memoryview(data)[at : at + step])
        at += step
    assert tree.size == size and tree.root() == root_of(data)


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
