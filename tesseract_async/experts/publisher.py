"""Keeps a server's manifests in the network: declares them, renews them, withdraws them when it leaves."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tesseract_async.errors import TesseractError, describe
from tesseract_async.experts.manifest import encode_manifest, experts_by_grid, join_uid, split_uid
from tesseract_async.experts.trust import Trust
from tesseract_async.metrics import Metrics
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.tasks import end

log = logging.getLogger(__name__)

NUM_HOLDERS: Final = 3
"""The number of nodes that must hold each entry, if that many can be reached: it outlives two that leave before it is
renewed."""


@dataclass(frozen=True, slots=True)
class PublisherSettings:
    """The settings of a server's entries in the directory. Times are seconds."""

    ttl: float = 45.0
    """Time for which a manifest holds; it is renewed three times as often. Shorter: a server that vanished is gone from
    every directory sooner. Longer: less traffic."""
    declare_timeout: float = 10.0
    """`ExpertPublisher.declare` looks for holders, and reads back what it stored, for at most this long, by which an
    unreachable network delays a server's start."""

    def __post_init__(self) -> None:
        if self.ttl <= 0:
            raise ValueError(f"a manifest's ttl is positive, not {self.ttl}")

    @property
    def refresh_period(self) -> float:
        """Seconds between renewals, of which two may fail."""
        return self.ttl / 3

    @property
    def retry_period(self) -> float:
        """Seconds until the next attempt, where a renewal reached too few holders."""
        return min(1.0, self.ttl / 10)


