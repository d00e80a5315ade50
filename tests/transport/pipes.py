"""Pairs of connected pipes of every kind, on loopback: what the conformance suite runs against."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable

from tesseract_async.identity import Identity
from tesseract_async.metrics import Metrics
from tesseract_async.nat import preamble
from tesseract_async.nat.demux import PipeHandler, PreambleDemultiplexer
from tesseract_async.nat.relay import Relay, RelaySettings
from tesseract_async.nat.webrtc.pipe import Negotiation
from tesseract_async.transport import tcp
from tesseract_async.transport.base import Pipe

Pair = contextlib.AbstractAsyncContextManager[tuple[Pipe, Pipe]]

UNLIMITED = RelaySettings(max_rate=None)


def bound_socket() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


class Receiver:
    """Keeps what a pipe tells it, and reads at most `room` bytes at once."""

    def __init__(self, room: int = 65536) -> None:
        self.received = bytearray()
        self.lost: list[Exception | None] = []
        self.num_drained = 0
        self.changed = asyncio.Event()
        self._buffer = memoryview(bytearray(room))

    def get_buffer(self, sizehint: int = -1, /) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        assert 0 < count <= len(self._buffer)
        assert not self.lost, "bytes after the end"
        self.received += self._buffer[:count]
        self.changed.set()

    def pipe_drained(self) -> None:
        self.num_drained += 1
        self.changed.set()

    def pipe_lost(self, error: Exception | None) -> None:
        self.lost.append(error)
        self.changed.set()

    async def until(self, condition: Callable[[], bool], timeout: float = 40.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def until_bytes(self, count: int) -> None:
        await self.until(lambda: len(self.received) >= count)

    async def until_lost(self) -> None:
        await self.until(lambda: bool(self.lost))


@contextlib.asynccontextmanager
async def _listening(
    handler: PipeHandler | None = None,
) -> AsyncIterator[tuple[str, asyncio.Queue[Pipe]]]:
    """An address that accepts connections, and the ordinary pipes that came."""
    sock = bound_socket()
    address = f"127.0.0.1:{sock.getsockname()[1]}"
    accepted: asyncio.Queue[Pipe] = asyncio.Queue()
    transport: tcp.TcpTransport = tcp.TcpTransport(sock)
    if handler is not None:
        handlers = dict.fromkeys(preamble.KINDS, handler)
        transport = PreambleDemultiplexer(sock, handlers=handlers, metrics=Metrics())
    await transport.listen(accepted.put_nowait)
    yield address, accepted
    await transport.aclose()


@contextlib.asynccontextmanager
async def tcp_pair() -> AsyncIterator[tuple[Pipe, Pipe]]:
    async with _listening() as (address, accepted):
        dialed = await tcp.connect(address)
        yield dialed, await accepted.get()


@contextlib.asynccontextmanager
async def guarded_pair() -> AsyncIterator[tuple[Pipe, Pipe]]:
    """TCP through a preamble demultiplexer, whose first byte must be that of an ordinary connection."""
    async with _listening(lambda token, pipe: pipe.abort()) as (address, accepted):
        dialed = await tcp.connect(address)
        dialed.write(b"\x16")
        other = await accepted.get()
        first = Receiver()
        other.start(first)
        await first.until_bytes(1)
        yield dialed, other


@contextlib.asynccontextmanager
async def reverse_pair() -> AsyncIterator[tuple[Pipe, Pipe]]:
    """The first pipe was accepted, the second one dialed."""
    arrived: asyncio.Queue[Pipe] = asyncio.Queue()
    async with _listening(lambda token, pipe: arrived.put_nowait(pipe)) as (address, _):
        dialed = await tcp.connect(address)
        dialed.write(preamble.encode_preamble(preamble.REVERSE, bytes(16)))
        yield await arrived.get(), dialed


@contextlib.asynccontextmanager
async def relay_pair(settings: RelaySettings = UNLIMITED) -> AsyncIterator[tuple[Pipe, Pipe]]:
    relay = Relay(settings=settings, metrics=Metrics())
    async with _listening(relay.pipe_arrived) as (address, _):
        pipes = []
        for token in relay.reserve(Identity.from_seed(os.urandom(32)).peer_id):
            pipe = await tcp.connect(address)
            pipe.write(preamble.encode_preamble(preamble.RELAY, token))
            pipes.append(pipe)
        yield pipes[0], pipes[1]
        await relay.aclose()


@contextlib.asynccontextmanager
async def datachannel_pair() -> AsyncIterator[tuple[Pipe, Pipe]]:
    one, other = (
        Negotiation(controlling=controlling, addresses=["127.0.0.1"], stun_server=None) for controlling in (True, False)
    )
    mine, theirs = await asyncio.gather(one.gather(), other.gather())
    yield await _both(one.connect(theirs), other.connect(mine))


async def _both(*connecting: object) -> tuple[Pipe, Pipe]:
    one, other = await asyncio.gather(*connecting)  # type: ignore[call-overload]
    return one, other


PAIRS: dict[str, Callable[[], Pair]] = {
    "tcp": tcp_pair,
    "guarded": guarded_pair,
    "reverse": reverse_pair,
    "relay": relay_pair,
    "datachannel": datachannel_pair,
}


@contextlib.asynccontextmanager
async def started(pair: Pair, *, room: int = 65536) -> AsyncIterator[tuple[Pipe, Receiver, Pipe, Receiver]]:
    """Both pipes with receivers; both are closed and gone at the end."""
    async with pair as (one, other):
        receivers = Receiver(room), Receiver(room)
        one.start(receivers[0])
        other.start(receivers[1])
        try:
            yield one, receivers[0], other, receivers[1]
        finally:
            one.abort()
            other.abort()
            for receiver in receivers:
                await receiver.until_lost()
