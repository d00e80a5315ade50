"""Many nodes of the real protocol over a simulated network: latency, loss, duplication, gateways, partitions, churn.

Only the network between the nodes and the signatures (`SimulatedIdentity`) are simulated. The nodes run
`network.protocol.NetworkProtocol`, the code that `TesseractNetwork` drives, too.
"""

import copy
import hashlib
import random
import statistics
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

import msgpack

from tesseract_async.identity import Identity, PeerID, SignedRecord
from tesseract_async.metrics import Metrics
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.network.contacts import Address, Contact
from tesseract_async.network.entries import Entry, single_view
from tesseract_async.network.events import Joined, NetworkEvent, ReadFinished, WriteFinished
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.network.routing_table import ID_BITS, K
from tesseract_async.network.settings import NetworkSettings
from tesseract_async.testing.clock import VirtualClock
from tesseract_async.wire.packed import Value

Latency = Callable[[Address, Address, random.Random], float]
"""One-way delay in seconds of one datagram from one address to another."""

WALL_AT_START = 1_700_000_000.0
GATEWAY_MEMORY = 120.0
"""Seconds for which a simulated gateway lets answers in."""


def log_normal_latency(*, median_rtt: float, sigma: float, jitter: float = 0.1) -> Latency:
    """Return round trips that are log-normal over pairs of nodes, and vary by a share of `jitter` for one pair."""
    steps = 4096
    normal = statistics.NormalDist()
    factors = [median_rtt / 2 * 2.718281828459045 ** (sigma * normal.inv_cdf((i + 0.5) / steps)) for i in range(steps)]

    def delay(source: Address, target: Address, rng: random.Random) -> float:
        low, high = sorted((f"{source[0]}:{source[1]}", f"{target[0]}:{target[1]}"))
        base = factors[zlib.crc32(f"{low}-{high}".encode()) % steps]
        return float(base * (1 + jitter * rng.random()))

    return delay


class SimulatedIdentity(Identity):
    """An identity whose signatures are keyed hashes, 50 times faster than Ed25519.

    Within one simulation they are as good: `SimulatedNetwork.verify` accepts only what the identity signed.
    """

    __slots__ = ()

    def __init__(self, seed: bytes) -> None:
        self._secret = hashlib.blake2b(seed, digest_size=32).digest()
        self.public_key = hashlib.blake2b(self._secret, digest_size=32).digest()
        self.peer_id = PeerID.from_public_key(self.public_key)

    def sign(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._secret, digest_size=64).digest()


class SimulatedNode:
    """One node: a machine, its address, and its reads and writes in progress."""

    def __init__(
        self, network: "SimulatedNetwork", protocol: NetworkProtocol, address: Address, *, gateway: bool
    ) -> None:
        self.network = network
        self.protocol = protocol
        self.address = address
        self.gateway = gateway
        """True if it is behind a gateway that lets in only answers from addresses that it wrote to."""
        self.alive = True
        self.joined = False
        self.events: list[NetworkEvent] = []
        """All events except for ends of reads and writes."""
        self.num_sent = 0
        self.num_bytes_sent = 0
        self._armed_at = float("inf")
        self._waiting: dict[int, Callable[..., None]] = {}
        self._written_to: dict[Address, float] = {}
        self._sequence = 0

    def read(self, key: str, done: Callable[[ReadFinished], None]) -> None:
        self._waiting[self.protocol.read(_digest(key), self.network.clock.now)] = done
        self.cycle()

    def write(self, records: Sequence[SignedRecord], done: Callable[[WriteFinished], None]) -> None:
        """Start a write of this node's records of one key; `done` is called with its result."""
        self._waiting[self.protocol.write(records, self.network.clock.now)] = done
        self.cycle()

    def sign(
        self, key: str, value: Value, *, ttl: float, subkey: str | None = None, tombstone: bool = False
    ) -> SignedRecord:
        wall = self.protocol.wall(self.network.clock.now)
        self._sequence = max(self._sequence + 1, int(wall * 1e6))
        return SignedRecord.sign(
            self.protocol.identity,
            _digest(key),
            subkey=subkey,
            sequence=self._sequence,
            expiration=wall + ttl,
            value=msgpack.packb(value),
            tombstone=tombstone,
        )

    def receive(self, data: bytes, source: Address) -> None:
        if not self.alive:
            return
        now = self.network.clock.now
        if self.gateway and now - self._written_to.get(source, float("-inf")) > GATEWAY_MEMORY:
            return
        self.protocol.receive_datagram(data, source, now)
        self.cycle()

    def cycle(self) -> None:
        """Pass on events and datagrams, and arm the timer: the driver's part after each input."""
        for event in self.protocol.events():
            if isinstance(event, ReadFinished | WriteFinished):
                done = self._waiting.pop(event.operation, None)
                if done is not None:
                    done(event)
            else:
                self.events.append(event)
                self.joined = isinstance(event, Joined) or (self.joined and self.protocol.joined)
        for data, target in self.protocol.datagrams_to_send():
            self.num_sent += 1
            self.num_bytes_sent += len(data)
            if self.gateway:
                self._written_to[target] = self.network.clock.now
            self.network.transmit(data, self.address, target)
        at = self.protocol.timer_at()
        if self.alive and at < self._armed_at:
            self._armed_at = at
            self.network.clock.call_at(at, self._timer, at)

    def _timer(self, at: float) -> None:
        # one that was overtaken by an earlier one has nothing to do: firing it too would arm ever more of them
        if self.alive and at == self._armed_at:
            self._armed_at = float("inf")
            self.protocol.handle_timer(self.network.clock.now)
            self.cycle()


