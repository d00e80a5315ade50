"""Pipes over TCP, on any asyncio loop, receiving straight into the receiver's memory."""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Final, cast

from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU
from tesseract_async.transport.base import (
    DialPath,
    PeerAddress,
    Pipe,
    PipeReceiver,
    is_loopback,
    join_host_port,
    split_host_port,
)
from tesseract_async.transport.token_bucket import TokenBucket

logger = logging.getLogger(__name__)

HIGH_WATER: Final = 256 * 1024
"""Unsent bytes beyond which a pipe is paused."""
USER_TIMEOUT: Final = 15.0
"""Seconds for which sent bytes may stay unacknowledged before the kernel gives the connection up."""
EARLY_BYTES: Final = 4096
"""Bytes kept from a peer that speaks before `TcpPipe.start`."""
HEAD_START: Final = 0.25
"""Seconds between the attempts on a peer's addresses (RFC 8305, section 5)."""
CONNECT_TIMEOUT: Final = 5.0
MAX_REMEMBERED: Final = 4096
"""Peers with several addresses for which the one that worked is remembered."""
DIAL_BURST: Final = 8.0
"""Dials of one ``host:port`` in a row that may fail."""
DIALS_PER_SECOND: Final = 0.2
"""Dials in a second after that."""
DIALS_PER_HOST: Final = 8.0
"""The factor for all ports of a host together, but not on loopback, where every node of a test is one host."""
MAX_TARGETS: Final = 4096


