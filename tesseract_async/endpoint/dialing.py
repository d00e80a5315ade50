"""Opens and accepts connections: races paths, makes handshakes, and limits half-open connections."""

import asyncio
import logging
import os
import random
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Final, TypeVar

from tesseract_async.endpoint.bounds import EndpointSettings
from tesseract_async.endpoint.connection import Connection
from tesseract_async.endpoint.connection_limits import SETTLED, WaitingRoom, descriptor_limit, room_for
from tesseract_async.endpoint.connection_pool import ConnectionPool
from tesseract_async.endpoint.handshake import Handshake
from tesseract_async.endpoint.lanes import BULK, MAIN
from tesseract_async.errors import (
    ConnectionLost,
    HandshakeFailed,
    PeerUnreachable,
    ProtocolError,
    TesseractError,
    UnsupportedVersion,
    describe,
)
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.tasks import end
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe, Transport, range_of
from tesseract_async.transport.certificates import make_contexts
from tesseract_async.transport.channel import Channel
from tesseract_async.transport.throttle import Throttle
from tesseract_async.transport.tls import TlsMachine
from tesseract_async.uncopied import Uncopied
from tesseract_async.wire.frames import FrameReader
from tesseract_async.wire.heads import Hello

logger = logging.getLogger(__name__)

CROWD: Final = 32
"""The number of connections up to which their origins do not matter."""
IDLE_SECONDS: Final = 5.0
"""Seconds without a call after which a connection may have to go for a new one, if there are too many."""

Result = TypeVar("Result")
Established = Callable[[Channel, FrameReader, PeerID, Hello], None]


