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
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.endpoint.reachability import DialBackServer, Finding, NatKind, Reachability, ReachabilitySettings
from tesseract_async.endpoint.rendezvous import RendezvousClient, RendezvousServer, RendezvousSettings
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.transport import preamble, stun_client, tcp
from tesseract_async.transport.base import PeerAddress, Pipe, Throttle, Transport, join_host_port, split_host_port
from tesseract_async.transport.doorman import Doorman
from tesseract_async.transport.interfaces import VIRTUAL_INTERFACES, own_addresses
from tesseract_async.transport.nat import NatSettings, NatTransport
from tesseract_async.transport.relay import Relay, RelaySettings

logger = logging.getLogger(__name__)

WILDCARDS = ("0.0.0.0", "::", "")


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
    nat: NatSettings = field(default_factory=NatSettings)
    rendezvous: RendezvousSettings = field(default_factory=RendezvousSettings)
    reachability: ReachabilitySettings = field(default_factory=ReachabilitySettings)


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
        settings: ReachSettings | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        """`sock`: the bound TCP socket. `announced`: what others should dial, if they can. `public`: they can."""
        self._settings = settings = settings if settings is not None else ReachSettings()
        self._network = network
        self._metrics = metrics
        self._announced = announced
        self._host, self._port = sock.getsockname()[:2]
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
        self._throttle = throttle
        self.finding = Finding(tcp=True) if public else Finding()
        self.on_change: Callable[[], None] | None = None
        """Called on the loop when `addresses` or `rendezvous_texts` have changed."""
        loopback = self._host not in WILDCARDS and ipaddress.ip_address(self._host).is_loopback
        self.enabled = settings.on_loopback or not loopback
        listener = tcp.TcpTransport(sock, throttle=throttle)
        self._relay = Relay(settings=settings.relay, metrics=metrics) if settings.relay is not None else None
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
            )
            self.transports = (Doorman(listener, special=self._special, metrics=metrics), self.nat)
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
        )
        self._server = RendezvousServer(endpoint, relay=self._relay, settings=settings.rendezvous)
        self._reachability = Reachability(endpoint, settings=settings.reachability)
        DialBackServer(endpoint, connect=lambda address: tcp.connect(address), settings=settings.reachability)
        self.nat.upgrade = endpoint.upgrade
        self.nat.is_relayed = lambda peer_id: any(
            info.peer_id == peer_id and info.path.startswith("relay") for info in endpoint.connections()
        )
        self._network.on_role_change = self._role_changed
        if self._declared_public:
            self._server.start()
            self._known.set()
        else:
            if settings.client:
                self._apply(self.finding, Finding(tcp=False))
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def aclose(self) -> None:
        """Ends it all; the endpoint is closed after this."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            await asyncio.wait([watcher])
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

    # ---- what others should know

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node: nowhere, where dial-back found that they can't and a rendezvous helps."""
        if self.finding.tcp is False and self.rendezvous:
            return ()
        return self._outside_addresses()

    @property
    def rendezvous_texts(self) -> tuple[str, ...]:
        """The nodes through which others can send offers, as records name them: ``host:port/PEER_ID``."""
        return tuple(str(peer) for peer in self.rendezvous)

    def report(self) -> list[str]:
        """What was found about this node's reachability, and what the user can do about it."""
        if not self.enabled:
            return [f"This node listens on {self._host}: it serves this computer only."]
        lines = self.finding.sentences(self._port)
        if self.finding.tcp is False:
            names = ", ".join(peer.short for peer in self.rendezvous)
            lines.append(f"Others find it through {names}." if names else "No node carries offers for it yet.")
        return lines

    # ---- transport.nat.Surroundings

    @property
    def public_addresses(self) -> tuple[str, ...]:
        """See `transport.nat.Surroundings`."""
        return self._outside_addresses() if self.finding.tcp else ()

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
                    logger.info("this computer's addresses have changed: finding out anew what can be reached")
                    break
            self._again.clear()

    async def _check(self) -> None:
        assert self._endpoint is not None and self._reachability is not None
        contacts = self._network.public_contacts(20)
        connected = {info.peer_id for info in self._endpoint.connections()}
        self._rng.shuffle(contacts)
        # those that we have no connection with see us as any stranger would
        contacts.sort(key=lambda peer: peer.peer_id in connected)
        client = self._settings.client  # whoever knows that it can't be reached asks for the NAT's kind only
        (reached, host), (nat, seen) = await asyncio.gather(
            _known(False) if client else self._reachability.check(contacts[:6], port=self._port), self._ask_stun()
        )
        host = host or seen
        udp = {"public": True, "client": False}.get(self._network.role)
        if self.finding.tcp is False:
            udp = None  # the network only repeats what it was told
        found = Finding(tcp=reached, udp=udp, host=host, nat=nat)
        if found.tcp is None and self.finding.tcp is not None:
            found = replace(self.finding, nat=nat)  # nobody answered: what was known stands
        self._apply(self.finding, found)

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
        else:
            self._server.stop()
            self._client.start()
            if before.tcp is not False:
                self._load_aiortc()
        if found.tcp != before.tcp or found.host != before.host:
            self._changed()

    def _load_aiortc(self) -> None:
        """A client node will need it: importing takes a while, better now than when somebody waits."""
        from tesseract_async.transport import webrtc

        assert self.nat is not None
        self.nat.spawn(webrtc.load())

    async def _ask_stun(self) -> tuple[NatKind, str | None]:
        """Renews the choice of a STUN server; what the answers tell of our NAT, and our host as they see it."""
        servers = [split_host_port(peer.addresses[0]) for peer in self._network.public_contacts(4)]
        for text in self._settings.stun_servers:
            servers += await _resolve(*split_host_port(text))
        servers = [server for server in servers if _is_ipv4(server[0])]
        local = self._host if _is_ipv4(self._host) else "0.0.0.0"
        try:
            answers = await stun_client.ask(servers, local_host=local)
        except OSError as error:
            logger.debug("no STUN server can be asked: %s", error)
            answers = {}
        if answers:
            self._stun = (next(iter(answers)), asyncio.get_running_loop().time())
        seen = set(answers.values())
        if not answers:
            return "unknown", None
        host = next(iter(seen))[0]
        if {host for host, _ in seen} <= set(self._own_addresses()):
            return "none", host
        if len(answers) < 2:
            return "unknown", host
        return ("keeping" if len(seen) == 1 else "symmetric"), host

    def _outside_addresses(self) -> tuple[str, ...]:
        """What was announced; with the host that others see, where this node itself did not know it."""
        host = self.finding.host
        if not self.finding.tcp or host is None or host in {split_host_port(text)[0] for text in self._announced}:
            return self._announced
        return (join_host_port(host, self._port), *self._announced)

    def _own_addresses(self) -> list[str]:
        if self._host not in WILDCARDS:
            return [str(self._host)]
        return own_addresses(self._settings.skip_interfaces)


async def _known(reached: bool) -> tuple[bool | None, str | None]:
    return reached, None


async def _resolve(host: str, port: int) -> list[tuple[str, int]]:
    """The IPv4 address of a server that was configured by name; nothing where it has none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_DGRAM)
    except OSError as error:
        logger.warning("the STUN server %s is unknown: %s", host, error)
        return []
    return [(str(found[0][4][0]), port)]


def _is_ipv4(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 4
    except ValueError:
        return False
