"""The batcher against a brute-force model, and each of its promises by hand."""

import math
import random
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tesseract_async.errors import Overloaded
from tesseract_async.runtime.batcher import (
    DEFAULT_RETRY_AFTER,
    GROUP_SECONDS,
    KEEPING_UP_SECONDS,
    LARGE_REQUEST_BYTES,
    SHARED_GROUP_SECONDS,
    URGENT_SECONDS,
    Batch,
    Batcher,
    BatchQueue,
    QueuedRequest,
    RowSlice,
)

NO_LIMIT = 1 << 60


def request(pool: BatchQueue, num_rows: int = 1, **rest: object) -> QueuedRequest:
    return QueuedRequest(pool, num_rows, num_bytes=num_rows * 4, **rest)  # type: ignore[arg-type]


def rows_of(batch: Batch | None) -> list[tuple[int, int]]:
    assert batch is not None
    return [(part.start, part.stop) for part in batch.slices]


def requests_of(batch: Batch | None) -> list[QueuedRequest]:
    assert batch is not None
    return [part.request for part in batch.slices]


def drain(batcher: Batcher, now: float = 0.0, seconds: float = 0.0) -> list[Batch]:
    """All that waits, at `seconds` a batch."""
    batches = []
    while (batch := batcher.pop_ready(now)) is not None:
        batches.append(batch)
        now += seconds
        batcher.finish([batch], now)
    return batches


def test_small_requests_are_merged_and_a_batch_never_exceeds_the_limit() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=10)
    for size in (4, 4, 4, 10, 1):
        batcher.add(request(pool, size), now=0.0)
    assert [batch.num_rows for batch in drain(batcher)] == [8, 4, 10, 1]


def test_a_large_request_is_split_in_order_and_its_tail_shares_a_batch() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=10)
    large, small = request(pool, 25), request(pool, 3)
    batcher.add(large, now=0.0)
    batcher.add(small, now=0.0)
    batches = drain(batcher)
    assert [rows_of(batch) for batch in batches] == [[(0, 10)], [(10, 20)], [(20, 25), (0, 3)]]
    assert not large.alive and batcher.statistics().num_bytes == 0


def test_a_request_of_many_bytes_shares_no_batch() -> None:
    batcher = Batcher()
    pool = batcher.add_queue("a", max_batch_size=10)
    small = LARGE_REQUEST_BYTES - 1
    for num_bytes in (small, small, LARGE_REQUEST_BYTES, LARGE_REQUEST_BYTES, small):
        batcher.add(QueuedRequest(pool, 2, num_bytes), now=0.0)
    assert [len(batch.slices) for batch in drain(batcher)] == [2, 1, 1, 1]
    batcher.add(QueuedRequest(pool, 2, small), now=0.0)
    batcher.add(QueuedRequest(pool, 2, LARGE_REQUEST_BYTES, deadline=0.1), now=0.0)
    assert [len(batch.slices) for batch in drain(batcher)] == [1, 1], "nor an urgent one"


def test_an_exclusive_request_shares_no_batch() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=10)
    for exclusive in (False, True, True, False):
        batcher.add(request(pool, 2, exclusive=exclusive), now=0.0)
    assert [len(batch.slices) for batch in drain(batcher)] == [1, 1, 1, 1]


def test_pools_are_never_mixed_and_the_one_with_the_oldest_work_goes_first() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pools = [batcher.add_queue(index, max_batch_size=10) for index in range(3)]
    for when, index in enumerate((2, 0, 2, 1, 0)):
        batcher.add(request(pools[index]), now=float(when))
    batches = drain(batcher, now=9.0)
    assert [batch.queue.name for batch in batches] == [2, 0, 1]
    assert all(part.request.queue is batch.queue for batch in batches for part in batch.slices)


