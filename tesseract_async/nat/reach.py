"""The ways to and from a node, beyond plain TCP: builds the parts, and drives the `role` machine.

If others can dial this node, it carries offers, answers STUN and relays for others. If not, it keeps a connection with
a few such nodes and names them in its records.
"""

import asyncio
import importlib
import logging
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.nat import preamble
from tesseract_async.nat.demux import PipeHandler, PreambleDemultiplexer
from tesseract_async.nat.dial_back import DIAL_TIMEOUT, DialBack
from tesseract_async.nat.hole_punching import HolePuncher
from tesseract_async.nat.interfaces import address_towards, own_addresses
from tesseract_async.nat.offer_answerer import OfferAnswerer
from tesseract_async.nat.port_mapping import Gateway, PortMapper
from tesseract_async.nat.relay import Relay, RelaySettings
from tesseract_async.nat.rendezvous import NUM_RENDEZVOUS, RendezvousClient, RendezvousServer
from tesseract_async.nat.role import (
    WATCH_PERIOD,
    CheckDue,
    HostsChanged,
    ListeningAddress,
    MappingDoubted,
    Notice,
    Observation,
    Reachability,
    RoleFound,
    RoleMachine,
)
from tesseract_async.nat.stun_client import StunClient
from tesseract_async.nat.traversal import HEAD_START, OFFER_TIMEOUT, NatTransport
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.tasks import end, in_time
from tesseract_async.transport.base import PeerAddress, Transport, ip_version, split_host_port
from tesseract_async.transport.tcp import TcpTransport

logger = logging.getLogger(__name__)

MAX_RENDEZVOUS_TEXTS: Final = 4
"""Rendezvous addresses that a record may hold."""
NUM_CONTACTS: Final = 20
"""Public nodes that helpers and rendezvous nodes are chosen from."""


@dataclass(frozen=True, slots=True)
class ReachSettings:
    """The part a node takes so that nodes behind NATs, itself included, can join."""

    relay: RelaySettings | None = field(default_factory=RelaySettings)
    """The room for relayed connections of others where this node is public; None where traffic is metered."""
    stun_servers: tuple[str, ...] = ()
    """Outside STUN servers, ``host:port``, asked besides the swarm's public nodes: for a swarm with few of them."""
    client: bool = False
    """This node is known not to be dialable (a strict firewall): it does not ask, and uses rendezvous nodes at once."""
    punch_holes: bool = True
    """Make data channels: False where UDP is blocked, so that relays are used at once."""
    num_rendezvous: int = NUM_RENDEZVOUS
    """Public nodes with which a client node keeps a connection: more where public nodes come and go."""
    watch_period: float = WATCH_PERIOD
    """Seconds between looks at this computer's addresses: longer to save a laptop's battery, shorter while moving."""
    dial_back_timeout: float = DIAL_TIMEOUT
    """Seconds given to a dial that proves whether a node can be reached: longer for slow links, by satellite say."""
    offer_timeout: float = OFFER_TIMEOUT
    """Seconds for asking a peer through a rendezvous: longer for slow links, too."""
    head_start: float = HEAD_START
    """Seconds that a hole gets before a relay is tried: longer where relayed traffic is dear."""
    on_loopback: bool = False
    """Do all this on a loopback address, too, where everybody reaches everybody anyway: to rehearse."""

    def __post_init__(self) -> None:
        """Raises: ValueError for a malformed STUN server."""
        for text in self.stun_servers:
            split_host_port(text)


