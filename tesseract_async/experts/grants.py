"""Grants, revocations and appointments: the signed records by which a run's owner decides who may do what. No I/O.

`experts.authority` decides whose records count in which run. This module only checks that a record is whole, and that
no signer of a grant gives more than it has.
"""

import base64
import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

import msgpack

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.experts.manifest import RUN_ID_BYTES
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.signed import Format, listed, number, octets, optional, peer, peers
from tesseract_async.identity import Identity, PeerID
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import packed
from tesseract_async.wire.heads import MAX_GRANT_BYTES

Role = Literal["host", "train", "share", "admit"]
"""``host``: hold experts, as primary or follower; ``train``: send gradients; ``share``: take part in the parameters
that trainers share; ``admit``: sign others' grants."""

ROLES: Final[dict[Role, int]] = {"host": 1, "train": 2, "share": 4, "admit": 8}
"""The bits that stand for them."""
GRANT_SECONDS: Final = 90 * 86400
"""Seconds that a grant is good for, unless its signer says otherwise."""
RENEW_SECONDS: Final = 60 * 86400
"""A grant that ends within this many seconds is renewed, so that the owner may be away for as long."""
MAX_PATTERN_BYTES: Final = 64
MAX_RECORD_BYTES: Final = 850
"""Most bytes of a revocation or appointment: as much as fits an entry of the network."""
PEERS_PER_PART: Final = 20
INVITE_PREFIX: Final = "tesseract1-"
"""The beginning of an invite's text; the number is that of its form."""
_INVITE: Final = re.compile(r"tesseract\d+-")
MAX_INVITE: Final = 8192
"""Most letters of an invite."""
MAX_SERIAL: Final = 2**40
"""Serials of grants and revocations are below this, so that no delegate puts a peer beyond the owner's reach."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission for `peer` in a run, signed by `signer`."""

    run_id: bytes
    peer: PeerID
    roles: int
    """Bits of `ROLES`."""
    pattern: ExpertPattern | None
    """The uids for which it holds; None: all of the run."""
    serial: int
    """Seconds since 1970 at which it was signed: of two grants of a peer the later one holds."""
    not_after: int
    """Seconds since 1970. From then on it allows nothing new, but what it has allowed before goes on."""
    via: "Grant | None"
    """The signer's own grant, where the signer is not the run's owner."""
    signer: PeerID
    blob: bytes
    digest: bytes

    def __post_init__(self) -> None:
        if self.roles == 0:
            raise ProtocolError("a grant of no role")
        if (via := self.via) is None:
            return
        if via.via is not None or via.peer != self.signer or not via.roles & ROLES["admit"]:
            raise InvalidRecord("a grant by somebody who may not grant")
        within = via.run_id == self.run_id and self.not_after <= via.not_after and not self.roles & ~via.roles
        if not within or self.roles & ROLES["admit"] or not is_within(self.pattern, via.pattern):
            raise InvalidRecord("a grant of more than its signer may give")

    @property
    def root(self) -> PeerID:
        """The peer on whose authority it rests in the end, to be compared with the run's owner."""
        return self.signer if self.via is None else self.via.signer

    @property
    def role_names(self) -> list[Role]:
        return [role for role, bit in ROLES.items() if self.roles & bit]


def sign_grant(
    identity: Identity,
    run_id: bytes,
    peer: PeerID,
    roles: Collection[Role],
    *,
    serial: int,
    not_after: int,
    pattern: ExpertPattern | None = None,
    via: Grant | None = None,
) -> Grant:
    """A grant; `via` is the signer's own, with the role ``admit``, unless the run is the signer's.

    Raises: ValueError for a grant that nobody would believe.
    """
    bits = sum(ROLES[role] for role in set(roles))
    text, parent = "" if pattern is None else str(pattern), b"" if via is None else via.blob
    return GRANTS.sign(identity, [run_id, peer, bits, text, serial, not_after, parent])


def grant_text(grant: Grant, *, invite: Identity | None = None) -> str:
    """A grant in letters and digits, to hand on. With `invite`, whose grant it is, anybody may use it."""
    return _lettered(b"g" + grant.blob if invite is None else b"i" + invite.seed + grant.blob)