class TcpPipe(asyncio.BufferedProtocol):
    """See `base.Pipe`. Made by `connect` and `TcpTransport`; what arrives before `start` is kept for it."""

    def __init__(self, opened: "Callable[[TcpPipe], None] | None" = None) -> None:
        self.paused = False
        self.description = "tcp"
        self.origin = ""
        self._opened = opened
        self._transport: asyncio.Transport | None = None
        self._receiver: PipeReceiver | None = None
        self._reading_paused = False
        # a peer that speaks before `start`: uvloop cannot pause a transport in connection_made
        self._early = bytearray()
        self._early_buffer = memoryview(b"")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._transport = transport
        self.write = transport.write  # type: ignore[method-assign]
        # low=0: resume_writing means that no memory is on loan any more
        transport.set_write_buffer_limits(high=HIGH_WATER, low=0)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            # a socket for both kinds of IP shows IPv4 addresses in its own notation
            self.origin = str(peer[0]).removeprefix("::ffff:")
            self.description = f"tcp {join_host_port(self.origin, peer[1])}"
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT * 1000))
            except OSError:  # the connection may be gone already; it will say so
                logger.debug("%s: TCP_USER_TIMEOUT cannot be set", self.description)
        if self._opened is not None:
            self._opened(self)

    # once there is a receiver, these two are its own
    def get_buffer(self, sizehint: int) -> memoryview:
        self._early_buffer = memoryview(bytearray(EARLY_BYTES))
        return self._early_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._early += self._early_buffer[:nbytes]
        if len(self._early) > EARLY_BYTES:
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
        del self.write
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.pipe_lost(exc)

    def start(self, receiver: PipeReceiver) -> None:
        self._receiver = receiver
        self.get_buffer, self.buffer_updated = receiver.get_buffer, receiver.buffer_updated  # type: ignore[assignment, method-assign]
        if self._transport is not None:
            self._transport.set_protocol(self)  # uvloop keeps the functions that it found
        early, self._early = memoryview(bytes(self._early)), bytearray()
        while early:
            buffer = receiver.get_buffer()
            count = min(len(buffer), len(early))
            buffer[:count] = early[:count]
            early = early[count:]
            receiver.buffer_updated(count)
        if self._transport is None:  # lost already, and the receiver hears of it as always: later
            asyncio.get_running_loop().call_soon(receiver.pipe_lost, None)

    def detach(self) -> None:
        """Take the receiver away: what arrives is kept for the next `start`, as before the first one."""
        if self._receiver is not None:
            self._receiver = None
            del self.get_buffer, self.buffer_updated
            if self._transport is not None:
                self._transport.set_protocol(self)

    def unread(self, data: bytes) -> None:
        """Give received bytes back: the receiver of the next `start` gets them first."""
        self._early += data

    def write(self, data: bytes | memoryview) -> None:
        pass  # the transport's own, while there is one

    @property
    def unsent(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def pause_reading(self) -> None:
        if self._transport is not None and not self._reading_paused:
            self._transport.pause_reading()
        self._reading_paused = True

    def resume_reading(self) -> None:
        if self._transport is not None and self._reading_paused:
            self._transport.resume_reading()
        self._reading_paused = False

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect(address: str) -> TcpPipe:
    """Dial ``host:port``. Raises: OSError, TimeoutError, ValueError."""
    host, port = split_host_port(address)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, pipe = await loop.create_connection(TcpPipe, host, port)
    except TimeoutError:
        raise TimeoutError(f"nothing answered within {CONNECT_TIMEOUT:g} s") from None
    return pipe


class DialedInVain(OSError):
    """A dial that was not made, since too many before it failed."""


class DialBudget:
    """Counts failed dials. One that succeeds makes up for all before it."""

    def __init__(self) -> None:
        self._failed: LRU[str, TokenBucket] = LRU(MAX_TARGETS)

    def check(self, address: str, now: float) -> None:
        """Raises: DialedInVain if ``host:port`` may not be dialed now."""
        wait = max((self._failed[one].wait(now) for one in _targets(address) if one in self._failed), default=0.0)
        if wait > 0:
            raise DialedInVain(f"dialing it failed too often; it may be dialed again in {wait:.1f} s")

    def finished(self, address: str, error: BaseException | None, now: float) -> None:
        if isinstance(error, DialedInVain):
            return
        for target, times in _targets(address).items():
            bucket = self._failed.pop(target, None)
            if error is not None:
                bucket = bucket or TokenBucket(times * DIALS_PER_SECOND, burst=times * DIAL_BURST, now=now)
                bucket.take(1, now)
                self._failed[target] = bucket


def _targets(address: str) -> dict[str, float]:
    host = split_host_port(address)[0]
    return {address: 1.0} if is_loopback(host) else {address: 1.0, host: DIALS_PER_HOST}


class TcpTransport:
    """See `base.Transport`. `sock`: a bound TCP socket to accept on, owned from `listen` on; None only dials."""

    def __init__(self, sock: socket.socket | None = None) -> None:
        self._sock = sock
        self._server: asyncio.Server | None = None
        self._worked: LRU[PeerID, str] = LRU(MAX_REMEMBERED)
        self._budget = DialBudget()

    async def listen(self, accept: Callable[[Pipe], None]) -> None:
        if self._sock is not None:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: TcpPipe(accept), sock=self._sock, backlog=1024
            )

    def paths(self, peer: PeerAddress) -> Sequence[DialPath]:
        addresses = self._in_order(peer)
        return [
            DialPath(f"tcp {address}", index * HEAD_START, lambda address=address: self._open(address))  # type: ignore[misc]
            for index, address in enumerate(addresses)
        ]

    def _in_order(self, peer: PeerAddress) -> list[str]:
        """Return the address that worked last time; then IPv6 and others by turns, each in the peer's order."""
        last = self._worked.get(peer.peer_id) if peer.peer_id is not None else None
        first = [last] if last in peer.addresses else []
        left = [address for address in peer.addresses if address != last]
        v6 = [address for address in left if address.startswith("[")]
        others = [address for address in left if not address.startswith("[")]
        return [*first, *(one for pair in zip_longest(v6, others) for one in pair if one is not None)]

    async def _open(self, address: str) -> Pipe:
        self._budget.check(address, asyncio.get_running_loop().time())
        return await connect(address)

    def path_finished(self, peer: PeerAddress, path: DialPath, error: BaseException | None) -> None:
        kind, _, address = path.name.partition(" ")
        if kind != "tcp":
            return
        self._budget.finished(address, error, asyncio.get_running_loop().time())
        if peer.peer_id is None:
            return
        if error is None and len(peer.addresses) > 1:
            self._worked[peer.peer_id] = address
        elif error is not None and self._worked.get(peer.peer_id) == address:
            del self._worked[peer.peer_id]

    def peer_known(self, peer: PeerAddress) -> None:
        pass  # the next dial tries what is named then

    async def aclose(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()  # wait_closed would also wait for the accepted pipes, whose owner closes them
        await asyncio.sleep(0)
