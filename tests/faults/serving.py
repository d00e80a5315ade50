"""A serving endpoint on loopback, and a peer made of raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable

from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.identity import Identity
from tesseract_async.transport.base import PeerAddress, split_host_port
from tesseract_async.transport.tcp import TcpTransport
from tesseract_async.wire import frames, heads
from tesseract_async.wire.heads import Hello


async def echo(call: IncomingCall) -> Message:
    return Message(call.body, call.buffers)


@contextlib.asynccontextmanager
async def serving(
    settings: EndpointSettings | None = None, *, features: frozenset[str] = heads.FEATURES
) -> AsyncIterator[tuple[Endpoint, PeerAddress]]:
    """An endpoint that echoes, and its address."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{sock.getsockname()[1]}"
    endpoint = Endpoint(
        identity=Identity.generate(), transports=[TcpTransport(sock)], settings=settings, features=features
    )
    endpoint.handle("echo", echo)
    await endpoint.start()
    async with endpoint:
        yield endpoint, PeerAddress(endpoint.peer_id, (address,))


async def until(condition: Callable[[], bool]) -> None:
    """Turns the loop until something holds that nobody announces."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def let_pass(seconds: float) -> None:
    """The running loop's clock jumps: what was due by then is due now. (Not uvloop's.)"""
    loop = asyncio.get_running_loop()
    real = loop.time
    loop.time = lambda: real() + seconds  # type: ignore[method-assign]


class RawPeer:
    """A plain channel in the hands of a test, after the hello."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, address: PeerAddress, *, greet: bool = True) -> AsyncIterator[RawPeer]:
        reader, writer = await asyncio.open_connection(*split_host_port(address.addresses[0]))
        peer = cls(reader, writer)
        try:
            if greet:
                hello = Hello(os.urandom(16), False, os.urandom(32), 1024, 2**23, 2**30)
                peer.writer.write(frames.frame(frames.HELLO, payload=heads.encode_hello(hello)))
                header = frames.HEADER.unpack(await reader.readexactly(16))
                assert header[0] == frames.HELLO
                heads.decode_hello(memoryview(await reader.readexactly(header[3])))
            yield peer
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def request(self, stream: int, payload: bytes = b"", *, method: str = "echo") -> bytes:
        head = frames.pack((method, 10_000, 0, 0, 2**30, None))
        return frames.encode_small(frames.REQUEST, stream, head, [len(payload)], [memoryview(payload)])

    async def closed(self) -> bytes:
        """What the other end still sends until it closes. Raises: TimeoutError if it does not."""
        async with asyncio.timeout(30):
            out = bytearray()
            with contextlib.suppress(ConnectionError):
                while data := await self.reader.read(65536):
                    out += data
            return bytes(out)
