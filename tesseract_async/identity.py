"""Identities of nodes: an Ed25519 key, the id that follows from it, and records that its owner signed.

A `PeerID` is the SHA-256 of the raw public key (as in S/Kademlia, Baumgart & Mies 2007: nobody can choose an id without
finding a key for it). It is the node's name in the DHT and on every channel. A `SignedRecord` is a statement of its
owner in the DHT: holders and readers check the signature, so that nobody can make it in another's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.bindings import crypto_sign, crypto_sign_open
from nacl.exceptions import CryptoError

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.files import sync_folder
from tesseract_async.uncopied import Uncopied

logger = logging.getLogger(__name__)


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
        """Read what ``str()`` wrote. Raises: ValueError."""
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


class Identity(Uncopied):
    """An Ed25519 key pair. Create one with `generate`, `load` or `load_or_create`."""

    __slots__ = ("_private_key", "_secret", "public_key", "peer_id")

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.public_key: bytes = private_key.public_key().public_bytes_raw()
        self._secret = private_key.private_bytes_raw() + self.public_key
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
        """Read a PEM file written by `save`; ``~`` is the home folder.

        If other users of this computer may read the file, that is taken from them, with a warning. Raises: OSError,
        ValueError if it holds no Ed25519 key.
        """
        path = Path(path).expanduser()
        data = path.read_bytes()
        try:
            identity = cls.from_pem(data)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
            state = "is empty" if not data.strip() else "holds no Ed25519 key"
            raise ValueError(
                f"{path} {state}: move it away, and a new key is made there (`tesseract keygen FILE` does it, too)"
            ) from None
        _close_to_others(path)
        return identity

    @classmethod
    def load_or_create(cls, path: str | Path) -> Identity:
        """`load`, or `generate` and `save` where no file exists yet. Programs that start at the same time agree on one
        key."""
        try:
            return cls.load(path)
        except FileNotFoundError:
            identity = cls.generate()
        try:
            identity.save(path)
        except FileExistsError:  # another one was faster
            return cls.load(path)
        return identity

    @classmethod
    def from_pem(cls, data: bytes, *, passphrase: bytes | None = None) -> Identity:
        """Read what `save` wrote. Raises: ValueError or TypeError if that passphrase opens no Ed25519 key there."""
        key = serialization.load_pem_private_key(data, password=passphrase)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("no Ed25519 key")
        return cls(key)

    def save(self, path: str | Path, *, passphrase: bytes | None = None) -> None:
        """Write the key as PKCS 8 PEM, readable by its owner only (0600), and encrypted if there is a `passphrase`.
        Never overwrites.

        The file appears whole or not at all, even when the machine loses power. Raises: OSError.
        """
        path = Path(os.path.realpath(Path(path).expanduser()))  # where a link points, if it is one
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(self.private_pem(passphrase))
                file.flush()
                os.fsync(file.fileno())
            _rename_new(unfinished, path)
            sync_folder(path.parent)
        except OSError as error:
            error.filename, error.filename2 = str(path), None  # not the other name, which nobody knows
            raise
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    @property
    def seed(self) -> bytes:
        """The secret in 32 bytes: what `from_seed` takes."""
        return self._secret[:32]

    def private_pem(self, passphrase: bytes | None = None) -> bytes:
        """The secret as PKCS 8 PEM, which OpenSSL reads. Without a passphrase, keep it off disks that others read."""
        how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        return self._private_key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature (RFC 8032) of `data`."""
        return crypto_sign(data, self._secret)[:64]

    def __repr__(self) -> str:
        return f"Identity({self.peer_id.short}…)"


def _rename_new(old: Path, new: Path) -> None:
    """Renames a file, never over another one. Raises: OSError."""
    if os.name == "nt":
        os.rename(old, new)
        return
    try:
        os.link(old, new)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as FAT's: the name is taken first, then filled
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.replace(old, new)


def _close_to_others(path: Path) -> None:
    """Take a key file's permissions from everybody but its owner, and says so."""
    with contextlib.suppress(OSError):
        if os.name == "nt" or not path.stat().st_mode & 0o077:
            return
        try:
            path.chmod(0o600)
            now = "it is its owner's alone now"
        except OSError:
            now = "and that cannot be changed here: chmod 600 it"
        logger.warning("other users of this computer could read the key in %s; %s", path, now)


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Return whether `signature` over `data` was made by the holder of this raw public key. Takes untrusted bytes."""
    if len(signature) != 64:
        return False
    try:
        # libsodium checks a signature in half the time that OpenSSL takes, and nodes do little else
        crypto_sign_open(signature + data, public_key)
    except (CryptoError, ValueError, TypeError):
        return False
    return True


Verifier = Callable[[bytes, bytes, bytes], bool]
"""`verify`, or a simulation's substitute: (public key, signature, data) -> whether the signature holds."""

RECORD_DOMAIN = b"tesseract record 1\0"
_RECORD_HEAD = struct.Struct(">64s32sQQB")
_TOMBSTONE, _HAS_SUBKEY = 1, 2
MAX_SUBKEY_BYTES = 128
MAX_RECORD_BYTES = 1040


