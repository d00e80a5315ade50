"""Finds experts for a node: one uid when asked, whole grids kept fresh in the background."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from tesseract_async.errors import ProtocolError, TesseractError, describe
from tesseract_async.experts.grid import (
    MAX_REPLICAS,
    Claim,
    ExpertReplica,
    GridTable,
    GridView,
    in_order_of_trust,
    rank_replicas,
)
from tesseract_async.experts.manifest import MAX_DIMS, decode_manifest, is_prefix, split_uid
from tesseract_async.experts.masks import Masks
from tesseract_async.experts.trust import Trust
from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU
from tesseract_async.metrics import Metrics
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.network.entries import Entry
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.tasks import end, in_time
from tesseract_async.uncopied import Uncopied

log = logging.getLogger(__name__)

REFRESH_PERIOD = 10.0
"""Seconds between two reads of a watched grid, unless the caller says otherwise."""
RETRY_PERIOD = 1.0
"""Seconds until the next attempt, where reading a grid failed, or it was never read completely."""
_NUM_PARTIAL = 5
"""The number of incomplete reads that together count as a complete one. Otherwise a stranger that claims to hold
records, and gives them to nobody, could keep a grid from ever being used."""
LEAST_AGE = 0.25
"""Seconds for which an answer of `ExpertDirectory.find` is kept at least, though a server says that it is outdated."""
MAX_CACHED_UIDS = 4096
"""The most answers of `ExpertDirectory.find` that are kept."""
_MAX_PARTS_OF_OWNER = 64
_DECODED_AT_ONCE = 16


async def read_claims(
    entries: Iterable[Entry],
    *,
    prefix: str,
    now: float,
    trust: Trust,
    scope: AddressScope | None = None,
    dropped: Callable[[Entry, ProtocolError], None] = lambda entry, error: None,
) -> list[Claim]:
    """Return the claims about this grid in the entries of a key, without those that are malformed or have expired at
    `now`.

    The entries come from strangers: only the 64 of each owner that expire last are read, and the loop runs in between.
    `dropped` is told of those that do not decode, that `trust` does not believe, or that name no address within
    `scope`, where one is given. Owners whom the policy does not list are passed over unread.
    """
    num_parts: dict[PeerID, int] = {}
    claims: list[Claim] = []
    for number, entry in enumerate(sorted(entries, key=lambda entry: -entry.expiration)):
        if number % _DECODED_AT_ONCE == _DECODED_AT_ONCE - 1:
            await asyncio.sleep(0)
        num_parts[entry.owner] = num_parts.get(entry.owner, 0) + 1
        if entry.expiration <= now or num_parts[entry.owner] > _MAX_PARTS_OF_OWNER:
            continue
        if not trust.may_be_read(entry.owner):
            continue
        try:
            manifest = trust.believed(entry.owner, decode_manifest(entry.value, prefix=prefix))
            if scope is not None:
                manifest = manifest.within(scope)
            claims.append(Claim(entry.owner, entry.expiration, manifest))
        except ProtocolError as error:
            dropped(entry, error)
    return claims


class _Grid:
    """A watched grid: what was read last, and the views made of it, one for each size that is watched."""

    def __init__(self, prefix: str, masks: Masks) -> None:
        self.prefix = prefix
        self.sizes: list[tuple[int, ...]] = []
        self.warm = asyncio.Event()
        self.num_partial = 0
        """The number of incomplete reads while the grid is not warm."""
        self.read_at = 0.0
        """Wall-clock time at which the latest read began that counts as complete."""
        self.read = asyncio.Event()
        """Set at the end of the next read, when another event takes its place."""
        self.hurry = asyncio.Event()
        """Set while somebody waits for experts that are not there yet."""
        self.claims: list[Claim] = []
        self.views: dict[tuple[int, ...], GridView] = {}
        self._masks = masks
        self._tables: dict[tuple[int, ...], GridTable] = {}
        self._version = 0

    def take(self, claims: list[Claim], tables: dict[tuple[int, ...], GridTable]) -> None:
        self.claims, self._tables = claims, tables
        self.views.clear()

    def view(self, size: tuple[int, ...], now: float) -> GridView:
        """Return the live experts, without expired and hidden ones; the same object as long as they are the same."""
        view = self.views.get(size)
        if view is None or view.expiration <= now:
            self._version += 1
            view = GridView(self.table(size), masks=self._masks, now=now, version=self._version)
            self.views[size] = view
        return view

    def table(self, size: tuple[int, ...]) -> GridTable:
        table = self._tables.get(size)
        if table is None:
            table = self._tables[size] = GridTable(self.prefix, size)
            for _ in table.fill(self.claims):
                pass
        return table


class ExpertDirectory(Uncopied):
    """A node's knowledge of others' experts. One per node; used on the node's loop only."""

    def __init__(
        self,
        network: TesseractNetwork,
        *,
        refresh_period: float = REFRESH_PERIOD,
        metrics: Metrics | None = None,
        trust: Trust | None = None,
        scope: AddressScope | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`refresh_period`: seconds between two reads of a watched grid, for which answers of `find` are kept, too.
        `trust` says who is believed (everybody by default); of the addresses that servers name, only those in `scope`
        are, where that is given. `clock` gives wall-clock time. Raises: ValueError for a `refresh_period` of 0 or less.
        """
        if refresh_period <= 0:
            raise ValueError(f"a directory's refresh_period is positive, not {refresh_period}")
        self.refresh_period = refresh_period
        self.metrics = metrics if metrics is not None else Metrics()
        self._network = network
        self._trust = Trust() if trust is None else trust
        self._scope = scope
        self._clock = clock
        self._grids: dict[str, _Grid] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # uid -> when it was read, until when that is believed without asking again, and what was found
        self._found: LRU[str, tuple[float, float, list[ExpertReplica]]] = LRU(MAX_CACHED_UIDS)
        self._masks = Masks()
        self._closed = False

    async def find(self, uid: str, *, even_failed: bool = False) -> list[ExpertReplica]:
        """Return who hosts `uid` now: the primary first, then the newest manifest; empty if nobody does.

        Answers from a warm grid, or from a recent find. That nobody hosts it is never remembered: the next call asks
        the network again. With `even_failed`, replicas that `report_failure` hides are named if there are no others.

        Raises: ValueError for a malformed uid; TimeoutError if no node of the network answered.
        """
        if known := self.known(uid):
            return known
        prefix, coords = split_uid(uid)
        claims = await self._read(prefix, await self._network.get_entries(self._trust.shard_key(uid)))
        now = self._clock()
        rows = []
        for number, claim in enumerate(in_order_of_trust(claims, self._owners(prefix)), 1):
            rows += [(claim, row) for row in claim.rows_of(coords)]
            if number % 256 == 0:
                await asyncio.sleep(0)
        rows.sort(key=lambda at: not at[0].manifest.primary[at[1]])  # stable
        hosting = [claim.replica(prefix, row, masks=self._masks) for claim, row in rows[:MAX_REPLICAS]]
        found = rank_replicas(replica for replica in hosting if not self._hides(replica, now))
        if even_failed and not found:
            return rank_replicas(hosting)
        if found:
            until = min(now + self.refresh_period, *(replica.expiration for replica in found))
            self._found[uid] = (now, until, found)
        return list(found)

    def known(self, uid: str) -> list[ExpertReplica]:
        """Return what `find` would answer from memory; empty if it would ask the network. Raises: ValueError, too."""
        prefix, coords = split_uid(uid)
        grid = self._grids.get(prefix)
        for size in () if grid is None else grid.sizes:
            view = self.live(prefix, size)
            if view is not None and (found := view.replicas.get(coords)) is not None:
                return found
        _, until, remembered = self._found.get(uid, (0.0, 0.0, []))
        return list(remembered) if until > self._clock() else []

    def watch(self, prefix: str, grid_size: tuple[int, ...]) -> None:
        """Keep the grid `prefix` fresh in the background from now on; needs a running loop. Again is harmless.

        Watched with several sizes, a prefix is read once for all of them, and each size has views of its own (`live`).
        Raises: ValueError for a malformed prefix or size.
        """
        grid_size = tuple(grid_size)
        if not is_prefix(prefix) or not 0 < len(grid_size) <= MAX_DIMS or min(grid_size) < 1:
            raise ValueError(f"not a grid: prefix {prefix!r}, size {grid_size}")
        if self._closed:
            raise RuntimeError("this directory is closed")
        grid = self._grids.get(prefix)
        if grid is None:
            grid = self._grids[prefix] = _Grid(prefix, self._masks)
            self._tasks[prefix] = asyncio.create_task(self._keep_fresh(grid), name=f"experts: watch {prefix}")
        if grid_size not in grid.sizes:
            grid.sizes.append(grid_size)

    async def wait_warm(self, prefix: str) -> None:
        """Return once the watched grid was read completely, or some times in part; waits for the network to be joined.

        Raises: ValueError if the grid is not watched.
        """
        await self._watched(prefix).warm.wait()

    @property
    def trouble(self) -> str | None:
        """A sentence that says why nothing can be read, if no node of the network answers."""
        return self._network.trouble

    async def wait_read(self, prefix: str) -> None:
        """Return once the watched grid was read again, or for the first time; it is read more often meanwhile.

        For callers that lack an expert: ask `live` afterwards. Raises: ValueError if the grid is not watched.
        """
        grid = self._watched(prefix)
        grid.hurry.set()
        await (grid.read if grid.warm.is_set() else grid.warm).wait()

    async def refresh(self, prefix: str) -> None:
        """Read the watched grid now, besides the periodic reads. Raises: ValueError if the grid is not watched."""
        await self._refresh(self._watched(prefix))

    def _watched(self, prefix: str) -> _Grid:
        if prefix not in self._grids:
            raise ValueError(f"the grid {prefix!r} is not watched: call watch() first")
        return self._grids[prefix]

    def live(self, prefix: str, grid_size: tuple[int, ...] | None = None) -> GridView | None:
        """Return the live experts of a watched grid, without what expired or failed since; None while nothing was read.

        `grid_size`: of which watched size; None: the one watched first.
        """
        grid = self._grids.get(prefix)
        if grid is None or not grid.warm.is_set() or (grid_size is not None and grid_size not in grid.sizes):
            return None
        return grid.view(grid.sizes[0] if grid_size is None else grid_size, self._clock())

    async def read_grid(self, prefix: str, grid_size: tuple[int, ...]) -> dict[str, list[ExpertReplica]]:
        """Read the grid and return the servers of each live expert by uid, the primary first.

        Raises: as `wait_warm`.
        """
        self.watch(prefix, grid_size)
        await self.wait_warm(prefix)
        view = self.live(prefix, grid_size)
        assert view is not None, "warm"
        return {view.uid(row): view.replicas_at(row) for row in range(len(view))}

    def report_failure(self, replica: ExpertReplica, *, reason: str = "silent") -> None:
        """Hide the replica until its server renews its manifest, and after more failures for longer (see `Masks`), so
        that nobody here calls it meanwhile, unless it is the only one and asked for (`find`).

        `reason`: one word for the counter; ``schema``: it hosts something else under the same uid.
        """
        owner = replica.peer.peer_id
        if owner is None:
            return
        self.metrics.count("replicas_masked", reason=reason)
        self._masks.failed(owner, replica.uid, replica.sequence, self._clock())
        self._forget(replica.uid)

    def report_late(self, replica: ExpertReplica) -> None:
        """Note that the replica was given up before it had answered: it is asked last until it answers again."""
        if (owner := replica.peer.peer_id) is not None:
            self._masks.late(owner, replica.uid)
            self._forget(replica.uid)

    def report_answer(self, replica: ExpertReplica) -> None:
        owner = replica.peer.peer_id
        if self._masks and owner is not None and self._masks.answered(owner, replica.uid):
            self._forget(replica.uid)

    @property
    def has_doubts(self) -> bool:
        """True if any replica is in doubt, so that answers are worth reporting."""
        return bool(self._masks)

    def report_outdated(self, uid: str) -> None:
        """Note that the uid's lineage is ahead of what its manifests say, so that they are read again soon. This is not
        done at every call, since a lying server may say so each time."""
        if (grid := self._grids.get(split_uid(uid)[0])) is not None:
            grid.hurry.set()
        if (known := self._found.get(uid)) is not None:
            read_at, until, found = known
            self._found[uid] = read_at, min(until, read_at + LEAST_AGE), found

    def _forget(self, uid: str) -> None:
        self._found.pop(uid, None)
        grid = self._grids.get(split_uid(uid)[0])
        if grid is not None:
            grid.views.clear()

    def _hides(self, replica: ExpertReplica, now: float) -> bool:
        owner = replica.peer.peer_id
        return owner is not None and self._masks.hides(owner, replica.uid, replica.sequence, now)

    def _owners(self, prefix: str) -> set[PeerID]:
        grid = self._grids.get(prefix)
        return set() if grid is None else {claim.owner for claim in grid.claims}

    def forget(self, prefix: str) -> None:
        """Forget all that was read of this grid: its run, or who may say something about it, has changed."""
        for uid in [uid for uid in self._found if split_uid(uid)[0] == prefix]:
            del self._found[uid]
        if (grid := self._grids.get(prefix)) is not None:
            grid.take([], {})
            grid.warm.clear()
            grid.hurry.set()

    async def aclose(self) -> None:
        """Stop watching. Closing twice is harmless."""
        self._closed = True
        tasks = list(self._tasks.values())
        self._tasks.clear()
        await end(*tasks)

    async def _keep_fresh(self, grid: _Grid) -> None:
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            period = RETRY_PERIOD
            try:
                # before anybody else is known, an empty answer says nothing
                if await self._network.wait_joined(self.refresh_period):
                    await self._refresh(grid)
                    period = self.refresh_period if grid.warm.is_set() else RETRY_PERIOD
            except (TesseractError, TimeoutError, OSError) as error:
                self.metrics.count("directory_reads_failed")
                log.warning("could not read the grid %s: %s", grid.prefix, describe(error))
            if grid.warm.is_set():
                self.metrics.set("directory_age_seconds", self._clock() - grid.read_at, prefix=grid.prefix)
            await asyncio.sleep(max(0.0, started + min(period, RETRY_PERIOD) - asyncio.get_running_loop().time()))
            await in_time(grid.hurry.wait(), started + period - loop.time())
            grid.hurry.clear()

    async def _refresh(self, grid: _Grid) -> None:
        began = self._clock()
        entries = await self._network.get_entries(self._trust.grid_key(grid.prefix))
        claims = await self._read(grid.prefix, entries)
        self.metrics.set("directory_complete", float(entries.complete), prefix=grid.prefix)
        if not entries.complete:
            # owners that this read lacks may well live: what was read of them before holds until it expires
            self.metrics.count("directory_reads_incomplete")
            grid.num_partial += not grid.warm.is_set()
            read = {claim.owner for claim in claims}
            claims += [claim for claim in grid.claims if claim.owner not in read]
        claims = in_order_of_trust(claims, self._owners(grid.prefix))
        tables = {size: GridTable(grid.prefix, size) for size in grid.sizes}
        for table in tables.values():
            for _ in table.fill(claims):
                await asyncio.sleep(0)
            if table.num_foreign:
                self.metrics.count("experts_off_grid", table.num_foreign)
            if table.num_crowded_out:
                self.metrics.count("experts_crowded_out", table.num_crowded_out)
        await asyncio.sleep(0)
        grid.take(claims, tables)
        self.metrics.set("experts_live", len(grid.view(grid.sizes[0], self._clock())), prefix=grid.prefix)
        if entries.complete or grid.num_partial >= _NUM_PARTIAL:
            grid.num_partial, grid.read_at = 0, began
            grid.warm.set()
        grid.read.set()
        grid.read = asyncio.Event()

    async def _read(self, prefix: str, entries: Iterable[Entry]) -> list[Claim]:
        def dropped(entry: Entry, error: ProtocolError) -> None:
            self.metrics.count("manifests_dropped")
            log.debug("dropped a manifest of %s: %s", entry.owner.short, error)

        now, trust, scope = self._clock(), self._trust, self._scope
        return await read_claims(entries, prefix=prefix, now=now, trust=trust, scope=scope, dropped=dropped)
