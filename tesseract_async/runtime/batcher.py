"""Which rows a device computes next: the batcher, a pure machine.

One batcher serves all experts of a device. Requests go in with `Batcher.add`, batches come out of `Batcher.pop_ready`,
whose caller says by calling that the device has room: work is dispatched at once while the device idles, and gathers
while it is busy. Time goes in as `now` (seconds, any monotonic clock) and comes out of `timer_at`.

A batch holds requests of one `Pool` only (what may be computed together: one expert, one direction, one mode) and
never more than the pool's `max_batch_size` rows. A request that fits is never split; a larger one is cut into chunks
of `max_batch_size` rows, in order, and its last chunk may share a batch with other requests, unless it has many bytes.

Order
    1. Device time is shared over *accounts* (a peer, or an address range of peers that nobody knows): each batch's
       seconds are charged to the accounts whose rows it held, and the account that used least goes first, across all
       pools (start-time fair queueing, Goyal, Vin & Cheng 1996, in seconds). Accounts whose use differs by less than
       `_TURN_SECONDS` are equal; of them, the one with the oldest request goes first. One that was away starts level.
    2. Within an account: work whose deadline is closer than `urgent_seconds`, the earliest first; then the highest
       priority, the oldest first. So neither deadlines nor priorities take anything from other accounts. A pool may
       have a head start, by which its requests count as older than they are.
    3. The chosen request's pool fills the batch, by the same two rules. A flood delays its sender only.

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
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, NamedTuple

from tesseract_async.errors import Overloaded
from tesseract_async.runtime.costs import BatchCost

_SWEEP_ABOVE = 1024
_ACCOUNTS_REMEMBERED = 1024
_TURN_SECONDS = 0.05
"""Of device time; a good deal more than most batches take, and less than anybody waits for in vain."""
_SPEED_WEIGHT = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherSettings:
    """How much may wait, and for how long."""

    max_queue_bytes: int = 1 << 30
    """Bytes of all requests that wait or run; beyond it `Batcher.add` refuses. One request is always taken."""
    max_peer_share: float = 0.5
    """Share of those bytes that one account may hold, so that a flood leaves room for others."""
    large_request_bytes: int = 1 << 20
    """A request of so many bytes shares no batch: copying it beside others would cost more than merging saves."""
    fixed_share: float = 0.25
    """While the device keeps up, a batch takes no more requests once what it costs whatever its rows is less than this
    share of its cost (as learnt, see `costs`); 0: it takes all that it may. See *Convoys*."""
    keeping_up_seconds: float = 0.5
    """A device that had nothing to do within these last seconds keeps up."""
    urgent_seconds: float = 0.2
    """A request whose deadline is closer than this overtakes all others of its account."""
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
        self.ready: dict[Account, list[tuple[int, int, Request]]] = {}

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
    """The account that the rows are charged to."""
    payload: Any = None
    """The caller's own; the batcher never looks inside."""
    deadline: float = math.inf
    priority: int = 0
    """Higher goes first."""
    exclusive: bool = False
    """Never shares a batch with another request (one whose random numbers or optimizer step are its own)."""
    account: Account | None = None
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
    seconds_per_row: float
    """As expected, and charged in advance."""


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