def read_grant_text(text: str, peer_id: PeerID, *, now: float) -> Grant:
    """The grant of `peer_id` that `grant_text` wrote; one made now by an invite's key, where it was an invite.

    Raises: ValueError.
    """
    sentence = "this is neither a grant nor an invite, as `tesseract run grant` prints them"
    if _INVITE.match(text.strip()):
        text = Invite.parse(text).grant
    try:
        blob = _unlettered(text)
        grant = GRANTS.read(blob[33:] if blob[:1] == b"i" else blob[1:])
    except (ValueError, ProtocolError):
        raise ValueError(sentence) from None
    if blob[:1] == b"i":
        invite = Identity.from_seed(blob[1:33])
        roles = [role for role in grant.role_names if role != "admit"]
        serial = min(int(now), grant.not_after)
        return sign_grant(
            *(invite, grant.run_id, peer_id, roles),
            serial=serial,
            not_after=grant.not_after,
            pattern=grant.pattern,
            via=grant,
        )
    if blob[:1] != b"g":
        raise ValueError(sentence)
    if grant.peer != peer_id:
        raise ValueError(f"this grant is for {grant.peer}, but this node is {peer_id}: give the --identity it is for")
    return grant


@dataclass(frozen=True, slots=True)
class Invite:
    """All that a newcomer needs to take part in a run; its text is one string."""

    run: str
    """``NAME@PEER_ID``."""
    seeds: tuple[str, ...]
    """Addresses to join by."""
    grant: str = ""
    """The `grant_text`; empty where everybody may take part."""
    not_after: int | None = None
    """Seconds since 1970 at which the grant ends; None without one."""

    def text(self) -> str:
        """Return it in letters and digits, with a checksum."""
        body = msgpack.packb([self.run, list(self.seeds), _unlettered(self.grant)])
        return f"{INVITE_PREFIX}{_lettered(body + hashlib.sha256(body).digest()[:4])}"

    @classmethod
    def parse(cls, text: str) -> "Invite":
        """Read `text`, whose line breaks do not matter. Untrusted. Raises: ValueError."""
        letters = "".join(text.split())
        if (version := _INVITE.match(letters)) is None or len(letters) > MAX_INVITE:
            raise ValueError(f"this is no invite: one begins with {INVITE_PREFIX}, as `tesseract run create` prints it")
        if version[0] != INVITE_PREFIX:
            raise ValueError("this invite was made by a newer version of Tesseract: upgrade this one")
        try:
            blob = _unlettered(letters[len(INVITE_PREFIX) :])
            body, check = blob[:-4], blob[-4:]
            if hashlib.sha256(body).digest()[:4] != check:
                raise ValueError
            run, seeds, grant = packed.unpack(body, max_bytes=MAX_INVITE)
            if type(run) is not str or type(seeds) is not list or type(grant) is not bytes or not 0 < len(seeds) <= 16:
                raise ValueError
            name, _, owner = run.partition("@")
            PeerID.parse(owner)
            for seed in seeds:
                PeerAddress.parse(seed)
            ends = GRANTS.read(grant[33:] if grant[:1] == b"i" else grant[1:]).not_after if grant else None
        except (ValueError, TypeError, AttributeError, ProtocolError):
            raise ValueError("this invite is damaged: letters are missing or changed; copy all of it") from None
        return cls(run, tuple(seeds), _lettered(grant), ends)


def _lettered(blob: bytes) -> str:
    return base64.urlsafe_b64encode(blob).decode().rstrip("=")


def _unlettered(text: str) -> bytes:
    """Raises: ValueError."""
    letters = "".join(text.split())
    return base64.b64decode(letters + "=" * (-len(letters) % 4), altchars=b"-_", validate=True)


@dataclass(frozen=True, slots=True)
class Revocations:
    """Peers whose grants from before `since` are void, and invites all of whose grants are void."""

    run_id: bytes
    number: int
    """Its number among its signer's revocations."""
    since: int
    """Seconds since 1970: a grant with this serial or a later one lets the peer in again."""
    peers: tuple[PeerID, ...]
    invites: tuple[PeerID, ...]
    signer: PeerID
    blob: bytes
    digest: bytes


