"""TesseractNetwork: the DHT of one node, as its users see it."""

import asyncio
import logging
import random
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgpack

from tesseract_async.admission import Policy
from tesseract_async.errors import describe
from tesseract_async.files import write_whole
from tesseract_async.identity import Identity, PeerID, SignedRecord
from tesseract_async.lru import LRU
from tesseract_async.metrics import Metrics
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.network.contacts import V4_BYTES, V6_BYTES
from tesseract_async.network.driver import NetworkDriver, families
from tesseract_async.network.entries import Entries, Entry, StoreItem, key_digest, single_view
from tesseract_async.network.holding import RecordCheck
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.network.settings import NetworkSettings
from tesseract_async.network.storage import CLOCK_SKEW, MAX_TTL
from tesseract_async.network.values import decode_value, encode_value
from tesseract_async.tasks import end, in_time
from tesseract_async.transport.base import PeerAddress, join_host_port
from tesseract_async.uncopied import Uncopied
from tesseract_async.wire.packed import Value

RECEIVE_BUFFER_BYTES = 4 * 2**20
"""Loopback drops datagrams too, once this is full."""
MAX_TOLD = 256
"""Keys remembered because the log has told that something is hidden under them."""
WARN_ALONE_AFTER = 5.5
"""Seconds without an answer of any seed, after which a node that is asked for nothing says so: a little more than
`NetworkSettings.join_timeout`, after which those who ask are told by an error instead. People wait 10 s for a sentence,
and starting Python takes its part of that."""
ASK_OTHERWISE_AFTER = 1.5
"""Seconds without an answer by UDP, after which a few seeds are asked in another way: what comes of it is in `trouble`,
which is read when `JOIN_TIMEOUT`, `WARN_ALONE_AFTER` or `NetworkSettings.join_timeout` are over."""
MAX_SEEDS_TOLD = 3
MAX_REMEMBERED_PEERS = 40
ENTRIES_PER_TURN = 1000

logger = logging.getLogger(__name__)


