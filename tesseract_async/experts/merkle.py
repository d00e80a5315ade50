"""Names of files, by the root of a hash tree, and proofs that a peer has one. No I/O."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

LEAF_BYTES: Final = 1 << 20
NUM_PROBES: Final = 16
PROBE_BYTES: Final = 4096


def leaf_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the hash of one leaf: `LEAF_BYTES` of a file, or its last bytes."""
    return _hash(b"\0", data)


def leaves_of(parts: Iterable[bytes | bytearray | memoryview]) -> list[bytes]:
    """Return the hashes of the leaves of a file that comes in parts of any length. A GB takes about 0.6 s of a core."""
    leaves, leaf, room = list[bytes](), hashlib.sha256(b"\0"), LEAF_BYTES
    for part in parts:
        view = memoryview(part).cast("B")
        while len(view):
            if not room:
                leaves.append(leaf.digest())
                leaf, room = hashlib.sha256(b"\0"), LEAF_BYTES
            leaf.update(view[:room])
            view, room = view[room:], room - min(room, len(view))
    return [*leaves, leaf.digest()]


def num_leaves(size: int) -> int:
    return max(1, -(-size // LEAF_BYTES))


def root_from(leaves: Sequence[bytes], size: int) -> bytes:
    """Return the 32 bytes that name a file, from the hashes of its leaves and its size.

    Leaves, inner nodes and the whole are hashed under different first bytes, and the whole with its size, so that no
    file passes for part of another. The tree is that of RFC 6962.
    """
    level = list(leaves)
    while len(level) > 1:
        pairs = [_hash(b"\1", left + right) for left, right in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return _hash(b"\2", size.to_bytes(8, "big") + level[0])


def root_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the 32 bytes that name a file: `root_from` of its leaves."""
    return root_from(leaves_of([data]), len(memoryview(data).cast("B")))


class Readable(Protocol):
    size: int

    def read(self, offset: int, num_bytes: int) -> bytes | memoryview: ...


def possession(data: bytes | bytearray | memoryview | Readable, nonce: bytes) -> bytes:
    """Return the proof that this node has a file: a hash of the 16 pieces of 4 KiB that the asker's `nonce` chooses."""
    view = memoryview(data).cast("B") if isinstance(data, bytes | bytearray | memoryview) else data
    size = len(view) if isinstance(view, memoryview) else view.size
    proof = hashlib.sha256(b"tesseract possession 1\0" + nonce + size.to_bytes(8, "big"))
    for number in range(NUM_PROBES):
        draw = hashlib.sha256(nonce + bytes([number])).digest()
        start = int.from_bytes(draw[:8], "big") % max(1, size - PROBE_BYTES + 1)
        proof.update(
            view[start : start + PROBE_BYTES] if isinstance(view, memoryview) else view.read(start, PROBE_BYTES)
        )
    return proof.digest()


def _hash(kind: bytes, data: bytes | bytearray | memoryview) -> bytes:
    found = hashlib.sha256(kind)
    found.update(data)
    return found.digest()
