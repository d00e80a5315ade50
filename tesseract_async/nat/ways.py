"""The ways to a peer behind a NAT: ask it to dial us, punch a hole, or meet it at a relay.

All three need a node that can reach the peer, its *rendezvous*: `Signalling` carries a signed offer there and brings
the answer back. Whichever way the bytes take, whoever wants the call opens TLS, and the ordinary handshake decides who
is at the other end. So nothing here needs to be trusted: at worst there is no connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from tesseract_async.errors import (
    ConnectionLost,
    NotAllowed,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    TesseractError,
    describe,
)
from tesseract_async.identity import Identity, PeerID
from tesseract_async.lru import LRU
from tesseract_async.metrics import Metrics
from tesseract_async.nat import offers, preamble
from tesseract_async.nat.offers import (
    Answer,
    Candidate,
    Description,
    GuardSettings,
    Offer,
    OfferGuard,
    RelayBody,
    ReverseBody,
)
from tesseract_async.transport import tcp
from tesseract_async.transport.address_scope import PUBLIC, AddressScope, kind_of
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe, range_of, split_host_port
from tesseract_async.transport.throttle import Throttle

if TYPE_CHECKING:
    from tesseract_async.nat.webrtc.pipe import WebrtcSettings

logger = logging.getLogger(__name__)

LATER_IMPROVED: Final = ("relay", "datachannel")
"""Kinds of path for which a better one may appear."""
MAX_REMEMBERED: Final = 4096
"""Peers whose best path is remembered."""
MAX_TRIED: Final = 4
"""Candidates of a peer to which a data channel's checks are sent."""


class Signalling(Protocol):
    """How offers travel. All of it may raise any TesseractError, OSError or TimeoutError."""

    async def send_offer(self, via: PeerAddress, recipient: PeerID, offer: bytes, *, timeout: float) -> bytes:
        """Sends an encoded offer through the node `via`; the encoded answer."""

    async def reserve_relay(self, via: PeerAddress, *, timeout: float) -> tuple[bytes, bytes]:
        """Has the node `via` keep a splice ready; the token for this node and the one for its peer."""


@dataclass(frozen=True, slots=True)
class NatSettings:
    """How peers behind NATs are reached."""

    offer_timeout: float = 5.0
    """Seconds for an offer's way to the peer and the answer's way back."""
    reverse_timeout: float = 5.0
    """Seconds in which a peer that was asked to dial us must have done so."""
    relay_head_start: float = 1.5
    """Seconds that hole punching gets before a relay is asked, too ..."""
    relay_head_start_symmetric: float = 0.25
    """... if this node's own NAT makes punching unlikely."""
    improve_after: tuple[float, ...] = (5.0, 30.0, 300.0)
    """Seconds after which a relayed connection looks for a better way; the last one repeats. It does so at once when
    this node's place in the network or the peer's addresses have changed, and so do data channels."""
    max_negotiations: int = 16
    """Data channels that may be under negotiation at the wish of others."""
    guard: GuardSettings = field(default_factory=GuardSettings)
    webrtc: WebrtcSettings | None = None
    """None: the defaults."""


class Surroundings(Protocol):
    """What the node knows about its own place in the network, at the moment."""

    @property
    def public_addresses(self) -> tuple[str, ...]:
        """Where others can dial this node, if they can."""

    @property
    def behind_nat(self) -> bool:
        """Whether there are peers that cannot dial this node: all, or those without IPv6."""

    @property
    def rendezvous(self) -> tuple[PeerAddress, ...]:
        """The nodes through which others can send offers to this one."""

    @property
    def symmetric(self) -> bool:
        """Whether this node's NAT takes another port for each destination."""

    @property
    def can_punch(self) -> bool:
        """Whether data channels make sense here: not on a node that lives on loopback only."""

    async def stun_server(self) -> tuple[str, int] | None:
        """An IPv4 STUN server that answered within a minute."""

    def channel_addresses(self) -> list[str]:
        """This computer's own addresses, for data channels."""