def test_priority_goes_before_age_and_an_urgent_deadline_before_both() -> None:
    batcher = Batcher()
    pool, other = batcher.add_queue("a", max_batch_size=1), batcher.add_queue("b", max_batch_size=1)
    old, high = request(pool), request(other, priority=1)
    urgent, patient = request(pool, deadline=1.0 + URGENT_SECONDS), request(pool, deadline=60.0)
    for one in (old, patient, high, urgent):
        batcher.add(one, now=1.0)
    assert [requests_of(batch)[0] for batch in drain(batcher, now=1.0)] == [urgent, high, old, patient]


def test_a_head_start_goes_before_older_work_but_not_for_ever_nor_before_priority() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    slow, fast = (
        batcher.add_queue("slow", max_batch_size=1),
        batcher.add_queue("fast", max_batch_size=1, head_start=0.5),
    )
    other = batcher.add_queue("other", max_batch_size=1)
    older, old, high, young, late = (
        request(slow),
        request(slow),
        request(other, priority=1),
        request(fast),
        request(fast),
    )
    for one, when in ((older, 0.0), (old, 1.0), (high, 1.2), (young, 1.3), (late, 1.6)):
        batcher.add(one, now=when)
    assert [requests_of(batch)[0] for batch in drain(batcher, now=1.6)] == [high, older, young, old, late]


def learned(batcher: Batcher, *, each: float = 4e-3, per_row: float = 1e-4) -> tuple[BatchQueue, float]:
    """A pool of which the batcher has seen batches that cost so much, and the time when it was idle last."""
    pool, now = batcher.add_queue("a", max_batch_size=1000), 0.0
    for num_rows in (10, 20, 40) * 5:
        batcher.add(request(pool, num_rows), now)
        batch = batcher.pop_ready(now)
        assert batch is not None and batcher.pop_ready(now) is None
        now += each + per_row * num_rows
        batcher.finish([batch], now)
    assert batcher.pop_ready(now) is None
    return pool, now


def test_a_batch_is_no_larger_than_pays_while_the_device_keeps_up() -> None:
    batcher = Batcher()
    pool, now = learned(batcher)  # 4 ms a batch are a quarter of it at 120 rows
    sizes = []
    for _ in range(160):
        batcher.add(request(pool, 50), now)
    while (batch := batcher.pop_ready(now)) is not None:
        sizes.append((now, batch.num_rows))
        now += 4e-3 + 1e-4 * batch.num_rows
        batcher.finish([batch], now)
    begun = sizes[0][0]
    early = [num_rows for when, num_rows in sizes if when <= begun + KEEPING_UP_SECONDS]
    late = [num_rows for when, num_rows in sizes if when > begun + KEEPING_UP_SECONDS]
    assert set(early) == {150}, "the third request brings enough"
    assert late[:-1] == [1000] * (len(late) - 1) and len(late) > 3, "half a second without a rest: now the rows count"


def test_costs_are_learned_by_the_processors_time_and_paid_by_the_time_that_passed() -> None:
    batcher = Batcher()
    pool = batcher.add_queue("a", max_batch_size=10)
    batcher.add(request(pool, 10), 0.0)
    batch = batcher.pop_ready(0.0)
    assert batch is not None and batcher.finish([batch], 1.0, spent=0.01) == 0.01
    assert pool.cost.seconds_per_row == pytest.approx(0.001)
    account = batch.slices[0].request.account
    assert account is not None and account.used == pytest.approx(1.0)
    assert batcher.group_seconds(1.0) == GROUP_SECONDS
    batcher.add(request(pool, 1, peer="another"), 1.0)
    assert batcher.group_seconds(1.0) < SHARED_GROUP_SECONDS / 10, "others wait for the time that passes"


@pytest.mark.parametrize("options", [{}, {"fixed_share": 0.0}])
def test_a_batch_takes_all_that_it_may_where_it_was_not_told_otherwise(options: dict[str, float]) -> None:
    batcher = Batcher(**options)  # type: ignore[arg-type]
    if not options:
        pool = batcher.add_queue("a", max_batch_size=1000, preferred_sizes=(600, 1000))
        for num_rows in (10, 20, 40) * 5:
            pool.cost.add(num_rows, 4e-3 + 1e-4 * num_rows)
        now = 0.0
    else:
        pool, now = learned(batcher)
    for _ in range(12):
        batcher.add(request(pool, 50), now)
    batch = batcher.pop_ready(now + 0.01)
    assert batch is not None and batch.num_rows == 600


