"""What every pipe promises (`transport.base.Pipe`), whatever carries its bytes."""

import asyncio
import random
from collections.abc import Callable

import pytest

from tests.transport.pipes import PAIRS, Pair, Receiver, started

pytestmark = pytest.mark.both_loops

MakePair = Callable[[], Pair]


@pytest.fixture(params=PAIRS)
def make(request: pytest.FixtureRequest) -> MakePair:
    return PAIRS[request.param]


async def test_bytes_arrive_in_order_both_ways_at_once(make: MakePair) -> None:
    rng = random.Random(1)
    async with started(make(), room=10_007) as (one, here, other, there):
        sent_here, sent_there = bytearray(), bytearray()
        for size in (1, 2, 3, 16_383, 16_384, 16_385, 100_000, 5, 70_001, 1):
            for pipe, sent in ((one, sent_here), (other, sent_there)):
                data = rng.randbytes(size)
                pipe.write(data)
                sent += data
            await asyncio.sleep(0)
        await here.until_bytes(len(sent_there))
        await there.until_bytes(len(sent_here))
        assert there.received == sent_here and here.received == sent_there
        assert not here.lost and not there.lost


async def test_a_receiver_may_give_a_single_byte_of_room(make: MakePair) -> None:
    async with started(make(), room=1) as (one, _, _, there):
        one.write(b"slowly, but all of it")
        await there.until_bytes(21)
        assert there.received == b"slowly, but all of it"


async def test_a_slow_reader_stops_the_writer_and_nothing_is_lost(make: MakePair) -> None:
    rng = random.Random(2)
    async with started(make()) as (one, here, other, there):
        other.pause_reading()
        sent = bytearray()
        while not one.paused or len(sent) < 2**20:
            data = rng.randbytes(65536)
            one.write(data)
            sent += data
            await asyncio.sleep(0)
            assert len(sent) < 64 * 2**20, "nothing stops the writer"
        assert one.unsent > 0
        held = len(there.received)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(there.received) == held, "bytes came to a paused reader"
        assert here.num_drained == 0 or not one.paused
        other.resume_reading()
        await here.until(lambda: not one.paused)
        assert here.num_drained >= 1
        await there.until_bytes(len(sent))
        assert there.received == sent


async def test_close_sends_what_was_written_first(make: MakePair) -> None:
    data = random.Random(3).randbytes(300_000)
    async with started(make()) as (one, here, _, there):
        one.write(data)
        one.close()
        one.close()
        one.write(b"ignored after the end")
        await there.until_lost()
        await here.until_lost()
        assert there.received == data
        assert there.lost == [None]
        assert len(here.lost) == 1


async def test_abort_tells_later_and_once(make: MakePair) -> None:
    async with started(make()) as (one, here, other, there):
        one.write(b"x")
        await there.until_bytes(1)
        one.abort()
        assert not here.lost, "told from within the call"
        one.abort()
        one.close()
        await here.until_lost()
        await there.until_lost()
        one.write(b"ignored after the end")
        other.pause_reading()
        other.resume_reading()
        await asyncio.sleep(0)
        assert len(here.lost) == len(there.lost) == 1


async def test_bytes_that_came_before_the_start_are_kept(make: MakePair) -> None:
    async with make() as (one, other):
        one.write(b"early ")
        here, there = Receiver(), Receiver()
        one.start(here)
        other.start(there)
        one.write(b"bird")
        await there.until_bytes(10)
        assert there.received == b"early bird"
        one.close()
        await here.until_lost()
        await there.until_lost()


async def test_the_receiver_may_change(make: MakePair) -> None:
    async with started(make()) as (one, _, other, there):
        one.write(b"first")
        await there.until_bytes(5)
        second = Receiver()
        other.start(second)
        one.write(b"second")
        await second.until_bytes(6)
        assert (there.received, second.received) == (b"first", b"second")
        one.close()
        await second.until_lost()
        there.lost.append(None)  # `started` waits for it


async def test_who_it_is_can_be_told(make: MakePair) -> None:
    async with started(make()) as (one, _, other, _):
        for pipe in (one, other):
            assert pipe.origin == "127.0.0.1"
            assert pipe.description.partition(" ")[0] in ("tcp", "reverse", "relay", "datachannel")


async def test_the_receiver_may_pause_from_within(make: MakePair) -> None:
    class Pausing(Receiver):
        def buffer_updated(self, count: int) -> None:
            super().buffer_updated(count)
            pipe.pause_reading()
            asyncio.get_running_loop().call_soon(pipe.resume_reading)

    data = random.Random(4).randbytes(200_000)
    async with started(make()) as (one, _, pipe, there):
        pausing = Pausing(30_000)
        pipe.start(pausing)
        one.write(data)
        await pausing.until_bytes(len(data))
        assert pausing.received == data
        one.abort()
        await pausing.until_lost()
        there.lost.append(None)