@dataclass(frozen=True, slots=True)
class SignedRecord:
    """One entry of the DHT, signed by its owner over a domain tag and every field.

    Its identity is (key, subkey, owner): two owners never collide. Of two records with the same identity the one with
    the higher sequence counts. A tombstone is a record that says that its owner withdrew the entry.
    """

    key: bytes
    """32 bytes: where in the DHT it is stored."""
    subkey: str | None
    """The name of an entry of a dictionary; None for a single value."""
    owner: PeerID
    sequence: int
    """Microseconds since 1970, or more."""
    expiration: float
    """Seconds since 1970, to the millisecond."""
    value: bytes
    tombstone: bool
    body: bytes
    """The record on the wire, without its key: signature, public key, sequence, expiration, flags, subkey, value."""

    @classmethod
    def sign(
        cls,
        identity: Identity,
        key: bytes,
        *,
        sequence: int,
        expiration: float,
        value: bytes = b"",
        subkey: str | None = None,
        tombstone: bool = False,
    ) -> SignedRecord:
        """A record by `identity`.

        Raises: ValueError for a subkey over 128 bytes or a record over 1,040 (113 of them are not the caller's).
        """
        name = b"" if subkey is None else subkey.encode()
        if len(name) > MAX_SUBKEY_BYTES:
            raise ValueError(f"a subkey may have {MAX_SUBKEY_BYTES} bytes, not {len(name)}")
        flags = _TOMBSTONE * tombstone | _HAS_SUBKEY * (subkey is not None)
        milliseconds = round(expiration * 1000)
        head = _RECORD_HEAD.pack(b"", identity.public_key, sequence, milliseconds, flags)[64:]
        tail = head + (bytes([len(name)]) + name if subkey is not None else b"") + value
        if len(tail) + 64 > MAX_RECORD_BYTES:
            room = MAX_RECORD_BYTES - (len(tail) + 64 - len(value))
            raise ValueError(f"the value has {len(value)} bytes, but a record has room for {room}: store it in parts")
        body = identity.sign(RECORD_DOMAIN + key + tail) + tail
        owner = identity.peer_id
        return cls(key, subkey, owner, sequence, milliseconds / 1000, value, tombstone, body)

    @classmethod
    def decode(cls, key: bytes, body: bytes, *, verify: Verifier = verify) -> SignedRecord:
        """Read and verifies an untrusted `body` that claims to belong under `key`.

        Raises: InvalidRecord if it is malformed or the signature does not hold.
        """
        record = cls.decode_unverified(key, body)
        record.check(verify=verify)
        return record

    def check(self, *, verify: Verifier = verify) -> None:
        """Checks the signature. Raises: InvalidRecord."""
        if not verify(self.body[64:96], self.body[:64], RECORD_DOMAIN + self.key + self.body[64:]):
            raise InvalidRecord("the signature of a record does not hold")

    @classmethod
    def decode_unverified(cls, key: bytes, body: bytes) -> SignedRecord:
        """Read an untrusted `body` without checking its signature: enough to see whether it is worth checking.

        Raises: InvalidRecord if it is malformed.
        """
        if not _RECORD_HEAD.size <= len(body) <= MAX_RECORD_BYTES or len(key) != 32:
            raise InvalidRecord(f"a record of {len(body)} bytes")
        _, public_key, sequence, milliseconds, flags = _RECORD_HEAD.unpack_from(body)
        start = _RECORD_HEAD.size
        subkey = None
        if flags & ~(_TOMBSTONE | _HAS_SUBKEY) or sequence >= 2**63 or milliseconds >= 2**52:
            raise InvalidRecord("a record with fields out of range")
        if flags & _HAS_SUBKEY:
            if len(body) == start or body[start] > MAX_SUBKEY_BYTES or len(body) < start + 1 + body[start]:
                raise InvalidRecord("a record whose subkey is cut short")
            end = start + 1 + body[start]
            try:
                subkey = body[start + 1 : end].decode()
            except UnicodeDecodeError:
                raise InvalidRecord("a record whose subkey is not UTF-8") from None
            start = end
        owner = PeerID.from_public_key(public_key)
        tombstone = bool(flags & _TOMBSTONE)
        return cls(key, subkey, owner, sequence, milliseconds / 1000, body[start:], tombstone, body)

    def supersedes(self, other: SignedRecord) -> bool:
        """Return whether this record counts instead of `other`, which has the same identity. All nodes agree on
        that."""
        return (self.sequence, self.body) > (other.sequence, other.body)

    @property
    def slot(self) -> int:
        """64 bits that place the entry in its dictionary: a hash of subkey and owner, the same at every holder."""
        name = b"\0" if self.subkey is None else b"\1" + self.subkey.encode()
        return int.from_bytes(hashlib.sha256(self.owner + name).digest()[:8], "big")

    @property
    def digest(self) -> int:
        """64 bits of a hash of the whole record: two holders with equal digests hold the same bytes."""
        return int.from_bytes(hashlib.sha256(self.body).digest()[:8], "big")
