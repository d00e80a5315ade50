"""How a Seal names a state's file: the root of a hash tree over its pieces; and proofs that somebody has it. No I/O."""

from __future__ import annotations

import hashlib
from typing import Final

LEAF_BYTES: Final = 1 << 20
NUM_PROBES: Final = 16
PROBE_BYTES: Final = 4096


class MerkleRoot:
    """The root over 1 MiB leaves of a file that comes in pieces; a GB takes about 0.6 s of a core.

    Leaves, inner nodes and the whole are hashed under different first bytes, and the whole with its size, so that no
    file passes for part of another.
    """

    def __init__(self) -> None:
        self.size = 0
        """Bytes so far."""
        self._leaf = hashlib.sha256(b"\0")
        self._peaks: list[tuple[int, bytes]] = []  # (height, hash) of the full subtrees so far, the highest first

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Takes the file's next bytes, as many as come."""
        rest = memoryview(data).cast("B")
        while len(rest):
            room = LEAF_BYTES - self.size % LEAF_BYTES
            piece = rest[:room]
            self._leaf.update(piece)
            self.size += len(piece)
            rest = rest[len(piece) :]
            if self.size % LEAF_BYTES == 0:
                self._push()

    def root(self) -> bytes:
        """32 bytes that name the file. Nothing may be added afterwards."""
        if self.size % LEAF_BYTES or not self.size:
            self._push()
        _, top = self._peaks.pop()
        while self._peaks:
            top = _node(self._peaks.pop()[1], top)
        return hashlib.sha256(b"\2" + self.size.to_bytes(8, "big") + top).digest()

    def _push(self) -> None:
        height, node = 0, self._leaf.digest()
        self._leaf = hashlib.sha256(b"\0")
        while self._peaks and self._peaks[-1][0] == height:
            height, node = height + 1, _node(self._peaks.pop()[1], node)
        self._peaks.append((height, node))


def root_of(data: bytes | bytearray | memoryview) -> bytes:
    """The root of a whole file."""
    tree = MerkleRoot()
    tree.update(data)
    return tree.root()


def possession(data: bytes | bytearray | memoryview, nonce: bytes) -> bytes:
    """Proves that somebody has this file: a hash of pieces that `nonce`, which the asker drew, chooses.

    Not that of one who lacks more than a few of its pieces: 16 of 4 KiB are looked at.
    """
    view = memoryview(data).cast("B")
    proof = hashlib.sha256(b"tesseract possession 1\0" + nonce + len(view).to_bytes(8, "big"))
    for number in range(NUM_PROBES):
        draw = hashlib.sha256(nonce + bytes([number])).digest()
        start = int.from_bytes(draw[:8], "big") % max(1, len(view) - PROBE_BYTES + 1)
        proof.update(view[start : start + PROBE_BYTES])
    return proof.digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
