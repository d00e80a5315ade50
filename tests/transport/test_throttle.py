"""The throttle by function calls, and once on real pipes."""

import asyncio
import socket
from typing import cast

import pytest

from tesseract_async.identity import PeerID
from tesseract_async.transport.base import Pipe, join_host_port
from tesseract_async.transport.channel import Channel
from tesseract_async.transport.tcp import TcpTransport, connect
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

    def channel_opened(self, peer_id: PeerID | None) -> None: ...

    def channel_drained(self) -> None:
        self.drained.set()

    def channel_lost(self, error: Exception | None) -> None:
        self.lost.set()


@pytest.mark.both_loops
@pytest.mark.parametrize("direction", ["upload", "download"])
async def test_real_channels_keep_to_the_rate_together(direction: str) -> None:
    """Two channels carry 250 kB each through one throttle of 800 kB/s: some pass at once, the rest in its time."""
    rate, size = 800_000.0, 250_000
    throttle = Throttle(upload_rate=rate) if direction == "upload" else Throttle(download_rate=rate)
    accepted: asyncio.Queue[Pipe] = asyncio.Queue()
    sock = socket.create_server(("127.0.0.1", 0))
    server = TcpTransport(sock)
    await server.listen(accepted.put_nowait)
    receivers, senders = [Receiver(size), Receiver(size)], [Receiver(), Receiver()]
    incoming, outgoing = [], []
    for receiver, sender in zip(receivers, senders, strict=True):
        pipe = await connect(join_host_port(*sock.getsockname()))
        outgoing.append(Channel(pipe, None, sender, throttle=throttle if direction == "upload" else None))
        limit = throttle if direction == "download" else None
        incoming.append(Channel(await accepted.get(), None, receiver, throttle=limit))
    loop = asyncio.get_running_loop()
    started = loop.time()
    for channel in (*incoming, *outgoing):
        channel.start()

    async def send(channel: Channel, sender: Receiver) -> None:
        for _ in range(10):
            channel.write([bytes(size // 10)])
            if channel.paused:
                sender.drained.clear()
                await sender.drained.wait()

    await asyncio.gather(*map(send, outgoing, senders), *(receiver.complete.wait() for receiver in receivers))
    seconds = loop.time() - started
    # a quarter of a second's worth passes at once; the last pieces are not waited for
    least = (2 * size - rate / 4 - (2 * 65536 if direction == "download" else 20_000)) / rate
    assert max(0.0, least) <= seconds < 10
    assert throttle.num_bytes_sent + throttle.num_bytes_received == 2 * size
    for channel in (*outgoing, *incoming):
        channel.abort()
    await asyncio.gather(*(one.lost.wait() for one in (*senders, *receivers)))
    await server.aclose()


class SlowPipe:
    """A pipe that notes whether it is read."""

    paused, unsent, is_read = False, 0, True

    def start(self, receiver: object) -> None: ...

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True


@pytest.mark.both_loops
async def test_a_receiver_that_pauses_stays_paused_when_the_throttle_lets_more_in() -> None:
    pipe, receiver = SlowPipe(), Receiver()
    channel = Channel(cast(Pipe, pipe), None, receiver, throttle=Throttle(download_rate=1e6))
    channel.start()
    channel.get_buffer()
    channel.buffer_updated(260_000)
    channel.pause_reading()
    channel.resume_reading()
    assert not pipe.is_read, "the throttle has not let it in yet"
    channel.pause_reading()
    await asyncio.sleep(0.02)
    assert not pipe.is_read
    channel.resume_reading()
    assert pipe.is_read and receiver.received == 260_000
    channel.pipe_lost(None)


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
