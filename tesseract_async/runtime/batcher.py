"""Which rows a device computes next: the batcher, a pure machine.

One batcher serves all experts of a device. Requests go in with `Batcher.add`, batches come out of `Batcher.pop_ready`,
whose caller says by calling that the device has room: work is dispatched at once while the device idles, and gathers
while it is busy. Time goes in as `now` (seconds, any monotonic clock) and comes out of `timer_at`.

A batch holds requests of one `Pool` only (what may be computed together: one expert, one direction, one mode) and
never more than the pool's `max_batch_size` rows. A request that fits is never split; a larger one is cut into chunks
of `max_batch_size` rows, in order, and its last chunk may share a batch with other requests, unless it has many bytes.

Order
    1. Work whose deadline is closer than `urgent_seconds`, the earliest deadline first.
    2. The pool that holds the oldest request of the highest priority, so that no expert starves. A pool may have a head
       start, by which its requests count as older than they are.
    3. Inside a pool: priority, then fairness. Each peer's rows are charged to that peer, and the peer that was served
       least goes first (start-time fair queueing, Goyal, Vin & Cheng 1996), so that a flood delays its sender only.

Convoys
    Requests that are computed together are answered together, travel together, and come back together; nothing on
    their way spreads them again, so the device idles between two crowds. Two things work against that. A batch is no
    larger than pays: while the device keeps up, it takes no more requests once the cost that all batches have, whatever
    their rows, is a small share of it. And work of short batches that leads to work of long ones (forwards, to
    backwards) has the head start, so that crowds meet where they are taken apart most slowly.

Queues are heaps whose entries are abandoned, not searched for, when a request leaves early; they are swept when half
of them are stale. Adding and dispatching a request costs some microseconds, whatever the number of experts.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tesseract_async.errors import Overloaded
from tesseract_async.runtime.costs import BatchCost

_SWEEP_ABOVE = 1024
_PEERS_REMEMBERED = 1024
_SPEED_WEIGHT = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherSettings:
    """How much may wait, and for how long."""

    max_queue_bytes: int = 1 << 30
    """Bytes of all requests that wait or run; beyond it `Batcher.add` refuses. One request is always taken."""
    max_peer_share: float = 0.5
    """Share of those bytes that one peer may hold, so that a flood leaves room for others."""
    max_wait: float = 0.0
    """Seconds that an incomplete batch is held back, although the device is idle, for others to join it."""
    large_request_bytes: int = 1 << 20
    """A request of so many bytes shares no batch: copying it beside others would cost more than merging saves."""
    fixed_share: float = 0.25
    """While the device keeps up, a batch takes no more requests once what it costs whatever its rows is less than this
    share of its cost (as learnt, see `costs`); 0: it takes all that it may. See *Convoys*."""
    keeping_up_seconds: float = 0.5
    """A device that had nothing to do within these last seconds keeps up."""
    urgent_seconds: float = 0.2
    """A request whose deadline is closer than this overtakes all others."""
    default_retry_after: float = 0.5
    """Seconds named in a refusal before anything was computed that an estimate could rest on."""


class Pool:
    """What may be computed together. Made by `Batcher.add_pool`; a request names the pool that it belongs to."""

    __slots__ = (
        "name",
        "max_batch_size",
        "preferred_sizes",
        "head_start",
        "cost",
        "num_waiting_rows",
        "ready",
        "served",
        "virtual_time",
    )

    def __init__(
        self, name: Hashable, max_batch_size: int, preferred_sizes: tuple[int, ...], head_start: float
    ) -> None:
        self.name = name
        self.max_batch_size = max_batch_size
        self.preferred_sizes = preferred_sizes
        self.head_start = head_start
        self.cost = BatchCost()
        self.num_waiting_rows = 0
        self.ready: list[tuple[int, float, int, Request]] = []
        self.served: dict[Hashable, float] = {}
        self.virtual_time = 0.0

    def __repr__(self) -> str:
        return f"Pool({self.name!r}, waiting={self.num_waiting_rows})"


@dataclass(slots=True, eq=False)
class Request:
    """Rows that somebody waits for. The first five fields are the caller's, the rest the batcher's."""

    pool: Pool
    num_rows: int
    """At least 1."""
    num_bytes: int
    """What the request holds in memory, for the byte budget."""
    peer: Hashable = None
    """Whom the rows are charged to."""
    payload: Any = None
    """The caller's own; the batcher never looks inside."""
    deadline: float = math.inf
    priority: int = 0
    """Higher goes first."""
    exclusive: bool = False
    """Never shares a batch with another request (one whose random numbers or optimizer step are its own)."""
    arrival: float = 0.0
    next_row: int = 0
    """Rows before this one have been dispatched."""
    num_running: int = 0
    """Batches under way that hold a part of this request."""
    alive: bool = False
    """False once the request was finished, removed or expired; what still runs of it has no taker."""

    @property
    def waits(self) -> bool:
        """Whether some rows have not been dispatched yet."""
        return self.alive and self.next_row < self.num_rows


