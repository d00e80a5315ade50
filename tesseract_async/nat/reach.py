"""How a node reaches others and is reached, beyond plain TCP: its role, its rendezvous nodes, its paths.

`Reach` builds the transports that a node gives to its endpoint and joins them with the network: it finds out by
dial-back whether others can dial this node. If they can, the node carries offers, answers STUN and relays for others;
if not, it keeps a connection with a few such nodes and names them in its records.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.nat import preamble, stun_client
from tesseract_async.nat.demux import PreambleDemultiplexer
from tesseract_async.nat.dial_back import (
    DialBackServer,
    Finding,
    NatKind,
    Reachability,
    ReachabilitySettings,
)
from tesseract_async.nat.interfaces import VIRTUAL_INTERFACES, own_addresses
from tesseract_async.nat.port_mapping import Gateway, PortMapper, PortMappingSettings
from tesseract_async.nat.relay import Relay, RelaySettings
from tesseract_async.nat.rendezvous import RendezvousClient, RendezvousServer, RendezvousSettings
from tesseract_async.nat.ways import NatSettings, NatTransport
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.transport import tcp
from tesseract_async.transport.address_scope import AddressScope
from tesseract_async.transport.base import (
    PeerAddress,
    Pipe,
    Transport,
    ip_version,
    join_host_port,
    split_host_port,
)
from tesseract_async.transport.throttle import Throttle

logger = logging.getLogger(__name__)

WILDCARDS = ("0.0.0.0", "::", "")
MAX_RENDEZVOUS_TEXTS = 4
"""That a record may hold."""


@dataclass(frozen=True, slots=True)
class ReachSettings:
    """What a node does so that nodes behind NATs can take part, itself included."""

    relay: RelaySettings | None = field(default_factory=RelaySettings)
    """What this node relays for others where it is public; None: nothing."""
    stun_servers: tuple[str, ...] = ()
    """Outside STUN servers, ``host:port``, asked beside the public nodes of the swarm."""
    period: float = 600.0
    """Seconds after which the node finds out anew whether it can be reached."""
    watch_period: float = 5.0
    """Seconds between looks at this computer's own addresses: a change of network is noticed so soon."""
    skip_interfaces: tuple[str, ...] = VIRTUAL_INTERFACES
    """Beginnings of names of network interfaces whose addresses are of no use to others."""
    stun_fresh: float = 60.0
    """Seconds for which a STUN server that answered counts as alive."""
    client: bool = False
    """This node knows that it can't be dialled: it does not ask, and uses rendezvous nodes from the start."""
    on_loopback: bool = False
    """Do all this on a loopback address, too: for tests. There, everybody reaches everybody anyway."""
    port_mapping: PortMappingSettings = field(default_factory=PortMappingSettings)
    nat: NatSettings = field(default_factory=NatSettings)
    rendezvous: RendezvousSettings = field(default_factory=RendezvousSettings)
    reachability: ReachabilitySettings = field(default_factory=ReachabilitySettings)

    def __post_init__(self) -> None:
        """Raises: ValueError for a malformed STUN server."""
        for text in self.stun_servers:
            split_host_port(text)


