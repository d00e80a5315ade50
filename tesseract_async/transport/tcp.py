"""Pipes over TCP, on any asyncio loop, receiving straight into the receiver's memory."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final, cast

from tesseract_async.transport.base import PipeReceiver, join_host_port

logger = logging.getLogger(__name__)

HIGH_WATER: Final = 256 * 1024
"""Unsent bytes beyond which a pipe is paused."""
USER_TIMEOUT: Final = 15.0
"""Seconds for which sent bytes may stay unacknowledged before the kernel gives the connection up."""


class TcpPipe(asyncio.BufferedProtocol):
    """See `base.Pipe`. Made by `connect` and `TcpListener`; what arrives before `start` is kept for it."""

    EARLY_BYTES: Final = 4096

    def __init__(self, opened: Callable[[TcpPipe], None] | None = None) -> None:
        self.paused = False
        self.description = "tcp"
        self.origin = ""
        self._opened = opened
        self._transport: asyncio.Transport | None = None
        self._receiver: PipeReceiver | None = None
        # a peer that speaks before `start`: uvloop cannot pause a transport in connection_made
        self._early = bytearray()
        self._early_buffer = memoryview(b"")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._transport = transport
        # low=0: resume_writing means that no memory is on loan any more
        transport.set_write_buffer_limits(high=HIGH_WATER, low=0)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.origin = str(peer[0])
            self.description = f"tcp {join_host_port(self.origin, peer[1])}"
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT * 1000))
            except OSError:  # the connection may be gone already; it will say so
                logger.debug("%s: TCP_USER_TIMEOUT cannot be set", self.description)
        if self._opened is not None:
            self._opened(self)

    def start(self, receiver: PipeReceiver) -> None:
        self._receiver = receiver
        early, self._early = memoryview(bytes(self._early)), bytearray()
        while early:
            buffer = receiver.get_buffer()
            count = min(len(buffer), len(early))
            buffer[:count] = early[:count]
            early = early[count:]
            receiver.buffer_updated(count)
        if self._transport is None:  # lost already, and the receiver hears of it as always: later
            asyncio.get_running_loop().call_soon(receiver.pipe_lost, None)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._receiver is not None:
            return self._receiver.get_buffer()
        self._early_buffer = memoryview(bytearray(self.EARLY_BYTES))
        return self._early_buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._receiver is not None:
            self._receiver.buffer_updated(nbytes)
            return
        self._early += self._early_buffer[:nbytes]
        if len(self._early) > self.EARLY_BYTES:
            self.abort()

    def eof_received(self) -> bool:
        return False  # half-open connections serve nobody: close

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._receiver is not None:
            self._receiver.pipe_drained()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.pipe_lost(exc)

    def write(self, data: bytes | memoryview) -> None:
        if self._transport is not None:
            self._transport.write(data)

    @property
    def unsent(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def pause_reading(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect(host: str, port: int) -> TcpPipe:
    """Dials. Raises: OSError."""
    _, pipe = await asyncio.get_running_loop().create_connection(TcpPipe, host, port)
    return pipe


class TcpListener:
    """Accepts pipes on a bound socket until closed; accepted pipes live on."""

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server

    @classmethod
    async def listen(
        cls, sock: socket.socket, accepted: Callable[[TcpPipe], None], *, backlog: int = 256
    ) -> TcpListener:
        """Takes over a bound stream socket that does not listen yet, and calls `accepted` for each pipe."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: TcpPipe(accepted), sock=sock, backlog=backlog)
        return cls(server)

    async def aclose(self) -> None:
        """Stops accepting."""
        self._server.close()
        # Server.wait_closed would also wait for the accepted connections, whose owner closes them
        await asyncio.sleep(0)
