"""The batcher: a pure machine that decides which rows a device computes next.

One batcher serves all experts of a device. Requests go in with `Batcher.add`, batches come out of `Batcher.pop_ready`.
The caller calls that when the device has room: work is dispatched at once while the device is idle, and gathers while
the device is busy. Time goes in as `now` (seconds, any monotonic clock) and comes out of `timer_at`.

A batch holds requests of one `BatchQueue` only (what may be computed together: one expert, one direction, one mode) and
never more than the queue's `max_batch_size` rows. A request that fits is never split; a larger one is cut into chunks
of `max_batch_size` rows, in order, and its last chunk may share a batch with other requests, unless it has many bytes.

Order
    1. Device time is shared over *accounts* (a peer, or an address range of unknown peers): each batch's seconds are
       charged to the accounts whose rows it held, and the account that used least goes first, across all queues
       (start-time fair queueing, Goyal, Vin & Cheng 1996, in seconds). Accounts whose use differs by less than
       `TURN_SECONDS` are equal; of them, the one with the oldest request goes first. A new account, or one that was
       away, starts level with the one that used least.
    2. Within an account: work whose deadline is closer than `URGENT_SECONDS`, the earliest first; then the highest
       priority, the oldest first. So neither deadlines nor priorities take anything from other accounts. A queue may
       have a head start, by which its requests count as older than they are.
    3. The chosen request's queue fills the batch, by the same two rules. A flood delays its sender only.

Convoys
    Requests that are computed together are answered together, travel together, and come back together, and nothing on
    their way spreads them again: the device idles between two crowds. Two rules work against that. First, a batch stops
    growing when merging no longer saves much: while the device keeps up, it takes no more requests once the fixed cost
    of a batch is a small share of its whole cost. Second, short batches whose answers lead to long ones (forwards,
    which lead to backwards) have a head start, so that crowds gather in front of the batches that take longest.

Groups
    Batches of several queues may be computed in one pass, where their owner has put these queues into one group. A pass
    holds only batches that would have come next anyway, in the same order, and no more than `GROUP_SECONDS` of work;
    less where several accounts use the device, so that the account whose turn it would be waits no longer than for a
    batch.

Queues are heaps. The entry of a request that leaves early stays until it reaches the top, or until most entries are
stale. Adding and dispatching a request costs some microseconds, whatever the number of experts.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final, NamedTuple

from tesseract_async.errors import Overloaded
from tesseract_async.runtime.costs import BatchCost

MAX_QUEUE_BYTES: Final = 1 << 30
"""Bytes of all requests that wait or run, by default."""
MAX_ACCOUNT_SHARE: Final = 0.5
"""Share of the queue's bytes that one account may hold, so that a flood leaves room for others."""
LARGE_REQUEST_BYTES: Final = 1 << 20
"""A request of this size shares no batch: copying it next to others would cost more than merging saves."""
FIXED_SHARE: Final = 0.25
"""While the device keeps up, a batch takes no more requests once its fixed cost is less than this share of its whole
cost (as learned, see `costs`). See *Convoys*."""
KEEPING_UP_SECONDS: Final = 0.5
"""A device keeps up if it had nothing to do at some moment of the last seconds, as many as this."""
URGENT_SECONDS: Final = 0.2
"""A request whose deadline is closer than this overtakes all others of its account."""
TURN_SECONDS: Final = 0.05
"""A difference in device time: well above the seconds of most batches, and well below what a caller would notice."""
GROUP_SECONDS: Final = 0.02
"""The most expected device time of batches that are computed in one pass: all others wait for its end."""
SHARED_GROUP_SECONDS: Final = 0.002
"""The limit `GROUP_SECONDS` while several accounts use the device."""
SHARED_SECONDS: Final = 1.0
"""Several accounts count as using the device for this many seconds after requests of two different ones came in a
row."""
MAX_GROUP_BATCHES: Final = 128
GROUP_ROWS: Final = 4
"""A batch joins others in one pass if it has no more than this many times their average rows: they may be padded."""
DEFAULT_RETRY_AFTER: Final = 0.5
"""Seconds named in a refusal before any batch has run from which they could be estimated."""
_SWEEP_ABOVE: Final = 64
_ACCOUNTS_REMEMBERED: Final = 1024
_SPEED_WEIGHT: Final = 0.2


