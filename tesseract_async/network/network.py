"""TesseractNetwork: the DHT of one node on an asyncio loop. UDP and timers; everything else is `network.protocol`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgpack

from tesseract_async.admission import Policy
from tesseract_async.errors import describe
from tesseract_async.identity import Identity, PeerID, SignedRecord
from tesseract_async.metrics import Metrics
from tesseract_async.network.contacts import V4_BYTES, V6_BYTES, Address
from tesseract_async.network.events import (
    ClockSkewed,
    Isolated,
    Joined,
    ReadFinished,
    RoleChanged,
    WriteFinished,
    WrongPeer,
)
from tesseract_async.network.holding import RecordCheck
from tesseract_async.network.joining import Seed
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.network.settings import CLOCK_SKEW, NetworkSettings
from tesseract_async.network.values import decode_value, encode_value
from tesseract_async.transport.address_scope import AddressScope
from tesseract_async.transport.base import PeerAddress, join_host_port, split_host_port
from tesseract_async.uncopied import Uncopied
from tesseract_async.wire import stun

RECEIVE_BUFFER_BYTES = 4 * 2**20
"""Loopback drops datagrams too, once this is full."""
RESOLVE_BACKOFF = 30.0
"""Longest wait before a seed's host name is looked up again."""

MAX_TOLD = 256
"""Keys of which is remembered that something is hidden under them."""
WARN_ALONE_AFTER = 11.0
"""Seconds without an answer of any seed, after which a node that is asked for nothing says so."""
MAX_REMEMBERED_PEERS = 40
MAPPED = "::ffff:"
"""How a socket for both kinds of IP writes IPv4 addresses."""
FAMILY_BYTES = {socket.AF_INET: V4_BYTES, socket.AF_INET6: V6_BYTES}
"""Bytes of a packed address."""
ENTRIES_PER_TURN = 1000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreItem:
    """One item of `TesseractNetwork.store_many`; the fields are `store`'s arguments."""

    key: str
    value: Any
    ttl: float
    subkey: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One live entry of the network, as its owner signed it."""

    key: str
    subkey: str | None
    owner: PeerID
    sequence: int
    """Rises with every store of the same entry."""
    expiration: float
    """Wall-clock seconds (``time.time()``)."""
    value: Any


class Entries(list[Entry]):
    """What `TesseractNetwork.get_entries` returns."""

    complete = True
    """False where holders reported entries that none of them could be made to send."""


def key_digest(key: str) -> bytes:
    """Where in the id space a key lives. Raises: TypeError for what is no text; ValueError for lone surrogates."""
    if not isinstance(key, str):
        raise TypeError(f"a key is text, not {type(key).__name__}")
    return hashlib.sha256(key.encode()).digest()


class TesseractNetwork(Uncopied):
    """The distributed hash table, seen from one node: `TesseractNode.network`.

    A *key* holds a single value, or a dictionary from subkeys to values. Entries are signed by the node that stores
    them, expire, and are told apart by (key, subkey, owner): nobody overwrites another's. A node without seeds is a
    network of one until others come. With seeds, reads and writes wait for the first of them to answer, at most
    `NetworkSettings.join_timeout`; then they do with what there is.

    Cancelling a read or a write ends it here; what holders have taken by then stays with them. Both raise RuntimeError
    while the network is not running, and ConnectionAbortedError if it is closed meanwhile.

    Kademlia (Maymounkov & Mazieres 2002), with disjoint paths (Baumgart & Mies 2007).
    """

    def __init__(
        self,
        *,
        identity: Identity,
        settings: NetworkSettings = NetworkSettings(),  # noqa: B008 (frozen)
        metrics: Metrics | None = None,
        peers_file: str | Path | None = None,
        policy: Policy = Policy(),  # noqa: B008 (frozen)
        checks: Sequence[RecordCheck] = (),
        scope: AddressScope | None = None,
        on_role_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`peers_file` is where contacts are remembered from one run to the next; they are asked beside the seeds.

        `policy` says whose records this node holds (action ``store``), and every one of `checks` that a record belongs
        where somebody wants it stored: the signature holds by then, but its value is anybody's, and a check returns
        False for what it does not like and True for what is not of its kind. `scope`: where this node may send on a
        stranger's word; by default what suits the address that its socket is bound to. `on_role_change` is called
        on the loop whenever `role` has changed.
        """
        self.identity = identity
        self.settings = settings
        self.metrics = Metrics() if metrics is None else metrics
        self._protocol: NetworkProtocol | None = None
        self._driver: _Driver | None = None
        self._published: dict[tuple[str, str | None], tuple[int, float]] = {}
        self._peers_file = None if peers_file is None else Path(peers_file)
        self._background: list[asyncio.Task[None]] = []
        self._seeds: tuple[PeerAddress, ...] = ()
        self._has_seeds = False
        self._muted = False
        self._has_told = False
        self._told_hidden: set[str] = set()
        self._policy = policy
        self._checks = tuple(checks)
        self._scope = scope
        self._forced_client = False
        self._on_role_change = on_role_change

    @property
    def peer_id(self) -> PeerID:
        """This node's id."""
        return self.identity.peer_id

    @property
    def num_contacts(self) -> int:
        """Nodes in the routing table."""
        return len(self._protocol.table) if self._protocol is not None else 0

    @property
    def role(self) -> str:
        """``public`` if a third node has dialled this one (or it was declared), ``client`` if none could, or
        ``unknown`` until that is clear. Only public nodes are listed by others and hold their records."""
        if self._forced_client:
            return "client"
        return self._protocol.dialback.role if self._protocol is not None else "unknown"

    @property
    def observed(self) -> dict[PeerID, str]:
        """Where the latest contacts see this node's UDP socket, as ``host:port``."""
        seen = self._protocol.observed if self._protocol is not None else {}
        return {peer_id: join_host_port(*address) for peer_id, address in seen.items()}

    def public_contacts(self, count: int) -> list[PeerAddress]:
        """Up to `count` contacts, all public, nearest to this node first. UDP and TCP share the port number."""
        if self._protocol is None:
            return []
        table = self._protocol.table
        return [
            PeerAddress(PeerID(contact.peer_id), (join_host_port(*contact.address),))
            for contact in table.closest(table.own_number, count)
        ]

    def mute(self) -> None:
        """From now on nothing is stored or withdrawn in this node's name, and nobody lists it: another node has its
        identity, and what it said would be overwritten."""
        self._muted = True
        self.set_client(True)

    def set_client(self, forced: bool) -> None:
        """Makes this node a client whatever dial-back says: where its other ports can't be reached, for one."""
        forced = forced or self._muted
        if forced != self._forced_client:
            self._forced_client = forced
            if self._protocol is not None:
                self._protocol.dialback.forced_client = forced
            self._on_role_change()

    async def start(
        self, sock: socket.socket, *, initial_peers: Sequence[PeerAddress] = (), public: bool = False
    ) -> None:
        """Takes over a bound, non-blocking UDP socket and begins to look for the network in the background.

        `public` says that this node can be dialled (the first node of a swarm says so itself); a node on loopback
        counts as public anyway. Returns at once: `wait_joined` waits for others.
        """
        assert self._driver is None, "a network is started once"
        loop = asyncio.get_running_loop()
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < RECEIVE_BUFFER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        host = sock.getsockname()[0]
        protocol = NetworkProtocol(
            identity=self.identity,
            settings=self.settings,
            random=random.SystemRandom(),
            metrics=self.metrics,
            now=loop.time(),
            wall_offset=time.time() - loop.time(),
            policy=self._policy,
            checks=self._checks,
            scope=self._scope if self._scope is not None else AddressScope([host]),
            public=public or host == "::1" or host.startswith("127."),
        )
        protocol.dialback.forced_client = self._forced_client
        driver = _Driver(protocol, loop, speaks=_families(sock), on_role_change=self._on_role_change)
        protocol.address_bytes = tuple(FAMILY_BYTES[family] for family in driver.speaks)
        await loop.create_datagram_endpoint(lambda: driver, sock=sock)
        self._protocol, self._driver = protocol, driver
        self._seeds = tuple(initial_peers)
        remembered = self._remembered_peers()
        self._has_seeds = driver.has_seeds = bool(self._seeds or remembered)
        if self._has_seeds:
            self._background = [
                loop.create_task(self._resolve(self._seeds, remembered), name="network-seeds"),
                loop.create_task(self._warn_if_alone(), name="network-alone"),
            ]
        driver.cycle()

    async def aclose(self) -> None:
        """Says farewell and closes the socket. Pending reads and writes raise `ConnectionAbortedError`."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._background = []
        if self._driver is not None:
            driver, self._driver = self._driver, None
            self._remember_peers()
            await driver.aclose()

    async def wait_joined(self, timeout: float | None = None) -> bool:
        """Waits until at least one other node is known, and returns True; False after `timeout` seconds.

        True at once where no seeds were given: then others come to us.
        """
        driver = self._running()
        if not self._has_seeds:
            return True
        try:
            async with asyncio.timeout(timeout):
                await driver.joined.wait()
        except TimeoutError:
            return False
        return True

    @property
    def wrong_seeds(self) -> list[str]:
        """A clause for each seed that was given with a peer id, and proves to be another. Nothing is said to it."""
        driver = self._driver
        found = driver.wrong_peers.items() if driver is not None else ()
        # two ids that begin alike are written out
        return [
            f"{join_host_port(*where)} proves to be {who.short}, not {asked.short}"
            if who.short != asked.short
            else f"{join_host_port(*where)} proves to be {who}, not {asked}"
            for where, (who, asked) in found
        ]

    @property
    def trouble(self) -> str | None:
        """A sentence on why this node knows nobody, where it was given seeds and none of them answers (yet)."""
        if self._driver is None or not self._has_seeds or self._driver.joined.is_set():
            return None
        if wrong := self.wrong_seeds:
            return f"no seed is the node that was asked for: {'; '.join(wrong[:3])}. Check the address and the peer id"
        names = ", ".join(peer.short for peer in self._seeds[:3]) or "those remembered from the last run"
        return (
            f"no answer from {names}. Does a node run there, and is UDP to its port let through?"
            " `tesseract doctor -p ADDRESS` looks closer"
        )

    async def store(self, key: str, value: Any, *, ttl: float, subkey: str | None = None) -> int:
        """Stores an entry for `ttl` seconds on the k nodes closest to the key; storing it again renews or replaces it.

        Returns how many nodes hold it, this one included where it is among them: 0 means that nobody took it.

        Raises, before anything is sent: ValueError for a value that is over about 900 bytes in msgpack, or a `ttl` that
        the settings do not allow; ValueError or TypeError for a value that would not come back equal, such as a tuple
        (see `network.values.encode_value`), and for a key or subkey that is no text.
        """
        (num_holders,) = await self.store_many([StoreItem(key, value, ttl, subkey)])
        return num_holders

    async def store_many(self, items: Sequence[StoreItem]) -> list[int]:
        """`store` for several entries at once. Those that share a key share its lookup, and all share datagrams."""
        self._running()
        # everything is signed, and so checked, before anything is sent
        values = [encode_value(item.value) for item in items]
        for item, value in zip(items, values, strict=True):
            self._sign(item.key, item.subkey, value, item.ttl)
        await self._ready()
        self._tell_trouble()
        if not items or self._muted:
            return [0] * len(items)
        # anew: a network that was not joined yet may have taken a while
        records = [
            self._sign(item.key, item.subkey, value, item.ttl) for item, value in zip(items, values, strict=True)
        ]
        event = await self._write(records)
        counts = list(event.num_holders)
        outdated = [index for index, count in enumerate(counts) if event.num_outdated[index] > count]
        if outdated:
            # before a restart, or by a clock that has been set back since, newer ones were published: go beyond them
            for name in {(items[index].key, items[index].subkey) for index in outdated}:
                await self._recall(*name)
            for index in outdated:
                item = items[index]
                record = self._sign(item.key, item.subkey, values[index], item.ttl)
                counts[index] = (await self._write([record])).num_holders[0]
        return counts

    def last_sequence(self, key: str, *, subkey: str | None = None) -> int:
        """The sequence of this node's entry as it stored it last; 0 if it has not."""
        return self._published.get((key, subkey), (0, 0.0))[0]

    async def get(self, key: str) -> Any:
        """What the network holds under `key`: None, a single value, or a dictionary of the live subkeys' values.

        Where several owners stored the same (key, subkey), the entry with the highest (sequence, owner) is shown, and
        entries with subkeys hide those without; the log tells of what is hidden, and `get_entries` shows all, with
        owner and expiration. Expired and withdrawn entries are not seen. Raises: as `get_entries`.
        """
        entries = await self.get_entries(key)
        shown = _view(entries)
        num_hidden = len(entries) - (len(shown) if isinstance(shown, dict) else bool(entries))
        if num_hidden and key not in self._told_hidden:
            self._told_hidden = {*list(self._told_hidden)[-MAX_TOLD:], key}
            logger.warning("get(%.80r) hides %d entries of other owners: get_entries() shows all", key, num_hidden)
        return shown

    async def get_many(self, keys: Sequence[str]) -> list[Any]:
        """`get` for several keys at once."""
        return list(await asyncio.gather(*(self.get(key) for key in keys)))

    async def get_entries(self, key: str) -> Entries:
        """All live entries under `key`, those of different owners side by side, by subkey, owner.

        Raises: TimeoutError if nobody answered within `NetworkSettings.join_timeout` though this node has seeds: that
        is not the same as nothing being there.
        """
        give_up_at = self._running().now() + self.settings.join_timeout
        driver = await self._ready()
        event = await self._read(key)
        while not event.num_answers and not event.records and self._has_seeds:
            # nobody has answered yet, or every contact failed at once (a line that was down): joining comes first
            self.metrics.count("network_reads_unanswered")
            left = give_up_at - driver.now()
            if left <= 0 or not await self.wait_joined(left):
                raise TimeoutError(self.trouble or f"no node answered within {self.settings.join_timeout:.0f} s")
            event = await self._read(key)
        if not event.complete:
            # holders vanished in the middle of it; others have the same
            self.metrics.count("network_reads_incomplete")
            event = await self._read(key)
        wall = time.time()
        entries = Entries()
        entries.complete = event.complete
        for index, record in enumerate(event.records):
            if index % ENTRIES_PER_TURN == ENTRIES_PER_TURN - 1:
                await asyncio.sleep(0)  # a large dictionary takes a while to unpack
            if record.tombstone or record.expiration <= wall:
                continue
            try:
                value = decode_value(record.value)
            except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
                self.metrics.count("network_values_unreadable")
                continue
            entries.append(Entry(key, record.subkey, record.owner, record.sequence, record.expiration, value))
        entries.sort(key=lambda entry: (entry.subkey is not None, entry.subkey or "", entry.owner))
        return entries

    async def withdraw(self, key: str, *, subkey: str | None = None) -> int:
        """Withdraws this node's entry, by a signed tombstone that its holders keep until the entry has expired.

        Returns how many nodes hold the tombstone. An entry of before a restart is looked up first.
        """
        await self._ready()
        if self._muted:
            return 0
        if (key, subkey) not in self._published:
            await self._recall(key, subkey)
        _, expiration = self._published.get((key, subkey), (0, 0.0))
        ttl = max(expiration - time.time(), 0.0) + CLOCK_SKEW
        record = self._sign(key, subkey, b"", ttl, tombstone=True)
        event = await self._write([record])
        return event.num_holders[0]

    # Inside

    def _remembered_peers(self) -> list[PeerAddress]:
        if self._peers_file is None or not self._peers_file.exists():
            return []
        try:
            return [PeerAddress.parse(line) for line in self._peers_file.read_text().split()]
        except (OSError, ValueError) as error:
            logger.warning("the remembered peers in %s cannot be read: %s", self._peers_file, describe(error))
            return []

    def _remember_peers(self) -> None:
        contacts = self.public_contacts(MAX_REMEMBERED_PEERS)
        if self._peers_file is None or not contacts:
            return
        try:
            self._peers_file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._peers_file.with_suffix(".new")
            fresh.write_text("".join(f"{peer}\n" for peer in contacts))
            fresh.replace(self._peers_file)
        except OSError as error:
            logger.warning("the peers cannot be remembered in %s: %s", self._peers_file, describe(error))

    def _running(self) -> _Driver:
        if self._driver is None:
            raise RuntimeError("this network has not been started, or is closed")
        return self._driver

    async def _ready(self) -> _Driver:
        """The driver, once the network is joined or `join_timeout` has passed since the call."""
        driver = self._running()
        if not driver.joined.is_set():
            await self.wait_joined(self.settings.join_timeout)
        return self._running()

    async def _recall(self, key: str, subkey: str | None) -> None:
        """Learns from the network what this identity published before a restart."""
        for record in (await self._read(key)).records:
            if record.subkey == subkey and record.owner == self.peer_id:
                sequence, expiration = self._published.get((key, subkey), (0, 0.0))
                self._published[(key, subkey)] = (max(sequence, record.sequence), max(expiration, record.expiration))

    def _sign(self, key: str, subkey: str | None, value: bytes, ttl: float, *, tombstone: bool = False) -> SignedRecord:
        if subkey is not None and not isinstance(subkey, str):
            raise TypeError(f"a subkey is text or None, not {type(subkey).__name__}")
        limit = self.settings.max_ttl + CLOCK_SKEW * tombstone
        if not 0 < ttl <= limit:
            raise ValueError(f"ttl must be between 0 and {limit} seconds, not {ttl}")
        now = time.time()
        last, hidden = self._published.get((key, subkey), (0, 0.0))
        sequence = max(last + 1, int(now * 1e6))
        expiration = now + ttl
        record = SignedRecord.sign(
            self.identity,
            key_digest(key),
            subkey=subkey,
            sequence=sequence,
            expiration=expiration,
            value=value,
            tombstone=tombstone,
        )
        self._published[(key, subkey)] = (sequence, max(expiration, hidden))
        return record

    async def _read(self, key: str) -> ReadFinished:
        driver = self._running()
        return cast(ReadFinished, await driver.wait(driver.protocol.read(key_digest(key), driver.now())))

    async def _write(self, records: list[SignedRecord]) -> WriteFinished:
        driver = self._running()
        return cast(WriteFinished, await driver.wait(driver.protocol.write(records, driver.now())))

    async def _warn_if_alone(self) -> None:
        """Says so once each time that nobody answers for a while."""
        driver = self._running()
        while True:
            if not await self.wait_joined(WARN_ALONE_AFTER):
                self._tell_trouble()
                await driver.joined.wait()
            self._has_told = False
            await driver.isolated.wait()

    def _tell_trouble(self) -> None:
        if not self._has_told and (trouble := self.trouble) is not None:
            self._has_told = True
            logger.warning("%s", trouble)

    async def _resolve(self, initial: Sequence[PeerAddress], remembered: Sequence[PeerAddress]) -> None:
        """Looks up the seeds' host names, again and again until all are known, and hands over what it has."""
        driver = self._running()
        backoff = 0.5
        while True:
            seeds: list[Seed] = []
            failed = False
            num_initial = 0
            for number, peer in enumerate([*initial, *remembered]):
                for text in peer.addresses:
                    host, port = split_host_port(text)
                    family = driver.speaks[0] if len(driver.speaks) == 1 else socket.AF_UNSPEC
                    try:
                        infos = await driver.loop.getaddrinfo(host, port, family=family, type=socket.SOCK_DGRAM)
                    except OSError as error:
                        failed = True
                        logger.warning("the seed %s cannot be resolved (%s); trying again", text, describe(error))
                        continue
                    found = [(str(info[4][0]).removeprefix(MAPPED), port) for info in infos]
                    seeds += [(address, peer.peer_id) for address in found]
                    if number < len(initial):
                        num_initial = len(seeds)
                        named = driver.seed_at if peer.peer_id is None else {}
                        driver.seed_at |= {address: peer for address in found if address not in named}
            driver.protocol.set_seeds(seeds[:num_initial], driver.now(), remembered=seeds[num_initial:])
            driver.cycle()
            if not failed:
                return
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, RESOLVE_BACKOFF)


