import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator

import pytest

from tesseract_async.metrics import Metrics
from tesseract_async.nat import preamble
from tesseract_async.nat.demux import MAX_WAITING_PER_RANGE, TIMEOUT, PreambleDemultiplexer
from tesseract_async.transport import tcp
from tesseract_async.transport.base import PeerAddress, Pipe
from tests.transport.pipes import Receiver, bound_socket

pytestmark = pytest.mark.both_loops


class House:
    def __init__(self, timeout: float, max_per_range: int) -> None:
        self.sock = bound_socket()
        self.address = f"127.0.0.1:{self.sock.getsockname()[1]}"
        self.metrics = Metrics()
        self.ordinary: asyncio.Queue[Pipe] = asyncio.Queue()
        self.special: asyncio.Queue[tuple[int, bytes, Pipe]] = asyncio.Queue()
        handlers = {kind: functools.partial(self.arrived, kind) for kind in preamble.KINDS}
        self.demultiplexer = PreambleDemultiplexer(
            self.sock, handlers=handlers, metrics=self.metrics, timeout=timeout, max_per_range=max_per_range
        )

    def arrived(self, kind: int, token: bytes, pipe: Pipe) -> None:
        self.special.put_nowait((kind, token, pipe))

    def refused(self, reason: str) -> float:
        return self.metrics.snapshot().get(f"demultiplexer_refused{{reason={reason}}}", 0)


@contextlib.asynccontextmanager
async def open_house(*, timeout: float = TIMEOUT, max_per_range: int = MAX_WAITING_PER_RANGE) -> AsyncIterator[House]:
    house = House(timeout, max_per_range)
    await house.demultiplexer.listen(house.ordinary.put_nowait)
    yield house
    await house.demultiplexer.aclose()


@contextlib.asynccontextmanager
async def visit(house: House) -> AsyncIterator[tuple[tcp.TcpPipe, Receiver]]:
    pipe, receiver = await tcp.connect(house.address), Receiver()
    pipe.start(receiver)
    yield pipe, receiver
    pipe.abort()
    await receiver.until_lost()


@pytest.mark.parametrize("first", [b"\x16\x03\x01 a TLS record", b"\x01", b"G" * 100])
async def test_ordinary_bytes_are_passed_on_whole(first: bytes) -> None:
    async with open_house() as house, visit(house) as (pipe, _):
        pipe.write(first)
        other, there = await house.ordinary.get(), Receiver(room=3)
        other.start(there)
        pipe.write(b" and more")
        await there.until_bytes(len(first) + 9)
        assert there.received == first + b" and more"
        other.abort()
        await there.until_lost()


async def test_a_preamble_may_come_byte_by_byte_and_what_follows_is_kept() -> None:
    async with open_house() as house, visit(house) as (pipe, _):
        data = preamble.encode_preamble(preamble.RELAY, b"0123456789abcdef")
        for position in range(len(data) - 1):
            pipe.write(data[position : position + 1])
            await asyncio.sleep(0)
        pipe.write(data[-1:] + b"first bytes of TLS")
        kind, token, other = await house.special.get()
        assert (kind, token) == (preamble.RELAY, b"0123456789abcdef")
        await asyncio.sleep(0)
        there = Receiver()
        other.start(there)
        await there.until_bytes(18)
        assert there.received == b"first bytes of TLS"
        other.abort()
        await there.until_lost()


async def test_a_malformed_preamble_is_sent_away() -> None:
    async with open_house() as house, visit(house) as (pipe, receiver):
        pipe.write(b"TSRP" + bytes(20))
        await receiver.until_lost()
        assert house.refused("malformed") == 1


async def test_a_silent_connection_is_sent_away() -> None:
    async with open_house(timeout=0.05) as house, visit(house) as (pipe, receiver):
        pipe.write(b"TSR")
        await receiver.until_lost()
        assert house.refused("silent") == 1


async def test_few_may_wait_and_fewer_of_one_host() -> None:
    async with (
        open_house(max_per_range=2) as house,
        visit(house),
        visit(house) as (second, gone),
        visit(house) as (_, third),
    ):
        await third.until_lost()
        assert house.refused("too_many") == 1
        second.abort()
        await gone.until_lost()
        async with visit(house) as (pipe, _):
            pipe.write(b"\x16")
            other, there = await house.ordinary.get(), Receiver()
            other.start(there)
            await there.until_bytes(1)
            other.abort()
            await there.until_lost()


async def test_closing_sends_the_silent_away() -> None:
    async with open_house() as house, visit(house) as (_, receiver):
        async with visit(house) as (pipe, _):
            pipe.write(b"\x16")  # accepted after the silent one
            other, there = await house.ordinary.get(), Receiver()
            other.start(there)
            await house.demultiplexer.aclose()
            await receiver.until_lost()
            assert not there.lost, "those who came in stay"
            other.abort()
            await there.until_lost()


async def test_dialing_is_the_inner_transports_business() -> None:
    async with open_house() as house:
        paths = house.demultiplexer.paths(PeerAddress.parse(house.address))
        assert [path.name for path in paths] == [f"tcp {house.address}"]