def test_a_flood_delays_its_sender_only() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=4)
    flood = [request(pool, 4, peer="loud") for _ in range(50)]
    for one in flood:
        batcher.add(one, now=0.0)
    first = batcher.pop_ready(now=0.0)
    assert first is not None
    batcher.finish([first], now=1.0)
    quiet = [request(pool, 4, peer=f"quiet {index}") for index in range(3)]
    for one in quiet:
        batcher.add(one, now=1.0)
    order = [requests_of(batch)[0] for batch in drain(batcher, now=1.0, seconds=1.0)]
    assert max(order.index(one) for one in quiet) <= 4


def test_equal_peers_take_turns() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=1)
    for peer in ("a", "b"):
        for _ in range(10):
            batcher.add(request(pool, peer=peer), now=0.0)
    peers = [requests_of(batch)[0].peer for batch in drain(batcher, seconds=1.0)]
    assert all({peers[index], peers[index + 1]} == {"a", "b"} for index in range(0, 20, 2))


class Crowd:
    """Peers that always have `at_once` requests open, on one device, in made-up time."""

    def __init__(self, seconds_per_row: float, max_batch_size: int = 256) -> None:
        self.batcher = Batcher(max_queue_bytes=NO_LIMIT)
        self.pools = [self.batcher.add_queue(name, max_batch_size=max_batch_size) for name in range(4)]
        self.seconds_per_row = seconds_per_row
        self.now = 0.0
        self.device: dict[object, float] = {}
        self.waits: dict[object, list[float]] = {}
        self.turn = 0
        self.patience: dict[object, float] = {}

    def ask(self, peer: object, num_rows: int, *, patience: float = math.inf, priority: int = 0) -> None:
        self.turn += 1
        self.patience[peer] = patience
        self.batcher.add(
            QueuedRequest(
                self.pools[self.turn % 4],
                num_rows,
                num_bytes=4,
                peer=peer,
                deadline=self.now + patience,
                priority=priority,
            ),
            self.now,
        )

    def run(self, seconds: float) -> None:
        """Answers; a caller that was answered, or waited in vain, asks again at once."""
        end = self.now + seconds
        while self.now < end:
            again = self.batcher.pop_expired(self.now)
            batch = self.batcher.pop_ready(self.now)
            if batch is not None:
                self.now += 1e-3 + self.seconds_per_row * batch.num_rows
                self.batcher.finish([batch], self.now)
                for part in batch.slices:
                    peer = part.request.peer
                    share = (1e-3 + self.seconds_per_row * batch.num_rows) * (part.stop - part.start) / batch.num_rows
                    self.device[peer] = self.device.get(peer, 0.0) + share
                    if part.is_last:
                        self.waits.setdefault(peer, []).append(self.now - part.request.arrival)
                        again.append(part.request)
            for one in again:
                self.ask(one.peer, one.num_rows, patience=self.patience[one.peer], priority=one.priority)