class _Driver(asyncio.DatagramProtocol):
    """The cycle: feed the machine, deliver its events, send its datagrams, arm one timer."""

    def __init__(
        self,
        protocol: NetworkProtocol,
        loop: asyncio.AbstractEventLoop,
        *,
        speaks: tuple[socket.AddressFamily, ...],
        on_role_change: Callable[[], None],
    ) -> None:
        self.protocol = protocol
        self.on_role_change = on_role_change
        self.loop = loop
        self.speaks = speaks
        self.joined = asyncio.Event()
        self.isolated = asyncio.Event()
        self.isolated.set()
        self.wrong_peers: dict[Address, tuple[PeerID, PeerID]] = {}
        """Who lives at seeds' addresses, and who was named."""
        self.seed_at: dict[Address, PeerAddress] = {}
        """Which of the seeds that the user gave lives where."""
        self.has_seeds = False
        self._maps_v4 = socket.AF_INET6 in speaks
        self._transport: asyncio.DatagramTransport | None = None
        self._closed: asyncio.Future[None] = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._waiters: dict[int, asyncio.Future[ReadFinished | WriteFinished]] = {}

    def now(self) -> float:
        return self.loop.time()

    async def wait(self, operation: int) -> ReadFinished | WriteFinished:
        """The event that ends an operation that has just been started. Cancelling the wait cancels the operation."""
        waiter: asyncio.Future[ReadFinished | WriteFinished] = self.loop.create_future()
        self._waiters[operation] = waiter
        try:
            self.cycle()
            return await waiter
        finally:
            del self._waiters[operation]
            self.protocol.cancel(operation)

    def cycle(self) -> None:
        """Delivers what the machine has to say. To be called after everything that is fed to it."""
        if self._transport is None or self._transport.is_closing():
            return
        for event in self.protocol.events():
            if isinstance(event, Joined):
                self.joined.set()
                self.isolated.clear()
                logger.info("joined the network: %d contacts", event.num_contacts)
            elif isinstance(event, Isolated):
                self.joined.clear()
                self.isolated.set()
                if self.has_seeds:
                    logger.warning("every contact is gone; looking for the network again")
                else:
                    logger.info("the last contact has left; waiting for others")
            elif isinstance(event, RoleChanged):
                logger.info("this node is found to be %s", event.role)
                self.on_role_change()
            elif isinstance(event, WrongPeer):
                seed = self.seed_at.get(event.address)
                if seed is not None and seed.peer_id is not None:
                    if self.wrong_peers.get(event.address) != (event.found, seed.peer_id):
                        logger.warning("the seed %s proves to be %s: nothing is said to it", seed, event.found)
                    self.wrong_peers[event.address] = (event.found, seed.peer_id)
            elif isinstance(event, ClockSkewed):
                logger.warning("the clock of this computer differs from the others' by %.0f s: set it", event.seconds)
            else:
                waiter = self._waiters.get(event.operation)
                if waiter is not None and not waiter.done():
                    waiter.set_result(event)
        for data, (host, port) in self.protocol.datagrams_to_send():
            if self._maps_v4 and ":" not in host:
                host = MAPPED + host
            try:
                self._transport.sendto(data, (host, port))
            except ValueError:  # uvloop, where the socket does not speak the address' family
                self.protocol.metrics.count("network_send_errors")
        self._arm_timer()

    async def aclose(self) -> None:
        """Farewell, then nothing more."""
        self.protocol.leave(self.now())
        self.cycle()
        self.joined.set()  # nobody needs to wait for that any longer
        if self._timer is not None:
            self._timer.cancel()
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(ConnectionAbortedError("the network was closed"))
        if self._transport is not None:
            self._transport.close()
            await self._closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        now = self.loop.time()
        self.protocol.wall_offset = time.time() - now
        # IPv6 adds flow and scope, and shows IPv4 peers of a dual-stack socket in its own notation
        host = addr[0].removeprefix(MAPPED)
        if stun.is_stun(data):
            self._answer_stun(data, host, addr)
            return
        self.protocol.receive_datagram(data, (host, addr[1]), now)
        self.cycle()

    def _answer_stun(self, data: bytes, host: str, addr: Any) -> None:
        """Tells whoever asks under which address it is seen: hole punching needs that."""
        answer = stun.answer(data, (host, addr[1]))
        if answer is None:
            self.protocol.metrics.count("network_datagrams_dropped", reason="stun")
        elif self._transport is not None:
            self._transport.sendto(answer, addr)
            self.protocol.metrics.count("network_stun_answers")

    def error_received(self, exc: Exception) -> None:
        # an ICMP error for something sent earlier: the call it belongs to will time out, which decides
        self.protocol.metrics.count("network_send_errors")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    def _handle_timer(self) -> None:
        self._timer = None
        now = self.loop.time()
        self.protocol.wall_offset = time.time() - now
        self.protocol.handle_timer(now)
        self.cycle()

    def _arm_timer(self) -> None:
        at = self.protocol.timer_at()
        if self._timer is not None:
            # a timer that fires early costs one look; moving it at every datagram would cost more
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(max(at, self.loop.time()), self._handle_timer)
        self._timer_at = at


def _families(sock: socket.socket) -> tuple[socket.AddressFamily, ...]:
    """The kinds of addresses that this socket can send to."""
    if sock.family != socket.AF_INET6:
        return (socket.AF_INET,)
    if sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) or sock.getsockname()[0] != "::":
        return (socket.AF_INET6,)
    return (socket.AF_INET, socket.AF_INET6)


def _view(entries: Sequence[Entry]) -> Any:
    best: dict[str | None, Entry] = {}
    for entry in entries:
        shown = best.get(entry.subkey)
        if shown is None or (entry.sequence, entry.owner) > (shown.sequence, shown.owner):
            best[entry.subkey] = entry
    single = best.pop(None, None)
    if best:
        return {subkey: entry.value for subkey, entry in best.items()}
    return None if single is None else single.value
