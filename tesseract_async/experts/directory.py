"""Finds experts: one uid when asked, whole grids kept fresh in the background."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tesseract_async.errors import ProtocolError, TesseractError, describe
from tesseract_async.experts.grid import Claim, ExpertReplica, GridView, rank_replicas
from tesseract_async.experts.manifest import MAX_DIMS, decode_manifest, grid_key, is_prefix, shard_key, split_uid
from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.transport.address_scope import AddressScope

log = logging.getLogger(__name__)


class ReadingNetwork(Protocol):
    """What a directory needs of `TesseractNetwork`."""

    async def wait_joined(self, timeout: float | None = None) -> bool: ...
    async def get_entries(self, key: str) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """How fresh a directory is. Seconds are plain floats."""

    refresh_period: float = 10.0
    """Watched grids are read again so often, and answers of `find` are kept for at most so long."""
    retry_period: float = 1.0
    """Until the next attempt, where reading a grid failed or the network was not joined yet."""
    max_cached_uids: int = 4096
    """Answers of `find` that are kept at most."""

    def __post_init__(self) -> None:
        if self.refresh_period <= 0 or self.retry_period <= 0:
            raise ValueError("refresh_period and retry_period are positive")


class _Grid:
    """A watched grid: what was read last, and the view made of it."""

    def __init__(self, prefix: str, grid_size: tuple[int, ...]) -> None:
        self.prefix = prefix
        self.grid_size = grid_size
        self.warm = asyncio.Event()
        self.read_at = 0.0
        """Wall-clock time at which the latest complete read began."""
        self.read = asyncio.Event()
        """Set at the end of the next read, by which another event takes its place."""
        self.hurry = asyncio.Event()
        """Set while somebody waits for experts that are not there yet."""
        self.claims: list[Claim] = []
        self.masked: dict[tuple[PeerID, tuple[int, ...]], int] = {}
        self.view: GridView | None = None
        self.version = 0

    def make_view(self, now: float) -> GridView:
        self.claims = [claim for claim in self.claims if claim.expiration > now]
        self.version += 1
        self.view = GridView(self.prefix, self.grid_size, self.claims, masked=self.masked, version=self.version)
        return self.view


class ExpertDirectory:
    """What a node knows about others' experts. One per node; used on the node's loop only.

    Everything that it reads was written by strangers: what does not decode is dropped and counted
    (``manifests_dropped``), and a wrong claim costs a failed call, after which `report_failure` hides it.
    """

    def __init__(
        self,
        network: ReadingNetwork,
        *,
        refresh_period: float | None = None,
        settings: DirectorySettings = DirectorySettings(),
        metrics: Metrics | None = None,
        scope: AddressScope | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`refresh_period`, where given, goes before the one in `settings`; `clock` gives wall-clock time; of
        what servers say that they live at, only what is in `scope` is believed, where that is given."""
        self.settings = settings
        self.refresh_period = settings.refresh_period if refresh_period is None else refresh_period
        self.metrics = metrics if metrics is not None else Metrics()
        self._network = network
        self._scope = scope
        self._clock = clock
        self._grids: dict[str, _Grid] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # uid -> what was found, and until when that is believed without asking again
        self._found: dict[str, tuple[float, list[ExpertReplica]]] = {}
        # (uid, owner) -> the last sequence that failed, for uids outside of watched grids
        self._masked: dict[tuple[str, PeerID], tuple[int, float]] = {}
        self._closed = False

    async def find(self, uid: str, *, even_failed: bool = False) -> list[ExpertReplica]:
        """Who hosts `uid` now: the primary first, then the newest manifest; empty if nobody does.

        Answers from a warm grid, or from a recent find. That nobody hosts it is never remembered: the next call asks
        the network again. With `even_failed`, replicas that `report_failure` hides are named if there are no others:
        whoever has no other choice had better try them again.

        Raises: ValueError for a malformed uid; TimeoutError if no node of the network answered.
        """
        if known := self.known(uid):
            return known
        prefix, coords = split_uid(uid)
        claims = self._read(prefix, await self._network.get_entries(shard_key(uid)))
        hosting = [(claim, claim.replica(prefix, row)) for claim in claims for row in claim.rows_of(coords)]
        found = rank_replicas(replica for claim, replica in hosting if self._believed(claim, uid))
        if even_failed and not found:
            return rank_replicas(replica for _, replica in hosting)
        if found:
            until = min(self._clock() + self.refresh_period, *(replica.expiration for replica in found))
            self._found[uid] = (until, found)
            while len(self._found) > self.settings.max_cached_uids:
                self._found.pop(next(iter(self._found)))
        return list(found)

    def known(self, uid: str) -> list[ExpertReplica]:
        """What `find` would answer from memory; empty if it would ask the network. Raises: ValueError, too."""
        prefix, coords = split_uid(uid)
        view = self.live(prefix)
        if view is not None and (found := view.replicas.get(coords)) is not None:
            return found
        until, remembered = self._found.get(uid, (0.0, []))
        return list(remembered) if until > self._clock() else []

    def watch(self, prefix: str, grid_size: tuple[int, ...]) -> None:
        """Keeps the grid `prefix` fresh in the background from now on; needs a running loop. Again is harmless.

        Raises: ValueError for a malformed prefix or size, or if it is watched with another size.
        """
        grid_size = tuple(grid_size)
        if not is_prefix(prefix) or not 0 < len(grid_size) <= MAX_DIMS or min(grid_size) < 1:
            raise ValueError(f"not a grid: prefix {prefix!r}, size {grid_size}")
        if self._closed:
            raise RuntimeError("this directory is closed")
        known = self._grids.get(prefix)
        if known is not None:
            if known.grid_size != grid_size:
                raise ValueError(f"the grid {prefix!r} is watched with size {known.grid_size}, not {grid_size}")
            return
        grid = self._grids[prefix] = _Grid(prefix, grid_size)
        self._tasks[prefix] = asyncio.create_task(self._keep_fresh(grid), name=f"experts: watch {prefix}")

    async def wait_warm(self, prefix: str) -> None:
        """Returns once the watched grid was read completely; waits for the network to be joined, however long.

        Raises: ValueError if the grid is not watched.
        """
        if prefix not in self._grids:
            raise ValueError(f"the grid {prefix!r} is not watched: call watch() first")
        await self._grids[prefix].warm.wait()

    async def wait_read(self, prefix: str) -> None:
        """Returns once the watched grid was read anew, or for the first time; it is read more often meanwhile.

        For whoever lacks an expert: ask `live` what came. Raises: ValueError if the grid is not watched.
        """
        if prefix not in self._grids:
            raise ValueError(f"the grid {prefix!r} is not watched: call watch() first")
        grid = self._grids[prefix]
        grid.hurry.set()
        await (grid.read if grid.warm.is_set() else grid.warm).wait()

    async def refresh(self, prefix: str) -> None:
        """Reads the watched grid now, beside the periodic reads. Raises: ValueError if the grid is not watched."""
        if prefix not in self._grids:
            raise ValueError(f"the grid {prefix!r} is not watched: call watch() first")
        await self._refresh(self._grids[prefix])

    def live(self, prefix: str) -> GridView | None:
        """The live experts of a watched grid, without what expired or failed since; None while nothing was read."""
        grid = self._grids.get(prefix)
        if grid is None or not grid.warm.is_set():
            return None
        now = self._clock()
        if grid.view is None or grid.view.expiration <= now:
            return grid.make_view(now)
        return grid.view

    def report_failure(self, replica: ExpertReplica) -> None:
        """Hides the replica until its server renews its manifest, so that nobody here calls it meanwhile, unless it is
        the only one and asked for (`find`)."""
        prefix, coords = split_uid(replica.uid)
        owner = replica.peer.peer_id
        if owner is None:
            return
        self.metrics.count("replicas_masked")
        self._found.pop(replica.uid, None)
        now = self._clock()
        self._masked = {at: mask for at, mask in self._masked.items() if mask[1] > now}
        self._masked[(replica.uid, owner)] = (replica.sequence, replica.expiration)
        grid = self._grids.get(prefix)
        if grid is not None:
            grid.masked[(owner, coords)] = replica.sequence
            grid.view = None

    async def aclose(self) -> None:
        """Stops watching. Closing twice is harmless."""
        self._closed = True
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_fresh(self, grid: _Grid) -> None:
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            period = self.settings.retry_period
            try:
                # before anybody else is known, an empty answer says nothing
                if await self._network.wait_joined(self.refresh_period):
                    await self._refresh(grid)
                    period = self.refresh_period
            except (TesseractError, TimeoutError, OSError) as error:
                self.metrics.count("directory_reads_failed")
                log.warning("could not read the grid %s: %s", grid.prefix, describe(error))
            if grid.warm.is_set():
                self.metrics.set("directory_age_seconds", self._clock() - grid.read_at, prefix=grid.prefix)
            await _sleep_until(started + min(period, self.settings.retry_period))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(started + period):
                    await grid.hurry.wait()
            grid.hurry.clear()

    async def _refresh(self, grid: _Grid) -> None:
        began = self._clock()
        entries = await self._network.get_entries(grid_key(grid.prefix))
        claims = self._read(grid.prefix, entries)
        complete = getattr(entries, "complete", True)
        self.metrics.set("directory_complete", float(complete), prefix=grid.prefix)
        if not complete:
            # whom this read lacks may well live: what was read of them before holds until it expires
            self.metrics.count("directory_reads_incomplete")
            read = {claim.owner for claim in claims}
            claims += [claim for claim in grid.claims if claim.owner not in read]
        grid.claims = claims
        # a mask ends with the server's next manifest, or with the server
        oldest: dict[PeerID, int] = {}
        for claim in grid.claims:
            oldest[claim.owner] = min(claim.manifest.sequence, oldest.get(claim.owner, claim.manifest.sequence))
        grid.masked = {at: last for at, last in grid.masked.items() if oldest.get(at[0], last + 1) <= last}
        view = grid.make_view(self._clock())
        if view.num_foreign:
            self.metrics.count("experts_off_grid", view.num_foreign)
        self.metrics.set("experts_live", len(view), prefix=grid.prefix)
        if complete:
            grid.read_at = began
            grid.warm.set()
        grid.read.set()
        grid.read = asyncio.Event()

    def _read(self, prefix: str, entries: Iterable[Any]) -> list[Claim]:
        """What the entries of a key claim about this grid, without what is malformed or has expired."""
        now = self._clock()
        claims = []
        for entry in entries:
            if entry.expiration <= now:
                continue
            try:
                manifest = decode_manifest(entry.value, prefix=prefix)
                if self._scope is not None:
                    manifest = manifest.within(self._scope)
                claims.append(Claim(entry.owner, entry.expiration, manifest))
            except ProtocolError as error:
                self.metrics.count("manifests_dropped")
                log.debug("dropped a manifest of %s: %s", entry.owner.short, error)
        return claims

    def _believed(self, claim: Claim, uid: str) -> bool:
        last, expiration = self._masked.get((uid, claim.owner), (-1, 0.0))
        if claim.manifest.sequence > last or expiration <= self._clock():
            self._masked.pop((uid, claim.owner), None)
            return True
        return False


async def _sleep_until(at: float) -> None:
    await asyncio.sleep(max(0.0, at - asyncio.get_running_loop().time()))
