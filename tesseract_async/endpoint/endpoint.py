"""`Endpoint`: calls to other nodes, and answers to theirs."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tesseract_async.endpoint.budget import Budget
from tesseract_async.endpoint.connection import Connection, IncomingCall, Message
from tesseract_async.endpoint.greeting import Greeting
from tesseract_async.endpoint.pool import Key, Pool
from tesseract_async.endpoint.protocol import BULK, MAIN, ProtocolSettings
from tesseract_async.errors import (
    ConnectionLost,
    HandshakeFailed,
    PeerUnreachable,
    ProtocolError,
    UnknownMethod,
    UnsupportedVersion,
    describe,
)
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.transport import tcp
from tesseract_async.transport.base import PeerAddress, Pipe, split_host_port
from tesseract_async.transport.certificates import make_contexts
from tesseract_async.transport.channel import Channel
from tesseract_async.transport.tls import TlsMachine
from tesseract_async.wire import calls, frames
from tesseract_async.wire.calls import Hello, RequestHead
from tesseract_async.wire.frames import Buffer, FrameReader

__all__ = ["Endpoint", "EndpointSettings", "Handler", "IncomingCall", "Message"]

logger = logging.getLogger(__name__)

Handler = Callable[[IncomingCall], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How an `Endpoint` behaves."""

    security: Literal["tls", "plain"] = "tls"
    """``plain`` proves and encrypts nothing: for a trusted local network only. Both ends must agree."""
    protocol: ProtocolSettings = field(default_factory=ProtocolSettings)
    """Bounds of each connection."""
    max_receive_bytes: int = 2**30
    """Bytes of large messages that all connections together may have reserved or half received."""
    handshake_timeout: float = 5.0
    """Seconds for TLS and hello together."""
    connect_timeout: float = 5.0
    """Seconds for the TCP connection to one address."""
    max_half_open: int = 512
    """Accepted channels in the middle of their handshake."""
    max_half_open_per_host: int = 64
    """... of one remote address."""
    max_connections: int = 4096
    """Connections in all; more are refused."""
    idle_timeout: float = 300.0
    """Seconds without a call after which a dialled connection is closed."""
    backoff_base: float = 0.1
    """Seconds before a failed dial is repeated, doubled by each failure."""
    backoff_max: float = 5.0


