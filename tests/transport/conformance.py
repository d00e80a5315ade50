"""What every pipe must do, whatever carries it. A test module for a transport takes these tests by importing them.

It defines one fixture, ``pipes``: an async context manager factory that yields a connected pair ``(dialed, accepted)``
of pipes that have not been started, and leaves nothing behind. See `test_tcp`.
"""

import asyncio
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from tesseract_async.transport.base import Pipe

Pipes = Callable[[], AbstractAsyncContextManager[tuple[Pipe, Pipe]]]


class Receiver:
    """Keeps what a pipe reports; gives memory of changing sizes."""

    def __init__(self, *, sizes: tuple[int, ...] = (65536,)) -> None:
        self.data = bytearray()
        self.drained = 0
        self.lost: list[Exception | None] = []
        self._sizes = sizes
        self._calls = 0
        self._buffer = memoryview(bytearray(1))
        self._changed = asyncio.Event()

    def get_buffer(self, sizehint: int = -1, /) -> memoryview:
        self._calls += 1
        self._buffer = memoryview(bytearray(self._sizes[self._calls % len(self._sizes)]))
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        assert not self.lost and 0 <= count <= len(self._buffer)
        self.data += self._buffer[:count]
        self._changed.set()

    def pipe_drained(self) -> None:
        self.drained += 1
        self._changed.set()

    def pipe_lost(self, error: Exception | None) -> None:
        self.lost.append(error)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(40):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


async def test_bytes_arrive_in_order_both_ways(pipes: Pipes) -> None:
    async with pipes() as (dialed, accepted):
        ends = []
        for pipe, seed in ((dialed, 1), (accepted, 2)):
            receiver = Receiver(sizes=(1, 7, 5000, 65536))
            pipe.start(receiver)
            ends.append((pipe, receiver, random.Random(seed).randbytes(300_000)))
        for pipe, _, data in ends:
            for position in range(0, len(data), 10_007):
                pipe.write(memoryview(data)[position : position + 10_007])
        for (_, receiver, _), (_, _, data) in zip(ends, reversed(ends), strict=True):
            await receiver.until(lambda receiver=receiver, data=data: len(receiver.data) >= len(data))  # type: ignore[misc]
            assert receiver.data == data


async def test_what_is_written_before_the_other_end_starts_is_kept(pipes: Pipes) -> None:
    async with pipes() as (dialed, accepted):
        dialed.start(Receiver())
        dialed.write(b"early")
        for _ in range(20):  # on loopback it is there at once; the loop reads it in its next turns
            await asyncio.sleep(0)
        receiver = Receiver(sizes=(2,))
        accepted.start(receiver)
        dialed.write(b" bird")
        await receiver.until(lambda: receiver.data == b"early bird")


async def test_a_reader_that_pauses_pauses_the_writer_and_loans_end(pipes: Pipes) -> None:
    async with pipes() as (dialed, accepted):
        writer, reader = Receiver(), Receiver()
        dialed.start(writer)
        accepted.start(reader)
        accepted.pause_reading()
        written, piece = 0, bytes(200_000)
        while not dialed.paused:
            dialed.write(memoryview(piece))
            written += len(piece)
            await asyncio.sleep(0)
            assert written < 200 << 20, "somebody buffers without a bound"
        assert dialed.unsent > 0 and not writer.drained
        accepted.resume_reading()
        await writer.until(lambda: writer.drained > 0)
        assert not dialed.paused and dialed.unsent == 0
        await reader.until(lambda: len(reader.data) == written)


async def test_closing_sends_what_was_written_first(pipes: Pipes) -> None:
    async with pipes() as (dialed, accepted):
        mine, theirs = Receiver(), Receiver()
        dialed.start(mine)
        accepted.start(theirs)
        dialed.write(bytes(100_000))
        dialed.close()
        dialed.close()
        dialed.write(b"too late")
        await theirs.until(lambda: bool(theirs.lost))
        assert len(theirs.data) == 100_000 and theirs.lost == [None]
        await mine.until(lambda: bool(mine.lost))
        accepted.close()
        accepted.write(b"nobody there")
        assert mine.lost == [None] and len(theirs.lost) == 1


async def test_aborting_ends_both_sides_but_never_within_the_call(pipes: Pipes) -> None:
    async with pipes() as (dialed, accepted):
        mine, theirs = Receiver(), Receiver()
        dialed.start(mine)
        accepted.start(theirs)
        dialed.abort()
        assert not mine.lost
        await mine.until(lambda: bool(mine.lost))
        await theirs.until(lambda: bool(theirs.lost))
        dialed.abort()
        accepted.abort()


async def test_a_pipe_describes_itself(pipes: Pipes) -> None:
    async with pipes() as (dialed, accepted):
        for pipe in (dialed, accepted):
            kind, _, rest = pipe.description.partition(" ")
            assert kind and rest
            pipe.start(Receiver())
