"""Who a node is: an Ed25519 key, and the id that follows from it.

A `PeerID` is the SHA-256 of the raw public key (as in S/Kademlia, Baumgart & Mies 2007, an id can't be chosen without
finding a key for it). It is the node's name in the DHT and on every channel.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tesseract_async.errors import ProtocolError


class PeerID(bytes):
    """32 bytes that name a node. ``str()`` gives 64 hexadecimal digits; `short` the first 8, for people."""

    __slots__ = ()

    def __new__(cls, raw: bytes) -> PeerID:
        """Raises: ProtocolError unless `raw` has 32 bytes."""
        if not isinstance(raw, bytes) or len(raw) != 32:
            raise ProtocolError("a peer id has 32 bytes")
        return super().__new__(cls, raw)

    @classmethod
    def from_public_key(cls, public_key: bytes) -> PeerID:
        """The id of the node that holds this raw Ed25519 public key (32 bytes)."""
        return cls(hashlib.sha256(public_key).digest())

    @classmethod
    def parse(cls, text: str) -> PeerID:
        """Reads what ``str()`` wrote. Raises: ValueError."""
        try:
            return cls(bytes.fromhex(text))
        except (ValueError, ProtocolError):
            raise ValueError(f"not a peer id (64 hexadecimal digits): {text!r}") from None

    @property
    def short(self) -> str:
        """The first 8 hexadecimal digits: enough for a log line, never for a decision."""
        return self.hex()[:8]

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"PeerID({self.short}…)"


class Identity:
    """An Ed25519 key pair. Create one with `generate`, `load` or `load_or_create`."""

    __slots__ = ("_private_key", "public_key", "peer_id")

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.public_key: bytes = private_key.public_key().public_bytes_raw()
        self.peer_id = PeerID.from_public_key(self.public_key)

    @classmethod
    def generate(cls) -> Identity:
        """A new random identity."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity whose secret is these 32 bytes: for simulations and tests that must repeat to the byte."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Reads a PEM file written by `save`. Raises: OSError, ValueError if it holds no Ed25519 key."""
        key = serialization.load_pem_private_key(Path(path).read_bytes(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path} holds no Ed25519 key")
        return cls(key)

    @classmethod
    def load_or_create(cls, path: str | Path) -> Identity:
        """`load`, or `generate` and `save` where no file exists yet."""
        if not Path(path).exists():
            identity = cls.generate()
            identity.save(path)
            return identity
        return cls.load(path)

    def save(self, path: str | Path) -> None:
        """Writes the key as PKCS 8 PEM, readable by its owner only (0600). Never overwrites. Raises: OSError."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(self.private_pem())

    def private_pem(self) -> bytes:
        """The secret as unencrypted PKCS 8 PEM: what OpenSSL reads. Keep it off disks that others read."""
        return self._private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature (RFC 8032) of `data`."""
        return self._private_key.sign(data)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id.short}…)"


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `signature` over `data` was made by the holder of this raw public key. Takes untrusted bytes."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True
