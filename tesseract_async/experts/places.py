"""Places: how a member of a run says, in bytes, what it has room for and what it leads, follows and holds. No I/O.

Every member with a role in the run's experts publishes one under `places_key`, in numbered parts of which each is
complete in itself, and reads those of the others (`experts.placement`). Like manifests they show their writer's grant,
so that holders refuse those of strangers.

Layout, integers big-endian::

    4 bytes   ``tsp`` and the format (1)
    1 byte    length of the prefix, then as many of UTF-8
    tag, addresses and rendezvous nodes, as in a manifest (`experts.manifest`)
    2 bytes   experts that it computes at most; 4 bytes: those of which it has a state at most
    4 bytes   rows that it computes each second, at most
    4 bytes   seconds since it last took part in a move; 4 bytes: since it came
    1 byte    number of dimensions, 1 byte: number of experts in this part, then each:
                4 bytes per coordinate
                1 byte   role: 0 holds, 1 follows, 2 leads
                3 x 4 bytes   epoch and number of the Seal whose file it has, and the steps in that
                2 x 4 bytes   rows each second (float), and rows that wait
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.manifest import (
    MAX_DIMS,
    MAX_PART_BYTES,
    Reader,
    RunTag,
    decode_addresses,
    decode_tag,
    encode_addresses,
    encode_tag,
    is_prefix,
    join_uid,
    split_uid,
)
from tesseract_async.experts.placement import MemberPart, MemberRole, Place
from tesseract_async.transport.base import range_of, split_host_port

MAGIC: Final = b"tsp\1"
_HEAD: Final = struct.Struct(">HIIII")
_PART: Final = struct.Struct(">BIIIfI")


@dataclass(frozen=True, slots=True)
class PlacePart:
    prefix: str
    tag: RunTag
    grant: bytes
    """The member's, unread."""
    addresses: tuple[str, ...]
    rendezvous: tuple[str, ...]
    numbers: tuple[int, int, int, int, int]
    """Room, files, speed, and seconds since the last move and since it came."""
    parts: Mapping[str, MemberPart]

    def keys(self) -> Iterator[str]:
        """The key under which it may stand."""
        yield places_key(self.prefix, self.tag)


def places_key(prefix: str, tag: RunTag) -> str:
    return f"run-places/{tag.run_id(prefix).hex()}"


def encode_place(
    place: Place,
    *,
    prefix: str,
    tag: RunTag,
    grant: bytes,
    addresses: Sequence[str],
    rendezvous: Sequence[str] = (),
) -> list[bytes]:
    """The parts that say what this member has. Raises: ValueError for a malformed address, or none at all."""
    numbers = (place.room, place.files, place.speed, place.moved_ago, place.uptime)
    limits = (2**16 - 1, *(2**32 - 1,) * 4)
    name = prefix.encode()
    head = MAGIC + bytes([len(name)]) + name + encode_tag(tag, grant) + encode_addresses(addresses, rendezvous)
    head += _HEAD.pack(*(min(int(number), most) for number, most in zip(numbers, limits, strict=True)))
    items = sorted((split_uid(uid)[1], part) for uid, part in place.parts.items())
    num_dims = len(items[0][0]) if items else 1
    per_part = min(255, (MAX_PART_BYTES - len(head) - 2) // (4 * num_dims + _PART.size))
    if per_part < 1:
        raise ValueError("the addresses leave no room for experts")
    found = []
    for start in range(0, max(1, len(items)), per_part):
        some = items[start : start + per_part]
        body = b"".join(struct.pack(f">{num_dims}I", *coords) + _pack(part) for coords, part in some)
        found.append(head + bytes([num_dims, len(some)]) + body)
    return found


def _pack(part: MemberPart) -> bytes:
    # its primary's numbers, who may sign for any
    epoch, number, version = (min(number, 2**32 - 1) for number in (part.epoch, part.number, part.version))
    return _PART.pack(part.role, epoch, number, version, min(part.rate, 2.0**31), min(part.waiting, 2**32 - 1))


def decode_place(value: object) -> PlacePart:
    """Read one part. Untrusted. Raises: ProtocolError."""
    if type(value) is not bytes or len(value) > MAX_PART_BYTES or not value.startswith(MAGIC):
        raise ProtocolError("not a member's place")
    try:
        reader = Reader(value, len(MAGIC))
        prefix = reader.short().decode()
        tag, grant = decode_tag(reader)
        addresses, rendezvous = decode_addresses(reader)
        numbers = _HEAD.unpack(reader.take(_HEAD.size))
        num_dims, num_parts = reader.number(), reader.number()
        if tag is None or not is_prefix(prefix) or not 0 < num_dims <= MAX_DIMS:
            raise ProtocolError("a malformed place")
        parts: dict[str, MemberPart] = {}
        for _ in range(num_parts):
            coords = struct.unpack(f">{num_dims}I", reader.take(4 * num_dims))
            role, epoch, number, version, rate, waiting = _PART.unpack(reader.take(_PART.size))
            if not 0 <= rate < 2**32:  # nor what is no number
                raise ProtocolError("a malformed rate")
            parts[join_uid(prefix, coords)] = MemberPart(MemberRole(role), epoch, number, version, rate, waiting)
    except (IndexError, UnicodeDecodeError, ValueError):
        raise ProtocolError("a malformed place") from None
    if not reader.is_at_end() or len(parts) != num_parts:
        raise ProtocolError("a place of the wrong length, or with an expert twice")
    return PlacePart(prefix, tag, grant, addresses, rendezvous, numbers, parts)


def ranges_of(addresses: Iterable[str]) -> frozenset[str]:
    """Return the ranges of a member's own addresses, ``host:port``."""
    found = (range_of(split_host_port(address)[0]) for address in addresses)
    return frozenset(one for one in found if one is not None)