class SimulatedNetwork:
    """Nodes and the network between them. All randomness comes from `seed`: the same calls give the same run."""

    def __init__(
        self,
        *,
        seed: int,
        latency: Latency | float = 0.04,
        loss: float = 0.0,
        duplication: float = 0.0,
        settings: NetworkSettings = NetworkSettings(),  # noqa: B008 (frozen)
        public_addresses: bool = False,
    ) -> None:
        """`latency` is one-way, in seconds; `loss` and `duplication` are shares of all datagrams.

        Nodes get private addresses, which limits by address range leave alone, unless `public_addresses`.
        """
        self.clock = VirtualClock()
        self.random = random.Random(seed)
        self.settings = settings
        self.loss = loss
        self.duplication = duplication
        self.nodes: dict[Address, SimulatedNode] = {}
        """All nodes that ever were, dead ones included, by address."""
        self.trace = hashlib.blake2b(digest_size=16)
        """A running hash over all datagrams with their times and addresses: two runs are equal if it is."""
        self.num_datagrams = 0
        self._latency: Latency = latency if callable(latency) else lambda source, target, rng: latency
        self._groups: dict[Address, int] = {}
        self._public_addresses = public_addresses
        self._secrets: dict[bytes, bytes] = {}
        self._seed = seed
        self._num_addresses = 0

    # Nodes

    def identity(self) -> SimulatedIdentity:
        identity = SimulatedIdentity(b"%d/%d" % (self._seed, len(self._secrets)))
        self.know(identity)
        return identity

    def know(self, identity: SimulatedIdentity) -> None:
        self._secrets[identity.public_key] = identity._secret

    def verify(self, public_key: bytes, signature: bytes, data: bytes) -> bool:
        """Verify a signature of a simulated identity, as `identity.verify` does for Ed25519."""
        secret = self._secrets.get(public_key)
        return secret is not None and hashlib.blake2b(data, key=secret, digest_size=64).digest() == signature

    def add_node(
        self,
        seeds: Iterable[SimulatedNode | Address] = (),
        *,
        public: bool = True,
        gateway: bool = False,
        clock_skew: float = 0.0,
        address: Address | None = None,
        identity: SimulatedIdentity | None = None,
        protocol: type[NetworkProtocol] = NetworkProtocol,
    ) -> SimulatedNode:
        """Add a node that starts now and looks for the network through `seeds`.

        `public`: whether it was declared so, as nodes on loopback are; otherwise it has to find out by dial-back.
        `clock_skew`: seconds that its wall clock is ahead. `protocol` may be a subclass that misbehaves.
        """
        if address is None:
            address = self._next_address()
        machine = protocol(
            identity=self.identity() if identity is None else identity,
            settings=self.settings,
            random=random.Random(self.random.getrandbits(64)),
            metrics=Metrics(),
            now=self.clock.now,
            wall_offset=WALL_AT_START + clock_skew,
            is_declared_public=public,
            verify=self.verify,
            scope=AddressScope([address[0]]),
        )
        node = SimulatedNode(self, machine, address, gateway=gateway)
        self.nodes[address] = node
        addresses = [item.address if isinstance(item, SimulatedNode) else item for item in seeds]
        if addresses:
            machine.membership.set_seeds([(item, None) for item in addresses], self.clock.now)
        node.cycle()
        return node

    def add_swarm(self, count: int, *, interval: float = 0.05) -> list[SimulatedNode]:
        """Add `count` nodes, each through a random one added before, and return when all have joined.

        Raises: TimeoutError if some have not after 30 seconds.
        """
        nodes = [self.add_node()]
        while len(nodes) < count:
            nodes.append(self.add_node([self.random.choice(nodes)]))
            self.clock.run(interval)
        if not self.clock.run_until(lambda: count == 1 or all(node.joined for node in nodes), timeout=30.0):
            raise TimeoutError(f"not all of {count} nodes have joined after 30 s")
        return nodes

    def add_settled_swarm(
        self, count: int, *, protocol_of: Callable[[int], type[NetworkProtocol]] = lambda index: NetworkProtocol
    ) -> list[SimulatedNode]:
        """Add `count` nodes whose routing tables are as after long use: in each bucket k random, proven nodes.

        Joining ten thousand nodes one by one takes an hour; this takes seconds.
        """
        nodes = [self.add_node(protocol=protocol_of(index)) for index in range(count)]
        ordered = sorted(nodes, key=lambda node: node.protocol.table.own_number)
        numbers = [node.protocol.table.own_number for node in ordered]
        templates = [Contact(node.protocol.own_id, node.address) for node in ordered]
        samples = []
        for index in range(5):
            number = int.from_bytes(_digest(f"sample {index}"), "big")
            samples.append((number, sorted(templates, key=lambda contact: contact.number ^ number)[:K]))  # noqa: B023
        for node in nodes:
            table = node.protocol.table
            low, high = 0, count
            for depth in range(ID_BITS):
                if high - low <= 1:
                    break
                middle = bisect_left(numbers, (table.own_number >> (ID_BITS - 1 - depth) | 1) << (ID_BITS - 1 - depth))
                if table.own_number >> (ID_BITS - 1 - depth) & 1:
                    others, low = range(low, middle), middle
                else:
                    others, high = range(middle, high), middle
                if high - low > K:
                    chosen = self.random.sample(others, min(K, len(others)))
                else:
                    # a node knows its own neighborhood completely
                    chosen = sorted(others, key=lambda index: numbers[index] ^ table.own_number)[:K]
                for index in chosen:
                    contact = copy.copy(templates[index])
                    contact.proven = True
                    contact.last_seen = self.clock.now
                    table.add(contact, self.clock.now)
            node.protocol.joined = True
            for number, closest in samples:
                node.protocol.density.note(number, closest)
        return nodes

    def kill(self, nodes: SimulatedNode | Iterable[SimulatedNode]) -> None:
        for node in [nodes] if isinstance(nodes, SimulatedNode) else nodes:
            node.alive = False

    def leave(self, nodes: SimulatedNode | Iterable[SimulatedNode]) -> None:
        for node in [nodes] if isinstance(nodes, SimulatedNode) else nodes:
            node.protocol.leave(self.clock.now)
            node.cycle()
            node.alive = False

    def alive(self) -> list[SimulatedNode]:
        return [node for node in self.nodes.values() if node.alive]

    # The network

    def partition(self, *groups: Iterable[SimulatedNode]) -> None:
        """Let only nodes of the same group reach one another; those in no group form one more."""
        self._groups = {node.address: index for index, group in enumerate(groups, 1) for node in group}

    def heal(self) -> None:
        self._groups = {}

    def transmit(self, data: bytes, source: Address, target: Address) -> None:
        """Send one datagram; it may be lost, late, or arrive twice."""
        self.num_datagrams += 1
        self.trace.update(b"%r %b %b %b" % (self.clock.now, source[0].encode(), target[0].encode(), data))
        if self._groups and self._groups.get(source, 0) != self._groups.get(target, 0):
            return
        receiver = self.nodes.get(target)
        if receiver is None or not receiver.alive:
            return
        copies = 1 + (self.duplication > 0 and self.random.random() < self.duplication)
        for _ in range(copies):
            if self.loss and self.random.random() < self.loss:
                continue
            delay = self._latency(source, target, self.random)
            self.clock.call_later(delay, receiver.receive, data, source)

    # Whole operations, in virtual time

    def run(self, seconds: float) -> None:
        self.clock.run(seconds)

    def store(
        self,
        node: SimulatedNode,
        key: str,
        value: Value,
        *,
        ttl: float,
        subkey: str | None = None,
        timeout: float = 60.0,
    ) -> int:
        """Do `TesseractNetwork.store` at one node. Raises: TimeoutError."""
        finished: list[WriteFinished] = []
        node.write([node.sign(key, value, ttl=ttl, subkey=subkey)], finished.append)
        self._wait(finished, timeout)
        return finished[0].num_holders[0]

    def withdraw(self, node: SimulatedNode, key: str, *, ttl: float, subkey: str | None = None) -> int:
        """Write a tombstone over the node's entry. Raises: TimeoutError."""
        finished: list[WriteFinished] = []
        node.write([node.sign(key, None, ttl=ttl, subkey=subkey, tombstone=True)], finished.append)
        self._wait(finished, 60.0)
        return finished[0].num_holders[0]

    def get(self, node: SimulatedNode, key: str, *, timeout: float = 60.0) -> Value:
        """Do `TesseractNetwork.get` at one node. Raises: TimeoutError."""
        finished: list[ReadFinished] = []
        node.read(key, finished.append)
        self._wait(finished, timeout)
        return self.value_of(node, finished[0])

    def value_of(self, node: SimulatedNode, finished: ReadFinished) -> Value:
        """Return None, a single value, or a dictionary, as `TesseractNetwork.get` does."""
        wall = node.protocol.wall(self.clock.now)
        live = (record for record in finished.records if not record.tombstone and record.expiration > wall)
        return single_view(
            [Entry("", one.subkey, one.owner, one.sequence, one.expiration, msgpack.unpackb(one.value)) for one in live]
        )

    def _wait(self, finished: Sequence[object], timeout: float) -> None:
        if not self.clock.run_until(lambda: bool(finished), timeout=timeout):
            raise TimeoutError(f"not finished after {timeout} s of virtual time")

    def _next_address(self) -> Address:
        self._num_addresses += 1
        index = self._num_addresses
        if not self._public_addresses:
            return f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}", 4000
        # one /24 for each node, from ranges that are not private
        return f"{20 + (index >> 16 & 63)}.{index >> 8 & 255}.{index & 255}.{1 + index % 200}", 4000


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
