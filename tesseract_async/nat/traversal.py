"""Ways to a peer behind a NAT: it dials this node (reverse), a hole is punched, or both meet at a relay.

All three need a node that can reach the peer, its *rendezvous*: it carries a signed offer there and brings the answer
back (`answering`). Whichever way the bytes take, the side that wants the call opens TLS, and the ordinary handshake
decides who is at the other end. So nothing here needs to be trusted: at worst there is no connection. `PathUpgrader`
looks for better paths to peers that are reached through a relay or a punched hole.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.errors import NotAllowed, PeerUnreachable, TesseractError
from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU
from tesseract_async.nat import offers
from tesseract_async.nat.hole_punching import HolePuncher, plausible
from tesseract_async.nat.offer_answerer import offer_tasks
from tesseract_async.nat.offers import Description, OfferAnswer
from tesseract_async.nat.relay import meet_at_relay
from tesseract_async.nat.rendezvous import RendezvousClient
from tesseract_async.nat.role import RoleMachine
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.tasks import in_time
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe

logger = logging.getLogger(__name__)

DIRECT_HEAD_START: Final = 0.5
"""Seconds for a peer's direct addresses, where it has some."""
HEAD_START: Final = 1.5
"""Seconds that a way gets before the next one is tried: a hole before a relay."""
HEAD_START_SYMMETRIC: Final = 0.25
"""The head start if this node's own NAT makes punching unlikely."""
OFFER_TIMEOUT: Final = 5.0
"""Seconds for an offer's way to the peer and the answer's way back; also for a reverse dial, offer included."""
MAX_REMEMBERED: Final = 4096
"""Peers whose best path is remembered."""
IMPROVABLE: Final = ("relay", "datachannel")
"""Kinds of path for which a better one may appear."""
UPGRADE_AFTER: Final = (5.0, 30.0, 300.0)
"""Seconds after which a relayed connection looks for a better path; the last one repeats."""


class NatTransport:
    """See `base.Transport` and the module."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        signalling: RendezvousClient,
        role: RoleMachine,
        puncher: HolePuncher,
        direct_paths: Callable[[PeerAddress], Sequence[DialPath]],
        scope: AddressScope,
        head_start: float = HEAD_START,
        offer_timeout: float = OFFER_TIMEOUT,
    ) -> None:
        """`direct_paths`: the ways that need no third node. `scope`: where this node may send on a stranger's word."""
        self._identity = endpoint.identity
        self._signalling = signalling
        self._role = role
        self._puncher = puncher
        self._direct_paths = direct_paths
        self._metrics = endpoint.metrics
        self._scope = scope
        self._head_start = head_start
        self._offer_timeout = offer_timeout
        self._expected: dict[bytes, asyncio.Future[Pipe]] = {}
        self._best: LRU[PeerID, str] = LRU(MAX_REMEMBERED)
        self.upgrader = PathUpgrader(endpoint, better_paths=self._better_paths)

    async def listen(self, accept: Callable[[Pipe], None]) -> None:
        pass  # what others ask for comes to `answering`

    def paths(self, peer: PeerAddress) -> Sequence[DialPath]:
        peer_id = peer.peer_id
        if peer_id is None or not peer.rendezvous or peer_id == self._identity.peer_id:
            return []
        role, best = self._role, self._best.get(peer_id)
        paths: list[DialPath] = []
        start = DIRECT_HEAD_START if peer.addresses else 0.0
        if role.public_addresses:
            paths.append(self._reverse(peer, peer_id, start))
            start += self._head_start
        if self._puncher.enabled and best != "relay" and (role.behind_nat or not role.public_addresses):
            paths.append(self._data_channel(peer, peer_id, start))
            unlikely = best != "datachannel" and role.symmetric
            start += HEAD_START_SYMMETRIC if unlikely else self._head_start
        paths.append(DialPath("relay", start, lambda: self._open_relay(peer, peer_id)))
        return paths

    def path_finished(self, peer: PeerAddress, path: DialPath, error: BaseException | None) -> None:
        peer_id, kind = peer.peer_id, path.name.partition(" ")[0]
        if peer_id is None:
            return
        if error is None:
            self._best[peer_id] = kind
            if kind in IMPROVABLE:
                self.upgrader.watch(peer, peer_id)
        elif self._best.get(peer_id) == kind:
            del self._best[peer_id]

    def peer_known(self, peer: PeerAddress) -> None:
        self.upgrader.peer_known(peer)

    async def aclose(self) -> None:
        await self.upgrader.tasks.aclose()

    def _reverse(self, peer: PeerAddress, peer_id: PeerID, delay: float) -> DialPath:
        return DialPath("reverse", delay, lambda: self._open_reverse(peer, peer_id))

    def _data_channel(self, peer: PeerAddress, peer_id: PeerID, delay: float) -> DialPath:
        return DialPath("datachannel", delay, lambda: self._open_channel(peer, peer_id))

    def _better_paths(self, peer: PeerAddress, peer_id: PeerID, kind: str) -> list[DialPath]:
        paths = list(self._direct_paths(peer))
        if peer.rendezvous and self._role.public_addresses:
            paths.append(self._reverse(peer, peer_id, 0.0))
        if kind == "relay" and peer.rendezvous and self._puncher.enabled:
            paths.append(self._data_channel(peer, peer_id, self._head_start if paths else 0.0))
        return paths

    async def _open_reverse(self, peer: PeerAddress, peer_id: PeerID) -> Pipe:
        token = os.urandom(offers.TOKEN_BYTES)
        arrived: asyncio.Future[Pipe] = asyncio.get_running_loop().create_future()
        self._expected[token] = arrived
        try:
            async with asyncio.timeout(self._offer_timeout):
                addresses = self._role.public_addresses[: offers.MAX_ADDRESSES]
                await self._offer(peer, peer_id, offers.REVERSE, {"addresses": addresses, "token": token})
                pipe = await arrived
        except BaseException:  # cancelled, too: the pipe has no owner
            if arrived.done() and not arrived.cancelled():
                arrived.result().abort()
            raise
        finally:
            del self._expected[token]
        pipe.description = f"reverse {pipe.description.partition(' ')[2]}"
        return pipe

    def pipe_arrived(self, token: bytes, pipe: Pipe) -> None:
        arrived = self._expected.get(token)
        if arrived is None or arrived.done():
            self._metrics.count("nat_refused", reason="unknown_token")
            pipe.abort()
        else:
            arrived.set_result(pipe)

    async def _open_channel(self, peer: PeerAddress, peer_id: PeerID) -> Pipe:
        negotiation = await self._puncher.negotiation(controlling=True)
        try:
            own = await negotiation.gather()
            answer = await self._offer(peer, peer_id, offers.CHANNEL, own.pack())
            remote = plausible(Description.unpack(answer.body), own, origin=None, allows=self._scope.allows)
            return await negotiation.connect(remote)
        except BaseException:  # cancelled, too: sockets are closed
            await negotiation.aclose()
            raise

    async def _open_relay(self, peer: PeerAddress, peer_id: PeerID) -> Pipe:
        errors: dict[str, BaseException] = {}
        for text in peer.rendezvous:
            via = PeerAddress.parse(text)
            if via.peer_id is None or via.peer_id == self._identity.peer_id:
                continue
            try:
                mine, theirs = await self._signalling.reserve_relay(via, timeout=self._offer_timeout)
                pipe = await meet_at_relay(via, mine, scope=self._scope)
                try:
                    body = {"relay": bytes(via.peer_id), "token": theirs}
                    await self._offer(peer, peer_id, offers.RELAY, body, via=[via])
                except BaseException:  # cancelled, too: the pipe has no owner
                    pipe.abort()
                    raise
                return pipe
            except (TesseractError, OSError) as error:
                errors[f"relay {via.short}"] = error
        raise PeerUnreachable(peer.short, errors)

    async def _offer(
        self, peer: PeerAddress, peer_id: PeerID, kind: str, body: Mapping[str, object], via: Sequence[PeerAddress] = ()
    ) -> OfferAnswer:
        """Return the peer's answer, over the first rendezvous that reaches it. Raises: PeerUnreachable, NotAllowed."""
        nonce = os.urandom(16)
        data = offers.encode_offer(self._identity, peer_id, kind=kind, body=body, nonce=nonce, now=time.time())
        errors: dict[str, BaseException] = {}
        for carrier in via or map(PeerAddress.parse, peer.rendezvous):
            try:
                reply = await self._signalling.send_offer(carrier, peer_id, data, timeout=self._offer_timeout)
                answer = offers.decode_answer(reply, data, sender=peer_id, recipient=self._identity.peer_id)
            except (TesseractError, OSError) as error:
                errors[f"offer through {carrier.short}"] = error
                continue
            if not answer.accepted:
                raise NotAllowed(f"{peer_id.short} declined: {answer.reason}")
            return answer
        raise PeerUnreachable(peer.short, errors)