class Dialer(Uncopied, ABC):
    """The part of `Endpoint` that opens connections, and accepts those that others open."""

    def __init__(
        self,
        *,
        identity: Identity,
        transports: Sequence[Transport],
        settings: EndpointSettings,
        metrics: Metrics,
        grants: Callable[[], Sequence[bytes]],
        features: frozenset[str],
        throttle: Throttle | None,
    ) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.metrics = metrics
        self.throttle = throttle
        self._contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
        if settings.security == "tls":
            self._contexts = make_contexts(identity)
        elif settings.security == "plain":
            logger.warning("security is off: nothing is encrypted, and peers can claim to be anybody")
        else:
            raise ValueError(f"security is 'tls' or 'plain', not {settings.security!r}")
        self._transports = list(transports)
        self._bounds = bounds = settings.bounds
        self._rng = random.Random()
        self.pool = ConnectionPool(backoff_base=bounds.backoff_base, backoff_max=bounds.backoff_max, rng=self._rng)
        self._grants = grants
        self._features = features
        self._dials: dict[PeerAddress, asyncio.Task[Connection]] = {}
        self._half_open: set[Handshake] = set()
        room = room_for(descriptor_limit())
        most = min(bounds.max_half_open, room.half_open)
        self._callers: WaitingRoom[Pipe] = WaitingRoom(most=most, most_per_group=bounds.max_half_open_per_host)
        self._max_connections = min(bounds.max_connections, room.connections)
        self._closed = False

    @property
    def num_callers(self) -> int:
        return len(self._callers)

    @abstractmethod
    def _make_connection(self, peer_id: PeerID, hello: Hello, dialed: PeerAddress | None, pipe: Pipe) -> Connection:
        """Return a connection that is not attached yet."""

    async def _end_dials(self) -> None:
        dials = list(self._dials.values())
        for dial in dials:
            dial.cancel()
        handshakes = list(self._half_open)
        for handshake in handshakes:
            handshake.abort()
        waits: list[Awaitable[object]] = [*dials, *(handshake.done for handshake in handshakes)]
        await asyncio.gather(*waits, return_exceptions=True)

    async def connect(self, peer: PeerAddress, *, deadline: float, what: str) -> Connection:
        """A new connection, or one that came while this waited for its turn after failures.

        One dial is shared by all who look for the same peer at the same place.

        Raises: PeerUnreachable, ConnectionLost if this end closes, TimeoutError naming `what` at the deadline.
        """
        loop = asyncio.get_running_loop()
        if self._closed:
            raise ConnectionLost(peer.short, "this endpoint is closed")
        dial = self._dials.get(peer)
        if dial is None:
            dial = self._dials[peer] = loop.create_task(self._dial(peer))
            dial.add_done_callback(lambda task: self._dialed(peer, task))
        done, _ = await asyncio.wait([dial], timeout=max(0.0, deadline - loop.time()))
        if not done:
            raise TimeoutError(f"{what}: {peer.short} was not reached in time")
        if dial.cancelled():
            raise ConnectionLost(peer.short, "this endpoint is closed")
        return dial.result()

    def _dialed(self, peer: PeerAddress, task: asyncio.Task[Connection]) -> None:
        self._dials.pop(peer, None)
        if not task.cancelled():
            task.exception()  # retrieved: perhaps no caller waits any more

    async def _dial(self, peer: PeerAddress) -> Connection:
        loop = asyncio.get_running_loop()
        wait = self.pool.retry_at(peer) - loop.time()
        if wait > 0:
            await asyncio.sleep(wait)
            if (back := self.pool.find(peer)) is not None:  # it came by itself meanwhile, or was found elsewhere
                return back
        try:
            connection = await self.connect_through(peer, self.paths(peer))
        except PeerUnreachable:
            self.pool.dial_failed(peer, loop.time())
            raise
        self.pool.dial_succeeded(peer)
        return connection

    async def connect_through(self, peer: PeerAddress, paths: Sequence[DialPath]) -> Connection:
        """A new connection over the best of these paths, preferred by later calls. Raises: PeerUnreachable."""
        made: list[Connection] = []

        def established(channel: Channel, reader: FrameReader, peer_id: PeerID, hello: Hello) -> None:
            if made:
                raise HandshakeFailed("late", "another path to the peer was faster")
            known = PeerAddress(peer_id, peer.addresses, peer.rendezvous)
            made.append(self._make_connection(peer_id, hello, known, channel.pipe))
            made[0].attach(MAIN, channel, reader)

        await self._race(peer, paths, peer.peer_id, lambda: self._hello(os.urandom(16), bulk=False), established)
        return made[0]

    async def _open_bulk(self, connection: Connection) -> None:
        """Open the second channel of a connection that was dialed here. Raises: PeerUnreachable."""
        peer = connection.dialed
        assert peer is not None

        def established(channel: Channel, reader: FrameReader, peer_id: PeerID, hello: Hello) -> None:
            if not connection.is_open or connection.has_bulk:
                raise HandshakeFailed("late", "the connection needs no bulk channel any more")
            connection.attach(BULK, channel, reader)

        hello = self._hello(connection.session, bulk=True)
        await self._race(peer, self.paths(peer), connection.peer_id, lambda: hello, established)

    def paths(self, peer: PeerAddress) -> list[DialPath]:
        return [path for transport in self._transports for path in transport.paths(peer)]

    async def _race(
        self,
        peer: PeerAddress,
        paths: Sequence[DialPath],
        expected: PeerID | None,
        hello: Callable[[], Hello],
        established: Established,
    ) -> None:
        """Make a handshake over the first of these paths on which one works. Raises: PeerUnreachable."""

        async def attempt(path: DialPath) -> bool:
            handshake = self._handshake(await path.open(), own=hello(), expected=expected, established=established)
            try:
                await asyncio.shield(handshake.done)
            except asyncio.CancelledError:
                handshake.abort()
                raise
            return True

        def finished(path: DialPath, error: BaseException | None) -> None:
            if error is not None:
                self.metrics.count("endpoint_dials_failed", reason=reason_of(error))
            for transport in self._transports:
                transport.path_finished(peer, path, error)

        opened, errors = await race(paths, attempt, finished=finished)
        if not opened:
            raise PeerUnreachable(peer.short, errors)

    def accept(self, pipe: Pipe) -> None:
        """Begin the handshake on a pipe that a peer opened. Where too many are half open, an old one of the largest
        crowd is dropped for it."""
        if self._closed:
            pipe.abort()
            return
        welcome, victim = self._callers.enter(pipe, group_of(pipe.origin), asyncio.get_running_loop().time())
        if victim is not None or not welcome:
            self.metrics.count("endpoint_handshakes_failed", reason="too_many")
        if victim is not None:
            victim.abort()
        if welcome:
            self._handshake(pipe, own=None, expected=None, established=self._accepted)
        else:
            pipe.abort()

    def _accepted(self, channel: Channel, reader: FrameReader, peer_id: PeerID, hello: Hello) -> None:
        if hello.bulk:
            connection = self.pool.find_session(peer_id, hello.session)
            if connection is None or connection.has_bulk:
                raise HandshakeFailed("hello", "a bulk channel belongs to no connection")
            connection.attach(BULK, channel, reader)
            return
        if not self._has_room(peer_id, channel.pipe.origin):
            raise HandshakeFailed("too_many", "the peer opens more connections than are accepted")
        self._make_connection(peer_id, hello, None, channel.pipe).attach(MAIN, channel, reader)

    def _has_room(self, peer_id: PeerID, origin: str) -> bool:
        """Return whether one more connection may be accepted. Where there are too many, one of the largest crowd is
        dropped for it, an idle one if there is one."""
        pool, bounds = self.pool, self._bounds
        if pool.num_connections_with(peer_id) >= bounds.max_connections_per_peer:
            return False
        full = pool.num_connections >= self._max_connections
        if not full and pool.num_connections < min(CROWD, bounds.max_connections_per_range):
            return True
        groups: dict[str, list[Connection]] = {}
        for connection in pool.connections():
            if connection.dialed is None and connection.is_open:
                groups.setdefault(group_of(connection.origin), []).append(connection)
        mine = group_of(origin)
        crowd = mine
        if range_of(origin) is None or len(groups.get(mine, ())) < bounds.max_connections_per_range:
            if not full:
                return True
            crowd = max(groups, key=lambda one: len(groups[one]), default=mine)
        now = asyncio.get_running_loop().time()
        found = groups.get(crowd, [])
        idle = [
            one
            for one in found
            if not one.protocol.num_calls
            # a peer that has never called is not missed
            and now - one.last_used > (IDLE_SECONDS if one.protocol.was_called else SETTLED)
        ]
        if not idle and (crowd == mine or len(found) <= len(groups.get(mine, ())) + 1):
            return False
        victim = min(idle or found, key=lambda one: (one.protocol.was_called, one.last_used))
        self.metrics.count("endpoint_connections_dropped", reason="crowd")
        victim.abort("it was idle, and there are too many")
        return True

    def _hello(self, session: bytes, *, bulk: bool) -> Hello:
        bounds = self._bounds
        limits = (bounds.max_calls, bounds.max_small, bounds.max_message)
        more = () if bulk else (tuple(self._grants()), self._features)
        return Hello(session, bulk, self.peer_id, *limits, *more)

    def _handshake(
        self, pipe: Pipe, *, own: Hello | None, expected: PeerID | None, established: Established
    ) -> Handshake:
        tls = None
        if self._contexts is not None:
            dialing, accepting = self._contexts
            context = accepting if own is None else dialing
            tls = TlsMachine(context, server_side=own is None, expected=expected)
        handshake = Handshake(
            pipe,
            tls,
            own=own,
            answer_for=lambda hello: self._hello(hello.session, bulk=hello.bulk),
            expected=expected,
            established=established,
            timeout=self._bounds.handshake_timeout,
            throttle=self.throttle,
        )
        self._half_open.add(handshake)
        handshake.done.add_done_callback(lambda done: self._handshake_ended(handshake, pipe))
        handshake.start()
        return handshake

    def _handshake_ended(self, handshake: Handshake, pipe: Pipe) -> None:
        self._half_open.discard(handshake)
        self._callers.leave(pipe)
        error = handshake.done.exception()
        if error is not None and not handshake.dialed:
            self.metrics.count("endpoint_handshakes_failed", reason=reason_of(error))
            logger.info("a handshake with %s failed: %s", handshake.description, describe(error))