@pytest.mark.parametrize(
    "greed", [{}, {"priority": 1}, {"patience": 0.199}, {"patience": 0.199, "priority": 1}], ids=str
)
@pytest.mark.parametrize("rows_each", [256, 16, 1])
def test_device_time_is_shared_however_much_somebody_asks_for(greed: dict[str, float], rows_each: int) -> None:
    crowd = Crowd(1e-4)
    for _ in range(8):
        crowd.ask("honest", 16)
    crowd.run(2.0)
    alone = len(crowd.waits.pop("honest"))
    for _ in range(64 * 256 // rows_each):
        crowd.ask("greedy", rows_each, **greed)  # type: ignore[arg-type]
    crowd.run(2.0)
    assert len(crowd.waits["honest"]) > 0.45 * alone


def test_a_newcomer_need_not_make_up_for_what_others_used_alone_nor_may_it_catch_up() -> None:
    crowd = Crowd(1e-3)
    for _ in range(16):
        crowd.ask("early", 64)
    crowd.run(100.0)
    for _ in range(16):
        crowd.ask("late", 64)
    before = dict(crowd.device)
    crowd.run(20.0)
    used = {peer: seconds - before.get(peer, 0.0) for peer, seconds in crowd.device.items()}
    assert used["early"] == pytest.approx(used["late"], rel=0.1)


def test_removed_and_expired_work_is_never_computed() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=10)
    removed, expired, kept = request(pool), request(pool, deadline=5.0), request(pool, deadline=50.0)
    for one in (removed, expired, kept):
        batcher.add(one, now=0.0)
    assert batcher.remove(removed) and not batcher.remove(removed)
    assert batcher.timer_at() is not None
    assert batcher.pop_expired(now=4.9) == []
    assert batcher.pop_expired(now=5.0) == [expired]
    assert requests_of(batcher.pop_ready(now=5.0)) == [kept]
    assert not batcher.remove(kept), "its batch runs already"


def test_a_split_request_that_leaves_is_not_continued() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=10)
    large = request(pool, 25)
    batcher.add(large, now=0.0)
    batch = batcher.pop_ready(now=0.0)
    assert batch is not None and batcher.remove(large)
    batcher.finish([batch], now=1.0)
    assert batcher.pop_ready(now=1.0) is None
    statistics = batcher.statistics()
    assert (statistics.num_waiting, statistics.num_waiting_rows, statistics.num_bytes) == (0, 0, 0)


def test_a_full_queue_says_when_to_come_back() -> None:
    batcher = Batcher(max_queue_bytes=100)
    pool = batcher.add_queue("a", max_batch_size=10)
    batcher.add(QueuedRequest(pool, 1, num_bytes=1000), now=0.0)  # alone it is taken, whatever its size
    with pytest.raises(Overloaded) as caught:
        batcher.add(QueuedRequest(pool, 1, num_bytes=1), now=0.0)
    assert caught.value.retry_after == DEFAULT_RETRY_AFTER
    (batch,) = [batcher.pop_ready(now=0.0)]
    assert batch is not None
    batcher.finish([batch], now=10.0)  # 100 bytes/s
    batcher.add(QueuedRequest(pool, 1, num_bytes=80), now=10.0)
    with pytest.raises(Overloaded) as caught:
        batcher.add(QueuedRequest(pool, 1, num_bytes=70), now=10.0)
    assert caught.value.retry_after == pytest.approx(0.5)


def test_bytes_are_held_until_the_batch_has_run() -> None:
    batcher = Batcher(max_queue_bytes=100)
    pool = batcher.add_queue("a", max_batch_size=10)
    batcher.add(QueuedRequest(pool, 1, num_bytes=100), now=0.0)
    batch = batcher.pop_ready(now=0.0)
    assert batch is not None
    with pytest.raises(Overloaded):
        batcher.add(QueuedRequest(pool, 1, num_bytes=100), now=0.0)
    batcher.finish([batch], now=1.0)
    batcher.add(QueuedRequest(pool, 1, num_bytes=100), now=1.0)


def test_answers_that_wait_leave_their_account_less_room() -> None:
    batcher = Batcher(max_queue_bytes=100)
    pool = batcher.add_queue("a", max_batch_size=10)
    batcher.hold("slow", 40)
    with pytest.raises(Overloaded, match="of yours"):
        batcher.add(QueuedRequest(pool, 1, num_bytes=20, peer="slow"), now=0.0)
    batcher.add(QueuedRequest(pool, 1, num_bytes=50, peer="other"), now=0.0)
    batcher.hold("slow", -40)
    batcher.add(QueuedRequest(pool, 1, num_bytes=20, peer="slow"), now=0.0)
    assert batcher.statistics().num_bytes == 70