class Reach:
    """See the module. Build it, give `transports` to the endpoint, start both, then `start` this."""

    def __init__(
        self,
        *,
        identity: Identity,
        network: TesseractNetwork,
        sock: socket.socket,
        metrics: Metrics,
        announced: tuple[str, ...],
        public: bool,
        upnp: bool = False,
        settings: ReachSettings | None = None,
        throttle: Throttle | None = None,
        scope: AddressScope | None = None,
    ) -> None:
        """`sock`: the bound TCP socket. `announced`: what others should dial, if they can. `public`: they can. `upnp`:
        the router is asked to let them. `scope`: where this node may send on a stranger's word."""
        self._settings = settings = settings if settings is not None else ReachSettings()
        self._network = network
        self._scope = scope
        self._metrics = metrics
        self._announced = announced
        self._host, self._port = sock.getsockname()[:2]
        self._speaks_v6 = sock.family == socket.AF_INET6
        self._speaks_v4 = not self._speaks_v6 or self._host == "::"
        self._rng = random.Random()
        self._endpoint: Endpoint | None = None
        self._client: RendezvousClient | None = None
        self._server: RendezvousServer | None = None
        self._reachability: Reachability | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._again = asyncio.Event()
        self._known = asyncio.Event()
        self._stun: tuple[tuple[str, int], float] | None = None
        self._declared_public = public
        self._doubt = ""
        self._throttle = throttle
        self.finding = Finding(tcp=True) if public else Finding()
        self.on_change: Callable[[], None] | None = None
        """Called on the loop when `addresses` or `rendezvous_texts` have changed."""
        loopback = self._host not in WILDCARDS and ipaddress.ip_address(self._host).is_loopback
        self.enabled = settings.on_loopback or not loopback
        self._listener = listener = tcp.TcpTransport(sock, throttle=throttle)
        self._relay = Relay(settings=settings.relay, metrics=metrics) if settings.relay is not None else None
        self._mapper: PortMapper | None = None
        if upnp and self.enabled and self._speaks_v4 and not public:
            self._mapper = PortMapper(
                _find_router,
                port=self._port,
                own_host=self._own_v4,
                changed=self._role_changed,
                metrics=metrics,
                settings=settings.port_mapping,
            )
        self.nat: NatTransport | None = None
        self.transports: tuple[Transport, ...] = (listener,)
        if self.enabled:
            self.nat = NatTransport(
                identity=identity,
                signalling=self,
                surroundings=self,
                metrics=metrics,
                settings=settings.nat,
                throttle=throttle,
                scope=scope,
            )
            self.transports = (PreambleDemultiplexer(listener, special=self._special, metrics=metrics), self.nat)
        else:
            self._known.set()

    # ---- life

    async def start(self, endpoint: Endpoint) -> None:
        """Begins to find out, in the background. The endpoint and the network have been started."""
        if not self.enabled or self.nat is None:
            return
        settings = self._settings
        self._endpoint = endpoint
        self._client = RendezvousClient(
            endpoint,
            contacts=lambda: self._network.public_contacts(20),
            answer=self.nat.answer_offer,
            changed=self._changed,
            own_origin=lambda: split_host_port(self.public_addresses[0])[0] if self.public_addresses else "",
            settings=settings.rendezvous,
            scope=self._scope,
        )
        self._server = RendezvousServer(
            endpoint,
            relay=self._relay,
            own_addresses=lambda: self.public_addresses,
            settings=settings.rendezvous,
        )
        self._reachability = Reachability(endpoint, settings=settings.reachability, scope=self._scope)
        DialBackServer(
            endpoint,
            connect=lambda address: tcp.connect(address),
            own_addresses=lambda: self.public_addresses,
            settings=settings.reachability,
        )
        self.nat.upgrade = endpoint.upgrade
        self.nat.path_kind = endpoint.path_kind
        self.nat.direct_paths = lambda peer: self._listener.paths(peer, bulk=False)
        self._network.on_role_change = self._role_changed
        if self._declared_public:
            self._server.start()
            self._known.set()
            self._watcher = asyncio.get_running_loop().create_task(self._watch_claim())
        else:
            if self._mapper is not None:
                self._mapper.start()
            if settings.client:
                self._apply(self.finding, Finding(tcp=False))
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def aclose(self) -> None:
        """Ends it all; the endpoint is closed after this."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            await asyncio.wait([watcher])
        if self._mapper is not None:
            await self._mapper.aclose()
        if self._client is not None:
            await self._client.stop()
        if self._server is not None:
            self._server.stop()
        if self._relay is not None:
            await self._relay.aclose()

    async def wait_known(self, timeout: float) -> bool:
        """Waits until the role is known, and a client node has a rendezvous; whether that came in time."""
        try:
            async with asyncio.timeout(timeout):
                await self._known.wait()
        except TimeoutError:
            return False
        return True

    def find_out(self) -> None:
        """Looks anew whether others can dial this node, instead of waiting for the next time (`ReachSettings.period`):
        after a change in the router, for one."""
        if self._mapper is not None:
            self._mapper.renew()
        self._again.set()

    # ---- what others should know

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node: only where dial-back got through, if it did or a rendezvous helps."""
        if self.finding.tcp is False and (self.rendezvous or self.finding.open_hosts):
            return self._open_addresses()
        return self._outside_addresses()

    @property
    def rendezvous_texts(self) -> tuple[str, ...]:
        """The nodes through which others can send offers, as records name them: ``host:port/PEER_ID``, once for each
        address of a node that has several."""
        texts: list[str] = []
        for wanted in (True, False):  # one address of each first, IPv4 where there is a choice
            for peer in self.rendezvous:
                ordered = sorted(peer.addresses, key=lambda address: ip_version(address) == 6)
                texts += [str(replace(peer, addresses=(one,))) for one in (ordered[:1] if wanted else ordered[1:])]
        return tuple(texts[:MAX_RENDEZVOUS_TEXTS])

    def report(self) -> list[str]:
        """What was found about this node's reachability, and what the user can do about it."""
        if not self.enabled:
            return [f"This node listens on {self._host}: it serves this computer only."]
        if self._doubt:
            return [self._doubt]
        lines = self.finding.sentences(self._outside_port)
        if self._mapper is not None:
            lines.append(self._mapper.sentence())
            if self._mapper.outside_port is not None and self.finding.tcp is False:
                lines.append("Others do not get through that, though: there may be a second NAT, your provider's.")
        if self.finding.tcp is False:
            names = ", ".join(peer.short for peer in self.rendezvous)
            lines.append(f"Others find it through {names}." if names else "No node carries offers for it yet.")
        return lines

    # ---- transport.nat.Surroundings

    @property
    def public_addresses(self) -> tuple[str, ...]:
        """See `transport.nat.Surroundings`."""
        return self._outside_addresses() if self.finding.tcp else self._open_addresses()

    @property
    def behind_nat(self) -> bool:
        """See `transport.nat.Surroundings`."""
        return not self.finding.tcp

    @property
    def rendezvous(self) -> tuple[PeerAddress, ...]:
        """See `transport.nat.Surroundings`."""
        return self._client.rendezvous if self._client is not None else ()

    @property
    def symmetric(self) -> bool:
        """See `transport.nat.Surroundings`."""
        return self.finding.nat == "symmetric"

    @property
    def can_punch(self) -> bool:
        """See `transport.nat.Surroundings`."""
        return self.enabled

    async def stun_server(self) -> tuple[str, int] | None:
        """See `transport.nat.Surroundings`: the one that answered last, asked again once a minute."""
        now = asyncio.get_running_loop().time()
        if self._stun is None or now - self._stun[1] > self._settings.stun_fresh:
            await self._ask_stun()
        return self._stun[0] if self._stun is not None else None

    def channel_addresses(self) -> list[str]:
        """See `transport.nat.Surroundings`."""
        return self._own_addresses()

    # ---- transport.nat.Signalling

    async def send_offer(self, via: PeerAddress, recipient: PeerID, offer: bytes, *, timeout: float) -> bytes:
        """See `transport.nat.Signalling`."""
        assert self._client is not None
        return await self._client.send_offer(via, recipient, offer, timeout=timeout)

    async def reserve_relay(self, via: PeerAddress, *, timeout: float) -> tuple[bytes, bytes]:
        """See `transport.nat.Signalling`."""
        assert self._client is not None
        return await self._client.reserve_relay(via, timeout=timeout)

    # ---- finding out

    def _special(self, kind: int, token: bytes, pipe: Pipe) -> None:
        """An accepted pipe began with a preamble."""
        if kind == preamble.REVERSE and self.nat is not None:
            self.nat.pipe_arrived(token, pipe)
        elif kind == preamble.RELAY and self._relay is not None:
            self._relay.pipe_arrived(token, pipe)
        elif kind == preamble.PROBE and self._reachability is not None:
            self._reachability.pipe_arrived(token, pipe)
        else:
            pipe.abort()

    def _role_changed(self) -> None:
        self._again.set()

    def _changed(self) -> None:
        if self._client is not None and self._client.rendezvous:
            self._known.set()
        if self.on_change is not None:
            self.on_change()

    async def _watch(self) -> None:
        settings = self._settings
        loop = asyncio.get_running_loop()
        await self._network.wait_joined()
        if settings.client and self._client is not None:
            self._client.look()  # it was started before anybody was known
        if self._mapper is not None:
            await self._mapper.tried.wait()
        addresses = self._own_addresses()
        while True:
            await self._check()
            due = loop.time() + (settings.period if self.finding.tcp is not None else settings.watch_period)
            while loop.time() < due and not self._again.is_set():
                try:
                    async with asyncio.timeout(settings.watch_period):
                        await self._again.wait()
                except TimeoutError:
                    pass
                if self._own_addresses() != addresses:
                    addresses = self._own_addresses()
                    if self._mapper is not None:
                        self._mapper.renew()
                    logger.info("this computer's addresses have changed: finding out anew what can be reached")
                    self._changed()
                    break
            self._again.clear()

    async def _check(self) -> None:
        assert self._endpoint is not None and self._reachability is not None
        contacts = self._helpers()
        client = self._settings.client  # whoever knows that it can't be reached asks for the NAT's kind only
        dialling = _nowhere() if client else self._dialled_back(contacts)
        if self._speaks_v6:  # those who dialled back have named the IPv4 addresses at which they answer STUN
            dialled, (nat, seen) = await dialling, await self._ask_stun()
            if nat == "unknown" and not client and self._own_v4() is not None:
                # those who were asked may all have IPv6 alone
                await self._reachability.learn(contacts, port=self._port)
                nat, seen = await self._ask_stun()
        else:
            dialled, (nat, seen) = await asyncio.gather(dialling, self._ask_stun())
        # IPv4 decides where there is both: everybody has it, and the DHT's contacts name one address
        reached, host = dialled.get(4) or dialled.get(6) or (False if client else None, None)
        if self.finding.host is not None and _is_ipv4(self.finding.host) and 4 not in dialled:
            reached = None  # who could have told is away: IPv6 alone says nothing of it
        host = host or seen
        udp = {"public": True, "client": False}.get(self._network.role)
        if self.finding.tcp is False:
            udp = None  # the network only repeats what it was told
        found = Finding(
            tcp=reached,
            udp=udp,
            host=host,
            nat=nat,
            open_hosts=tuple(host for reached, host in dialled.values() if reached),
            closed_hosts=tuple(host for reached, host in dialled.values() if not reached),
        )
        if found.tcp is False and self.finding.tcp and self._mapper is not None:
            self._mapper.renew()  # the router may have forgotten it
        if found.tcp is None and self.finding.tcp is not None:
            found = replace(self.finding, nat=nat)  # nobody answered: what was known stands
        self._apply(self.finding, found)

    def _helpers(self) -> list[PeerAddress]:
        """Public nodes; those that we have no connection with first: they see us as any stranger would."""
        assert self._endpoint is not None
        contacts = self._network.public_contacts(20)
        connected = {info.peer_id for info in self._endpoint.connections()}
        self._rng.shuffle(contacts)
        contacts.sort(key=lambda peer: peer.peer_id in connected)
        return contacts

    async def _watch_claim(self) -> None:
        """Has others dial a node whose owner says that they can. It stays public: who says so may know better. But its
        owner is told."""
        settings, loop = self._settings, asyncio.get_running_loop()
        _, port = split_host_port(self._announced[0])
        await self._network.wait_joined()
        while True:
            assert self._reachability is not None
            version = ip_version(self._announced[0]) or (4 if self._speaks_v4 else 6)
            helpers = [peer for peer in self._helpers() if ip_version(peer.addresses[0]) == version]
            reached, host = await self._reachability.check(helpers[:6], port=port)
            if reached is not None and host is not None:
                doubt = "" if reached else _claim_doubted(join_host_port(host, port), self._announced[0])
                if doubt and not self._doubt:
                    logger.warning("%s", doubt)
                elif self._doubt and not doubt:
                    logger.info("others reach this node at %s now", join_host_port(host, port))
                self._doubt = doubt
                self._metrics.set("reachable_by_tcp", float(reached))
            due = loop.time() + (settings.watch_period if reached is None else settings.period)
            try:
                async with asyncio.timeout_at(due):
                    await self._again.wait()
            except TimeoutError:
                pass
            self._again.clear()

    async def _dialled_back(self, contacts: list[PeerAddress]) -> dict[int, tuple[bool, str]]:
        """For IPv4 and IPv6, where somebody could be asked: whether others reach this node, and under which host."""
        own = {ip_version(join_host_port(host, 1)) for host in self._own_addresses()}
        wished = [version for version, speaks in ((4, self._speaks_v4), (6, self._speaks_v6)) if speaks]
        wished = [version for version in wished if version in own or self._settings.on_loopback]
        found: dict[int, tuple[bool, str]] = {}

        async def ask(version: int) -> None:
            assert self._reachability is not None
            helpers = [peer for peer in contacts if ip_version(peer.addresses[0]) == version]
            # contacts are known by one address each; those who helped by the other kind of IP have named theirs
            helpers += self._reachability.also(version)
            port = self._outside_port if version == 4 else self._port
            reached, host = await self._reachability.check(helpers[:6], port=port)
            if reached is not None and host is not None:
                found[ip_version(join_host_port(host, port)) or version] = (reached, host)

        await asyncio.gather(*map(ask, wished))
        for version in wished:
            if version not in found:
                await ask(version)
        return dict(sorted(found.items()))

    def _apply(self, before: Finding, found: Finding) -> None:
        """Takes the role that was found."""
        self.finding = found
        assert self._client is not None and self._server is not None
        if found != before:
            for line in self.report():
                logger.info("%s", line)
        if found.tcp is None:
            return
        self._metrics.set("reachable_by_tcp", float(found.tcp))
        self._network.set_client(not found.tcp)
        if found.tcp:
            self._server.start()
            self._known.set()
            if not any(map(_is_ipv4, found.open_hosts)):
                self._client.start()  # those who have IPv4 only still need somebody in between
        else:
            self._server.stop()
            self._client.start()
            if before.tcp is not False:
                self._load_aiortc()
        if replace(found, nat=before.nat, udp=before.udp) != before:
            self._changed()
            if self.nat is not None:
                self.nat.surroundings_changed()

    def _load_aiortc(self) -> None:
        """A client node will need it: importing takes a while, better now than when somebody waits."""
        from tesseract_async.nat.webrtc import pipe as webrtc

        assert self.nat is not None
        self.nat.spawn(webrtc.load())

    async def _ask_stun(self) -> tuple[NatKind, str | None]:
        """Renews the choice of a STUN server; what the answers tell of our NAT, and our host as they see it."""
        contacts = self._network.public_contacts(4)
        if self._reachability is not None:
            contacts += self._reachability.also(4)[:4]
        servers = list(dict.fromkeys(split_host_port(peer.addresses[0]) for peer in contacts))
        for text in self._settings.stun_servers:
            servers += await _resolve(*split_host_port(text))
        answers: dict[tuple[str, int], tuple[str, int]] = {}
        if self._speaks_v4 or any(_is_ipv4(host) for host in self._own_addresses()):
            answers = await self._ask_stun_over(servers, v6=False)
            if answers:  # aioice asks over IPv4 only
                self._stun = (next(iter(answers)), asyncio.get_running_loop().time())
        if not answers and self._speaks_v6:
            answers = await self._ask_stun_over(servers, v6=True)
        seen = set(answers.values())
        if not answers:
            return "unknown", None
        host = next(iter(seen))[0]
        if {host for host, _ in seen} <= set(self._own_addresses()):
            return "none", host
        if len(answers) < 2:
            return "unknown", host
        return ("keeping" if len(seen) == 1 else "symmetric"), host

    async def _ask_stun_over(
        self, servers: Sequence[tuple[str, int]], *, v6: bool
    ) -> dict[tuple[str, int], tuple[str, int]]:
        asked = [server for server in servers if _is_ipv4(server[0]) != v6]
        local = self._host if _is_ipv4(self._host) != v6 and self._host else ("::" if v6 else "0.0.0.0")
        try:
            return await stun_client.ask(asked, local_host=local)
        except OSError as error:
            logger.debug("no STUN server can be asked: %s", error)
            return {}

    @property
    def _outside_port(self) -> int:
        """Where others dial this node by IPv4: its own port, or the router's that leads to it."""
        mapped = self._mapper.outside_port if self._mapper is not None else None
        return mapped if mapped is not None else self._port

    def _open_addresses(self) -> tuple[str, ...]:
        """Where dial-back got through."""
        return tuple(
            join_host_port(host, self._port if ":" in host else self._outside_port) for host in self.finding.open_hosts
        )

    def _outside_addresses(self) -> tuple[str, ...]:
        """What was announced; with what others see, where this node itself did not know it, or knew it wrong."""
        if not self.finding.tcp:
            return self._announced
        found = self._open_addresses()
        known = {split_host_port(text)[0] for text in self._announced}
        opened = [text for text in found if split_host_port(text)[0] not in known]
        left = [text for text in self._announced if split_host_port(text)[0] not in self.finding.closed_hosts]
        return tuple(dict.fromkeys((*opened, *left)))

    def _own_v4(self) -> str | None:
        """This computer's address in the router's network."""
        if _is_ipv4(self._host) and self._host not in WILDCARDS:
            return str(self._host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # RFC 5737: sends nothing, asks the routing table which way leads out
            except OSError:
                return next(filter(_is_ipv4, self._own_addresses()), None)
            return str(probe.getsockname()[0])

    def _own_addresses(self) -> list[str]:
        if self._host not in WILDCARDS:
            return [str(self._host)]
        return own_addresses(self._settings.skip_interfaces)


def _claim_doubted(dialled: str, announced: str) -> str:
    elsewhere = "" if dialled == announced else f", as which others see it (it announces {announced})"
    return (
        f"This node was started as public, but others that dialled {dialled}{elsewhere} did not get through: let TCP "
        f"and UDP to this port in, or start it without that claim, and it finds the other ways by itself."
    )


async def _nowhere() -> dict[int, tuple[bool, str]]:
    return {}


async def _find_router(own_host: str) -> Gateway | None:
    from tesseract_async.nat import upnp  # an optional extra

    return await upnp.find(own_host)


async def _resolve(host: str, port: int) -> list[tuple[str, int]]:
    """The addresses of a server that was configured by name, one of each kind of IP; nothing where it has none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        logger.warning("the STUN server %s is unknown: %s", host, error)
        return []
    first = {family: str(address[0]) for family, *_, address in reversed(found)}
    return [(host, port) for host in first.values()]


def _is_ipv4(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 4
    except ValueError:
        return False
