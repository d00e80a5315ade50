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
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

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
from tesseract_async.experts.own_term import MAX_BEHIND, NUM_SUCCESSORS
from tesseract_async.identity import PeerID
from tesseract_async.transport.base import range_of, split_host_port

WAIT_SECONDS: Final = 30.0
"""Rows that wait count as demand as if they had come within this many seconds."""
NEVER: Final = 1e9
MAGIC: Final = b"tsp\1"
_HEAD: Final = struct.Struct(">HIIII")
_PART: Final = struct.Struct(">BIIIfI")


class MemberRole(IntEnum):
    """The part of a member in an expert."""

    HOLDER = 0
    """The member has the file on disk."""
    FOLLOWER = 1
    """The member computes forwards, too."""
    PRIMARY = 2


class MemberPart(NamedTuple):
    """One expert at one member, as that member says."""

    role: MemberRole
    epoch: int = 0
    number: int = 0
    """Epoch and number of the Seal whose file it has; 0: none yet."""
    version: int = 0
    """Steps in that state."""
    rate: float = 0.0
    """Rows computed each second, on average over half a minute."""
    waiting: int = 0
    """Rows that wait."""

    @property
    def has_file(self) -> bool:
        return self.number > 0

    @property
    def age(self) -> tuple[int, int]:
        return self.epoch, self.number

    @property
    def demand(self) -> float:
        return self.rate + self.waiting / WAIT_SECONDS


@dataclass(frozen=True, slots=True)
class Place:
    peer: PeerID
    room: int
    """The most experts that it computes; 0: it only holds."""
    files: int
    """The most experts of which it has a state, those that it computes included."""
    speed: float = 0.0
    """Rows that it can compute each second."""
    ranges: frozenset[str] = frozenset()
    """Its address ranges; empty where addresses tell nothing."""
    moved_ago: float = NEVER
    """Seconds since it last took part in a move."""
    uptime: float = 0.0
    parts: Mapping[str, MemberPart] = field(default_factory=dict)

    @property
    def num_primaries(self) -> int:
        return sum(part.role is MemberRole.PRIMARY for part in self.parts.values())

    @property
    def num_computed(self) -> int:
        return sum(part.role is not MemberRole.HOLDER for part in self.parts.values())

    @property
    def can_be_primary(self) -> bool:
        return self.num_primaries < self.room

    @property
    def pressure(self) -> float:
        demand = sum(part.demand for part in self.parts.values())
        return demand / self.speed if self.speed > 0 else 0.0


class Standing(NamedTuple):
    """The state of an expert in the swarm."""

    primary: PeerID | None
    followers: tuple[PeerID, ...]
    holders: tuple[PeerID, ...]
    version: int
    """Steps in the newest state that more than its primary has; of its primary's, where nobody else has any."""
    losses: int
    """The number of members that may still be lost, one after the other, without losing the expert; -1: it is lost."""

    @property
    def word(self) -> str:
        """``lost``, ``at risk`` (the next loss is its end), ``not led``, or ``safe``."""
        if self.losses < 0:
            return "lost"
        if self.losses == 0:
            return "at risk"
        return "safe" if self.primary is not None else "not led"


class Survey:
    """All places at one moment, by expert."""

    def __init__(self, places: Mapping[PeerID, Place], *, stuck: frozenset[tuple[PeerID, str]] = frozenset()) -> None:
        """`stuck`: members that say they hold an expert, but have not got its file for long."""
        self.places = places
        self.parts: defaultdict[str, dict[PeerID, MemberPart]] = defaultdict(dict)
        for peer, place in places.items():
            for uid, part in place.parts.items():
                if (peer, uid) not in stuck:
                    self.parts[uid][peer] = part
        self.alive = {
            uid
            for uid, parts in self.parts.items()
            if any(one.has_file or one.role is MemberRole.PRIMARY for one in parts.values())
        }
        """Experts of which any member has a state."""
        self.named = set(self.parts)
        """Experts that any member names."""
        self.holders = {peer for peer, place in places.items() if place.room == 0}
        """Members that compute nothing."""
        self.full = {peer for peer, place in places.items() if not place.can_be_primary}
        """Members that lead as much as they have room for, or compute nothing."""

    def shortage(self, num_copies: int) -> str:
        """Return in words why these members cannot keep this many copies besides each primary; empty if they can."""
        num_members, num_experts = len(self.places), len(self.alive)
        if num_members <= num_copies:
            return f"members: {num_members}, too few for {num_copies} copies besides each primary"
        room = sum(min(place.files, num_experts) for place in self.places.values())
        if room >= (wanted := num_experts * (num_copies + 1)):
            return ""
        return f"the members have room for {room} states on disk, and all copies are {wanted}: more of them, or --hold"

    def primary(self, uid: str) -> PeerID | None:
        """Return the member that leads it, by the highest epoch."""
        primaries = [(part.age, peer) for peer, part in self.parts[uid].items() if part.role is MemberRole.PRIMARY]
        return max(primaries)[1] if primaries else None

    def copies(self, uid: str) -> dict[PeerID, MemberPart]:
        """Return the other members that have it, or are about to: not those that fell far behind the primary."""
        primary = self.primary(uid)
        others = {peer: part for peer, part in self.parts[uid].items() if peer != primary}
        if primary is None:
            return others
        newest = self.parts[uid][primary]
        return {
            peer: part
            for peer, part in others.items()
            if not part.has_file  # on its way
            or (part.epoch == newest.epoch and part.number >= newest.number - MAX_BEHIND)
            or (part.epoch < newest.epoch and newest.number <= MAX_BEHIND)
            or part.epoch > newest.epoch
        }

    def unfit(self, uid: str) -> frozenset[PeerID]:
        """Return the members that could not lead it, and so are no good successors: those that only hold; where enough
        others have it, also those that have no room left to compute it."""
        parts = self.parts.get(uid, {})
        computing = {peer for peer, part in parts.items() if part.role is not MemberRole.HOLDER}
        able = [peer for peer in parts if peer in computing or peer not in self.full]
        num_able = sum(parts[peer].has_file and parts[peer].role is not MemberRole.PRIMARY for peer in able)
        return frozenset(self.full - computing if num_able >= NUM_SUCCESSORS else self.holders)

    def standing(self, uid: str) -> Standing:
        """Return who has it, and how safe it is."""
        parts, primary = self.parts[uid], self.primary(uid)
        have = {peer: part for peer, part in self.copies(uid).items() if part.has_file}
        newest = max(have.values(), key=lambda part: part.age, default=None)
        if newest is None and primary is not None:
            newest = parts[primary]
        return Standing(
            primary,
            tuple(sorted(peer for peer, part in parts.items() if part.role is MemberRole.FOLLOWER)),
            tuple(sorted(peer for peer, part in parts.items() if part.role is MemberRole.HOLDER and part.has_file)),
            0 if newest is None else newest.version,
            len(have) + (primary is not None) - 1,
        )


@dataclass(frozen=True, slots=True)
class PlacePart:
    prefix: str
    tag: RunTag
    grant: bytes
    """The member's grant, unread."""
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