def test_one_peer_cannot_fill_the_queue() -> None:
    batcher = Batcher(max_queue_bytes=100)
    pool = batcher.add_queue("a", max_batch_size=10)
    loud = [QueuedRequest(pool, 1, num_bytes=20, peer="loud") for _ in range(3)]
    for one in loud[:2]:
        batcher.add(one, now=0.0)
    with pytest.raises(Overloaded, match="of yours"):
        batcher.add(loud[2], now=0.0)
    batcher.add(QueuedRequest(pool, 1, num_bytes=60, peer="other"), now=0.0)
    batcher.remove(loud[0])
    batcher.add(loud[2], now=0.0)
    drain(batcher)
    batcher.add(QueuedRequest(pool, 1, num_bytes=100, peer="loud"), now=0.0)


def test_batches_are_cut_at_preferred_sizes() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=64, preferred_sizes=(8, 32))
    for _ in range(45):
        batcher.add(request(pool), now=0.0)
    assert [batch.num_rows for batch in drain(batcher)] == [32, 8, 5]
    batcher.add(request(pool, 50), now=0.0)
    assert [batch.num_rows for batch in drain(batcher)] == [50], "but what fits is not split for it"


class Peer:
    """With room for weak references."""


def test_the_queues_forget_what_has_passed() -> None:
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=8)
    peers: weakref.WeakSet[Peer] = weakref.WeakSet()
    for round_number in range(5000):
        one = request(pool, deadline=1e9, peer=Peer())
        peers.add(one.peer)  # type: ignore[arg-type]
        batcher.add(one, now=float(round_number))
        if round_number % 3:
            batcher.remove(one)
        drain(batcher, now=float(round_number))
    assert len(peers) <= 1025 and not batcher.waiting() and not pool.ready


def test_a_request_that_has_left_is_held_by_nothing() -> None:
    class Weak(QueuedRequest):
        """With room for weak references."""

    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pool = batcher.add_queue("a", max_batch_size=1)
    kept = request(pool, deadline=10.0, priority=1)
    batcher.add(kept, now=0.0)
    for deadline in (20.0, 30.0):
        batcher.add(Weak(pool, 1, 4, deadline=deadline), now=0.0)
    gone = [weakref.ref(one) for one in batcher.waiting() if one is not kept]
    for one in gone:
        batcher.remove(one())  # type: ignore[arg-type]
    assert len(gone) == 2 and all(one() is None for one in gone) and batcher.waiting() == [kept]


def test_sixty_four_experts_under_a_thousand_requests_wait_fairly() -> None:
    """In made-up time: a batch takes 1 ms and 10 us a row; each client asks some expert again at once."""
    batcher = Batcher(max_queue_bytes=NO_LIMIT)
    pools = [batcher.add_queue(number, max_batch_size=256) for number in range(64)]
    choice = random.Random(1)
    waits: list[float] = []
    now = busy = 0.0

    def ask(client: int) -> None:
        batcher.add(request(choice.choice(pools), 4, peer=client, deadline=now + 30), now)

    for client in range(1000):
        ask(client)
    while len(waits) < 20_000:
        oldest = min(one.arrival for one in batcher.waiting())
        batch = batcher.pop_ready(now)
        assert batch is not None, "the device idles although work waits"
        assert min(part.request.arrival for part in batch.slices) == oldest, "another expert holds older work"
        seconds = 1e-3 + 1e-5 * batch.num_rows
        now += seconds
        busy += seconds
        batcher.finish([batch], now)
        for part in batch.slices:
            waits.append(now - part.request.arrival)
            ask(part.request.peer)
    steady = sorted(waits[1000:])
    assert steady[int(0.99 * len(steady))] <= 2.2 * sum(steady) / len(steady)
    assert busy == pytest.approx(now)


@pytest.mark.parametrize("num_rows", [0, -1])
def test_a_request_without_rows_is_refused(num_rows: int) -> None:
    batcher = Batcher()
    with pytest.raises(ValueError, match="at least one row"):
        batcher.add(request(batcher.add_queue("a", max_batch_size=1), num_rows), now=0.0)