@dataclass(slots=True)
class _Watched:
    """A peer to which there may be a better path than the one in use."""

    peer: PeerAddress
    again: asyncio.Event = field(default_factory=asyncio.Event)


class PathUpgrader:
    """Looks for better paths: to relayed peers now and then, and to all when their addresses or this node's place have
    changed. `better_paths` returns what is better for a peer than a path of the given kind, and possible."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        better_paths: Callable[[PeerAddress, PeerID, str], Sequence[DialPath]],
        upgrade_after: Sequence[float] = UPGRADE_AFTER,
    ) -> None:
        self._endpoint = endpoint
        self._better_paths = better_paths
        self._upgrade_after = upgrade_after
        self._watched: dict[PeerID, _Watched] = {}
        self.tasks = offer_tasks(endpoint.metrics)

    def watch(self, peer: PeerAddress, peer_id: PeerID) -> None:
        if peer_id not in self._watched:
            one = self._watched[peer_id] = _Watched(peer)
            self.tasks.spawn(self._improve(one, peer_id))

    def peer_known(self, peer: PeerAddress) -> None:
        one = self._watched.get(peer.peer_id) if peer.peer_id is not None else None
        if one is not None and peer != one.peer:
            is_news = bool(set(peer.addresses) - set(one.peer.addresses))
            one.peer = peer
            if is_news:
                one.again.set()

    def place_changed(self) -> None:
        for one in self._watched.values():
            one.again.set()

    async def _improve(self, one: _Watched, peer_id: PeerID) -> None:
        attempt = 0
        try:
            while True:
                after = self._upgrade_after[min(attempt, len(self._upgrade_after) - 1)]
                was_told = await in_time(one.again.wait(), after)
                one.again.clear()
                attempt += 1
                kind = self._endpoint.path_kind(peer_id)
                if kind not in IMPROVABLE:
                    return
                paths = self._better_paths(one.peer, peer_id, kind) if was_told or kind == "relay" else []
                if not paths:
                    continue
                try:
                    await self._endpoint.upgrade(one.peer, paths)
                except PeerUnreachable as error:
                    logger.debug("no better path to %s: %s", peer_id.short, error)
                else:
                    now = self._endpoint.path_kind(peer_id)
                    logger.info("%s is reached by %s now, no longer by %s", peer_id.short, now, kind)
                    self._endpoint.metrics.count("nat_paths_improved", path=now)
        finally:
            del self._watched[peer_id]