def sign_revocations(
    identity: Identity,
    run_id: bytes,
    *,
    number: int,
    since: int,
    peers: Collection[PeerID] = (),
    invites: Collection[PeerID] = (),
) -> list[Revocations]:
    """Return the revocation of these peers and invites, in as many parts as it takes, with numbers from `number` on."""
    named = [(0, peer) for peer in sorted(peers)] + [(1, peer) for peer in sorted(invites)]
    parts: list[Revocations] = []
    for start in range(0, len(named), PEERS_PER_PART):
        some = named[start : start + PEERS_PER_PART]
        lists = [[peer for kind, peer in some if kind == wanted] for wanted in (0, 1)]
        parts.append(REVOCATIONS.sign(identity, [run_id, number + len(parts), since, *lists]))
    return parts


@dataclass(frozen=True, slots=True)
class Appointment:
    """The owner's choice of the primary of some experts, for when lineage alone does not settle it."""

    run_id: bytes
    pattern: ExpertPattern
    serial: int
    """The appointment for a uid with the highest serial holds."""
    peer: PeerID | None
    """The new primary; None: the servers agree on one by themselves, as if nobody had been appointed."""
    root: bytes | None
    """The root of the state to go on from, which that peer keeps; None: the latest that it has."""
    signer: PeerID
    blob: bytes
    digest: bytes


def sign_appointment(
    identity: Identity,
    run_id: bytes,
    pattern: ExpertPattern,
    *,
    serial: int,
    peer: PeerID | None,
    root: bytes | None = None,
) -> Appointment:
    """An appointment. Raises: ValueError for too long a pattern."""
    return APPOINTMENTS.sign(identity, [run_id, str(pattern), serial, peer, root])


def is_within(inner: ExpertPattern | None, outer: ExpertPattern | None) -> bool:
    if outer is None or inner is None:
        return outer is None
    pairs = list(zip(inner.ranges, outer.ranges, strict=False))
    same = inner.prefix == outer.prefix and len(inner.ranges) == len(outer.ranges)
    return same and all(one.start >= all_.start and one.stop <= all_.stop for one, all_ in pairs)


# -- the form of records -----------------------------------------------------------------------------------------------


def _pattern(text: object) -> ExpertPattern:
    if type(text) is not str or len(text.encode()) > MAX_PATTERN_BYTES:
        raise ProtocolError(f"a pattern of uids has at most {MAX_PATTERN_BYTES} bytes")
    try:
        pattern = ExpertPattern.parse(text)
    except ValueError:
        raise ProtocolError("a malformed pattern of uids") from None
    if str(pattern) != text:
        raise ProtocolError("a pattern of uids that is not written as usual")
    return pattern


def _via(blob: object) -> Grant | None:
    if type(blob) is not bytes:
        raise ProtocolError("a malformed grant")
    return GRANTS.read(blob) if blob else None


_RUN_ID: Final = octets(RUN_ID_BYTES)
_ROLES = number(below=16)
_TIME = number(below=MAX_SERIAL)
_GRANT_FIELDS = (_RUN_ID, peer, _ROLES, lambda text: None if text == "" else _pattern(text), _TIME, _TIME, _via)
_REVOCATIONS_FIELDS = (_RUN_ID, number(), number(below=MAX_SERIAL + 1), peers, peers)  # so any grant may be revoked
_APPOINTMENT_FIELDS = (_RUN_ID, _pattern, number(), optional(peer), optional(octets(32)))

GRANTS: Final = Format(b"tesseract grant 1\0", listed(_GRANT_FIELDS, Grant), max_bytes=MAX_GRANT_BYTES, remembered=4096)
"""Grants, each with the one that its signer shows along. Whose run it is remains to be seen (`Grant.root`)."""
REVOCATIONS: Final = Format(
    b"tesseract revocations 1\0",
    listed(_REVOCATIONS_FIELDS, Revocations),
    max_bytes=MAX_RECORD_BYTES,
    remembered=4096,
)
APPOINTMENTS: Final = Format(
    b"tesseract appointment 1\0",
    listed(_APPOINTMENT_FIELDS, Appointment),
    max_bytes=MAX_RECORD_BYTES,
    remembered=1024,
)