@dataclass(slots=True, eq=False, repr=False)
class BatchQueue:
    """Requests that may be computed together. Made by `Batcher.add_queue`; a request names the queue it belongs to."""

    name: Hashable
    max_batch_size: int
    preferred_sizes: tuple[int, ...]
    head_start: float
    cost: BatchCost = field(default_factory=BatchCost)
    num_waiting_rows: int = 0
    group: object | None = None
    """Queues with the same object here may be computed in one pass. Set by the owner, at any time."""
    ready: dict[Account, _Heap] = field(default_factory=dict)
    """The waiting requests by account: the highest priority first, then in order of arrival."""


@dataclass(slots=True, eq=False, repr=False)
class QueuedRequest:
    """Rows to compute for one caller. The fields up to `exclusive` are the caller's, the rest the batcher's."""

    queue: BatchQueue
    num_rows: int
    """At least 1."""
    num_bytes: int
    """Memory that the request holds, for the byte budget."""
    peer: Hashable = None
    """The account that the rows are charged to."""
    deadline: float = math.inf
    priority: int = 0
    """Higher goes first."""
    exclusive: bool = False
    """True if it never shares a batch with another request: it has random numbers or an optimizer step of its own."""
    account: Account | None = None
    arrival: float = 0.0
    sequence: int = 0
    next_row: int = 0
    """Rows before this one have been dispatched."""
    num_running: int = 0
    """Batches in progress that hold a part of this request."""
    alive: bool = False
    """False once the request was finished, removed or expired: results of what still runs are dropped."""
    cell: list[QueuedRequest] = field(default_factory=list)
    """Holds the request until all rows are dispatched. Queues keep the cell only, so that they pin nothing."""


class RowSlice(NamedTuple):
    """Rows ``start`` to ``stop`` of a request, in one batch."""

    request: QueuedRequest
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.request.num_rows


@dataclass(slots=True, eq=False)
class Batch:
    """Rows to compute at once. Give it back to `Batcher.finish` after it ran, whether it worked or not."""

    queue: BatchQueue
    slices: list[RowSlice]
    num_rows: int
    started: float
    seconds_per_row: float
    """The expected seconds per row, which are charged in advance."""


@dataclass(slots=True)
class BatcherStatistics:
    """Totals since the start, and what waits now."""

    num_batches: int = 0
    num_rows: int = 0
    """Rows of those batches."""
    num_waiting: int = 0
    """Requests of which some rows have not been dispatched."""
    num_waiting_rows: int = 0
    num_bytes: int = 0
    """Bytes of all requests that wait or run."""
    bytes_per_second: float = 0.0
    """The speed at which the device got through its work lately; 0 before the first batch."""


_Heap = list[tuple[float, int, list[QueuedRequest]]]
"""The cells of requests, ordered by a number, then by arrival. The first one is never empty; later ones may be."""


def _sweep(heap: _Heap) -> None:
    heap[:] = [entry for entry in heap if entry[2]]
    heapq.heapify(heap)


@dataclass(slots=True, eq=False, repr=False)
class Account:
    """The waiting requests of one account, and the device time that it used. Made by the batcher."""

    used: float = 0.0
    """Seconds of device time, counted from the use of the account that had used least when this one came."""
    num_bytes: int = 0
    num_waiting: int = 0
    classes: dict[tuple[int, float], _Heap] = field(default_factory=dict)
    """Requests by priority and head start, in order of arrival."""
    deadlines: _Heap = field(default_factory=list)
    """The earliest deadline first."""
    _age: float | None = None

    def add(self, request: QueuedRequest) -> None:
        """Count a request that begins to wait."""
        self.num_waiting += 1
        self.num_bytes += request.num_bytes
        queue, sequence, cell = request.queue, request.sequence, request.cell
        heapq.heappush(self.classes.setdefault((request.priority, queue.head_start), []), (0.0, sequence, cell))
        heapq.heappush(queue.ready.setdefault(self, []), (-request.priority, sequence, cell))
        if self._age is not None:
            self._age = min(self._age, _age(request))
        if request.deadline < math.inf:
            heapq.heappush(self.deadlines, (request.deadline, sequence, cell))

    def end_wait(self, request: QueuedRequest) -> None:
        """Count out a request that no longer waits, and drop its entries where they come first."""
        request.cell.clear()
        self.num_waiting -= 1
        self._age = None
        ready, kind = request.queue.ready, (request.priority, request.queue.head_start)
        for heap in (ready[self], self.classes[kind], self.deadlines):
            while heap and not heap[0][2]:
                heapq.heappop(heap)
            if len(heap) > 2 * self.num_waiting + _SWEEP_ABOVE:
                _sweep(heap)
        if not ready[self]:
            del ready[self]
        if not self.classes[kind]:
            del self.classes[kind]

    @property
    def age(self) -> float:
        if self._age is None:
            self._age = min([_age(heap[0][2][0]) for heap in self.classes.values()])
        return self._age

    def first(self, now: float) -> QueuedRequest:
        """The waiting request that comes first: an urgent one, else the oldest of the highest priority."""
        if self.deadlines and self.deadlines[0][0] <= now + URGENT_SECONDS:
            return self.deadlines[0][2][0]
        if len(self.classes) == 1:
            (heap,) = self.classes.values()
            return heap[0][2][0]
        heads = [heap[0][2][0] for heap in self.classes.values()]
        return min(heads, key=lambda one: (-one.priority, _age(one)))