class Account:
    """Whose work waits, and the device time that it used. Made by the batcher."""

    __slots__ = ("used", "num_bytes", "num_waiting", "classes", "deadlines", "_age")

    def __init__(self) -> None:
        self.used = 0.0
        """Seconds, counted from where the account that used least stood when this one came."""
        self.num_bytes = 0
        self.num_waiting = 0
        self.classes: dict[tuple[int, float], deque[Request]] = {}
        """Requests of one priority and one head start, oldest first; some have left."""
        self.deadlines: list[tuple[float, int, Request]] = []
        self._age: float | None = None

    def add(self, request: Request, sequence: int) -> None:
        """A request waits."""
        self.num_waiting += 1
        self.num_bytes += request.num_bytes
        kind = (request.priority, request.pool.head_start)
        ages = self.classes.get(kind)
        if ages is None:
            ages = self.classes[kind] = deque()
        ages.append(request)
        if self._age is not None:
            self._age = min(self._age, _age(request))
        if request.deadline < math.inf:
            heapq.heappush(self.deadlines, (request.deadline, sequence, request))

    def end_wait(self) -> None:
        """One of the requests waits no more."""
        self.num_waiting -= 1
        self._age = None
        if not self.num_waiting:
            self.classes.clear()
            self.deadlines.clear()

    @property
    def age(self) -> float:
        """Since when its oldest request counts as waiting."""
        if self._age is None:
            self._age = min(map(_age, self.heads()))
        return self._age

    def heads(self) -> list[Request]:
        """The oldest waiting request of each priority and head start."""
        found: list[Request] = []
        for ages in self.classes.values():
            while ages and not ages[0].waits:
                ages.popleft()
            if ages:
                found.append(ages[0])
        if len(found) < len(self.classes):
            self.classes = {kind: ages for kind, ages in self.classes.items() if ages}
        return found

    def most_urgent(self) -> Request | None:
        """The waiting request with the earliest deadline."""
        deadlines = self.deadlines
        while deadlines and not deadlines[0][2].waits:
            heapq.heappop(deadlines)
        return deadlines[0][2] if deadlines else None

    def sweep(self) -> None:
        """Drops entries of requests that have left."""
        self.deadlines = [entry for entry in self.deadlines if entry[2].waits]
        heapq.heapify(self.deadlines)
        self.classes = {kind: deque(one for one in ages if one.waits) for kind, ages in self.classes.items()}


def _age(request: Request) -> float:
    """Since when a request counts as waiting."""
    return request.arrival - request.pool.head_start


_USED: Final = attrgetter("used")
_ACCOUNT_AGE: Final = attrgetter("age")