class ExpertPublisher:
    """Publishes which experts a server hosts. One per server, of which a node may have several (one for each device);
    used on the node's loop only.
    """

    def __init__(
        self,
        network: TesseractNetwork,
        *,
        addresses: Sequence[str],
        rendezvous: Sequence[str] = (),
        settings: PublisherSettings = PublisherSettings(),
        metrics: Metrics | None = None,
        trust: Trust | None = None,
        places: set[int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`addresses` are what others dial, ``host:port``, the preferred one first; `rendezvous` are nodes that pass on
        what cannot be dialed, ``host:port/PEER_ID``. `places`: those that the publishers of one node hold, side by
        side; this one takes one. `clock` gives wall-clock time."""
        self.settings = settings
        self.metrics = metrics if metrics is not None else Metrics()
        self._network = network
        self._trust = Trust() if trust is None else trust
        self._addresses = tuple(addresses)
        self._rendezvous = tuple(rendezvous)
        self._clock = clock
        self._places = set() if places is None else places
        # the lowest one, so that a server that comes back replaces what it said before
        self._place = next(place for place in itertools.count() if place not in self._places)
        self._places.add(self._place)
        self._uids: dict[str, bool] = {}
        self._epochs: dict[str, int] = {}
        self._sequence = 0
        # (key, subkey) -> value, of everything that was stored last
        self._entries: dict[tuple[str, str], bytes] = {}
        self._renewal: asyncio.Task[None] | None = None
        self._publishing = asyncio.Lock()
        self._closed = False

    @property
    def uids(self) -> Mapping[str, bool]:
        """The declared experts, and whether each is led here."""
        return dict(self._uids)

    async def declare(self, uids: Mapping[str, bool], *, epochs: Mapping[str, int] | None = None) -> int:
        """Publish `uids` (-> primary), in place of what was declared before, and keep them published. `epochs` are
        those of their lineages in a run; None: as before.

        Returns the number of holders of the entry that has the fewest, once that is min(`NUM_HOLDERS`, what can be
        reached) and the manifests were read back; or what was achieved after `declare_timeout`, in which case the
        renewal in the background keeps trying. 0 means that nobody can find these experts yet.

        If cancelled, what was stored so far stays until `aclose` or its expiry. Raises: ValueError for a malformed uid.
        """
        if self._closed:
            raise RuntimeError("this publisher is closed")
        for prefix, experts in experts_by_grid(uids):
            self._encode(prefix, experts)  # raises before anything is sent
        deadline = asyncio.get_running_loop().time() + self.settings.declare_timeout
        self._uids = dict(uids)
        if epochs is not None:
            self._epochs = dict(epochs)
        while True:
            holders = await self._publish()
            if not self._uids:
                break
            if holders >= self._wanted and await self._readable():
                break
            if asyncio.get_running_loop().time() >= deadline:
                log.warning("experts are declared at %d nodes only; more are looked for in the background", holders)
                break
            await asyncio.sleep(min(0.1, self.settings.retry_period))
        if self._renewal is None and self._uids and not self._closed:
            self._renewal = asyncio.create_task(self._renew(), name="experts: renew manifests")
        return holders

    async def update_addresses(self, addresses: Sequence[str], rendezvous: Sequence[str] = ()) -> int:
        """Publish new addresses of this server; like `declare` with the same experts.

        Raises: ValueError for a malformed address; then the former ones stay.
        """
        before = self._addresses, self._rendezvous
        self._addresses, self._rendezvous = tuple(addresses), tuple(rendezvous)
        try:
            longest = max((prefix for prefix, _ in experts_by_grid(self._uids)), key=len, default="any")
            self._encode(longest, {(0,): True})
        except ValueError:
            self._addresses, self._rendezvous = before
            raise
        return await self.declare(self._uids) if self._uids else 0

    async def withdraw(self) -> None:
        """Tell the network that these experts are gone, and stop renewing. `declare` may follow."""
        await self.stop_renewing()
        self._uids = {}
        await self._publish()

    async def stop_renewing(self) -> None:
        """Let what is declared expire: for a node whose network is closed."""
        await end(self._renewal)
        self._renewal = None

    async def aclose(self) -> None:
        was_open, self._closed = not self._closed, True
        try:
            await self.withdraw()
        finally:
            if was_open:
                self._places.discard(self._place)

    @property
    def _wanted(self) -> int:
        return max(1, min(NUM_HOLDERS, self._network.num_contacts))

    async def _plan(self, uids: Mapping[str, bool]) -> dict[tuple[str, str], bytes]:
        # milliseconds, so that a server that lost its memory still goes on upwards
        self._sequence = max(self._sequence + 1, int(self._clock() * 1000))
        entries: dict[tuple[str, str], bytes] = {}
        for prefix, experts in experts_by_grid(uids):
            # each part goes under the grid's key, and under the shard of every uid in it
            for number, (part, members) in enumerate(self._encode(prefix, experts)):
                subkey = f"{self._place}.{number}" if self._place else str(number)
                entries[(self._trust.grid_key(prefix), subkey)] = part
                for coords in members:
                    entries[(self._trust.shard_key(join_uid(prefix, coords)), subkey)] = part
                await asyncio.sleep(0)  # for thousands of experts, the hashes take milliseconds
        return entries

    def _encode(
        self, prefix: str, experts: Mapping[tuple[int, ...], bool]
    ) -> list[tuple[bytes, list[tuple[int, ...]]]]:
        return encode_manifest(
            self._addresses,
            experts,
            prefix=prefix,
            sequence=self._sequence,
            rendezvous=self._rendezvous,
            tag=self._trust.tag(prefix),
            grant=self._trust.own_grant(prefix),
            epochs={at[1]: epoch for uid, epoch in self._epochs.items() if (at := split_uid(uid))[0] == prefix},
        )

    async def _publish(self) -> int:
        """Store what is declared under a new sequence, withdraw the rest; return the fewest holders of an entry."""
        async with self._publishing:
            entries = await self._plan(self._uids)
            gone = self._entries.keys() - entries.keys()
            # what is being stored must be withdrawn some day, even if this is cancelled
            self._entries = {**dict.fromkeys(gone, b""), **entries}
            async with asyncio.TaskGroup() as group:
                stores = [group.create_task(self._store(*at, value)) for at, value in entries.items()]
                for at in gone:
                    group.create_task(self._withdraw(*at))
            self._entries = entries
            return min((task.result() for task in stores), default=0)

    async def _store(self, key: str, subkey: str, value: bytes) -> int:
        try:
            return await self._network.store(key, value, ttl=self.settings.ttl, subkey=subkey)
        except (TesseractError, TimeoutError, OSError) as error:
            self.metrics.count("manifest_stores_failed")
            log.warning("could not store the manifest under %s: %s", key, describe(error))
            return 0

    async def _readable(self) -> bool:
        wanted: dict[str, set[bytes]] = {}
        for prefix, _ in experts_by_grid(self._uids):
            key = self._trust.grid_key(prefix)
            wanted[key] = {value for (at, _), value in self._entries.items() if at == key}
        for key, parts in wanted.items():
            try:
                entries = await self._network.get_entries(key)
            except (TesseractError, TimeoutError, OSError) as error:
                log.warning("could not read back %s: %s", key, describe(error))
                return False
            now = self._clock()
            mine = (item for item in entries if item.owner == self._network.peer_id and item.expiration > now)
            if not parts <= {item.value for item in mine if type(item.value) is bytes}:
                return False
        return True

    async def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self.settings.refresh_period
        while True:
            await asyncio.sleep(max(0.0, due - loop.time()))
            started = loop.time()
            holders = await self._publish()
            self.metrics.set("manifest_holders", holders)
            enough = holders >= self._wanted
            due = started + (self.settings.refresh_period if enough else self.settings.retry_period)

    async def _withdraw(self, key: str, subkey: str) -> None:
        try:
            await self._network.withdraw(key, subkey=subkey)
        except (TesseractError, TimeoutError, OSError) as error:
            log.warning("could not withdraw the manifest under %s, it will expire: %s", key, describe(error))