def group_of(origin: str) -> str:
    """Return the group whose connections are counted together: an address range, or the origin itself on loopback and
    where there is no address."""
    return range_of(origin) or origin


def reason_of(error: BaseException) -> str:
    if isinstance(error, HandshakeFailed):
        return error.reason
    if isinstance(error, UnsupportedVersion):
        return "version"
    return "protocol" if isinstance(error, ProtocolError) else "io"


async def race(
    paths: Sequence[DialPath],
    attempt: Callable[[DialPath], Coroutine[object, object, Result]],
    *,
    finished: Callable[[DialPath, BaseException | None], None],
) -> tuple[Result | None, dict[str, BaseException]]:
    """Try several paths to one peer with head starts (RFC 8305's "happy eyeballs"); the first that succeeds wins.

    Returns its result, or None and each path's error. The other attempts are cancelled and awaited. A path starts after
    its delay, or as soon as all attempts before it have failed. An attempt fails with OSError or TesseractError; any
    other exception ends the race. `finished` is called for each attempt that ended by itself.
    """
    loop = asyncio.get_running_loop()
    queue = deque(sorted(paths, key=lambda path: path.delay))
    begun = loop.time()
    running: dict[asyncio.Task[Result], DialPath] = {}
    errors: dict[str, BaseException] = {}
    try:
        while queue or running:
            while queue and (not running or loop.time() - begun >= queue[0].delay):
                path = queue.popleft()
                running[loop.create_task(attempt(path))] = path
            timeout = max(0.0, begun + queue[0].delay - loop.time()) if queue else None
            done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                path = running[task]
                error = task.exception()
                if error is not None and not isinstance(error, OSError | TesseractError):  # TimeoutError is an OSError
                    raise error
                finished(path, error)
                if error is None:
                    return task.result(), errors
                errors[path.name] = error
                del running[task]
        return None, errors
    finally:
        await end(*running)  # some may have finished in the same turn as the winner