@pytest.mark.parametrize("sizes", [(0,), (5,)])
def test_impossible_pool_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at most 4"):
        Batcher().add_queue("a", max_batch_size=4, preferred_sizes=sizes)


class BatcherModel(RuleBasedStateMachine):
    """Any order of add, cancel, expire, pop, finish and fail: every row answered once, in order, within the limits."""

    @initialize(budget=st.integers(50, 400), seed=st.integers(0, 99))
    def begin(self, budget: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.budget = budget
        self.batcher = Batcher(max_queue_bytes=budget)
        self.peer_budget = budget // 2
        self.pools = [
            self.batcher.add_queue(name, max_batch_size=size, preferred_sizes=preferred, head_start=head_start)
            for name, size, preferred, head_start in (("a", 8, (), 0.0), ("b", 5, (), 0.7), ("c", 16, (4, 8), 0.0))
        ]
        self.now = 0.0
        self.waiting: dict[QueuedRequest, int] = {}  # rows dispatched so far
        self.running: list[Batch] = []
        self.answered: dict[QueuedRequest, int] = {}
        self.gone: set[QueuedRequest] = set()
        self.all: list[QueuedRequest] = []

    def held(self, one: QueuedRequest) -> bool:
        return one not in self.gone and self.answered[one] < one.num_rows

    @rule(
        pool=st.integers(0, 2),
        num_rows=st.integers(1, 40),
        patience=st.sampled_from([0.1, 0.3, 2.0, 10.0, math.inf]),
        priority=st.integers(0, 2),
        peer=st.integers(0, 3),
        exclusive=st.booleans(),
    )
    def add(self, pool: int, num_rows: int, patience: float, priority: int, peer: int, exclusive: bool) -> None:
        one = QueuedRequest(
            self.pools[pool],
            num_rows,
            num_bytes=num_rows,
            peer=peer,
            deadline=self.now + patience,
            priority=priority,
            exclusive=exclusive,
        )
        held = sum(other.num_bytes for other in self.all if self.held(other))
        of_peer = sum(other.num_bytes for other in self.all if self.held(other) and other.peer == peer)
        if (held and held + num_rows > self.budget) or (of_peer and of_peer + num_rows > self.peer_budget):
            with pytest.raises(Overloaded) as caught:
                self.batcher.add(one, self.now)
            assert caught.value.retry_after >= 0
            return
        self.batcher.add(one, self.now)
        self.waiting[one] = 0
        self.answered[one] = 0
        self.all.append(one)

    @precondition(lambda self: self.all)
    @rule()
    def cancel(self) -> None:
        one = self.random.choice(self.all)
        was_waiting = one in self.waiting
        assert self.batcher.remove(one) == was_waiting
        if was_waiting:
            del self.waiting[one]
            self.gone.add(one)

    @rule(seconds=st.sampled_from([0.1, 0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        late = {one for one in self.waiting if one.deadline <= self.now}
        assert set(self.batcher.pop_expired(self.now)) == late
        for one in late:
            del self.waiting[one]
            self.gone.add(one)

    @rule()
    def pop(self) -> None:
        self.expire()
        batch = self.batcher.pop_ready(self.now)
        if batch is None:
            assert not self.waiting
            return
        assert 1 <= batch.num_rows <= batch.queue.max_batch_size
        assert batch.num_rows == sum(part.stop - part.start for part in batch.slices)
        chosen = {part.request for part in batch.slices}
        for part in batch.slices:
            self.check_part(batch, part)
        first = batch.slices[0].request
        mine = [one for one in self.waiting if one.peer == first.peer]
        urgent = [one.deadline for one in mine if one.deadline <= self.now + URGENT_SECONDS]
        if urgent:
            assert first.deadline == min(urgent)
        else:
            assert first.priority == max(one.priority for one in mine)
            ages = [one.arrival - one.queue.head_start for one in mine if one.priority == first.priority]
            assert first.arrival - first.queue.head_start == min(ages), "it has older work of this class"
        for part in batch.slices:
            self.waiting[part.request] = part.stop
            if part.is_last:
                del self.waiting[part.request]
        assert len(chosen) == len(batch.slices)
        self.running.append(batch)

    def check_part(self, batch: Batch, part: RowSlice) -> None:
        one = part.request
        assert one.queue is batch.queue and self.waiting[one] == part.start < part.stop <= one.num_rows
        assert not one.exclusive or len(batch.slices) == 1
        if part.start == 0 and not part.is_last:
            assert one.num_rows > batch.queue.max_batch_size, "what fits is never split"
        if not part.is_last:
            assert batch.num_rows == batch.queue.max_batch_size

    @precondition(lambda self: self.running)
    @rule(fails=st.booleans())
    def finish(self, fails: bool) -> None:
        batch = self.running.pop(self.random.randrange(len(self.running)))
        if fails:
            for part in batch.slices:
                if self.batcher.remove(part.request):
                    del self.waiting[part.request]
                    self.gone.add(part.request)
        self.batcher.finish([batch], self.now)
        for part in batch.slices:
            self.answered[part.request] += part.stop - part.start

    @invariant()
    def figures_agree(self) -> None:
        statistics = self.batcher.statistics()
        assert statistics.num_waiting == len(self.waiting) == len(self.batcher.waiting())
        assert statistics.num_waiting_rows == sum(one.num_rows - done for one, done in self.waiting.items())
        assert statistics.num_bytes == sum(one.num_bytes for one in self.all if self.held(one))
        for pool in self.pools:
            rows = sum(one.num_rows - done for one, done in self.waiting.items() if one.queue is pool)
            assert pool.num_waiting_rows == rows

    def teardown(self) -> None:
        if not hasattr(self, "batcher"):
            return
        while self.waiting:
            self.pop()
        while self.running:
            self.finish(fails=False)
        assert all(one in self.gone or self.answered[one] == one.num_rows for one in self.all)


BatcherModel.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestBatcherModel = BatcherModel.TestCase


@given(st.data())
def test_a_group_holds_what_would_have_come_next_in_the_same_order(data: st.DataObject) -> None:
    sides = [Batcher(), Batcher()]
    queues = [[one.add_queue(index, max_batch_size=8) for index in range(5)] for one in sides]
    for own in queues:
        for queue in own[:4]:
            queue.group = "a kind"
    requests = data.draw(
        st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12), st.integers(0, 2), st.integers(0, 1)), max_size=20)
    )
    for index, num_rows, peer, priority in requests:
        for batcher, own in zip(sides, queues, strict=True):
            batcher.add(QueuedRequest(own[index], num_rows, 8, peer, priority=priority), 0.0)

    def seen(batch: Batch) -> tuple[object, ...]:
        return batch.queue.name, [(one.request.sequence, one.start, one.stop) for one in batch.slices]

    now, alone = 0.0, []
    while (batch := sides[0].pop_ready(now)) is not None:
        alone.append(batch)
    passes = []
    while (batch := sides[1].pop_ready(now)) is not None:
        passes.append([batch, *sides[1].pop_group(batch, now)])
    assert [seen(batch) for batch in alone] == [seen(batch) for one in passes for batch in one]
    for one in passes:
        names = [batch.queue.name for batch in one]
        assert len(set(names)) == len(names) and (names == [4] or 4 not in names)
        sides[1].finish(one, now := now + 1.0)
    assert sides[1].statistics().num_bytes == 0


def test_a_pass_is_short_while_several_accounts_use_the_device() -> None:
    for peers, expected in (((0, 0), 20), ((0, 1), 2)):
        batcher = Batcher()
        queues = [batcher.add_queue(index, max_batch_size=4) for index in range(40)]
        for queue in queues:
            queue.group = "a kind"
            queue.cost.add(1, 0.001)
        for index, queue in enumerate(queues):
            batcher.add(QueuedRequest(queue, 1, 8, peers[index % 2]), 0.0)
        first = batcher.pop_ready(0.0)
        assert first is not None and 1 + len(batcher.pop_group(first, 0.0)) == pytest.approx(expected, abs=1)