class Reach:
    """See the module. Build it, give `transports` to the endpoint, start both, then `start` this."""

    def __init__(
        self,
        *,
        endpoint: Endpoint,
        network: TesseractNetwork,
        address: ListeningAddress,
        sock: socket.socket,
        scope: AddressScope,
        on_change: Callable[[], None],
        public: bool = False,
        upnp: bool = False,
        find_router: Callable[[str], Awaitable[Gateway | None]] | None = None,
        settings: ReachSettings | None = None,
    ) -> None:
        """`sock`: the TCP socket that is bound to `address`. `scope`: where this node may send on a stranger's word.
        `on_change` is called on the loop when `addresses` or `rendezvous_texts` have changed. `public`: the user says
        that others can dial this node. `upnp`: the router is asked to let them. `find_router`: by default by UPnP."""
        settings = settings if settings is not None else ReachSettings()
        self._endpoint = endpoint
        self._network = network
        self._metrics = metrics = endpoint.metrics
        self.address = address
        self._is_declared_public = public
        self._on_change = on_change
        self._rng = random.Random()
        self._known = asyncio.Event()
        self._is_running = False
        self._beginning: asyncio.Task[None] | None = None
        self._check: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.enabled = settings.on_loopback or not address.is_loopback
        """True except on loopback, where none of this is needed."""
        self.role = RoleMachine(
            address,
            is_declared_public=public,
            is_declared_client=settings.client and self.enabled,
            check_all_versions=settings.on_loopback,
            watch_period=settings.watch_period,
        )
        self._mapper: PortMapper | None = None
        if upnp and self.enabled and 4 in address.versions and not public:
            self._mapper = PortMapper(
                find_router or _find_router,
                port=address.port,
                own_host=self._own_v4,
                changed=self._port_mapped,
                metrics=metrics,
            )
        self._relay: Relay | None = None
        if settings.relay is not None:
            self._relay = Relay(settings=settings.relay, metrics=metrics, throttle=endpoint.throttle)
        self._dial_back = DialBack(
            endpoint,
            own_addresses=lambda: self.role.public_addresses,
            scope=scope,
            dial_timeout=settings.dial_back_timeout,
        )
        self._stun = StunClient(
            address,
            outside_servers=settings.stun_servers,
            contacts=lambda: [*network.public_contacts(4), *self._dial_back.also(4)[:4]],
            own_hosts=self._own_hosts,
        )
        puncher = HolePuncher(
            own_hosts=self._own_hosts,
            stun_server=self._stun.server,
            enabled=settings.punch_holes,
        )
        self._puncher = puncher
        self._answerer = OfferAnswerer(endpoint, puncher=puncher, scope=scope)
        self._server = RendezvousServer(endpoint, relay=self._relay, own_addresses=lambda: self.role.public_addresses)
        self._client = RendezvousClient(
            endpoint,
            contacts=lambda: network.public_contacts(NUM_CONTACTS),
            answer=self._answer,
            changed=self._changed,
            own_origin=lambda: next((split_host_port(text)[0] for text in self.role.public_addresses), ""),
            scope=scope,
            num_rendezvous=settings.num_rendezvous,
        )
        self._traversal = NatTransport(
            endpoint,
            signalling=self._client,
            role=self.role,
            puncher=puncher,
            direct_paths=lambda peer: self.transports[0].paths(peer),
            scope=scope,
            head_start=settings.head_start,
            offer_timeout=settings.offer_timeout,
        )
        handlers: dict[int, PipeHandler] = {
            preamble.REVERSE: self._traversal.pipe_arrived,
            preamble.PROBE: self._dial_back.pipe_arrived,
        }
        if self._relay is not None:
            handlers[preamble.RELAY] = self._relay.pipe_arrived
        self.transports: tuple[Transport, ...] = (TcpTransport(sock),)
        if self.enabled:
            self.transports = (PreambleDemultiplexer(sock, handlers=handlers, metrics=metrics), self._traversal)

    def start(self) -> None:
        """Begin to find out, in the background. The endpoint and the network have been started."""
        if not self.enabled or self._is_declared_public:
            self._known.set()
        if not self.enabled:
            return
        self._is_running = True
        self._dial_back.start()
        if self._is_declared_public:
            self._server.start()
        if self._mapper is not None:
            self._mapper.start()
        self._cycle()
        self._beginning = asyncio.get_running_loop().create_task(self._begin())

    async def _begin(self) -> None:
        await asyncio.to_thread(importlib.import_module, "aioice.stun")  # not when the first question comes
        await self._network.wait_joined()
        self._client.look()  # it was started before anybody was known
        if self._mapper is not None:
            await self._mapper.tried.wait()
        self.role.joined(self._own_hosts(), self._now())
        self._cycle()

    async def aclose(self) -> None:
        """End it all; the endpoint is closed after this."""
        self._is_running = False
        if self._timer is not None:
            self._timer.cancel()
        await end(self._beginning, self._check)
        if self._mapper is not None:
            await self._mapper.aclose()
        await self._client.stop()
        self._server.stop()
        await self._answerer.tasks.aclose()
        if self._relay is not None:
            await self._relay.aclose()

    @property
    def reachability(self) -> Reachability:
        return self.role.reachability

    @property
    def rendezvous(self) -> tuple[PeerAddress, ...]:
        return self._client.rendezvous

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses at which others dial this node: only confirmed ones, if there are any or a rendezvous helps."""
        return self.role.told_addresses(has_rendezvous=bool(self.rendezvous))

    @property
    def rendezvous_texts(self) -> tuple[str, ...]:
        """`rendezvous` as records name them: ``host:port/PEER_ID``, once for each address of a node that has several,
        but one address of each node first, IPv4 where there is a choice."""
        texts: list[tuple[int, str]] = []
        for peer in self.rendezvous:
            ordered = sorted(peer.addresses, key=lambda address: ip_version(address) == 6)
            texts += [(min(place, 1), str(replace(peer, addresses=(one,)))) for place, one in enumerate(ordered)]
        return tuple(text for _, text in sorted(texts, key=lambda text: text[0])[:MAX_RENDEZVOUS_TEXTS])

    async def wait_known(self, timeout: float) -> bool:
        """Wait until the role is known, and a client node has a rendezvous. Returns whether that came in time."""
        return await in_time(self._known.wait(), timeout)

    def report(self) -> list[str]:
        """Say what was found about this node's reachability, and what the user can do about it."""
        if not self.enabled:
            return [f"This node listens on {self.address.host}: it serves this computer only."]
        if self.role.doubt:
            return [self.role.doubt]
        is_client = self.reachability.tcp is False
        lines = self.reachability.sentences(self.role.outside_port)
        if self._mapper is not None:
            lines.append(self._mapper.sentence())
            if self._mapper.outside_port is not None and is_client:
                lines.append("Others do not get through that, though: there may be a second NAT, your provider's.")
        if is_client:
            names = ", ".join(peer.short for peer in self.rendezvous)
            lines.append(f"Others find it through {names}." if names else "No node carries offers for it yet.")
        return lines

    def look_again(self) -> None:
        """Find out now whether others can dial this node: something may have changed."""
        self.role.look_again(self._now())
        self._cycle()

    def _port_mapped(self, port: int | None) -> None:
        self.role.mapped(port, self._now())
        self._cycle()

    def _timer_fired(self) -> None:
        self.role.handle_timer(self._own_hosts(), self._now())
        self._cycle()

    def _cycle(self) -> None:
        if not self._is_running:
            return
        for event in self.role.events():
            if isinstance(event, Notice):
                logger.log(logging.WARNING if event.is_warning else logging.INFO, "%s", event.text)
            elif isinstance(event, MappingDoubted):
                if self._mapper is not None:
                    self._mapper.renew()
            elif isinstance(event, HostsChanged):
                self._changed()
            elif isinstance(event, RoleFound):
                self._take_role(event)
            else:
                self._check = asyncio.get_running_loop().create_task(self._run_check(event))
        if self._timer is not None:
            self._timer.cancel()
        at = self.role.timer_at()
        self._timer = asyncio.get_running_loop().call_at(at, self._timer_fired) if at is not None else None

    def _take_role(self, found: RoleFound) -> None:
        is_public = bool(self.reachability.tcp)
        self._metrics.set("reachable_by_tcp", float(is_public))
        self._network.set_client(not is_public)
        if is_public:
            self._server.start()
            self._known.set()
        else:
            self._server.stop()
        if not any(":" not in host for host in self.reachability.open_hosts):
            self._client.start()  # a public node's too, if it has IPv6 only: peers without need a go-between
        if found.became_client and self._puncher.enabled:
            # importing aiortc takes a while, better now than when somebody waits
            self._answerer.tasks.spawn(self._puncher.load())
        if found.is_news:
            self._changed()
            self._traversal.upgrader.place_changed()

    def _changed(self) -> None:
        if self.rendezvous:
            self._known.set()
        self._on_change()

    async def _run_check(self, check: CheckDue) -> None:
        try:
            found = await self._observe(check)
        except Exception:  # whatever it is, nodes go on: the next check may do better
            logger.exception("a check of how others reach this node failed; the next one follows")
            found = Observation({})
        udp = {"public": True, "client": False}.get(self._network.role)
        self.role.checked(replace(found, udp=udp), self._now())
        if self._is_declared_public and found.dialed:
            self._metrics.set("reachable_by_tcp", float(not self.role.doubt))
        self._cycle()

    async def _observe(self, check: CheckDue) -> Observation:
        contacts = self._network.public_contacts(NUM_CONTACTS)
        self._rng.shuffle(contacts)
        connected = {info.peer_id for info in self._endpoint.connections()}
        # nodes without a connection first: they see this one as any stranger would
        contacts.sort(key=lambda peer: peer.peer_id in connected)
        dialing = self._dial_back.check_all(contacts, check.ports)
        if not check.stun:
            return Observation(await dialing)
        if 6 not in self.address.versions:
            dialed, (nat, seen_host) = await asyncio.gather(dialing, self._stun.look())
            return Observation(dialed, nat, seen_host)
        # helpers by IPv6 have named the IPv4 addresses at which they answer STUN
        dialed, (nat, seen_host) = await dialing, await self._stun.look()
        if nat == "unknown" and check.ports and self._own_v4() is not None:
            await self._dial_back.learn(contacts, port=self.address.port)  # they may all have IPv6 alone
            nat, seen_host = await self._stun.look()
        return Observation(dialed, nat, seen_host)

    async def _answer(self, offer: bytes, origin: str) -> bytes:
        return await self._answerer.answer(offer, origin=origin, relays=self.rendezvous)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _own_hosts(self) -> list[str]:
        return own_addresses() if self.address.is_wildcard else [self.address.host]

    def _own_v4(self) -> str | None:
        if not self.address.is_wildcard and ":" not in self.address.host:
            return self.address.host
        return address_towards(socket.AF_INET) or next((host for host in self._own_hosts() if ":" not in host), None)


async def _find_router(own_host: str) -> Gateway | None:
    from tesseract_async.nat import upnp  # an optional extra

    return await upnp.find(own_host)
