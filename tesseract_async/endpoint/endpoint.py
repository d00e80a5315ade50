"""`Endpoint`: calls to other nodes, and answers to theirs."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tesseract_async.admission import Action, Policy
from tesseract_async.endpoint.bounds import EndpointSettings
from tesseract_async.endpoint.budget import NodeBudgets
from tesseract_async.endpoint.call_table import Answer, CallHandler, CallTable, IncomingCall, Message
from tesseract_async.endpoint.connection import Connection
from tesseract_async.endpoint.dialing import Dialer
from tesseract_async.endpoint.events import ReplyEvent, RequestUnseen
from tesseract_async.endpoint.quotas import Quotas
from tesseract_async.errors import ConnectionLost, NotAllowed
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.tasks import TaskSet
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe, Transport
from tesseract_async.transport.throttle import Throttle
from tesseract_async.wire import frames, heads
from tesseract_async.wire.frames import Buffer
from tesseract_async.wire.heads import Hello, RequestHead

__all__ = ["ConnectionInfo", "CallHandler", "CallTable", "Endpoint", "EndpointSettings", "IncomingCall", "Message"]

logger = logging.getLogger(__name__)

TICK: Final = 1.0
"""Seconds between rounds of housekeeping."""
IDLE_TIMEOUT: Final = 300.0
"""Seconds without a call after which a connection that was dialed here is closed: NATs forget TCP much later."""


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """One open connection, for people and for choosing better paths."""

    peer_id: PeerID
    path: str
    """As the pipe describes itself: ``tcp 10.0.0.1:4000``."""
    dialed: bool
    """True if this end opened it."""
    rtt: float | None
    """Seconds for a ping and its answer, smoothed; None until the first one came."""
    bytes_per_second: float
    """Rate at which large messages last arrived; 0.0 if none did."""
    num_calls: int
    """Calls under way in both directions."""


class Endpoint(Dialer):
    """Calls to other nodes, and answers to theirs, many at once over one connection per peer.

    Lives on one event loop: `start`, then `call` and `handle`, then `aclose`. `transports` say how others are reached.
    Without `start` it can call, but not be called.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        transports: Sequence[Transport] = (),
        settings: EndpointSettings | None = None,
        policy: Policy | None = None,
        metrics: Metrics | None = None,
        table: CallTable | None = None,
        grants: Callable[[], Sequence[bytes]] = tuple,
        on_grants: Callable[[PeerID, Sequence[bytes]], None] = lambda peer_id, grants: None,
        admits: Callable[[PeerID], bool] = lambda peer_id: True,
        features: frozenset[str] = heads.FEATURES,
        throttle: Throttle | None = None,
    ) -> None:
        """`grants`: what this node shows to each peer it meets (`Hello.grants`). `on_grants` is called with what a peer
        shows, before any of its calls. `admits`: whether a peer that the policy allows may send large requests.
        `features`: what this node says it understands. `throttle`: what all connections keep to."""
        settings = settings if settings is not None else EndpointSettings()
        super().__init__(
            identity=identity,
            transports=transports,
            settings=settings,
            metrics=metrics if metrics is not None else Metrics(),
            grants=grants,
            features=features,
            throttle=throttle,
        )
        self._table = table if table is not None else CallTable(self.peer_id.short)
        self.budgets = NodeBudgets(settings.max_receive_bytes)
        """Memory that all connections share."""
        self.quotas = Quotas(
            policy if policy is not None else Policy(),
            refused=lambda reason: self.metrics.count("endpoint_calls_over_quota", reason=reason),
        )
        """The part of its quota that each peer has used."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closing = TaskSet("endpoint: close")
        self._on_grants = on_grants
        self._admits = admits

    @property
    def policy(self) -> Policy:
        """The rules on who may do what here; may be replaced at any time."""
        return self.quotas.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.quotas.policy = policy

    async def start(self, transports: Sequence[Transport] = ()) -> None:
        """Let every transport listen. `transports`: further ones, which need this endpoint to be built."""
        self._transports += transports
        for transport in self._transports:
            await transport.listen(self.accept)

    async def aclose(self) -> None:
        """Cancel all calls in both directions, say farewell, and leave no task, timer or socket."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for transport in self._transports:
            await transport.aclose()
        await self._end_dials()
        closes = [connection.aclose("the node is closing") for connection in self.pool.connections()]
        await asyncio.gather(*closes, *self._closing, return_exceptions=True)

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def handle(self, method: str, handler: CallHandler, *, action: Action = "call") -> None:
        """Answer calls of `method` from now on. Each call runs in a task of its own, cancelled with its caller.

        A handler is a coroutine function that returns the reply, or an async generator function that yields its parts
        (for callers with `IncomingCall.in_parts`), the last one as a `LastPart` if it knows. Buffers are on loan until
        they are sent: don't change them. A RemoteError that it raises reaches the caller; any other exception is
        logged, and reaches the caller as a plain RemoteError. Peers that the policy does not let take `action` get
        NotAllowed.

        Raises: ValueError if the method is taken, or its name is too long.
        """
        self._table.add(method, handler, action=action)

    def unhandle(self, method: str) -> None:
        """Calls of `method` get UnknownMethod from now on; those under way go on."""
        self._table.remove(method)

    def _answer(self, call: IncomingCall) -> Answer:
        action = self._table.actions.get(call.method)
        if action is not None and not self.quotas.policy.allows(call.peer_id, action):
            raise self._refusal(call.peer_id, action)
        return self._table.find(call)(call)

    def _refusal_of_large(self, peer_id: PeerID) -> NotAllowed | None:
        """Return why `peer_id` may send no large requests; None if it may."""
        allowed = self.quotas.policy.allows(peer_id, "call") and self._admits(peer_id)
        return None if allowed else self._refusal(peer_id, "call")

    def _refusal(self, peer_id: PeerID, action: Action) -> NotAllowed:
        self.metrics.count("endpoint_calls_refused", action=action)
        return NotAllowed(f"{self.peer_id.short} does not let {peer_id.short} {action}: ask its owner")

    async def call(
        self,
        peer: PeerAddress,
        method: str,
        body: object = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout: float,
        idempotent: bool = False,
        max_reply_bytes: int | None = None,
        priority: int = 0,
    ) -> Message:
        """Call `method` at `peer` and return its answer; connect first where necessary.

        `timeout` bounds the whole call, in seconds; the time that is left travels along. `max_reply_bytes` is the
        largest reply that is accepted: naming it lets a large reply of up to that many bytes come without asking.
        `idempotent` allows repeating the call after a lost connection. Large messages of higher `priority` (-128 to
        127) are sent first. `buffers` are not copied where they are large: don't change them before this returns.
        Cancelling cancels the handler at the other end.

        Raises: RemoteError (the subclass that the peer raised); ConnectionLost; PeerUnreachable; ProtocolError;
        TimeoutError; ValueError or TypeError for what can't be sent.
        """
        head, views, deadline = self._request(method, body, buffers, timeout, max_reply_bytes, priority)
        attempt = 0
        while True:
            connection = self.pool.find(peer)
            if connection is None:
                connection = await self.connect(peer, deadline=deadline, what=method)
            elif peer is not connection.known:
                self._note_address(connection, peer)
            try:
                future: asyncio.Future[Message] = asyncio.Future()
                reserves = max_reply_bytes is not None
                stream = connection.start_call(head, views, future, deadline=deadline, reserve_reply=reserves)
                try:
                    return await future
                except BaseException:  # cancelled or failed: the other end is told
                    connection.cancel_call(stream)
                    raise
            except ConnectionLost as error:
                await self._before_repeating(error, idempotent, attempt, deadline)
            attempt += 1

    async def _before_repeating(self, error: ConnectionLost, idempotent: bool, attempt: int, deadline: float) -> None:
        """Wait a moment. Raises: `error` if the call is not to be repeated, or not in time."""
        again = idempotent or isinstance(error, RequestUnseen)
        wait = min(0.05 * 2**attempt, 2.0) * self._rng.uniform(0.5, 1.0)
        if not again or self._closed or asyncio.get_running_loop().time() + wait >= deadline:
            raise error
        self.metrics.count("endpoint_calls_repeated")
        await asyncio.sleep(wait)

    async def call_parts(
        self,
        peer: PeerAddress,
        method: str,
        body: object = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout: float,
        idempotent: bool = False,
        max_reply_bytes: int | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Message, None]:
        """As `call`, for a method whose reply may come in parts: yields them as they come, at least one.

        A few parts are sent ahead; then the handler waits for this iteration, 30 seconds at most. `max_reply_bytes`
        bounds all parts together. `idempotent` allows repeating the call where the connection was lost before the first
        part came. Close the generator (``contextlib.aclosing``) to cancel it where it is not read to its end. A peer
        that knows no parts replies in one.

        Raises: what `call` raises, also after some parts.
        """
        head, views, deadline = self._request(method, body, buffers, timeout, max_reply_bytes, priority)
        attempt = 0
        while True:
            connection = self.pool.find(peer)
            if connection is None:
                connection = await self.connect(peer, deadline=deadline, what=method)
            elif peer is not connection.known:
                self._note_address(connection, peer)
            head = head._replace(time_left=max(deadline - asyncio.get_running_loop().time(), 0.001))
            parts = connection.call_parts(head, views, deadline=deadline, reserve_reply=max_reply_bytes is not None)
            try:
                async with contextlib.aclosing(parts):
                    async for part in parts:
                        idempotent = False
                        yield part
                return
            except ConnectionLost as error:
                await self._before_repeating(error, idempotent, attempt, deadline)
            attempt += 1

    def call_into(
        self,
        peer: PeerAddress,
        method: str,
        body: object,
        buffers: Sequence[Buffer],
        sink: Callable[[ReplyEvent], None],
        *,
        timeout: float,
        priority: int = 0,
    ) -> Callable[[], None] | None:
        """As `call_parts`, without a task, over a connection that is there; None where there is none.

        `sink` is given each part as it comes, and last the reply's end or its failure: nothing is repeated. Returns a
        function that cancels the call, which does nothing once it is over. Raises: what starting a call raises.
        """
        if (connection := self.pool.find(peer)) is None:
            return None
        if peer is not connection.known:
            self._note_address(connection, peer)
        head, views, deadline = self._request(method, body, buffers, timeout, None, priority)
        return connection.call_into(head, views, sink, deadline=deadline)

    def _request(
        self,
        method: str,
        body: object,
        buffers: Sequence[Buffer],
        timeout: float,
        max_reply_bytes: int | None,
        priority: int,
    ) -> tuple[RequestHead, tuple[memoryview, ...], float]:
        if not 0 < len(method) <= heads.MAX_METHOD_LENGTH:
            raise ValueError(f"a method's name has 1 to {heads.MAX_METHOD_LENGTH} characters")
        if not 0 < timeout <= heads.MAX_TIMEOUT:
            raise ValueError(f"a timeout is positive and at most {heads.MAX_TIMEOUT:.0f} s: {timeout}")
        if priority:
            check_priority(priority)
        max_reply = self._bounds.max_message if max_reply_bytes is None else max_reply_bytes
        head = tuple.__new__(RequestHead, (method, timeout, priority, 0, max_reply, body))  # as in `heads`
        views: tuple[memoryview, ...] = tuple(map(frames.byte_view, map(memoryview, buffers)))  # type: ignore[arg-type]
        return head, views, asyncio.get_running_loop().time() + timeout

    def _note_address(self, connection: Connection, peer: PeerAddress) -> None:
        """Note that a call names a peer by other addresses than the calls before it."""
        if connection.known is not None:
            if peer != connection.known and peer.peer_id is not None:
                for transport in self._transports:
                    transport.peer_known(peer)
            connection.known = peer

    def connections(self) -> list[ConnectionInfo]:
        return [
            ConnectionInfo(
                c.peer_id,
                c.path,
                c.dialed is not None,
                c.protocol.life.rtt,
                c.protocol.windows.bytes_per_second,
                c.protocol.num_calls,
            )
            for c in self.pool.connections()
            if c.is_open
        ]

    def is_connected(self, peer_id: PeerID) -> bool:
        return self.pool.find(PeerAddress(peer_id, ())) is not None

    def path_kind(self, peer_id: PeerID) -> str:
        """The first word of the path that calls to this peer take now, where this end opened it; else empty."""
        connection = self.pool.find(PeerAddress(peer_id, ()))
        if connection is None or connection.dialed is None:
            return ""
        return connection.path.partition(" ")[0]

    async def upgrade(self, peer: PeerAddress, paths: Sequence[DialPath] | None = None) -> None:
        """Open another connection to `peer` over one of `paths`, or of all that its addresses allow. Later calls use
        it; those under way stay, and what this end opened before is closed after them.

        Raises: PeerUnreachable.
        """
        old = [c for c in self.pool.connections() if c.peer_id == peer.peer_id and c.dialed is not None]
        await self.connect_through(peer, self.paths(peer) if paths is None else paths)
        for connection in old:
            connection.retired = True

    def say_anew(self) -> None:
        """Open new connections for later calls, so that peers learn of grants that have changed. Connections that
        others opened stay: those behind NATs could not be dialed."""
        for connection in self.pool.connections():
            connection.retired = connection.retired or connection.dialed is not None

    def _make_connection(self, peer_id: PeerID, hello: Hello, dialed: PeerAddress | None, pipe: Pipe) -> Connection:
        connection = Connection(
            peer_id,
            replace(hello, features=hello.features & self._features),
            dialed=dialed,
            pipe=pipe,
            answer=self._answer,
            open_bulk=self._open_bulk,
            on_closed=self.pool.remove,
            budgets=self.budgets,
            bounds=self._bounds,
            metrics=self.metrics,
            quotas=self.quotas,
            refusal=lambda: self._refusal_of_large(peer_id),
        )
        if hello.grants:
            self._on_grants(peer_id, hello.grants)
        self.pool.add(connection)
        kind = pipe.description.partition(" ")[0]
        self.metrics.count(
            "endpoint_connections_opened", side="dialed" if dialed is not None else "accepted", path=kind
        )
        if self._timer is None and not self._closed:
            self._arm_timer()
        return connection

    def _arm_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer_at = loop.time() + TICK
        self._timer = loop.call_at(self._timer_at, self.tick)

    def tick(self) -> None:
        """A round of housekeeping: metrics, and closing connections that are idle or retired. Runs every `TICK`."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        lag = now - self._timer_at
        self.metrics.set("loop_lag_seconds", lag)
        if lag > 1.0:
            logger.warning("the event loop stood still for %.1f s: something blocks it", lag)
        connections = self.pool.connections()
        self.metrics.set("endpoint_connections", len(connections))
        for connection in connections:
            connection.count_bytes()
            if connection.dialed is None or not connection.is_open or connection.protocol.num_calls:
                continue
            idle = now - connection.last_used > IDLE_TIMEOUT
            if idle or connection.retired:
                self._closing.spawn(connection.aclose("idle"))
        if connections:
            self._arm_timer()
        else:
            self._timer = None


def check_priority(priority: int) -> None:
    """Raises: ValueError for a priority that can't travel."""
    if not -128 <= priority <= 127:
        raise ValueError(f"a priority is between -128 and 127: {priority}")
