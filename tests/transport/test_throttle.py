"""The throttled pipe between a pipe and a receiver that write down what they are told."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

import pytest

from tesseract_async.transport import throttle as throttle_module
from tesseract_async.transport.base import PipeReceiver
from tesseract_async.transport.throttle import SMALL, Throttle, ThrottledPipe


class Timer:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, int, Timer, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        timer = Timer()
        heapq.heappush(self.timers, (self.now + delay, len(self.timers), timer, callback))
        return timer

    def advance(self, until: float) -> None:
        while self.timers and self.timers[0][0] <= until:
            self.now, _, timer, callback = heapq.heappop(self.timers)
            if not timer.cancelled:
                callback()
        self.now = until


class FakePipe:
    description = "fake"
    origin = "nowhere"

    def __init__(self) -> None:
        self.receiver: PipeReceiver | None = None
        self.written: list[bytes] = []
        self.paused = False
        self.unsent = 0
        self.reading = True

    def start(self, receiver: PipeReceiver) -> None:
        self.receiver = receiver

    def write(self, data: bytes | memoryview) -> None:
        self.written.append(bytes(data))

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


class FakeReceiver:
    def __init__(self) -> None:
        self.received = 0
        self.num_drained = 0
        self.lost: list[Exception | None] = []

    def get_buffer(self) -> memoryview:
        return memoryview(bytearray(65536))

    def buffer_updated(self, count: int) -> None:
        self.received += count

    def pipe_drained(self) -> None:
        self.num_drained += 1

    def pipe_lost(self, error: Exception | None) -> None:
        self.lost.append(error)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    fake = FakeLoop()
    monkeypatch.setattr(throttle_module.asyncio, "get_running_loop", lambda: fake)
    return fake


def start(throttle: Throttle) -> tuple[ThrottledPipe, FakePipe, FakeReceiver]:
    inner, receiver = FakePipe(), FakeReceiver()
    pipe = throttle.wrap(inner)
    pipe.start(receiver)
    return pipe, inner, receiver


def test_reading_stops_until_the_bytes_are_paid_for(loop: FakeLoop) -> None:
    pipe, inner, receiver = start(Throttle(download_rate=100_000.0))
    pipe.buffer_updated(25_000)  # the burst
    assert inner.reading
    pipe.buffer_updated(50_000)
    assert not inner.reading
    assert receiver.received == 75_000
    loop.advance(0.49)
    assert not inner.reading
    loop.advance(0.51)
    assert inner.reading


def test_the_receivers_own_pause_and_the_throttles_do_not_undo_each_other(loop: FakeLoop) -> None:
    pipe, inner, _ = start(Throttle(download_rate=100_000.0))
    pipe.buffer_updated(75_000)
    pipe.resume_reading()
    assert not inner.reading  # not paid for yet
    pipe.pause_reading()
    loop.advance(1.0)
    assert not inner.reading  # the receiver wants none
    pipe.resume_reading()
    assert inner.reading


def test_a_writer_waits_until_its_bytes_are_paid_for_and_is_told_once(loop: FakeLoop) -> None:
    pipe, inner, receiver = start(Throttle(upload_rate=100_000.0))
    pipe.write(bytes(25_000))
    assert not pipe.paused
    pipe.write(memoryview(bytearray(50_000)))
    assert sum(map(len, inner.written)) == 75_000  # what is written goes out: nothing is kept here
    assert pipe.paused
    pipe.pipe_drained()
    assert receiver.num_drained == 0
    loop.advance(0.51)
    assert not pipe.paused
    assert receiver.num_drained == 1


def test_drained_is_said_only_when_no_memory_is_on_loan(loop: FakeLoop) -> None:
    pipe, inner, receiver = start(Throttle(upload_rate=100_000.0))
    inner.unsent = 10
    pipe.write(bytes(75_000))
    loop.advance(0.6)
    assert pipe.paused
    assert receiver.num_drained == 0
    inner.unsent = 0
    loop.advance(0.7)
    assert receiver.num_drained == 1
    pipe.write(bytes(75_000))
    inner.paused = True
    loop.advance(2.0)
    assert pipe.paused
    assert receiver.num_drained == 1
    inner.paused = False
    pipe.pipe_drained()  # the pipe's own
    assert receiver.num_drained == 2


def test_all_pipes_of_a_node_share_the_rate(loop: FakeLoop) -> None:
    throttle = Throttle(upload_rate=100_000.0)
    first, _, _ = start(throttle)
    second, _, _ = start(throttle)
    first.write(bytes(75_000))
    second.write(bytes(50_000))
    assert first.paused and second.paused
    loop.advance(0.6)
    assert not first.paused
    assert second.paused
    loop.advance(1.01)
    assert not second.paused
    assert throttle.num_bytes_sent == 125_000


def test_a_heartbeat_does_not_wait_behind_megabytes_but_a_flood_of_them_does(loop: FakeLoop) -> None:
    throttle = Throttle(upload_rate=100_000.0, download_rate=100_000.0)
    bulk, _, _ = start(throttle)
    small, inner, _ = start(throttle)
    bulk.write(bytes(125_000))
    bulk.buffer_updated(125_000)
    small.write(bytes(SMALL))
    small.buffer_updated(SMALL)
    assert bulk.paused
    assert not small.paused and inner.reading
    for _ in range(50):
        small.write(bytes(SMALL))
        small.buffer_updated(SMALL)
    assert small.paused and not inner.reading


def test_the_end_of_a_pipe_ends_its_timers(loop: FakeLoop) -> None:
    pipe, inner, receiver = start(Throttle(upload_rate=1000.0, download_rate=1000.0))
    pipe.write(bytes(10_000))
    pipe.buffer_updated(10_000)
    pipe.pipe_lost(None)
    loop.advance(100.0)
    assert receiver.lost == [None]
    assert receiver.num_drained == 0
    assert not inner.reading


def test_without_limits_it_only_counts(loop: FakeLoop) -> None:
    throttle = Throttle()
    pipe, inner, _ = start(throttle)
    pipe.write(bytes(10**6))
    pipe.buffer_updated(10**6)
    assert not pipe.paused and inner.reading
    assert (throttle.num_bytes_sent, throttle.num_bytes_received) == (10**6, 10**6)


def test_the_loop_is_the_running_one() -> None:
    async def make() -> ThrottledPipe:
        return Throttle().wrap(FakePipe())

    assert isinstance(asyncio.run(make()), ThrottledPipe)
