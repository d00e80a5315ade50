"""Makes negotiations of WebRTC data channels, and decides which of a peer's addresses they try."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from tesseract_async.nat.offers import Candidate, Description
from tesseract_async.network.address_scope import PUBLIC, kind_of
from tesseract_async.transport.base import range_of

if TYPE_CHECKING:
    from tesseract_async.nat.webrtc.pipe import Negotiation

MAX_TRIED: Final = 4
"""Candidates of a peer to which a data channel's checks are sent."""


@dataclass(kw_only=True, slots=True)
class HolePuncher:
    """Imports what it needs only when a hole is to be punched, or by `load`: most nodes never do."""

    own_hosts: Callable[[], Sequence[str]]
    """Returns the addresses of this computer."""
    stun_server: Callable[[], Awaitable[tuple[str, int] | None]]
    """Returns an IPv4 server that is known to answer."""
    enabled: bool = True
    """True if this node makes data channels at all."""

    async def load(self) -> None:
        """Import aiortc without holding up the loop. Raises: ConnectionLost where that is not possible."""
        from tesseract_async.nat.webrtc import pipe

        await pipe.load()

    async def negotiation(self, *, controlling: bool) -> Negotiation:
        """Begin an attempt at a data channel. `controlling`: this side makes the offer. Raises: ConnectionLost."""
        from tesseract_async.nat.webrtc import pipe

        await pipe.load()
        return pipe.Negotiation(
            controlling=controlling,
            addresses=self.own_hosts(),
            stun_server=await self.stun_server(),
        )


def plausible(
    remote: Description, own: Description, *, origin: str | None, allows: Callable[[str], bool]
) -> Description:
    """Keep of a peer's description the candidates that this node sends to: they may name anybody's hosts.

    With `origin`, the host that the peer speaks from: candidates there, and where this node itself is seen there too
    (both are behind one NAT), those in its private network. Without: one public host of each version of IP, and the
    same. At most `MAX_TRIED` in all.
    """
    seen = {one.host for one in own.candidates if one.kind == "srflx"}
    public: dict[bool, str | None] = {}
    kept: list[Candidate] = []
    for one in sorted(remote.candidates, key=lambda one: (one.kind == "host", -one.priority)):
        where = range_of(one.host)
        if kind_of(one.host) != PUBLIC and one.host != origin:
            good = origin in seen if origin is not None else (not public or any(host.host in seen for host in kept))
        elif origin is not None:
            good = one.host == origin or (":" in one.host and where == range_of(origin))
        else:
            good = public.setdefault(":" in one.host, where) == where
        if good and allows(one.host) and len(kept) < MAX_TRIED:
            kept.append(one)
    return replace(remote, candidates=tuple(kept))