class _Improvement:
    """What is known about a peer to which there may be a better way than the one in use."""

    __slots__ = ("peer", "again")

    def __init__(self, peer: PeerAddress) -> None:
        self.peer = peer
        self.again = asyncio.Event()


class NatTransport:
    """See `base.Transport` and the module. `start` must be called before paths are opened."""

    def __init__(
        self,
        *,
        identity: Identity,
        signalling: Signalling,
        surroundings: Surroundings,
        metrics: Metrics,
        settings: NatSettings | None = None,
        throttle: Throttle | None = None,
        scope: AddressScope | None = None,
    ) -> None:
        """`scope`: where this node may send on a stranger's word; None: anywhere."""
        self._identity = identity
        self._scope = scope
        self._signalling = signalling
        self._surroundings = surroundings
        self._metrics = metrics
        self._throttle = throttle
        self._settings = settings = settings if settings is not None else NatSettings()
        self._guard = OfferGuard(settings.guard)
        self._accept: Callable[[Pipe], None] | None = None
        self._expected: dict[bytes, asyncio.Future[Pipe]] = {}
        self._num_negotiations = 0
        self._best: LRU[PeerID, str] = LRU(MAX_REMEMBERED)
        self._improving: dict[PeerID, _Improvement] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.upgrade: Callable[[PeerAddress, Sequence[DialPath]], Awaitable[None]] | None = None
        """Set by the node: opens a better connection for later calls."""
        self.path_kind: Callable[[PeerID], str] = lambda peer_id: ""
        """Set by the node: the kind of path that calls to this peer take now, empty where there is none."""
        self.direct_paths: Callable[[PeerAddress], Sequence[DialPath]] = lambda peer: ()
        """Set by the node: the ways that need nobody's help."""

    # ---- base.Transport

    async def listen(self, accept: Callable[[Pipe], None]) -> None:
        self._accept = accept

    def paths(self, peer: PeerAddress, *, bulk: bool) -> Sequence[DialPath]:
        peer_id = peer.peer_id
        if peer_id is None or not peer.rendezvous or peer_id == self._identity.peer_id:
            return []
        here, settings = self._surroundings, self._settings
        best = self._best.get(peer_id)
        paths: list[DialPath] = []
        start = 0.5 if peer.addresses else 0.0  # the peer may be reachable directly: let that win
        if here.public_addresses:
            paths.append(DialPath("reverse", start, lambda: self._open_reverse(peer, peer_id)))
            start += settings.relay_head_start
        if here.can_punch and best != "relay" and (here.behind_nat or not here.public_addresses):
            paths.append(DialPath("datachannel", start, lambda: self._open_channel(peer, peer_id)))
            if best != "datachannel" and here.symmetric:
                start += settings.relay_head_start_symmetric
            else:
                start += settings.relay_head_start
        paths.append(DialPath("relay", start, lambda: self._open_relay(peer, peer_id)))
        return paths

    def path_finished(self, peer: PeerAddress, path: DialPath, error: BaseException | None, seconds: float) -> None:
        peer_id = peer.peer_id
        kind = path.name.partition(" ")[0]
        if peer_id is None:
            return
        if error is None:
            self._best[peer_id] = kind
            if kind in LATER_IMPROVED:
                self._start_improving(peer, peer_id)
        elif self._best.get(peer_id) == kind:
            del self._best[peer_id]

    async def aclose(self) -> None:
        self._accept = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # ---- opening

    async def _open_reverse(self, peer: PeerAddress, peer_id: PeerID) -> Pipe:
        """Asks the peer to dial us. What arrives with our token is the pipe on which we open TLS."""
        token = os.urandom(offers.TOKEN_BYTES)
        arrived: asyncio.Future[Pipe] = asyncio.get_running_loop().create_future()
        self._expected[token] = arrived
        try:
            async with asyncio.timeout(self._settings.reverse_timeout):
                body = ReverseBody(self._surroundings.public_addresses[: offers.MAX_ADDRESSES], token)
                await self._offer(peer, peer_id, offers.REVERSE, body.pack())
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
        """A connection came in that begins with the preamble of a reverse dial."""
        arrived = self._expected.get(token)
        if arrived is None or arrived.done():
            self._metrics.count("nat_refused", reason="unknown_token")
            pipe.abort()
        else:
            arrived.set_result(pipe)

    async def _open_channel(self, peer: PeerAddress, peer_id: PeerID) -> Pipe:
        negotiation = await self._negotiation(controlling=True)
        try:
            own = await negotiation.gather()
            answer = await self._offer(peer, peer_id, offers.CHANNEL, own.pack())
            remote = plausible(Description.unpack(answer.body), own, origin=None, allows=self._allows)
            pipe: Pipe = await negotiation.connect(remote)
            return pipe
        except BaseException:  # cancelled, too: sockets are closed
            await negotiation.aclose()
            raise

    async def _open_relay(self, peer: PeerAddress, peer_id: PeerID) -> Pipe:
        """Meets the peer at one of its rendezvous nodes."""
        errors: dict[str, BaseException] = {}
        timeout = self._settings.offer_timeout
        for text in peer.rendezvous:
            via = PeerAddress.parse(text)
            if via.peer_id is None or via.peer_id == self._identity.peer_id:
                continue
            try:
                mine, theirs = await self._signalling.reserve_relay(via, timeout=timeout)
                pipe = await self._meet(via, mine)
                try:
                    body = RelayBody(via.peer_id, theirs)
                    await self._offer(peer, peer_id, offers.RELAY, body.pack(), via=[via])
                except BaseException:  # cancelled, too: the pipe has no owner
                    pipe.abort()
                    raise
                return pipe
            except (TesseractError, OSError) as error:
                errors[f"relay {via.short}"] = error
        raise PeerUnreachable(peer.short, errors)

    async def _meet(self, relay: PeerAddress, token: bytes) -> Pipe:
        for address in relay.addresses:
            if not self._allows(split_host_port(address)[0]):
                raise PeerUnreachable(relay.short, {})
            try:
                pipe = await tcp.connect(address, throttle=self._throttle)
                break
            except OSError:
                if address == relay.addresses[-1]:
                    raise
        pipe.write(preamble.encode_preamble(preamble.RELAY, token))
        pipe.description = f"relay {address}"
        return pipe

    async def _offer(
        self, peer: PeerAddress, peer_id: PeerID, kind: str, body: dict[str, Any], via: Sequence[PeerAddress] = ()
    ) -> Answer:
        """The peer's answer, over the first rendezvous that reaches it. Raises: PeerUnreachable."""
        nonce = os.urandom(16)
        data = offers.encode_offer(self._identity, peer_id, kind=kind, body=body, nonce=nonce, now=time.time())
        errors: dict[str, BaseException] = {}
        for carrier in via or map(PeerAddress.parse, peer.rendezvous):
            try:
                reply = await self._signalling.send_offer(carrier, peer_id, data, timeout=self._settings.offer_timeout)
                answer = offers.decode_answer(reply, data, sender=peer_id, recipient=self._identity.peer_id)
            except (TesseractError, OSError) as error:
                errors[f"offer through {carrier.short}"] = error
                continue
            if not answer.accepted:
                raise NotAllowed(f"{peer_id.short} declined: {answer.reason}")
            return answer
        raise PeerUnreachable(peer.short, errors)

    async def _negotiation(self, *, controlling: bool) -> Any:
        """Imports what it needs only now: most nodes never punch a hole."""
        from tesseract_async.nat.webrtc import pipe as webrtc

        await webrtc.load()
        return webrtc.Negotiation(
            controlling=controlling,
            addresses=self._surroundings.channel_addresses(),
            stun_server=await self._surroundings.stun_server(),
            settings=self._settings.webrtc or webrtc.WebrtcSettings(),
            throttle=self._throttle,
        )

    # ---- answering

    async def answer_offer(self, data: bytes, *, origin: str) -> bytes:
        """Answers an offer that came through a rendezvous, and does what it asks. Untrusted.

        `origin`: the address from which the rendezvous heard the offer's sender.

        Raises: ProtocolError for an offer that is malformed, forged or for another peer; Overloaded, NotAllowed.
        """
        try:
            offer = offers.decode_offer(data, self._identity.peer_id)
        except ProtocolError:
            self._metrics.count("nat_offers_refused", reason="malformed")
            raise
        target = "" if offer.kind == offers.RELAY else origin
        reason = self._guard.refuse(offer, now=asyncio.get_running_loop().time(), wall=time.time(), target=target)
        if reason is None and self._accept is None:
            reason = "closing"
        if reason is not None:
            self._metrics.count("nat_offers_refused", reason=reason)
            if reason == "too_many":
                raise Overloaded("too many offers", retry_after=10.0)
            raise NotAllowed(f"the offer is {reason}")
        self._metrics.count("nat_offers_accepted", kind=offer.kind)
        try:
            body = await self._accept_offer(offer, origin)
        except ProtocolError:
            self._metrics.count("nat_offers_refused", reason="malformed")
            raise
        except NotAllowed as error:
            self._metrics.count("nat_offers_refused", reason="declined")
            return offers.encode_answer(self._identity, offer, body=None, reason=str(error), now=time.time())
        return offers.encode_answer(self._identity, offer, body=body, now=time.time())

    async def _accept_offer(self, offer: Offer, origin: str) -> dict[str, Any]:
        """What the answer says. Raises: NotAllowed, ProtocolError."""
        if offer.kind == offers.REVERSE:
            wish = ReverseBody.unpack(offer.body)
            # never dial a third party at somebody's wish
            addresses = [address for address in wish.addresses if split_host_port(address)[0] == origin]
            if not addresses or not self._allows(origin):
                raise NotAllowed(f"you speak from {origin}, and want to be dialled elsewhere")
            self.spawn(self._dial_back(addresses[0], wish.token))
            return {}
        if offer.kind == offers.RELAY:
            place = RelayBody.unpack(offer.body)
            for relay in self._surroundings.rendezvous:
                if relay.peer_id == place.relay:
                    self.spawn(self._come_to(relay, place.token))
                    return {}
            raise NotAllowed("that relay is none of my rendezvous nodes")
        remote = Description.unpack(offer.body)
        if not self._surroundings.can_punch:
            raise NotAllowed("this node makes no data channels")
        if self._num_negotiations >= self._settings.max_negotiations:
            raise NotAllowed("too many data channels are under negotiation")
        self._num_negotiations += 1
        try:
            negotiation = await self._negotiation(controlling=False)
            try:
                own: Description = await negotiation.gather()
                remote = plausible(remote, own, origin=origin, allows=self._allows)
                if not remote.candidates:
                    raise NotAllowed(f"you speak from {origin}, and name no address there")
            except BaseException:  # cancelled, too: sockets are closed
                await negotiation.aclose()
                raise
        except BaseException:  # cancelled, too: the place is free again
            self._num_negotiations -= 1
            raise
        self.spawn(self._finish_negotiation(negotiation, remote))
        return own.pack()

    def _allows(self, host: str) -> bool:
        return self._scope is None or self._scope.allows(host)

    async def _finish_negotiation(self, negotiation: Any, remote: Description) -> None:
        try:
            self._hand_over(await negotiation.connect(remote))
        finally:
            self._num_negotiations -= 1

    async def _dial_back(self, address: str, token: bytes) -> None:
        pipe = await tcp.connect(address, throttle=self._throttle)
        pipe.write(preamble.encode_preamble(preamble.REVERSE, token))
        pipe.description = f"reverse {address}"
        self._hand_over(pipe)

    async def _come_to(self, relay: PeerAddress, token: bytes) -> None:
        self._hand_over(await self._meet(relay, token))

    def _hand_over(self, pipe: Pipe) -> None:
        if self._accept is None:
            pipe.abort()
        else:
            self._accept(pipe)

    # ---- better paths

    def peer_known(self, peer: PeerAddress) -> None:
        """A call names this peer at other addresses than where it was dialled: maybe there is a better way now."""
        one = self._improving.get(peer.peer_id) if peer.peer_id is not None else None
        if one is not None and peer != one.peer:
            is_news = bool(set(peer.addresses) - set(one.peer.addresses))
            one.peer = peer
            if is_news:
                one.again.set()

    def surroundings_changed(self) -> None:
        """This node can be dialled now, or no longer: what was no way before may be one."""
        for one in self._improving.values():
            one.again.set()

    def _start_improving(self, peer: PeerAddress, peer_id: PeerID) -> None:
        if self.upgrade is not None and peer_id not in self._improving:
            one = self._improving[peer_id] = _Improvement(peer)
            self.spawn(self._improve(one, peer_id))

    async def _improve(self, one: _Improvement, peer_id: PeerID) -> None:
        """While the connection is not the best one thinkable, looks for a better one: now and then, and when told."""
        waits = self._settings.improve_after
        attempt = 0
        try:
            while True:
                told = await _is_set(one.again, timeout=waits[min(attempt, len(waits) - 1)])
                one.again.clear()
                attempt += 1
                kind = self.path_kind(peer_id)
                if kind not in LATER_IMPROVED or self.upgrade is None:
                    return
                paths = self._better_paths(one.peer, peer_id, kind) if told or kind == "relay" else []
                if not paths:
                    continue
                try:
                    await self.upgrade(one.peer, paths)
                except PeerUnreachable as error:
                    logger.debug("no better path to %s: %s", peer_id.short, error)
                else:
                    now = self.path_kind(peer_id)
                    logger.info("%s is reached by %s now, no longer by %s", peer_id.short, now, kind)
                    self._metrics.count("nat_paths_improved", path=now)
        finally:
            del self._improving[peer_id]

    def _better_paths(self, peer: PeerAddress, peer_id: PeerID, kind: str) -> list[DialPath]:
        """What is better than a path of this kind, and possible."""
        paths = list(self.direct_paths(peer))
        if peer.rendezvous and self._surroundings.public_addresses:
            paths.append(DialPath("reverse", 0.0, lambda: self._open_reverse(peer, peer_id)))
        if kind == "relay" and peer.rendezvous and self._surroundings.can_punch:
            delay = self._settings.relay_head_start if paths else 0.0
            paths.append(DialPath("datachannel", delay, lambda: self._open_channel(peer, peer_id)))
        return paths

    # ---- tasks

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` in a task that ends with this transport; its failure is counted."""

        async def run() -> None:
            try:
                await work
            except (TesseractError, OSError) as error:
                logger.debug("a peer's offer came to nothing: %s", describe(error))
                self._metrics.count("nat_offers_failed", reason=_reason(error))

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def plausible(
    remote: Description, own: Description, *, origin: str | None, allows: Callable[[str], bool]
) -> Description:
    """What of a peer's description this node sends to: its candidates name hosts that may be anybody's.

    With `origin`, the host that the peer speaks from: candidates there, and where that is where this node itself is
    seen, so behind the same NAT, those in its private network. Without: one public host of each version of IP, and the
    same. Few of them in all.
    """
    seen = {one.host for one in own.candidates if one.kind == "srflx"}
    public: dict[bool, str | None] = {}
    kept: list[Candidate] = []
    for one in sorted(remote.candidates, key=lambda one: (one.kind == "host", -one.priority)):
        where = range_of(one.host)
        if kind_of(one.host) != PUBLIC and one.host != origin:
            near = origin in seen if origin is not None else (not public or any(host.host in seen for host in kept))
            good = near and allows(one.host)
        elif origin is not None:
            good = one.host == origin or (":" in one.host and where == range_of(origin))
        else:
            good = public.setdefault(":" in one.host, where) == where
        if good and allows(one.host) and len(kept) < MAX_TRIED:
            kept.append(one)
    return replace(remote, candidates=tuple(kept))


async def _is_set(event: asyncio.Event, *, timeout: float) -> bool:
    """Waits for `event`, `timeout` seconds at most."""
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return "lost" if isinstance(error, ConnectionLost) else "io" if isinstance(error, OSError) else "protocol"