class Batcher:
    """See the module's docstring. Not thread-safe: its owner keeps one caller at a time."""

    def __init__(self, settings: BatcherSettings = BatcherSettings()) -> None:
        self.settings = settings
        self._accounts: dict[Hashable, Account] = {}
        self._active: dict[Account, None] = {}  # those with waiting requests
        self._least_used = 0.0  # of the active accounts when there were any; never falls
        self._max_account_bytes = int(settings.max_queue_bytes * settings.max_peer_share)
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
        account = self._accounts.get(request.peer)
        held = 0 if account is None else account.num_bytes
        if statistics.num_bytes + request.num_bytes > self.settings.max_queue_bytes and statistics.num_bytes:
            raise self._refusal("", statistics.num_bytes + request.num_bytes - self.settings.max_queue_bytes)
        if held + request.num_bytes > self._max_account_bytes and held:
            raise self._refusal(" of yours", held + request.num_bytes - self._max_account_bytes)
        if account is None:
            if len(self._accounts) >= _ACCOUNTS_REMEMBERED:
                self._forget_accounts()
            account = self._accounts[request.peer] = Account()
        if not account.num_waiting:
            account.used = max(account.used, self._least_used)
            self._active[account] = None
        request.account = account
        self._sequence += 1
        request.arrival = now
        request.alive = True
        pool = request.pool
        ready = pool.ready.get(account)
        if ready is None:
            ready = pool.ready[account] = []
        heapq.heappush(ready, (-request.priority, self._sequence, request))
        pool.num_waiting_rows += request.num_rows
        account.add(request, self._sequence)
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
        for account in list(self._active):
            while (request := account.most_urgent()) is not None and request.deadline <= now:
                self._statistics.num_expired += 1
                self._leave(request)
                expired.append(request)
        return expired

    def pop_ready(self, now: float) -> Batch | None:
        """The next batch for a device that has room, or None. Call `pop_expired` first."""
        if not self._active:
            self._is_idle = self._is_idle or not self._num_running
            return None
        if self._is_idle:
            self._is_idle, self._busy_since = False, now
        least = min(map(_USED, self._active))
        self._least_used = max(self._least_used, least)
        turn = least + _TURN_SECONDS
        first = self._next_request(now, turn)
        pool = first.pool
        parts: list[Part] = []
        limit = self._batch_limit(pool)
        if first.exclusive or first.num_rows - first.next_row > limit:
            limit = pool.max_batch_size  # a preferred size must not split what fits in a batch
        per_row = pool.cost.seconds_per_row
        num_rows = self._take(first, parts, limit, per_row, now)
        if (
            pool.num_waiting_rows > num_rows  # else nobody could ride along
            and not first.exclusive
            and first.num_bytes < self.settings.large_request_bytes
        ):
            num_rows = self._fill(pool, parts, num_rows, limit, turn, per_row, now)
        self._num_running += 1
        self._statistics.num_batches += 1
        self._statistics.num_rows += num_rows
        pool.num_waiting_rows -= num_rows
        if not pool.num_waiting_rows:
            pool.ready.clear()
        self._statistics.num_waiting_rows -= num_rows
        if self._num_stale > _SWEEP_ABOVE and self._num_stale > self._statistics.num_waiting:
            self._sweep()
        return Batch(pool, parts, num_rows, now, per_row)

    def finish(self, batch: Batch, now: float) -> None:
        """A batch that `pop_ready` gave has run, well or badly. Its bytes are free once whole requests are through."""
        self._num_running -= 1
        # beside another batch its own time begins where that one's ended
        took = now - max(batch.started, self._finished_at)
        batch.pool.cost.add(batch.num_rows, took)
        self._finished_at = now
        owed = took / batch.num_rows - batch.seconds_per_row
        num_bytes = 0
        for request, start, stop in batch.parts:
            request.num_running -= 1
            assert request.account is not None
            request.account.used += owed * (stop - start)
            num_bytes += request.num_bytes * (stop - start) // request.num_rows
            if request.alive and request.next_row == request.num_rows and request.num_running == 0:
                request.alive = False
                self._statistics.num_finished += 1
                self._release(request)
        seconds = max(now - batch.started, 1e-6)
        speed = self._statistics.bytes_per_second
        self._statistics.bytes_per_second = speed + (num_bytes / seconds - speed) * (_SPEED_WEIGHT if speed else 1.0)

    def timer_at(self) -> float | None:
        """When the next deadline passes."""
        if not self._active:
            return None
        urgent = [account.most_urgent() for account in self._active]
        return min((request.deadline for request in urgent if request is not None), default=None)

    @property
    def num_waiting(self) -> int:
        """Requests of which some rows have not been dispatched."""
        return self._statistics.num_waiting

    def waiting(self) -> list[Request]:
        """Every request of which some rows have not been dispatched."""
        return [one for account in self._active for ages in account.classes.values() for one in ages if one.waits]

    def statistics(self) -> BatcherStatistics:
        """The figures of this moment."""
        return dataclasses.replace(self._statistics)

    def _next_request(self, now: float, turn: float) -> Request:
        """The one that the next batch is made for. An account's place is that of its oldest request, whichever of them
        it wants done first.
        """
        if len(self._active) == 1:
            (account,) = self._active
        else:
            account = min((one for one in self._active if one.used <= turn), key=_ACCOUNT_AGE)
        urgent = account.most_urgent()
        if urgent is not None and urgent.deadline <= now + self.settings.urgent_seconds:
            return urgent
        heads = account.heads()
        return heads[0] if len(heads) == 1 else min(heads, key=lambda one: (-one.priority, _age(one)))

    @staticmethod
    def _batch_limit(pool: Pool) -> int:
        """Rows to gather: the largest preferred size that is filled by what waits, if there is one."""
        if not pool.preferred_sizes or pool.num_waiting_rows >= pool.max_batch_size:
            return pool.max_batch_size
        return max(
            (size for size in pool.preferred_sizes if size <= pool.num_waiting_rows), default=pool.max_batch_size
        )

    def _enough_rows(self, pool: Pool, now: float) -> float:
        """Rows at which a batch takes no more requests; infinity where the device is behind, or told how to cut."""
        if pool.preferred_sizes:
            return math.inf
        if now - self._busy_since > self.settings.keeping_up_seconds:
            return math.inf
        return pool.cost.rows_until(self.settings.fixed_share)

    def _fill(
        self, pool: Pool, parts: list[Part], num_rows: int, limit: int, turn: float, per_row: float, now: float
    ) -> int:
        """Takes the pool's requests in order until there are enough rows, or one does not fit any more.

        Accounts whose `turn` it is not don't ride along either: they would make the others' batches as slow as theirs.
        Returns the rows now in the batch.
        """
        enough, large = self._enough_rows(pool, now), self.settings.large_request_bytes
        turns = [(account.used, some[0][1], account) for account, some in pool.ready.items() if account.used <= turn]
        heapq.heapify(turns)
        while turns and num_rows < min(limit, enough):
            account = heapq.heappop(turns)[2]
            ready = pool.ready[account]
            while ready and not ready[0][2].waits:
                heapq.heappop(ready)
            if not ready:
                del pool.ready[account]
                continue
            request = ready[0][2]
            if (
                request.exclusive
                or request.num_bytes >= large
                or request.num_rows - request.next_row > limit - num_rows
            ):
                break
            num_rows += self._take(request, parts, limit - num_rows, per_row, now)
            heapq.heappush(turns, (account.used, ready[0][1], account))
        return num_rows

    def _take(self, request: Request, parts: list[Part], room: int, per_row: float, now: float) -> int:
        """Dispatches as many of the request's rows as there is room for. Returns how many."""
        start = request.next_row
        stop = min(request.num_rows, start + room)
        parts.append(Part(request, start, stop))
        request.next_row = stop
        request.num_running += 1
        assert request.account is not None
        request.account.used += per_row * (stop - start)
        if start == 0:
            self._statistics.wait_seconds += now - request.arrival
        if stop == request.num_rows:
            self._end_wait(request.account)
        return stop - start

    def _end_wait(self, account: Account) -> None:
        """One of the account's requests waits no more; its entries in the queues go stale."""
        self._statistics.num_waiting -= 1
        self._num_stale += 1
        account.end_wait()
        if not account.num_waiting:
            del self._active[account]

    def _leave(self, request: Request) -> None:
        """Takes a waiting request out of all counts."""
        num_left = request.num_rows - request.next_row
        pool = request.pool
        pool.num_waiting_rows -= num_left
        if not pool.num_waiting_rows:
            pool.ready.clear()
        request.alive = False
        self._statistics.num_waiting_rows -= num_left
        assert request.account is not None
        self._end_wait(request.account)
        self._release(request)

    def _release(self, request: Request) -> None:
        assert request.account is not None
        self._statistics.num_bytes -= request.num_bytes
        request.account.num_bytes -= request.num_bytes

    def _forget_accounts(self) -> None:
        """Drops those that stand where a new one would start."""
        self._accounts = {
            name: one
            for name, one in self._accounts.items()
            if one.num_waiting or one.num_bytes or one.used > self._least_used
        }

    def _sweep(self) -> None:
        """Drops stale entries, so that memory follows what waits and not what has passed."""
        pools = {one.pool for account in self._active for ages in account.classes.values() for one in ages}
        for account in self._accounts.values():
            account.sweep()
        for pool in pools:
            pool.ready = {
                account: left
                for account, some in pool.ready.items()
                if (left := [entry for entry in some if entry[2].waits])
            }
            for left in pool.ready.values():
                heapq.heapify(left)
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
