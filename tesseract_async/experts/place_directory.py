"""The places of a run's members, read from the network."""

import asyncio
from typing import Final

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.lineage import SKEW
from tesseract_async.experts.manifest import addresses_within
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.places import MemberPart, MemberRole, Place, decode_place, places_key, ranges_of
from tesseract_async.experts.trust import Trust
from tesseract_async.identity import PeerID
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.transport.base import PeerAddress

MAX_PARTS: Final = 64
"""The most parts of one member's place that are read."""
MAX_MEMBERS: Final = 16384
"""The most members whose places are read. Strangers can fill an open run; a granted one is as large as its owner makes
it."""

Places = dict[PeerID, Place]


async def fetch_places(
    network: TesseractNetwork,
    trust: Trust,
    authority: Authority,
    scope: AddressScope,
    *,
    pattern: ExpertPattern | None = None,
) -> tuple[Places, dict[PeerID, PeerAddress]]:
    """Return the places of all members of a run but this one, and their addresses. Untrusted: what does not fit is left
    out, and the loop is let run in between. `pattern`: of what they host, by default the run's experts.

    Raises: what the network raises.
    """
    pattern = authority.run.manifest.pattern if pattern is None else pattern
    entries = await network.get_entries(places_key(pattern.prefix, authority.tag))
    now = trust.clock()
    places: Places = {}
    addresses: dict[PeerID, PeerAddress] = {}
    num_parts: dict[PeerID, int] = {}
    latest = authority.epoch(now) + SKEW
    for number, entry in enumerate(sorted(entries, key=lambda entry: entry.expiration)):  # what is newest counts
        owner = entry.owner
        if number % 16 == 15:
            await asyncio.sleep(0)
        if owner == network.peer_id or (owner not in places and len(places) >= MAX_MEMBERS):
            continue
        if entry.expiration <= now or num_parts.get(owner, 0) >= MAX_PARTS or not trust.may_be_read(owner):
            continue
        try:
            part = decode_place(entry.value)
            if (part.prefix, part.tag) != (pattern.prefix, authority.tag):
                continue
            if part.grant:
                authority.learn_grant(part.grant, owner)
            if not authority.may(owner, "host", now=None):
                continue
            direct, passing = addresses_within(scope, part.addresses, part.rendezvous)
        except ProtocolError:
            continue
        num_parts[owner] = num_parts.get(owner, 0) + 1
        known = places[owner].parts if owner in places else {}
        # from the future: of a liar, or by a clock that was wrong; that ranks last, but nobody begins the expert anew
        mine = {
            uid: one if one.epoch <= latest else MemberPart(MemberRole.HOLDER, 0, min(1, one.number))
            for uid, one in part.parts.items()
            if uid in pattern and authority.may(owner, "host", uid, now=None)
        }
        room, files, speed, moved_ago, uptime = part.numbers
        addresses[owner] = PeerAddress(owner, direct, passing)
        places[owner] = Place(
            owner, room, files, float(speed), ranges_of(direct), float(moved_ago), float(uptime), {**known, **mine}
        )
    return places, addresses
