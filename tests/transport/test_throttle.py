"""The throttle by function calls, and once on real pipes."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tesseract_async.transport.base import PeerAddress, Pipe
from tesseract_async.transport.tcp import TcpTransport
from tesseract_async.transport.throttle import SMALL, Leftover, Throttle


def test_bytes_are_paid_for() -> None:
    throttle = Throttle(upload_rate=100_000.0, download_rate=50_000.0)
    assert throttle.sent(25_000, 0.0) == 0.0  # the burst
    assert throttle.sent(50_000, 0.0) == pytest.approx(0.5)
    assert throttle.received(12_500, 0.0) == 0.0
    assert throttle.received(50_000, 0.0) == pytest.approx(1.0)
    assert throttle.sent(5000, 0.5) == pytest.approx(0.05)
    assert (throttle.num_bytes_sent, throttle.num_bytes_received) == (80_000, 62_500)


def test_a_heartbeat_does_not_wait_behind_megabytes_but_a_flood_of_them_does() -> None:
    throttle = Throttle(upload_rate=100_000.0, download_rate=100_000.0)
    assert throttle.sent(125_000, 0.0) > 0
    assert throttle.received(125_000, 0.0) > 0
    assert throttle.sent(SMALL, 0.0) == throttle.received(SMALL, 0.0) == 0.0
    for _ in range(50):
        throttle.sent(SMALL, 0.0)
        throttle.received(SMALL, 0.0)
    assert throttle.sent(SMALL, 0.0) > 2.0
    assert throttle.received(SMALL, 0.0) > 2.0


def test_without_limits_it_only_counts() -> None:
    throttle = Throttle()
    assert throttle.sent(10**9, 0.0) == throttle.received(10**9, 0.0) == 0.0
    assert throttle.num_bytes_sent == throttle.num_bytes_received == 10**9


class Receiver:
    """Takes everything and says when `expected` bytes have come."""

    def __init__(self, expected: int = 0) -> None:
        self.buffer = memoryview(bytearray(65536))
        self.expected = expected
        self.received = 0
        self.complete = asyncio.Event()
        self.drained = asyncio.Event()
        self.lost = asyncio.Event()

    def get_buffer(self) -> memoryview:
        return self.buffer

    def buffer_updated(self, count: int) -> None:
        self.received += count
        if self.received >= self.expected:
            self.complete.set()

    def pipe_drained(self) -> None:
        self.drained.set()

    def pipe_lost(self, error: Exception | None) -> None:
        self.lost.set()


@pytest.mark.both_loops
@pytest.mark.parametrize("direction", ["upload", "download"])
async def test_real_pipes_keep_to_the_rate_together(direction: str) -> None:
    """Two pipes carry 250 kB each through one throttle of 800 kB/s: some pass at once, the rest in its time."""
    rate, size = 800_000.0, 250_000
    throttle = Throttle(upload_rate=rate) if direction == "upload" else Throttle(download_rate=rate)
    accepted: list[Pipe] = []
    two = asyncio.Event()

    def accept(pipe: Pipe) -> None:
        accepted.append(pipe)
        if len(accepted) == 2:
            two.set()

    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = TcpTransport(sock, throttle=throttle if direction == "download" else None)
    client = TcpTransport(throttle=throttle if direction == "upload" else None)
    await server.listen(accept)
    peer = PeerAddress(None, (f"127.0.0.1:{sock.getsockname()[1]}",))
    pipes: list[Pipe] = []
    for _ in range(2):
        (path,) = client.paths(peer)
        pipes.append(await path.open())
    await two.wait()
    receivers = [Receiver(size) for _ in accepted]
    senders = [Receiver() for _ in pipes]
    loop = asyncio.get_running_loop()
    started = loop.time()
    for pipe, receiver in zip(accepted, receivers, strict=True):
        pipe.start(receiver)
    for pipe, sender in zip(pipes, senders, strict=True):
        pipe.start(sender)

    async def send(pipe: Pipe, sender: Receiver) -> None:
        for _ in range(10):
            pipe.write(bytes(size // 10))
            if pipe.paused:
                sender.drained.clear()
                await sender.drained.wait()

    await asyncio.gather(*map(send, pipes, senders), *(receiver.complete.wait() for receiver in receivers))
    seconds = loop.time() - started
    # a quarter of a second's worth passes at once; the last pieces are not waited for
    least = (
        (2 * size - rate / 4 - 2 * 65536) / rate if direction == "download" else (2 * size - rate / 4 - 20_000) / rate
    )
    assert seconds >= max(0.0, least)
    assert seconds < 10
    assert throttle.num_bytes_sent + throttle.num_bytes_received == 2 * size
    for pipe in (*pipes, *accepted):
        pipe.abort()
    await asyncio.gather(*(one.lost.wait() for one in (*senders, *receivers)))
    await server.aclose()
    await client.aclose()


def test_what_may_wait_gets_what_the_others_leave() -> None:
    throttle = Throttle(upload_rate=1000.0)
    leftover, now, sent, others = Leftover(1e9, throttle), 0.0, 0, 600.0
    while now < 100.0:
        if leftover.wait(now) == 0.0:
            leftover.take(100, now)
            throttle.sent(100, now)
            sent += 100
        throttle.sent(int(others * 0.05), now)
        now += 0.05
    assert 0.85 * 400 < sent / now < 1.15 * 400
    begin, before, others = now, sent, 5000.0  # there is nothing left: it still goes on
    while now < begin + 200.0:
        if leftover.wait(now) == 0.0:
            leftover.take(100, now)
            throttle.sent(100, now)
            sent += 100
        throttle.sent(int(others * 0.05), now)
        now += 0.05
    assert 0.04 * 1000 < (sent - before) / (now - begin) < 0.07 * 1000


def test_alone_it_has_the_whole_rate_and_without_a_limit_its_own() -> None:
    for throttle, expected in ((Throttle(upload_rate=1000.0), 1000.0), (Throttle(), 5000.0), (None, 5000.0)):
        leftover, now = Leftover(5000.0, throttle), 0.0
        for _ in range(100):
            now += leftover.take(100, now)
            if throttle is not None:
                throttle.sent(100, now)
        assert now == pytest.approx(99 * 100 / expected, rel=0.02)
        assert leftover.take(100, now + 50.0) == 0.0, "nothing is saved up, and nothing owed"