class Endpoint:
    """Calls to other nodes, and answers to theirs, many at once over one connection per peer.

    Use it on one event loop: `start`, then `call` and `handle`, then `aclose`. It can call without `start`.
    """

    def __init__(
        self, *, identity: Identity, settings: EndpointSettings | None = None, metrics: Metrics | None = None
    ) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.metrics = metrics if metrics is not None else Metrics()
        self._settings = settings = settings if settings is not None else EndpointSettings()
        self._contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
        if settings.security == "tls":
            self._contexts = make_contexts(identity)
        elif settings.security == "plain":
            logger.warning("security is off: nothing is encrypted, and peers can claim to be anybody")
        else:
            raise ValueError(f"security is 'tls' or 'plain', not {settings.security!r}")
        self._handlers: dict[str, Handler] = {}
        self._budget = Budget(settings.max_receive_bytes)
        rng = random.Random()
        self._pool = Pool(backoff_base=settings.backoff_base, backoff_max=settings.backoff_max, rng=rng)
        self._rng = rng
        self._dials: dict[Key, asyncio.Task[Connection]] = {}
        self._half_open: set[Greeting] = set()
        self._listener: tcp.TcpListener | None = None
        self._housekeeping: asyncio.TimerHandle | None = None
        self._tick_at = 0.0
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    # ---- life

    async def start(self, sock: socket.socket) -> None:
        """Listens on a bound TCP socket that does not listen yet, which the endpoint owns from now on."""
        self._listener = await tcp.TcpListener.listen(sock, self._accepted)
        self._start_housekeeping()

    async def aclose(self) -> None:
        """Cancels all calls in both directions, says farewell, and leaves no task, timer or socket."""
        self._closed = True
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        if self._listener is not None:
            await self._listener.aclose()
        dials = list(self._dials.values())
        for dial in dials:
            dial.cancel()
        for greeting in list(self._half_open):
            greeting.abort()
        connections = self._pool.connections()
        waits: list[Awaitable[Any]] = [*dials, *(greeting.done for greeting in self._half_open), *self._closing]
        waits += [connection.aclose("the node is closing") for connection in connections]
        await asyncio.gather(*waits, return_exceptions=True)

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def handle(self, method: str, handler: Handler) -> None:
        """Answers calls of `method` from now on. Each call runs in a task of its own.

        What the handler returns is on loan until it is sent: don't change its buffers. A RemoteError that it raises
        reaches the caller; any other exception is logged, and reaches the caller as a plain RemoteError.

        Raises: ValueError if the method is taken.
        """
        if method in self._handlers:
            raise ValueError(f"{method} has a handler already")
        if not 0 < len(method) <= calls.MAX_METHOD_LENGTH:
            raise ValueError(f"a method's name has 1 to {calls.MAX_METHOD_LENGTH} characters")
        self._handlers[method] = handler

    def unhandle(self, method: str) -> None:
        """Calls of `method` get UnknownMethod from now on; those under way go on."""
        del self._handlers[method]

    # ---- calls

    async def call(
        self,
        peer: PeerAddress,
        method: str,
        body: Any = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout: float,
        idempotent: bool = False,
        max_reply_bytes: int | None = None,
        priority: int = 0,
        call_id: bytes | None = None,
    ) -> Message:
        """Calls `method` at `peer` and gives its answer; connects first where necessary.

        `timeout` bounds all of it, in seconds; what is left of it travels along. `max_reply_bytes` is the largest
        reply that is accepted: naming it reserves that much memory, so that a large reply comes without asking.
        `idempotent` allows repeating the call after a lost connection, under the same `call_id` (16 bytes, random by
        default). Calls of higher `priority` (-128 to 127) send their chunks first. `buffers` are not copied where
        they are large: don't change them before this returns. Cancelling cancels the handler at the other end.

        Raises: RemoteError (the subclass that the peer raised); ConnectionLost; PeerUnreachable; ProtocolError;
        TimeoutError; ValueError or TypeError for what can't be sent.
        """
        if not 0 < len(method) <= calls.MAX_METHOD_LENGTH:
            raise ValueError(f"a method's name has 1 to {calls.MAX_METHOD_LENGTH} characters")
        if not 0 < timeout <= calls.MAX_TIMEOUT:
            raise ValueError(f"a timeout is positive and at most {calls.MAX_TIMEOUT:.0f} s: {timeout}")
        if not -128 <= priority <= 127:
            raise ValueError(f"a priority is between -128 and 127: {priority}")
        if call_id is None:
            call_id = os.urandom(16)
        elif len(call_id) != 16:
            raise ValueError("a call id has 16 bytes")
        deadline = asyncio.get_running_loop().time() + timeout
        views = tuple(map(frames.byte_view, buffers))
        attempt = 0
        while True:
            connection = self._pool.find(peer) or await self._connect(peer, deadline, method)
            max_reply = self._settings.protocol.max_message if max_reply_bytes is None else max_reply_bytes
            left = deadline - asyncio.get_running_loop().time()
            head = RequestHead(call_id, method, max(left, 0.001), priority, 0, max_reply, body)
            try:
                return await connection.call(head, views, deadline=deadline, reserve_reply=max_reply_bytes is not None)
            except ConnectionLost:
                wait = min(0.05 * 2**attempt, 2.0) * self._rng.uniform(0.5, 1.0)
                attempt += 1
                if not idempotent or self._closed or asyncio.get_running_loop().time() + wait >= deadline:
                    raise
                self.metrics.count("endpoint_calls_repeated")
            await asyncio.sleep(wait)

    async def _connect(self, peer: PeerAddress, deadline: float, method: str) -> Connection:
        """Shares one dial among all who want the same peer. Raises: PeerUnreachable, TimeoutError."""
        if self._closed:
            raise ConnectionLost(peer.short, "this endpoint is closed")
        key = self._pool.key(peer)
        dial = self._dials.get(key)
        if dial is None:
            self._start_housekeeping()
            dial = self._dials[key] = asyncio.get_running_loop().create_task(self._dial(peer, key))
            dial.add_done_callback(lambda task: self._dial_done(key, task))
        left = deadline - asyncio.get_running_loop().time()
        done, _ = await asyncio.wait([dial], timeout=max(left, 0.0))
        if not done:
            raise TimeoutError(f"{method}: {peer.short} was not reached in time")
        if dial.cancelled():
            raise ConnectionLost(peer.short, "this endpoint is closing")
        return dial.result()

    def _dial_done(self, key: Key, task: asyncio.Task[Connection]) -> None:
        self._dials.pop(key, None)
        if not task.cancelled():
            task.exception()  # retrieved: there may be no one left who waits

    async def _dial(self, peer: PeerAddress, key: Key) -> Connection:
        loop = asyncio.get_running_loop()
        wait = self._pool.retry_at(key) - loop.time()
        if wait > 0:
            await asyncio.sleep(wait)
        attempts: dict[str, BaseException] = {}
        for address in peer.addresses:
            try:
                connection = await self._dial_address(address, peer.peer_id)
            except (OSError, ProtocolError, TimeoutError) as error:
                attempts[f"tcp {address}"] = error
                self.metrics.count("endpoint_dials_failed", reason=_reason(error))
            else:
                self._pool.dial_succeeded(key)
                return connection
        self._pool.dial_failed(key, loop.time())
        raise PeerUnreachable(peer.peer_id.short if peer.peer_id is not None else peer.short, attempts)

    async def _dial_address(self, address: str, expected: PeerID | None) -> Connection:
        made: list[Connection] = []

        def established(channel: Channel, reader: FrameReader, peer_id: PeerID, hello: Hello) -> None:
            connection = self._new_connection(peer_id, hello, dialled=address)
            connection.attach(MAIN, channel, reader)
            made.append(connection)

        await self._greet(address, expected, self._hello(os.urandom(16), bulk=False), established)
        return made[0]

    async def _open_bulk(self, connection: Connection) -> None:
        assert connection.dialled is not None

        def established(channel: Channel, reader: FrameReader, peer_id: PeerID, hello: Hello) -> None:
            if not connection.is_open:
                raise HandshakeFailed("hello", "the connection ended meanwhile")
            connection.attach(BULK, channel, reader)

        hello = self._hello(connection.session, bulk=True)
        await self._greet(connection.dialled, connection.peer_id, hello, established)

    async def _greet(
        self,
        address: str,
        expected: PeerID | None,
        hello: Hello,
        established: Callable[[Channel, FrameReader, PeerID, Hello], None],
    ) -> None:
        """Raises: OSError, ProtocolError, TimeoutError."""
        async with asyncio.timeout(self._settings.connect_timeout):
            pipe = await tcp.connect(*split_host_port(address))
        greeting = self._greeting(pipe, own=hello, expected=expected, established=established)
        try:
            await asyncio.shield(greeting.done)
        except asyncio.CancelledError:
            greeting.abort()
            raise

    def _hello(self, session: bytes, *, bulk: bool) -> Hello:
        bounds = self._settings.protocol
        return Hello(session, bulk, self.peer_id, bounds.max_calls, bounds.max_small, bounds.max_message)

    def _greeting(
        self,
        pipe: Pipe,
        *,
        own: Hello | None,
        expected: PeerID | None,
        established: Callable[[Channel, FrameReader, PeerID, Hello], None],
    ) -> Greeting:
        tls = None
        if self._contexts is not None:
            dialling, accepting = self._contexts
            context = accepting if own is None else dialling
            tls = TlsMachine(context, server_side=own is None, expected=expected)
        greeting = Greeting(
            pipe,
            tls,
            own=own,
            answer_for=lambda peer_id, hello: self._hello(hello.session, bulk=hello.bulk),
            expected=expected,
            established=established,
            timeout=self._settings.handshake_timeout,
        )
        self._half_open.add(greeting)
        greeting.done.add_done_callback(lambda done: self._greeted(greeting, own is not None))
        greeting.start()
        return greeting

    def _greeted(self, greeting: Greeting, dialled: bool) -> None:
        self._half_open.discard(greeting)
        error = greeting.done.exception()
        if error is not None and not dialled:
            self.metrics.count("endpoint_handshakes_failed", reason=_reason(error))
            logger.info("a handshake with %s failed: %s", greeting.origin, describe(error))

    # ---- accepting

    def _accepted(self, pipe: tcp.TcpPipe) -> None:
        settings = self._settings
        same_host = sum(greeting.origin == pipe.origin for greeting in self._half_open)
        if (
            self._closed
            or len(self._half_open) >= settings.max_half_open
            or same_host >= settings.max_half_open_per_host
        ):
            self.metrics.count("endpoint_handshakes_failed", reason="too_many")
            pipe.abort()
        else:
            self._greeting(pipe, own=None, expected=None, established=self._established)

    def _established(self, channel: Channel, reader: FrameReader, peer_id: PeerID, hello: Hello) -> None:
        if hello.bulk:
            connection = self._pool.find_session(peer_id, hello.session)
            if connection is None or connection.has_bulk:
                raise HandshakeFailed("hello", "a bulk channel belongs to no connection")
            connection.attach(BULK, channel, reader)
        elif len(self._pool.connections()) >= self._settings.max_connections:
            raise HandshakeFailed("too_many", "too many connections")
        else:
            self._new_connection(peer_id, hello, dialled=None).attach(MAIN, channel, reader)

    def _new_connection(self, peer_id: PeerID, hello: Hello, *, dialled: str | None) -> Connection:
        connection = Connection(
            peer_id,
            hello,
            dialled=dialled,
            answer=self._answer,
            open_bulk=self._open_bulk,
            on_closed=self._pool.remove,
            budget=self._budget,
            settings=self._settings.protocol,
            metrics=self.metrics,
        )
        self._pool.add(connection)
        self.metrics.count("endpoint_connections_opened", side="dialled" if dialled else "accepted")
        return connection

    async def _answer(self, call: IncomingCall) -> Message:
        handler = self._handlers.get(call.method)
        if handler is None:
            raise UnknownMethod(f"{call.method!r} is no method of {self.peer_id.short}")
        return await handler(call)

    # ---- housekeeping

    def _start_housekeeping(self) -> None:
        if self._housekeeping is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._tick_at = loop.time() + 1.0
            self._housekeeping = loop.call_at(self._tick_at, self._tick)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        lag = now - self._tick_at
        self.metrics.set("loop_lag_seconds", lag)
        if lag > 1.0:
            logger.warning("the event loop stood still for %.1f s: something blocks it", lag)
        for connection in self._pool.connections():
            idle = not connection.num_calls and now - connection.last_used > self._settings.idle_timeout
            if idle and connection.dialled is not None and connection.is_open:
                task = loop.create_task(connection.aclose("idle"))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        self._tick_at = now + 1.0
        self._housekeeping = loop.call_at(self._tick_at, self._tick)


def _reason(error: BaseException) -> str:
    """One word for the counters."""
    if isinstance(error, HandshakeFailed):
        return error.reason
    if isinstance(error, UnsupportedVersion):
        return "version"
    return "protocol" if isinstance(error, ProtocolError) else "io"