class TesseractNetwork(Uncopied):
    """The distributed hash table, seen from one node: `TesseractNode.network`.

    A *key* holds a single value, or a dictionary from subkeys to values. Entries are signed by the node that stores
    them, expire, and are told apart by (key, subkey, owner): nobody overwrites another's. A node without seeds is a
    network of one until others come. With seeds, reads and writes wait for the first of them to answer, at most
    `NetworkSettings.join_timeout`; then they make do with what there is.

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
        ask_otherwise: Callable[[PeerAddress], Awaitable[str]] | None = None,
    ) -> None:
        """`peers_file` is where contacts are remembered from one run to the next; they are asked besides the seeds.

        `policy` says whose records this node holds (action ``host``). Each of `checks` is asked if a record belongs
        where it is to be stored: its signature holds by then, but its value may be anything; False
        refuses it, True passes it or leaves it to others. `scope`: where this node may send on a stranger's word; by
        default what suits the address that its socket is bound to. `on_role_change` is called on the loop whenever
        `role` has changed. `ask_otherwise` tries to reach a seed that is silent by UDP: its sentence, if any, is in
        `trouble`.
        """
        self.identity = identity
        self.settings = settings
        self.metrics = Metrics() if metrics is None else metrics
        self._protocol: NetworkProtocol | None = None
        self._driver: NetworkDriver | None = None
        self._published: dict[tuple[str, str | None], tuple[int, float]] = {}
        self._peers_file = None if peers_file is None else Path(peers_file)
        self._background: list[asyncio.Task[None]] = []
        self._seeds: tuple[PeerAddress, ...] = ()
        self._has_seeds = False
        self._muted = False
        self._has_told = False
        self._told_hidden: LRU[str, None] = LRU(MAX_TOLD)
        self._policy = policy
        self._checks = tuple(checks)
        self._scope = scope
        self._forced_client = False
        self._on_role_change = on_role_change
        self._ask_otherwise = ask_otherwise
        self._said_otherwise: list[str] = []

    @property
    def peer_id(self) -> PeerID:
        return self.identity.peer_id

    @property
    def num_contacts(self) -> int:
        """Nodes in the routing table."""
        return len(self._protocol.table) if self._protocol is not None else 0

    @property
    def role(self) -> str:
        """``public`` if a third node has dialed this one (or it was declared), ``client`` if none could, or
        ``unknown`` until that is clear. Only public nodes are listed by others and hold their records."""
        if self._forced_client:
            return "client"
        return self._protocol.role if self._protocol is not None else "unknown"

    def public_contacts(self, count: int) -> list[PeerAddress]:
        """Return up to `count` contacts, all public, nearest to this node first. UDP and TCP share the port number."""
        if self._protocol is None:
            return []
        table = self._protocol.table
        return [
            PeerAddress(PeerID(contact.peer_id), (join_host_port(*contact.address),))
            for contact in table.closest(table.own_number, count)
        ]

    def mute(self) -> None:
        """Store and withdraw nothing in this node's name from now on, and have nobody list it.

        For a node whose identity another one has: what that one said would be overwritten.
        """
        self._muted = True
        self.set_client(True)

    def set_client(self, forced: bool) -> None:
        """Make this node a client whatever dial-back says, for example where its TCP port can't be reached."""
        forced = forced or self._muted
        if forced != self._forced_client:
            self._forced_client = forced
            if self._protocol is not None:
                self._protocol.outbox.forced_client = forced
            self._on_role_change()

    async def start(
        self, sock: socket.socket, *, initial_peers: Sequence[PeerAddress] = (), public: bool = False
    ) -> None:
        """Take over a bound, non-blocking UDP socket and begin to look for the network in the background.

        `public` says that this node can be dialed (the first node of a swarm says so itself); a node on loopback
        counts as public anyway. Returns at once: `wait_joined` waits for others.
        """
        assert self._driver is None, "a network is started once"
        loop = asyncio.get_running_loop()
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < RECEIVE_BUFFER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        host, speaks = sock.getsockname()[0], families(sock)
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
            is_declared_public=public or host == "::1" or host.startswith("127."),
            address_bytes=tuple(V6_BYTES if family == socket.AF_INET6 else V4_BYTES for family in speaks),
        )
        protocol.outbox.forced_client = self._forced_client
        self._seeds = tuple(initial_peers)
        remembered = self._remembered_peers()
        self._has_seeds = bool(self._seeds or remembered)
        driver = NetworkDriver(protocol, loop, sock, has_seeds=self._has_seeds, on_role_change=self._on_role_change)
        self._protocol, self._driver = protocol, driver
        await loop.create_datagram_endpoint(lambda: driver, sock=sock)
        if self._has_seeds:
            self._background = [
                loop.create_task(driver.find_seeds(self._seeds, remembered), name="network-seeds"),
                loop.create_task(self._warn_if_alone(), name="network-alone"),
                loop.create_task(self._ask_silent_seeds(), name="network-silent-seeds"),
            ]
        driver.cycle()

    async def aclose(self) -> None:
        """Say farewell and close the socket. Pending reads and writes raise `ConnectionAbortedError`."""
        await end(*self._background)
        self._background = []
        if self._driver is not None:
            driver, self._driver = self._driver, None
            self._remember_peers()
            await driver.aclose()

    def abort(self) -> None:
        """Fall silent at once and without a farewell, as a program does that is killed. `aclose` it afterwards.

        For programs that must end within milliseconds: others find out by themselves, after timeouts.
        """
        if self._driver is not None:
            self._driver.abort()

    async def wait_joined(self, timeout: float | None = None) -> bool:
        """Wait until at least one other node is known, and return True; False after `timeout` seconds.

        True at once where no seeds were given: then others come to this node.
        """
        driver = self._running()
        return not self._has_seeds or await in_time(driver.joined.wait(), timeout)

    @property
    def wrong_seeds(self) -> list[str]:
        """A clause for each seed that was given with a peer id, and proves to have another. Nothing is sent to it."""
        return self._driver.wrong_seeds if self._driver is not None else []

    @property
    def trouble(self) -> str | None:
        """A sentence on why this node knows nobody, where it was given seeds and none of them answers (yet)."""
        if self._driver is None or not self._has_seeds or self._driver.joined.is_set():
            return None
        if wrong := self.wrong_seeds:
            return f"no seed is the node that was asked for: {'; '.join(wrong[:3])}. Check the address and the peer id"
        names = ", ".join(peer.short for peer in self._seeds[:MAX_SEEDS_TOLD]) or "those remembered from the last run"
        said = (
            " ".join(filter(None, self._said_otherwise)) or "Does a node run there, and is UDP to its port let through?"
        )
        return f"no answer from {names}. {said} `tesseract doctor -p ADDRESS` looks closer"

    async def store(self, key: str, value: Value, *, ttl: float, subkey: str | None = None) -> int:
        """Store an entry for `ttl` seconds on the k nodes closest to the key; storing it again renews or replaces it.

        Return how many nodes hold it, this one included where it is among them: 0 means that nobody took it.

        Raises, before anything is sent: ValueError for a value that is over about 900 bytes in msgpack, or a `ttl` over
        a day; ValueError or TypeError for a value that would not come back equal, such as a tuple (see
        `network.values.encode_value`), and for a key or subkey that is not text.
        """
        (num_holders,) = await self.store_many([StoreItem(key, value, ttl, subkey)])
        return num_holders

    async def store_many(self, items: Sequence[StoreItem]) -> list[int]:
        """Store several entries at once. Those that share a key share its lookup, and all share datagrams."""
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
        event = await self._running().write(records)
        counts = list(event.num_holders)
        outdated = [index for index, count in enumerate(counts) if event.num_outdated[index] > count]
        if outdated:
            # before a restart, or by a clock that has been set back since, newer ones were published: go beyond them
            for name in {(items[index].key, items[index].subkey) for index in outdated}:
                await self._recall(*name)
            for index in outdated:
                item = items[index]
                record = self._sign(item.key, item.subkey, values[index], item.ttl)
                counts[index] = (await self._running().write([record])).num_holders[0]
        return counts

    def last_sequence(self, key: str, *, subkey: str | None = None) -> int:
        """Return the sequence of this node's entry as it stored it last; 0 if it has not."""
        return self._published.get((key, subkey), (0, 0.0))[0]

    async def get(self, key: str) -> Value:
        """Return what the network holds under `key`: None, a single value, or a dictionary of the subkeys' values.

        Where several owners stored the same (key, subkey), the entry with the highest (sequence, owner) is shown, and
        entries with subkeys hide those without; the log tells of what is hidden, and `get_entries` shows all, with
        owner and expiration. Expired and withdrawn entries are not seen. Raises: as `get_entries`.
        """
        entries = await self.get_entries(key)
        shown = single_view(entries)
        num_hidden = len(entries) - (len(shown) if isinstance(shown, dict) else bool(entries))
        if num_hidden and key not in self._told_hidden:
            self._told_hidden[key] = None
            logger.warning("get(%.80r) hides %d entries of other owners: get_entries() shows all", key, num_hidden)
        return shown

    async def get_many(self, keys: Sequence[str]) -> list[Value]:
        """Get several keys at once, see `get`."""
        return list(await asyncio.gather(*(self.get(key) for key in keys)))

    async def get_entries(self, key: str) -> Entries:
        """Return all live entries under `key`, those of different owners side by side, by subkey, owner.

        Raises: TimeoutError if nobody answered within `NetworkSettings.join_timeout` though this node has seeds: that
        is not the same as nothing being there.
        """
        give_up_at = self._running().now() + self.settings.join_timeout
        driver = await self._ready()
        event = await self._running().read(key_digest(key))
        while not event.num_answers and not event.records and self._has_seeds:
            # nobody has answered yet, or every contact failed at once (a line that was down): joining comes first
            self.metrics.count("network_reads_unanswered")
            left = give_up_at - driver.now()
            if left <= 0 or not await self.wait_joined(left):
                raise TimeoutError(self.trouble or f"no node answered within {self.settings.join_timeout:.0f} s")
            event = await self._running().read(key_digest(key))
        if not event.complete:
            # holders vanished in the middle of it; others have the same
            self.metrics.count("network_reads_incomplete")
            event = await self._running().read(key_digest(key))
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
        """Withdraw this node's entry, by a signed tombstone that its holders keep until the entry has expired.

        Return how many nodes hold the tombstone. An entry from before a restart is looked up first.
        """
        await self._ready()
        if self._muted:
            return 0
        if (key, subkey) not in self._published:
            await self._recall(key, subkey)
        _, expiration = self._published.get((key, subkey), (0, 0.0))
        ttl = max(expiration - time.time(), 0.0) + CLOCK_SKEW
        record = self._sign(key, subkey, b"", ttl, tombstone=True)
        event = await self._running().write([record])
        return event.num_holders[0]

    def _remembered_peers(self) -> list[PeerAddress]:
        if self._peers_file is None:
            return []
        try:
            return [PeerAddress.parse(line) for line in self._peers_file.read_text().split()]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            logger.warning("the remembered peers in %s cannot be read: %s", self._peers_file, describe(error))
            return []

    def _remember_peers(self) -> None:
        contacts = self.public_contacts(MAX_REMEMBERED_PEERS)
        if self._peers_file is None or not contacts:
            return
        try:
            write_whole(self._peers_file, [f"{peer}\n".encode() for peer in contacts])
        except OSError as error:
            logger.warning("the peers cannot be remembered in %s: %s", self._peers_file, describe(error))

    def _running(self) -> NetworkDriver:
        if self._driver is None:
            raise RuntimeError("this network has not been started, or is closed")
        return self._driver

    async def _ready(self) -> NetworkDriver:
        """Return the driver, once the network is joined or `join_timeout` has passed since the call."""
        driver = self._running()
        if not driver.joined.is_set():
            await self.wait_joined(self.settings.join_timeout)
        return self._running()

    async def _recall(self, key: str, subkey: str | None) -> None:
        """Learn from the network what this identity published before a restart."""
        for record in (await self._running().read(key_digest(key))).records:
            if record.subkey == subkey and record.owner == self.peer_id:
                sequence, expiration = self._published.get((key, subkey), (0, 0.0))
                self._published[(key, subkey)] = (max(sequence, record.sequence), max(expiration, record.expiration))

    def _sign(self, key: str, subkey: str | None, value: bytes, ttl: float, *, tombstone: bool = False) -> SignedRecord:
        if subkey is not None and not isinstance(subkey, str):
            raise TypeError(f"a subkey is text or None, not {type(subkey).__name__}")
        limit = MAX_TTL + CLOCK_SKEW * tombstone
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

    async def _warn_if_alone(self) -> None:
        driver = self._running()
        while True:
            if not await self.wait_joined(WARN_ALONE_AFTER):
                self._tell_trouble()
                await driver.joined.wait()
            self._has_told = False
            await driver.isolated.wait()

    async def _ask_silent_seeds(self) -> None:
        if self._ask_otherwise is not None and not await self.wait_joined(ASK_OTHERWISE_AFTER):
            self._said_otherwise = await asyncio.gather(*map(self._ask_otherwise, self._seeds[:MAX_SEEDS_TOLD]))

    def _tell_trouble(self) -> None:
        if not self._has_told and (trouble := self.trouble) is not None:
            self._has_told = True
            logger.warning("%s", trouble)
