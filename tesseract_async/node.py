"""A node: one event loop's share of the swarm. It builds the parts (DHT, endpoint, directory) and connects them.

Only `reach` names concrete transports.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from tesseract_async.admission import Policy
from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings
from tesseract_async.errors import (
    ExpertNotFound,
    PeerUnreachable,
    RemoteError,
    TesseractError,
    UnsupportedVersion,
)
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.directory import ExpertDirectory
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.node_calls import NOT_STARTED, NodeCalls
from tesseract_async.experts.progress import Thanks
from tesseract_async.experts.run import SignedRun
from tesseract_async.experts.run_directory import RunKeeper, enter_run
from tesseract_async.experts.trust import belongs_under_its_key
from tesseract_async.identity import Identity, PeerID
from tesseract_async.nat.interfaces import bind_pair, hosts_to_announce, own_addresses
from tesseract_async.nat.reach import Reach, ReachSettings
from tesseract_async.nat.role import WILDCARDS, ListeningAddress
from tesseract_async.network.address_scope import LOOPBACK, PUBLIC, AddressScope, kind_of
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.network.presence import Presence
from tesseract_async.tasks import end
from tesseract_async.transport.base import PeerAddress, ip_version, is_loopback, join_host_port, split_host_port
from tesseract_async.transport.throttle import Throttle

if TYPE_CHECKING:
    from tesseract_async.client.remote_expert import RemoteExpert

logger = logging.getLogger(__name__)

MAX_RECEIVE_BYTES = 3 * 2**29
SILENT_SEED_TIMEOUT = 2.5
"""Seconds for asking a seed by TCP that does not answer by UDP."""


class TesseractNode(NodeCalls):
    """One member of the swarm, embedded in the running event loop. Use it as an async context manager.

    UDP (the DHT) and TCP (expert calls) share one port number. Starting never waits for the seeds: the node keeps
    looking for them in the background, and look-ups made meanwhile wait a few seconds for it.

    - `host`, `port`: what to listen on; port 0 takes any free one. The default host is loopback, where only this
      computer can reach the node. ``"::"`` is every interface by IPv6 and IPv4, ``"0.0.0.0"`` by IPv4 only.
    - `initial_peers`: seeds, each ``"host:port"`` (trusted on first use) or ``"host:port/PEER_ID"`` (checked: no other
      peer is accepted there), or several separated by commas, as ``str(node.peer_address)`` gives them.
    - `identity`: an `Identity`, the path of one (created there if missing), or None for a new one each time. Next to
      the file, a node with seeds remembers its contacts, which are asked besides the seeds when it starts again.
    - `announce`: the ``"host:port"`` that others should dial, if it differs from what this node listens on.
    - `public`: this is the first node of a swarm, and all others can reach it. Later nodes find out by themselves.
    - `upnp`: asks the router to let others in, as most home routers do when asked (``pip install -e '.[upnp]'``).
      Other nodes still check that it worked.
    - `relay`: whether this node, if others can dial it, relays for peers that cannot connect otherwise. The traffic is
      limited (`RelaySettings`), and encrypted between those peers.
    - `security`: ``"plain"`` neither authenticates nor encrypts; for a trusted local network, at both ends.
    - `policy`: who may call, train and store here; everybody by default.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        initial_peers: Sequence[str | PeerAddress] = (),
        identity: Identity | str | Path | None = None,
        announce: str | Sequence[str] | None = None,
        public: bool = False,
        upnp: bool = False,
        relay: bool = True,
        security: Literal["tls", "plain"] = "tls",
        policy: Policy | None = None,
        refresh_period: float = 10.0,
        reach: ReachSettings | None = None,
        throttle: Throttle | None = None,
        max_receive_bytes: int = MAX_RECEIVE_BYTES,
    ) -> None:
        """Do no I/O, except that an `identity` given as a path is read or created.

        `refresh_period`: seconds after which the directory of a grid in use is read again. `reach`: what is done about
        NATs. `throttle`: the limits that all connections together keep, a `transport.throttle.Throttle`.
        `max_receive_bytes`: the limit for large messages that are half received or being answered. Replies that wait to
        be taken may hold half as many bytes, small calls under way a quarter.

        Raises: ValueError for seeds that are malformed or no list, for a malformed port or announced address, and for
        `upnp` without its packages; OSError for an identity file that cannot be read.
        """
        if upnp and importlib.util.find_spec("async_upnp_client") is None:
            raise ValueError("upnp=True needs more packages: pip install -e '.[upnp]' in the clone")
        if not 0 <= port < 65536:
            raise ValueError(f"a port is a number from 0 to 65535, not {port}")
        self.initial_peers = _parse_peers(initial_peers)
        self._identity_file = Path(identity).expanduser() if isinstance(identity, str | Path) else None
        is_lasting = identity is not None
        if identity is None:
            identity = Identity.generate()
        elif not isinstance(identity, Identity):
            identity = Identity.load_or_create(identity)
        super().__init__(identity, policy if policy is not None else Policy())
        self.scope = AddressScope()
        """The addresses learned from strangers that this node may send to; known once it is started."""
        self.publisher_places: set[int] = set()
        """The places taken by its servers' `ExpertPublisher`s."""
        self.network = TesseractNetwork(
            identity=identity,
            policy=self.policy,
            metrics=self.metrics,
            peers_file=self._peers_file(),
            checks=[belongs_under_its_key],
            scope=self.scope,
            on_role_change=self._role_changed,
            ask_otherwise=self._ask_silent_seed,
        )
        self.directory = ExpertDirectory(
            self.network, refresh_period=refresh_period, metrics=self.metrics, trust=self.trust, scope=self.scope
        )
        self._host, self._port = host, port
        self._public, self._upnp = public, upnp
        self.throttle = throttle
        """The limits that all connections together keep to; None: none."""
        self._max_receive_bytes = max_receive_bytes
        self._security = security
        self._announce = (announce,) if isinstance(announce, str) else tuple(announce or ())
        for address in self._announce:
            PeerAddress.parse(address)
        self._reach_settings = reach if reach is not None else ReachSettings()
        if not relay:
            self._reach_settings = replace(self._reach_settings, relay=None)
        self._address_watchers: list[Callable[[], None]] = []
        self.twin = asyncio.Event()
        """Set once a node with the same identity is found that was started earlier: this one has withdrawn."""
        self._presence = Presence(self.network, on_older_twin=self._withdraw) if is_lasting else None
        self._watch_for_twin: asyncio.Task[None] | None = None
        self._reach: Reach | None = None
        self.thanks = Thanks()
        """The counts of what servers gave to this node: `publish_progress` tells others."""
        self.run_keepers: list[RunKeeper] = []
        """Each keeps what is known of one run that this node takes part in."""
        self._at_close: list[Callable[[], Awaitable[None]]] = []
        self.client_state: object = None
        """State that the client modules of this node keep in it (`client.experience`)."""

    def _peers_file(self) -> Path | None:
        """Return where contacts are remembered: next to the identity, one file for each swarm, told by its seeds."""
        if self._identity_file is None or not self.initial_peers:
            return None
        seeds = hashlib.sha256(" ".join(sorted(map(str, self.initial_peers))).encode()).hexdigest()[:8]
        return self._identity_file.with_name(f"{self._identity_file.name}.{seeds}.peers")

    async def start(self) -> None:
        """Bind the port, and start the DHT and the endpoint. Cancelled or failed, it leaves nothing behind.

        Raises: OSError with a clear message if the port is in use or the host is not this machine's; RuntimeError if
        the node was started before; ValueError if it listens on every interface and its own address can't be told.
        """
        if self._endpoint is not None:
            raise RuntimeError("this node was started before; make a new one")
        tcp, udp = await bind_pair(self._host, self._port)
        try:
            self._warn_of_seeds_elsewhere(tcp.getsockname()[0])
            reach = self._build(tcp)
            await self.endpoint.start(reach.transports)
            await self.network.start(udp, initial_peers=self.initial_peers, public=self._public)
            reach.start()
            if self._presence is not None:
                self._watch_for_twin = asyncio.create_task(self._presence.run(), name="node: twin")
        except BaseException:  # cancelled, too: nothing half started stays
            await self.aclose()
            tcp.close()
            udp.close()
            raise
        logger.info("node %s listens on %s (UDP and TCP)", self.peer_id.short, self.address)

    async def aclose(self) -> None:
        """Leave the DHT, end all calls and close every socket. Safe to call twice."""
        self._closed = True
        await end(self._watch_for_twin)
        await asyncio.gather(*(aclose() for aclose in self._at_close))
        await self.directory.aclose()
        if self._reach is not None:
            await self._reach.aclose()
        await self.network.aclose()
        if self._endpoint is not None:
            await self._endpoint.aclose()

    def at_close(self, aclose: Callable[[], Awaitable[None]]) -> None:
        """Await ``aclose()`` when this node closes, before its connections end."""
        self._at_close.append(aclose)

    def distrust(self, peer_id: PeerID, reason: str) -> None:
        """From now on, until this node ends, believe nothing that this peer says about experts, and send it nothing.

        `trust.distrusted` lists such peers with the reason.
        """
        self.trust.distrusted[peer_id] = reason
        logger.warning("nothing that %s says is believed any more: %s", peer_id.short, reason)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _withdraw(self) -> None:
        self.network.mute()
        self.twin.set()

    def _build(self, sock: socket.socket) -> Reach:
        host, port = sock.getsockname()[:2]
        self._set_scope(host)
        announced = self._announce
        if not announced:
            known = [split_host_port(address) for peer in self.initial_peers for address in peer.addresses]
            announced = tuple(join_host_port(one, port) for one in hosts_to_announce(host, sock.family, known))
        v6 = (4, 6) if host == "::" else (6,)
        address = ListeningAddress(host, port, announced, versions=v6 if sock.family == socket.AF_INET6 else (4,))
        self._loop = asyncio.get_running_loop()
        self._endpoint = endpoint = Endpoint(
            identity=self.identity,
            settings=EndpointSettings(security=self._security, max_receive_bytes=self._max_receive_bytes),
            policy=self.policy,
            metrics=self.metrics,
            table=self._table,
            grants=self.trust.shown,
            on_grants=self.trust.introduced,
            admits=lambda peer_id: self.trust.admits(peer_id, self._table.uids),
            throttle=self.throttle,
        )
        self._reach = reach = Reach(
            endpoint=endpoint,
            network=self.network,
            address=address,
            sock=sock,
            scope=self.scope,
            on_change=self._addresses_changed,
            public=self._public,
            upnp=self._upnp,
            settings=self._reach_settings,
        )
        return reach

    def _warn_of_seeds_elsewhere(self, own_host: str) -> None:
        seeds = [address for peer in self.initial_peers for address in peer.addresses if ip_version(address)]
        beyond = [one for one in seeds if not is_loopback(split_host_port(one)[0])]
        if beyond and is_loopback(own_host):
            logger.warning(
                "this node listens on %s and reaches this computer only: to join by %s it needs "
                "host='0.0.0.0' (--host 0.0.0.0)",
                own_host,
                ", ".join(beyond),
            )

    def _set_scope(self, own_host: str) -> None:
        """Set where this node lives: the announced addresses, else those it listens on. On loopback, this computer's
        other private addresses count too: they lead back to it."""
        hosts = [own_host]
        if kind_of(own_host) == LOOPBACK:
            hosts += [host for host in own_addresses() if kind_of(host) != PUBLIC]
        elif self._announce:
            hosts = [split_host_port(address)[0] for address in self._announce]
        elif own_host in WILDCARDS:
            hosts = own_addresses()
        seeds = [split_host_port(address)[0] for peer in self.initial_peers for address in peer.addresses]
        self.scope.set_own(hosts, seeds=seeds)

    def _role_changed(self) -> None:
        if self._reach is not None:
            self._reach.look_again()

    async def _ask_silent_seed(self, seed: PeerAddress) -> str:
        try:
            await self.endpoint.call(seed, "node.status", timeout=SILENT_SEED_TIMEOUT, max_reply_bytes=2**20)
        except RemoteError:
            pass
        except (TesseractError, TimeoutError) as error:
            for one in error.attempts.values() if isinstance(error, PeerUnreachable) else ():
                if isinstance(one, UnsupportedVersion):
                    return f"At {seed.short}, {one}."
            return ""
        return f"{seed.short} answers by TCP: is UDP to its port let through?"

    def _addresses_changed(self) -> None:
        self._set_scope(self.reach.address.host)
        for watcher in list(self._address_watchers):
            watcher()

    @property
    def address(self) -> str:
        """The ``"host:port"`` that this node listens on, UDP and TCP. Raises: RuntimeError before `start`."""
        listening = self.reach.address
        return join_host_port(listening.host, listening.port)

    @property
    def peer_address(self) -> PeerAddress:
        """The address by which others reach this node: its id, and its addresses or rendezvous nodes as known now."""
        return PeerAddress(self.peer_id, self.reach.addresses, self.reach.rendezvous_texts)

    @property
    def reach(self) -> Reach:
        """Everything known about the ways to and from this node. Raises: RuntimeError before `start`."""
        if self._reach is None:
            raise RuntimeError(NOT_STARTED)
        return self._reach

    async def wait_reachable(self, timeout: float = 10.0) -> bool:
        """Wait at most `timeout` seconds until it is known how others reach this node; return whether it is known.

        On loopback it is known at once. Elsewhere other nodes are asked, which takes a second or two.
        """
        return await self.reach.wait_known(timeout)

    def watch_address(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Call `watcher` on the loop whenever `peer_address` has changed. Returns a function that ends this."""
        self._address_watchers.append(watcher)
        return lambda: self._address_watchers.remove(watcher)

    def is_connected(self, peer_id: PeerID) -> bool:
        """Return whether `peer_id` is this node or a peer with an open connection, dialed by either side."""
        return peer_id == self.peer_id or self.endpoint.is_connected(peer_id)

    async def get_expert(self, uid: str) -> RemoteExpert:
        """Return the expert `uid`, found through the DHT: a module whose call is awaited.

        Raises: ExpertNotFound naming the uid if no live server hosts it; TimeoutError if no node of the network
        answered, which is not the same; ValueError for a malformed uid; RuntimeError if the node is not running.
        """
        from tesseract_async.client.remote_expert import RemoteExpert  # the one arrow that points up (torch, too)

        split_uid(uid)
        self.check_running()
        self._check_loop()
        replicas = await self.directory.find(uid, even_failed=True)
        if not replicas:
            raise ExpertNotFound(f"no live server hosts the expert {uid}")
        return RemoteExpert(self, uid, replicas)

    async def join_run(self, run: str | SignedRun, *, grant: str | None = None) -> Authority:
        """Take part in the run ``NAME@OWNER``: at this node, uids with its prefix mean that run's experts from now on.

        Peers that may not host there are then neither believed nor sent anything. To train in a run that is not open,
        the node's identity needs a grant: `grant` is the text that the run's owner handed on (or an invite); a grant
        that waits in the network is found without it. If the identity came from a file, what is learned of the run is
        kept next to that file. Joining again is harmless. Returns what is known of the run: who may do what.

        Raises: RunNotFound if the network does not know the run; ValueError for a malformed name, a grant that is not
        this node's, or a second run with the same prefix.
        """
        self.check_running()
        self._check_loop()
        keeper = await enter_run(
            self.network, self.trust, run, identity=self.identity, grant=grant, identity_file=self._identity_file
        )
        keeper.on_own_grant = self.endpoint.say_anew
        self.endpoint.say_anew()
        self.directory.forget(keeper.authority.prefix)
        if not any(one.authority is keeper.authority for one in self.run_keepers):
            self.run_keepers.append(keeper)
            self.at_close(keeper.aclose)
            keeper.start()
        return keeper.authority


def _parse_peers(peers: Sequence[str | PeerAddress]) -> tuple[PeerAddress, ...]:
    """Return one seed for each address of a list with commas. Raises: ValueError for anything but addresses."""
    if isinstance(peers, str | bytes | PeerAddress) or not isinstance(peers, Iterable):
        raise ValueError(f"initial_peers is a list of addresses, such as ['192.0.2.1:31337']; got {peers!r}")
    found: list[PeerAddress] = []
    for peer in peers:
        if not isinstance(peer, str | PeerAddress):
            raise ValueError(f"each of initial_peers is a string, such as '192.0.2.1:31337'; got {peer!r}")
        found += [peer] if isinstance(peer, PeerAddress) else map(PeerAddress.parse, peer.split(","))
    return tuple(found)