class Part(NamedTuple):
    """Rows ``start`` to ``stop`` of a request, in one batch."""

    request: Request
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the request ends with this part."""
        return self.stop == self.request.num_rows


@dataclass(slots=True, eq=False)
class Batch:
    """What to compute at once. Give it back to `Batcher.finish` when it ran, whether it worked or not."""

    pool: Pool
    parts: list[Part]
    num_rows: int
    started: float


@dataclass(slots=True)
class BatcherStatistics:
    """What happened so far, and what waits now."""

    num_added: int = 0
    num_refused: int = 0
    num_expired: int = 0
    num_removed: int = 0
    num_finished: int = 0
    num_batches: int = 0
    num_rows: int = 0
    wait_seconds: float = 0.0
    """Sum over dispatched requests of the time from arrival to their first batch."""
    num_waiting: int = 0
    num_waiting_rows: int = 0
    num_bytes: int = 0
    bytes_per_second: float = 0.0
    """How fast the device got through its work lately; 0 before the first batch."""


@dataclass(slots=True)
class _Class:
    """All requests of one priority and one head start, oldest first."""

    priority: int
    head_start: float
    ages: deque[Request] = field(default_factory=deque)


class Batcher:
    """See the module's docstring. Not thread-safe: its owner keeps one caller at a time."""

    def __init__(self, settings: BatcherSettings = BatcherSettings()) -> None:
        self.settings = settings
        self._classes: list[_Class] = []  # highest priority first
        self._deadlines: list[tuple[float, int, Request]] = []
        self._full_pools: dict[Pool, None] = {}  # those that need not wait for others to join; used with max_wait only
        self._peer_bytes: dict[Hashable, int] = {}
        self._max_peer_bytes = int(settings.max_queue_bytes * settings.max_peer_share)
        self._sequence = 0
        self._num_stale = 0
        self._num_running = 0
        self._is_idle = True
        self._busy_since = 0.0
        self._finished_at = -math.inf
        self._statistics = BatcherStatistics()

    def add_pool(
        self,
        name: Hashable,
        *,
        max_batch_size: int,
        preferred_sizes: tuple[int, ...] = (),
        head_start: float = 0.0,
    ) -> Pool:
        """A new pool. `preferred_sizes`: rows at which a batch is best cut off, if that many wait. `head_start`: the
        seconds by which its requests count as older than they are, beside those of other pools.

        Raises: ValueError for sizes below 1 or above `max_batch_size`.
        """
        if max_batch_size < 1 or any(not 1 <= size <= max_batch_size for size in preferred_sizes):
            raise ValueError(f"a batch has at least 1 row and at most {max_batch_size}: {preferred_sizes}")
        return Pool(name, max_batch_size, tuple(sorted(preferred_sizes)), head_start)

    def add(self, request: Request, now: float) -> None:
        """Queues a request. Raises: Overloaded when the byte budget is full; ValueError for a request of no rows."""
        if request.num_rows < 1:
            raise ValueError("a request has at least one row")
        statistics = self._statistics
        held = self._peer_bytes.get(request.peer, 0)
        if statistics.num_bytes + request.num_bytes > self.settings.max_queue_bytes and statistics.num_bytes:
            raise self._refusal("", statistics.num_bytes + request.num_bytes - self.settings.max_queue_bytes)
        if held + request.num_bytes > self._max_peer_bytes and held:
            raise self._refusal(" of yours", held + request.num_bytes - self._max_peer_bytes)
        self._peer_bytes[request.peer] = held + request.num_bytes
        self._sequence += 1
        request.arrival = now
        request.alive = True
        pool = request.pool
        # start-time fair queueing: a peer's next rows start where its last ones ended, but never in the past
        start = max(pool.virtual_time, pool.served.get(request.peer, 0.0))
        pool.served[request.peer] = start + request.num_rows
        if len(pool.served) > _PEERS_REMEMBERED:
            pool.served = {peer: end for peer, end in pool.served.items() if end > pool.virtual_time}
        heapq.heappush(pool.ready, (-request.priority, start, self._sequence, request))
        pool.num_waiting_rows += request.num_rows
        if self.settings.max_wait and pool.num_waiting_rows >= self._full_size(pool):
            self._full_pools[pool] = None
        self._class_of(request).ages.append(request)
        if request.deadline < math.inf:
            heapq.heappush(self._deadlines, (request.deadline, self._sequence, request))
        statistics.num_added += 1
        statistics.num_waiting += 1
        statistics.num_waiting_rows += request.num_rows
        statistics.num_bytes += request.num_bytes

    def remove(self, request: Request) -> bool:
        """Nobody waits for this any more: what was not dispatched yet is dropped.

        False if all of it was dispatched (or it has left before): then its batch runs to the end.
        """
        if not request.waits:
            return False
        self._statistics.num_removed += 1
        self._leave(request)
        return True

    def pop_expired(self, now: float) -> list[Request]:
        """Requests whose deadline passed before all of their rows were dispatched. They have left."""
        expired: list[Request] = []
        deadlines = self._deadlines
        while deadlines and (deadlines[0][0] <= now or not deadlines[0][2].waits):
            request = heapq.heappop(deadlines)[2]
            if request.waits:
                self._statistics.num_expired += 1
                self._leave(request)
                expired.append(request)
        return expired

    def pop_ready(self, now: float) -> Batch | None:
        """The next batch for a device that has room, or None. Call `pop_expired` first."""
        urgent = self._most_urgent(now)
        pool = urgent.pool if urgent is not None else self._next_pool(now)
        if pool is None:
            self._is_idle = self._is_idle or not self._num_running
            return None
        if self._is_idle:
            self._is_idle, self._busy_since = False, now
        parts: list[Part] = []
        limit = self._batch_limit(pool)
        num_rows = 0
        if urgent is not None:
            if urgent.exclusive or urgent.num_rows - urgent.next_row > limit:
                limit = pool.max_batch_size
            num_rows = self._take(urgent, parts, limit, now)
        enough = self._enough_rows(pool, now)
        if urgent is None or (not urgent.exclusive and num_rows < min(limit, enough)):
            num_rows = self._fill(pool, parts, num_rows, limit, enough, now)
        self._num_running += 1
        self._statistics.num_batches += 1
        self._statistics.num_rows += num_rows
        pool.num_waiting_rows -= num_rows
        self._statistics.num_waiting_rows -= num_rows
        if self._num_stale > _SWEEP_ABOVE and self._num_stale > self._statistics.num_waiting:
            self._sweep()
        return Batch(pool, parts, num_rows, now)

    def finish(self, batch: Batch, now: float) -> None:
        """A batch that `pop_ready` gave has run, well or badly. Its bytes are free once whole requests are through."""
        self._num_running -= 1
        # beside another batch its own time begins where that one's ended
        batch.pool.cost.add(batch.num_rows, now - max(batch.started, self._finished_at))
        self._finished_at = now
        num_bytes = 0
        for request, start, stop in batch.parts:
            request.num_running -= 1
            num_bytes += request.num_bytes * (stop - start) // request.num_rows
            if request.alive and request.next_row == request.num_rows and request.num_running == 0:
                request.alive = False
                self._statistics.num_finished += 1
                self._release(request)
        seconds = max(now - batch.started, 1e-6)
        speed = self._statistics.bytes_per_second
        self._statistics.bytes_per_second = speed + (num_bytes / seconds - speed) * (_SPEED_WEIGHT if speed else 1.0)

    def timer_at(self) -> float | None:
        """When time alone changes something: a deadline passes, or a batch held back for `max_wait` is due."""
        times = []
        while self._deadlines and not self._deadlines[0][2].waits:
            heapq.heappop(self._deadlines)
        if self._deadlines:
            times.append(self._deadlines[0][0])
            if self.settings.max_wait:
                times.append(self._deadlines[0][0] - self.settings.urgent_seconds)
        oldest = min((request.arrival for request in self._oldest()), default=None)
        if oldest is not None:
            times.append(oldest + self.settings.max_wait)
        return min(times, default=None)

    @property
    def num_waiting(self) -> int:
        """Requests of which some rows have not been dispatched."""
        return self._statistics.num_waiting

    def waiting(self) -> list[Request]:
        """Every request of which some rows have not been dispatched, by priority, then oldest first within a pool."""
        return [request for one in self._classes for request in one.ages if request.waits]

    def statistics(self) -> BatcherStatistics:
        """The figures of this moment."""
        return dataclasses.replace(self._statistics)

    def _class_of(self, request: Request) -> _Class:
        priority, head_start = request.priority, request.pool.head_start
        index = 0
        for one in self._classes:
            if one.priority == priority and one.head_start == head_start:
                return one
            index += one.priority > priority
        self._classes.insert(index, _Class(priority, head_start))
        return self._classes[index]

    def _oldest(self) -> list[Request]:
        """The oldest waiting request of each priority and head start: the highest priority first, then by turn."""
        found: list[Request] = []
        for one in self._classes:
            ages = one.ages
            while ages and not ages[0].waits:
                ages.popleft()
            if ages:
                found.append(ages[0])
        found.sort(key=lambda request: (-request.priority, request.arrival - request.pool.head_start))
        return found

    def _most_urgent(self, now: float) -> Request | None:
        deadlines = self._deadlines
        horizon = now + self.settings.urgent_seconds
        while deadlines and deadlines[0][0] <= horizon:
            request = deadlines[0][2]
            if request.waits:
                return request
            heapq.heappop(deadlines)
        return None

    def _next_pool(self, now: float) -> Pool | None:
        if not self.settings.max_wait:
            return next((request.pool for request in self._oldest()), None)
        # held back: an old enough request releases its pool, and so do enough rows for a whole batch
        for request in self._oldest():
            if request.arrival + self.settings.max_wait <= now:
                return request.pool
        for pool in list(self._full_pools):
            if pool.num_waiting_rows >= self._full_size(pool):
                return pool
            del self._full_pools[pool]
        return None

    @staticmethod
    def _full_size(pool: Pool) -> int:
        return pool.preferred_sizes[-1] if pool.preferred_sizes else pool.max_batch_size

    @staticmethod
    def _batch_limit(pool: Pool) -> int:
        """Rows to gather: the largest preferred size that is filled by what waits, if there is one."""
        if pool.num_waiting_rows >= pool.max_batch_size:
            return pool.max_batch_size
        return max(
            (size for size in pool.preferred_sizes if size <= pool.num_waiting_rows), default=pool.max_batch_size
        )

    def _enough_rows(self, pool: Pool, now: float) -> float:
        """Rows at which a batch takes no more requests; infinity where the device is behind, or told how to cut."""
        if pool.preferred_sizes or self.settings.max_wait:
            return math.inf
        if now - self._busy_since > self.settings.keeping_up_seconds:
            return math.inf
        return pool.cost.rows_until(self.settings.fixed_share)

    def _fill(self, pool: Pool, parts: list[Part], num_rows: int, limit: int, enough: float, now: float) -> int:
        """Takes the pool's requests in order until there are `enough` rows, or one does not fit any more.

        Returns the rows now in the batch.
        """
        ready, large = pool.ready, self.settings.large_request_bytes
        if parts and parts[0].request.num_bytes >= large:
            return num_rows
        while ready:
            _, start, _, request = ready[0]
            if not request.waits:
                heapq.heappop(ready)
                continue
            if parts and (
                request.exclusive
                or request.num_bytes >= large
                or request.num_rows - request.next_row > limit - num_rows
            ):
                break
            if not parts and (request.exclusive or request.num_rows - request.next_row > limit):
                limit = pool.max_batch_size  # a preferred size must not split what fits in a batch
            pool.virtual_time = max(pool.virtual_time, start)
            num_rows += self._take(request, parts, limit - num_rows, now)
            if request.next_row == request.num_rows:
                heapq.heappop(ready)
            if request.exclusive or request.num_bytes >= large or num_rows >= min(limit, enough):
                break
        if not ready:
            pool.served.clear()
            pool.virtual_time = 0.0
        return num_rows

    def _take(self, request: Request, parts: list[Part], room: int, now: float) -> int:
        """Dispatches as many of the request's rows as there is room for. Returns how many."""
        start = request.next_row
        stop = min(request.num_rows, start + room)
        parts.append(Part(request, start, stop))
        request.next_row = stop
        request.num_running += 1
        if start == 0:
            self._statistics.wait_seconds += now - request.arrival
        if stop == request.num_rows:
            self._statistics.num_waiting -= 1
            self._num_stale += 1
        return stop - start

    def _leave(self, request: Request) -> None:
        """Takes a waiting request out of all counts; its entries in the queues go stale."""
        num_left = request.num_rows - request.next_row
        request.pool.num_waiting_rows -= num_left
        request.alive = False
        statistics = self._statistics
        statistics.num_waiting -= 1
        statistics.num_waiting_rows -= num_left
        self._release(request)
        self._num_stale += 1

    def _release(self, request: Request) -> None:
        self._statistics.num_bytes -= request.num_bytes
        held = self._peer_bytes[request.peer] - request.num_bytes
        if held:
            self._peer_bytes[request.peer] = held
        else:
            del self._peer_bytes[request.peer]

    def _sweep(self) -> None:
        """Drops stale entries, so that memory follows what waits and not what has passed."""
        pools: set[Pool] = set()
        self._deadlines = [entry for entry in self._deadlines if entry[2].waits]
        heapq.heapify(self._deadlines)
        for one in self._classes:
            pools.update(request.pool for request in one.ages)
            one.ages = deque(request for request in one.ages if request.waits)
        self._classes = [one for one in self._classes if one.ages]
        for pool in pools:
            pool.ready = [entry for entry in pool.ready if entry[3].waits]
            heapq.heapify(pool.ready)
        self._num_stale = 0

    def _refusal(self, whose: str, num_excess_bytes: int) -> Overloaded:
        statistics = self._statistics
        statistics.num_refused += 1
        retry_after = self.settings.default_retry_after
        if statistics.bytes_per_second:
            retry_after = num_excess_bytes / statistics.bytes_per_second
        return Overloaded(
            f"too many bytes{whose} wait already; try again in {retry_after:.2f} s or ask another replica",
            retry_after=retry_after,
        )