def _age(request: QueuedRequest) -> float:
    return request.arrival - request.queue.head_start


_USED: Final = attrgetter("used")
_ACCOUNT_AGE: Final = attrgetter("age")


class Batcher:
    """See the module's docstring. Not thread-safe: its owner lets one caller in at a time.

    - `max_queue_bytes`: bytes of all requests that wait or run; beyond it `add` refuses. One request is always taken.
    - `fixed_share`: see `FIXED_SHARE`; at 0, a batch takes all requests that fit.
    """

    def __init__(self, *, max_queue_bytes: int = MAX_QUEUE_BYTES, fixed_share: float = FIXED_SHARE) -> None:
        self._max_queue_bytes = max_queue_bytes
        self._max_account_bytes = int(max_queue_bytes * MAX_ACCOUNT_SHARE)
        self._fixed_share = fixed_share
        self._accounts: dict[Hashable, Account] = {}
        self._active: dict[Account, None] = {}  # those with waiting requests
        self._newest: Account | None = None
        self._shared_until = -math.inf
        self._least_used = 0.0  # of the active accounts when there were any; never falls
        self._sequence = 0
        self._num_running = 0
        self._is_idle = True
        self._busy_since = 0.0
        self._finished_at = -math.inf
        self._delay = 1.0
        """Seconds that passed for each second of processor time, lately: other accounts wait as long as passes take."""
        self._statistics = BatcherStatistics()

    def add_queue(
        self,
        name: Hashable,
        *,
        max_batch_size: int,
        preferred_sizes: tuple[int, ...] = (),
        head_start: float = 0.0,
    ) -> BatchQueue:
        """Return a new queue. `preferred_sizes`: rows at which a batch is best cut off, if that many wait.
        `head_start`: the seconds by which its requests count as older than they are.

        Raises: ValueError for sizes below 1 or above `max_batch_size`.
        """
        if max_batch_size < 1 or any(not 1 <= size <= max_batch_size for size in preferred_sizes):
            raise ValueError(f"a batch has at least 1 row and at most {max_batch_size}: {preferred_sizes}")
        return BatchQueue(name, max_batch_size, tuple(sorted(preferred_sizes)), head_start)

    def add(self, request: QueuedRequest, now: float) -> None:
        """Queue a request. Raises: Overloaded when the byte budget is full; ValueError for a request of no rows."""
        if request.num_rows < 1:
            raise ValueError("a request has at least one row")
        statistics = self._statistics
        account = self._accounts.get(request.peer)
        held = 0 if account is None else account.num_bytes
        if statistics.num_bytes + request.num_bytes > self._max_queue_bytes and statistics.num_bytes:
            raise self._refusal("", statistics.num_bytes + request.num_bytes - self._max_queue_bytes)
        if held + request.num_bytes > self._max_account_bytes and held:
            raise self._refusal(" of yours", held + request.num_bytes - self._max_account_bytes)
        if account is None:
            if len(self._accounts) >= _ACCOUNTS_REMEMBERED:
                self._forget_accounts()
            account = self._accounts[request.peer] = Account()
        if not account.num_waiting:
            account.used = max(account.used, self._least_used)
            self._active[account] = None
        if account is not self._newest:
            if self._newest is not None:
                self._shared_until = now + SHARED_SECONDS
            self._newest = account
        self._sequence += 1
        request.account, request.arrival, request.sequence = account, now, self._sequence
        request.alive = True
        request.cell.append(request)
        account.add(request)
        request.queue.num_waiting_rows += request.num_rows
        statistics.num_waiting += 1
        statistics.num_waiting_rows += request.num_rows
        statistics.num_bytes += request.num_bytes

    def hold(self, peer: Hashable, num_bytes: int) -> None:
        """Count `num_bytes` of answers that an account has yet to take, for which it has less room; a negative number
        gives the room back."""
        account = self._accounts.setdefault(peer, Account())
        account.num_bytes += num_bytes
        self._statistics.num_bytes += num_bytes

    @property
    def has_waiting(self) -> bool:
        return bool(self._active)

    def remove(self, request: QueuedRequest) -> bool:
        """Drop the rows of a request that were not dispatched yet.

        Returns False if all of them were dispatched, or the request has left before: its batch then runs to the end.
        """
        if not request.cell:
            return False
        num_left = request.num_rows - request.next_row
        request.queue.num_waiting_rows -= num_left
        self._statistics.num_waiting_rows -= num_left
        self._end_wait(request)
        self._release(request)
        return True

    def pop_expired(self, now: float) -> list[QueuedRequest]:
        """Remove and return the requests whose deadline passed before all of their rows were dispatched."""
        expired: list[QueuedRequest] = []
        for account in list(self._active):
            while account.deadlines and account.deadlines[0][0] <= now:
                expired.append(account.deadlines[0][2][0])
                self.remove(expired[-1])
        return expired

    def pop_ready(self, now: float) -> Batch | None:
        """Return the next batch for a device that has room, or None. Call `pop_expired` first."""
        if not self._active:
            self._is_idle = self._is_idle or not self._num_running
            return None
        if self._is_idle:
            self._is_idle, self._busy_since = False, now
        return self._dispatch(*self._choose(now), now)

    def pop_group(self, first: Batch, now: float) -> list[Batch]:
        """Return the batches that come next and may be computed in one pass with `first`, which was just popped."""
        group, queues, batches = first.queue.group, {first.queue}, [first]
        seconds, num_rows = first.seconds_per_row * first.num_rows, first.num_rows
        limit = self.group_seconds(now)
        while self._active and len(batches) < MAX_GROUP_BATCHES and seconds < limit:
            request, turn = self._choose(now)
            queue = request.queue
            if queue.group is not group or queue in queues or request.num_bytes >= LARGE_REQUEST_BYTES:
                break
            if min(queue.num_waiting_rows, queue.max_batch_size) > max(16, GROUP_ROWS * num_rows / len(batches)):
                break
            batch = self._dispatch(request, turn, now)
            batches.append(batch)
            queues.add(queue)
            seconds += batch.seconds_per_row * batch.num_rows
            num_rows += batch.num_rows
        return batches[1:]

    def group_seconds(self, now: float) -> float:
        """Return the expected device time that what several queues hold may take in one pass."""
        return SHARED_GROUP_SECONDS / self._delay if now < self._shared_until else GROUP_SECONDS

    def _choose(self, now: float) -> tuple[QueuedRequest, float]:
        """Return the request that comes next, and the use up to which accounts have their turn."""
        least = min(map(_USED, self._active))
        self._least_used = max(self._least_used, least)
        turn = least + TURN_SECONDS
        if len(self._active) == 1:
            (account,) = self._active
        else:
            account = min((one for one in self._active if one.used <= turn), key=_ACCOUNT_AGE)
        return account.first(now), turn

    def _dispatch(self, first: QueuedRequest, turn: float, now: float) -> Batch:
        queue = first.queue
        limit = queue.max_batch_size
        if queue.preferred_sizes and not first.exclusive:
            # the largest preferred size that what waits fills, unless it would split what fits in a batch
            size = max([size for size in queue.preferred_sizes if size <= queue.num_waiting_rows], default=limit)
            if queue.num_waiting_rows < limit and first.num_rows - first.next_row <= size:
                limit = size
        batch = Batch(queue, [], 0, now, queue.cost.seconds_per_row)
        self._take(first, batch, limit)
        if (
            queue.num_waiting_rows > batch.num_rows  # else there is nothing to share the batch with
            and not first.exclusive
            and first.num_bytes < LARGE_REQUEST_BYTES
        ):
            self._fill(batch, limit, turn)
        self._num_running += 1
        self._statistics.num_batches += 1
        self._statistics.num_rows += batch.num_rows
        self._statistics.num_waiting_rows -= batch.num_rows
        queue.num_waiting_rows -= batch.num_rows
        return batch

    def finish(self, batches: Sequence[Batch], now: float, spent: float | None = None) -> float:
        """Account for a batch that has run, well or badly, or several in one pass. Returns the seconds that it cost.

        `spent`: its seconds of processor time. If they are known, its cost is learned from them, since other work of
        the machine says nothing about the next batch. Accounts pay for the time that passed.
        """
        # next to another batch, its time begins where that one's ended
        took = now - max(batches[0].started, self._finished_at)
        self._finished_at = now
        cost = took if spent is None else spent
        if spent:
            self._delay += _SPEED_WEIGHT * (max(1.0, took / spent) - self._delay)
        num_rows = sum([batch.num_rows for batch in batches])
        for batch in batches:
            share = batch.num_rows / num_rows
            batch.queue.cost.add(batch.num_rows, cost * share)
            self._account(batch, took * share, (now - batch.started) * share)
        return cost

    def _account(self, batch: Batch, took: float, since_start: float) -> None:
        self._num_running -= 1
        owed = took / batch.num_rows - batch.seconds_per_row
        num_bytes = 0
        for request, start, stop in batch.slices:
            request.num_running -= 1
            assert request.account is not None
            request.account.used += owed * (stop - start)
            num_bytes += request.num_bytes * (stop - start) // request.num_rows
            if request.alive and request.next_row == request.num_rows and request.num_running == 0:
                # as `_release`
                request.alive = False
                self._statistics.num_bytes -= request.num_bytes
                request.account.num_bytes -= request.num_bytes
        seconds = max(since_start, 1e-6)
        speed = self._statistics.bytes_per_second
        self._statistics.bytes_per_second = speed + (num_bytes / seconds - speed) * (_SPEED_WEIGHT if speed else 1.0)

    def timer_at(self) -> float | None:
        return min([account.deadlines[0][0] for account in self._active if account.deadlines], default=None)

    def waiting(self) -> list[QueuedRequest]:
        """Return every request of which some rows have not been dispatched."""
        heaps = [heap for account in self._active for heap in account.classes.values()]
        return [request for heap in heaps for _, _, cell in heap for request in cell]

    def statistics(self) -> BatcherStatistics:
        return dataclasses.replace(self._statistics)

    def _fill(self, batch: Batch, limit: int, turn: float) -> None:
        """Take the queue's requests in order until there are enough rows, or one does not fit any more."""
        queue, enough = batch.queue, math.inf
        if not queue.preferred_sizes and batch.started - self._busy_since <= KEEPING_UP_SECONDS:
            enough = queue.cost.rows_until(self._fixed_share)
        turns = [(account.used, heap[0][1], account) for account, heap in queue.ready.items() if account.used <= turn]
        heapq.heapify(turns)
        while turns and batch.num_rows < min(limit, enough):
            account = heapq.heappop(turns)[2]
            (request,) = queue.ready[account][0][2]
            if (
                request.exclusive
                or request.num_bytes >= LARGE_REQUEST_BYTES
                or request.num_rows - request.next_row > limit - batch.num_rows
            ):
                break
            self._take(request, batch, limit - batch.num_rows)
            if account in queue.ready:
                heapq.heappush(turns, (account.used, request.sequence, account))

    def _take(self, request: QueuedRequest, batch: Batch, room: int) -> None:
        """Dispatch as many of the request's rows as there is room for."""
        start = request.next_row
        stop = min(request.num_rows, start + room)
        batch.slices.append(tuple.__new__(RowSlice, (request, start, stop)))  # its own takes a Python call more
        batch.num_rows += stop - start
        request.next_row = stop
        request.num_running += 1
        assert request.account is not None
        request.account.used += batch.seconds_per_row * (stop - start)
        if stop == request.num_rows:  # as `_end_wait`
            account = request.account
            self._statistics.num_waiting -= 1
            account.end_wait(request)
            if not account.num_waiting:
                del self._active[account]

    def _end_wait(self, request: QueuedRequest) -> None:
        account = request.account
        assert account is not None
        self._statistics.num_waiting -= 1
        account.end_wait(request)
        if not account.num_waiting:
            del self._active[account]

    def _release(self, request: QueuedRequest) -> None:
        assert request.account is not None
        request.alive = False
        self._statistics.num_bytes -= request.num_bytes
        request.account.num_bytes -= request.num_bytes

    def _forget_accounts(self) -> None:
        self._accounts = {
            name: one
            for name, one in self._accounts.items()
            if one.num_waiting or one.num_bytes or one.used > self._least_used
        }

    def _refusal(self, whose: str, num_excess_bytes: int) -> Overloaded:
        retry_after = DEFAULT_RETRY_AFTER
        if self._statistics.bytes_per_second:
            retry_after = num_excess_bytes / self._statistics.bytes_per_second
        return Overloaded(
            f"too many bytes{whose} wait already; try again in {retry_after:.2f} s or ask another replica",
            retry_after=retry_after,
        )
