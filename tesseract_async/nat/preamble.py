"""The first bytes of a TCP connection that is not dialed in the ordinary way (`docs/design/nat.md`). No I/O."""

from typing import Final

from tesseract_async.errors import ProtocolError, UnsupportedVersion

MAGIC: Final = b"TSRP"
VERSION: Final = 1
LENGTH: Final = 24

REVERSE: Final = 1
"""You asked me to dial you: the token is yours, and you open TLS."""
RELAY: Final = 2
"""Join me with the holder of the other token of this pair."""
PROBE: Final = 3
"""You asked whether you can be reached: you can. Nothing follows."""
KINDS: Final = (REVERSE, RELAY, PROBE)


def encode_preamble(kind: int, token: bytes) -> bytes:
    """Return the preamble of this kind. `token`: 16 bytes."""
    assert kind in KINDS and len(token) == 16
    return MAGIC + bytes((VERSION, kind, 0, 0)) + token


def decode_preamble(data: bytes) -> tuple[int, bytes]:
    """Return kind and token of `LENGTH` bytes. Untrusted. Raises: ProtocolError, UnsupportedVersion."""
    if len(data) != LENGTH or data[:4] != MAGIC:
        raise ProtocolError("a malformed preamble")
    if data[4] != VERSION:
        raise UnsupportedVersion(data[4], VERSION)
    if data[5] not in KINDS or data[6:8] != b"\0\0":
        raise ProtocolError("a malformed preamble")
    return data[5], data[8:]
