"""The driver of one node's machine: a UDP socket, one timer, and the host names of seeds."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import cast

from tesseract_async.errors import describe
from tesseract_async.identity import PeerID, SignedRecord
from tesseract_async.network.contacts import Address
from tesseract_async.network.events import (
    Isolated,
    Joined,
    NetworkEvent,
    NodeRoleChanged,
    ReadFinished,
    WriteFinished,
    WrongPeer,
)
from tesseract_async.network.joining import Seed
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.transport.base import PeerAddress, join_host_port, split_host_port
from tesseract_async.wire import stun

RESOLVE_BACKOFF = 30.0
"""Longest wait in seconds before a seed's host name is looked up again."""
MAX_PER_TURN = 64
"""The most datagrams that are read in one turn of the loop: others wait for the next turn, after other work that is
due."""
MAX_DATAGRAM_BYTES = 65536
MAPPED = "::ffff:"
"""The prefix of IPv4 addresses at a socket for both kinds of IP."""

logger = logging.getLogger(__name__)


class NetworkDriver(asyncio.DatagramProtocol):
    """The cycle: feed the machine, deliver its events, send its datagrams, arm one timer."""

    def __init__(
        self,
        protocol: NetworkProtocol,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        *,
        has_seeds: bool,
        on_role_change: Callable[[], None],
    ) -> None:
        """`sock` is that of the endpoint whose protocol this will be."""
        self.protocol = protocol
        self.joined = asyncio.Event()
        self.isolated = asyncio.Event()
        self.isolated.set()
        self._metrics = protocol.metrics
        self._loop = loop
        # uvloop reads many datagrams in a turn by itself
        self._sock = sock if isinstance(loop, asyncio.BaseEventLoop) else None
        self._speaks = families(sock)
        self._has_seeds = has_seeds
        self._on_role_change = on_role_change
        self._wrong_peers: dict[Address, tuple[PeerID, PeerID]] = {}
        """The ids that were found at seeds' addresses, and those that were named."""
        self._seed_at: dict[Address, PeerAddress] = {}
        """The seeds that the user gave, by address."""
        self._maps_v4 = socket.AF_INET6 in self._speaks
        self._transport: asyncio.DatagramTransport | None = None
        self._is_over = False
        self._closed: asyncio.Future[None] = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._waiters: dict[int, asyncio.Future[ReadFinished | WriteFinished]] = {}

    def now(self) -> float:
        return self._loop.time()

    async def read(self, key: bytes) -> ReadFinished:
        """Read the entries under `key`. Cancelling it cancels the read. Raises: ConnectionAbortedError if closed."""
        event = await self._wait(self.protocol.read(key, self.now()))
        assert isinstance(event, ReadFinished)
        return event

    async def write(self, records: Sequence[SignedRecord]) -> WriteFinished:
        """Store records. Cancelling it cancels the write. Raises: ConnectionAbortedError if closed."""
        event = await self._wait(self.protocol.write(records, self.now()))
        assert isinstance(event, WriteFinished)
        return event

    async def find_seeds(self, initial: Sequence[PeerAddress], remembered: Sequence[PeerAddress]) -> None:
        """Look up the seeds' host names, again and again until all are known; hand over what is known meanwhile."""
        backoff = 0.5
        while True:
            seeds: list[Seed] = []
            failed = False
            num_initial = 0
            for number, peer in enumerate([*initial, *remembered]):
                for text in peer.addresses:
                    host, port = split_host_port(text)
                    family = self._speaks[0] if len(self._speaks) == 1 else socket.AF_UNSPEC
                    try:
                        infos = await self._loop.getaddrinfo(host, port, family=family, type=socket.SOCK_DGRAM)
                    except OSError as error:
                        failed = True
                        logger.warning("the seed %s cannot be resolved (%s); trying again", text, describe(error))
                        continue
                    found = [(str(info[4][0]).removeprefix(MAPPED), port) for info in infos]
                    seeds += [(address, peer.peer_id) for address in found]
                    if number < len(initial):
                        num_initial = len(seeds)
                        named = self._seed_at if peer.peer_id is None else {}
                        self._seed_at |= {address: peer for address in found if address not in named}
            self.protocol.membership.set_seeds(seeds[:num_initial], self.now(), remembered=seeds[num_initial:])
            self.cycle()
            if not failed:
                return
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, RESOLVE_BACKOFF)

    @property
    def wrong_seeds(self) -> list[str]:
        """A clause for each seed that was given with a peer id, and proves to have another."""
        # two ids that begin alike are written out
        return [
            f"{join_host_port(*where)} proves to be {found.short}, not {named.short}"
            if found.short != named.short
            else f"{join_host_port(*where)} proves to be {found}, not {named}"
            for where, (found, named) in self._wrong_peers.items()
        ]

    def cycle(self) -> None:
        """Deliver what the machine has to say. To be called after everything that is fed to it."""
        if self._transport is None or self._transport.is_closing():
            return
        for event in self.protocol.events():
            self._deliver(event)
        for data, (host, port) in self.protocol.datagrams_to_send():
            if self._maps_v4 and ":" not in host:
                host = MAPPED + host
            try:
                self._transport.sendto(data, (host, port))
            except ValueError:  # uvloop, where the socket does not speak the address' family
                self._metrics.count("network_send_errors")
        self._arm_timer()

    async def aclose(self) -> None:
        """Say farewell and close the socket. Pending reads and writes raise `ConnectionAbortedError`."""
        self.protocol.leave(self.now())
        self.cycle()
        self.joined.set()  # nobody needs to wait for that any longer
        if self._timer is not None:
            self._timer.cancel()
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(ConnectionAbortedError("the network was closed"))
        self._is_over = True
        if self._transport is not None:
            self._transport.close()
            await self._closed

    def abort(self) -> None:
        """End the socket now, without a farewell and what is still to be sent."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        if self._is_over:  # its opening was cancelled: uvloop opens it all the same
            transport.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        now = self._update_clock()
        self._receive(data, addr, now)
        # asyncio reads one datagram in each turn of the loop: where turns are long, the others would be late
        if self._sock is not None:
            with contextlib.suppress(OSError):  # none is left; or what `error_received` is about
                for _ in range(MAX_PER_TURN - 1):
                    self._receive(*self._sock.recvfrom(MAX_DATAGRAM_BYTES), now)
        self.cycle()

    def _receive(self, data: bytes, addr: tuple[str, int], now: float) -> None:
        # IPv6 adds flow and scope, and shows IPv4 peers of a dual-stack socket in its own notation
        address = (addr[0].removeprefix(MAPPED), addr[1])
        if stun.is_stun(data):
            answer = stun.answer(data, address)
            if answer is None:
                self._metrics.count("network_datagrams_dropped", reason="stun")
            elif self._transport is not None:
                self._transport.sendto(answer, addr)
                self._metrics.count("network_stun_answers")
        else:
            self.protocol.receive_datagram(data, address, now)

    def error_received(self, exc: Exception) -> None:
        # an ICMP error for something sent earlier: the call it belongs to will time out, which decides
        self._metrics.count("network_send_errors")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    def _deliver(self, event: NetworkEvent) -> None:
        if isinstance(event, ReadFinished | WriteFinished):
            waiter = self._waiters.get(event.operation)
            if waiter is not None and not waiter.done():
                waiter.set_result(event)
        elif isinstance(event, Joined):
            self.joined.set()
            self.isolated.clear()
            logger.info("joined the network: %d contacts", event.num_contacts)
        elif isinstance(event, Isolated):
            self.joined.clear()
            self.isolated.set()
            if self._has_seeds:
                logger.warning("every contact is gone; looking for the network again")
            else:
                logger.info("the last contact has left; waiting for others")
        elif isinstance(event, NodeRoleChanged):
            logger.info("this node is found to be %s", event.role)
            self._on_role_change()
        elif isinstance(event, WrongPeer):
            seed = self._seed_at.get(event.address)
            if seed is not None and seed.peer_id is not None:
                if self._wrong_peers.get(event.address) != (event.found, seed.peer_id):
                    logger.warning("the seed %s proves to be %s: nothing is said to it", seed, event.found)
                self._wrong_peers[event.address] = (event.found, seed.peer_id)
        else:
            logger.warning("the clock of this computer differs from the others' by %.0f s: set it", event.seconds)

    async def _wait(self, operation: int) -> ReadFinished | WriteFinished:
        waiter: asyncio.Future[ReadFinished | WriteFinished] = self._loop.create_future()
        self._waiters[operation] = waiter
        try:
            self.cycle()
            return await waiter
        finally:
            del self._waiters[operation]
            self.protocol.cancel(operation)

    def _update_clock(self) -> float:
        now = self._loop.time()
        self.protocol.wall_offset = time.time() - now
        return now

    def _handle_timer(self) -> None:
        self._timer = None
        self.protocol.handle_timer(self._update_clock())
        self.cycle()

    def _arm_timer(self) -> None:
        at = self.protocol.timer_at()
        if self._timer is not None:
            # a timer that fires early costs one look; moving it at every datagram would cost more
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(max(at, self._loop.time()), self._handle_timer)
        self._timer_at = at


def families(sock: socket.socket) -> tuple[socket.AddressFamily, ...]:
    if sock.family != socket.AF_INET6:
        return (socket.AF_INET,)
    if sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) or sock.getsockname()[0] != "::":
        return (socket.AF_INET6,)
    return (socket.AF_INET, socket.AF_INET6)
