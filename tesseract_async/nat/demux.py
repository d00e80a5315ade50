"""The preamble demultiplexer: tells accepted connections apart by their first bytes (`preamble`)."""

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Final

from tesseract_async.endpoint.connection_limits import WaitingRoom, descriptor_limit, room_for
from tesseract_async.errors import ProtocolError
from tesseract_async.metrics import Metrics
from tesseract_async.nat import preamble
from tesseract_async.transport.base import Pipe, range_of
from tesseract_async.transport.tcp import TcpPipe, TcpTransport

TIMEOUT: Final = 5.0
"""Seconds until the first bytes must have arrived."""
MAX_WAITING: Final = 512
"""Connections whose first bytes have not come yet."""
MAX_WAITING_PER_RANGE: Final = 64
"""Such connections of one address range."""

PipeHandler = Callable[[bytes, Pipe], None]
"""Takes a token, and the pipe that began with it."""


class PreambleDemultiplexer(TcpTransport):
    """Listens for TCP connections: those with a preamble go to the handler of its kind, the others on."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        handlers: Mapping[int, PipeHandler],
        metrics: Metrics,
        timeout: float = TIMEOUT,
        max_per_range: int = MAX_WAITING_PER_RANGE,
    ) -> None:
        super().__init__(sock)
        self._handlers = handlers
        self._metrics = metrics
        self._timeout = timeout
        most = min(MAX_WAITING, room_for(descriptor_limit()).half_open)
        self._visitors: WaitingRoom[_Visitor] = WaitingRoom(most=most, most_per_group=max_per_range)

    async def listen(self, accept: Callable[[Pipe], None]) -> None:
        await super().listen(lambda pipe: self._pipe_accepted(pipe, accept))

    async def aclose(self) -> None:
        for visitor in self._visitors.guests():
            self._refuse(visitor, "closing")
        await super().aclose()

    def _pipe_accepted(self, pipe: Pipe, accept: Callable[[Pipe], None]) -> None:
        assert isinstance(pipe, TcpPipe)
        visitor = _Visitor(self, pipe, accept, self._timeout)
        now = asyncio.get_running_loop().time()
        welcome, victim = self._visitors.enter(visitor, range_of(pipe.origin) or pipe.origin, now)
        if victim is not None:
            self._refuse(victim, "too_many")
        if welcome:
            pipe.start(visitor)
        else:
            self._refuse(visitor, "too_many")

    def _decide(self, visitor: "_Visitor", data: bytes) -> None:
        if data[:1] != preamble.MAGIC[:1]:
            self._gone(visitor)
            visitor.pipe.unread(data)
            visitor.accept(visitor.pipe)
        elif len(data) == preamble.LENGTH:
            try:
                kind, token = preamble.decode_preamble(data)
            except ProtocolError:
                self._refuse(visitor, "malformed")
                return
            if kind not in self._handlers:
                self._refuse(visitor, "unsupported")
                return
            self._gone(visitor)
            self._handlers[kind](token, visitor.pipe)

    def _refuse(self, visitor: "_Visitor", reason: str) -> None:
        self._metrics.count("demultiplexer_refused", reason=reason)
        self._gone(visitor)
        visitor.pipe.abort()

    def _gone(self, visitor: "_Visitor") -> None:
        visitor.timer.cancel()
        visitor.pipe.detach()
        self._visitors.leave(visitor)


class _Visitor:
    """Receives the first bytes of one pipe, and never one too many."""

    def __init__(
        self, demultiplexer: PreambleDemultiplexer, pipe: TcpPipe, accept: Callable[[Pipe], None], timeout: float
    ) -> None:
        self.pipe = pipe
        self.accept = accept
        self.timer = asyncio.get_running_loop().call_later(timeout, demultiplexer._refuse, self, "silent")
        self._demultiplexer = demultiplexer
        self._buffer = memoryview(bytearray(preamble.LENGTH))
        self._count = 0

    def get_buffer(self, sizehint: int = -1, /) -> memoryview:
        return self._buffer[self._count :]

    def buffer_updated(self, count: int) -> None:
        self._count += count
        self._demultiplexer._decide(self, bytes(self._buffer[: self._count]))

    def pipe_drained(self) -> None:
        pass

    def pipe_lost(self, error: Exception | None) -> None:
        self._demultiplexer._gone(self)
