"""Drives the calls of one peer (`protocol`) over one or two channels."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.budget import NodeBudgets, Owner, Reservation
from tesseract_async.endpoint.call_table import Answer, IncomingCall, Message
from tesseract_async.endpoint.events import (
    BulkWanted,
    CallCancelled,
    CallFailed,
    CallReceived,
    PartReceived,
    PartWanted,
    PeerClosed,
    ReplyEvent,
    ReplyReceived,
)
from tesseract_async.endpoint.handlers import Handlers
from tesseract_async.endpoint.lanes import BULK, MAIN
from tesseract_async.endpoint.protocol import ConnectionProtocol
from tesseract_async.endpoint.quotas import Quotas
from tesseract_async.errors import ConnectionLost, ProtocolError, RemoteError, describe
from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.transport.base import PeerAddress, Pipe, range_of
from tesseract_async.transport.channel import Channel
from tesseract_async.wire.frames import FrameReader
from tesseract_async.wire.heads import Hello, RequestHead

logger = logging.getLogger(__name__)

FLUSH_BYTES: Final = 256 * 1024
"""Bytes encrypted and written before the loop may do something else."""
UNCOUNTED_UNSENT: Final = 1024 * 1024
"""Bytes of small frames that may wait for a peer to read without counting among the node's replies."""
UNREAD_TIMEOUT: Final = 20.0
"""Seconds for which bytes may wait on a channel from which none leave."""


class Connection:
    """Calls to and from one peer. Lives from the hello until `closed` is set; `on_closed` is called then, once.

    `answer` finds and calls the handler of a received call. `pipe` is that of the main channel.
    """

    def __init__(
        self,
        peer_id: PeerID,
        hello: Hello,
        *,
        dialed: PeerAddress | None,
        pipe: Pipe,
        answer: Callable[[IncomingCall], Answer],
        open_bulk: "Callable[[Connection], Awaitable[None]]",
        on_closed: "Callable[[Connection], None]",
        budgets: NodeBudgets,
        bounds: Bounds,
        metrics: Metrics,
        quotas: Quotas,
        refusal: Callable[[], RemoteError | None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.peer_id = peer_id
        self.session = hello.session
        self.dialed = dialed
        """The address that this end dialed, or None if the peer did."""
        self.known = dialed
        """The address that calls give for the peer, which may have changed since."""
        self.path = pipe.description
        self.origin = pipe.origin
        self.is_open = True
        """True while calls may be started."""
        self.retired = False
        """True once a better connection has replaced this one, which ends with its last call."""
        self.closed: asyncio.Future[None] = loop.create_future()
        self.last_used = loop.time()
        self._loop = loop
        self._open_bulk = open_bulk
        self._on_closed = on_closed
        self._metrics = metrics
        self._bounds = bounds
        self._budgets = budgets
        self._owner = Owner(range_of(pipe.origin) or peer_id, peer_id, self)
        self.protocol = ConnectionProtocol(
            f"{peer_id.short} ({pipe.description})",
            hello,
            dialed=dialed is not None,
            budgets=budgets,
            owner=self._owner,
            bounds=bounds,
            now=loop.time(),
            quotas=quotas,
            refusal=refusal,
        )
        self._unsent: Reservation | None = None  # what small frames count that a peer does not read
        self._drained = [0, 0]  # bytes that had left each channel when it last moved ...
        self._drained_at = [loop.time()] * 2  # ... and when that was
        self._channels: list[Channel | None] = [None, None]
        self._sinks: dict[int, asyncio.Future[Message] | Callable[[ReplyEvent], None]] = {}
        """The receivers of calls' replies: first of the parts, if there are any, then of the end or the failure."""
        self._handlers = Handlers(
            self.protocol, answer, peer_id, pipe.origin, max_backlog=bounds.max_backlog, done=self._send
        )
        self._bulk_task: asyncio.Task[None] | None = None
        self._flush_scheduled = False
        self._was_alone = False  # the call before the next one
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._lost_reason: str | None = None

    def attach(self, lane: int, channel: Channel, reader: FrameReader) -> None:
        """Take over a channel after its hello; `reader` may be in the middle of its bytes."""
        self._channels[lane] = channel
        port = _LanePort(self, lane, channel, reader)
        reader.sink = self.protocol.lanes[lane]
        self.protocol.lanes[lane].reader = reader
        channel.receiver = port
        if lane == BULK:
            self.protocol.lanes[BULK].open = True
        self._arm_timer()

    @property
    def has_bulk(self) -> bool:
        return self._channels[BULK] is not None

    def count_bytes(self) -> None:
        for channel in self._channels:
            if channel is not None:
                received, sent = channel.bytes_received, channel.bytes_sent
                old_received, old_sent = channel.bytes_counted
                channel.bytes_counted = (received, sent)
                self._metrics.count("transport_bytes_received", received - old_received)
                self._metrics.count("transport_bytes_sent", sent - old_sent)

    def start_call(
        self,
        head: RequestHead,
        buffers: tuple[memoryview, ...],
        sink: asyncio.Future[Message] | Callable[[ReplyEvent], None],
        *,
        deadline: float,
        reserve_reply: bool,
        in_parts: bool = False,
    ) -> int:
        """Start a call, and return its number. It is sent at once if it is alone here, as the one before it was;
        otherwise together with the other calls of this turn of the loop. If a future ends by anything but the reply,
        its caller then calls `cancel_call`.

        Raises: ConnectionLost, MessageTooLarge; TypeError and ValueError for a bad body.
        """
        if self._lost_reason is not None:
            raise ConnectionLost(self.protocol.peer, self._lost_reason)
        now = self._loop.time()
        stream = self.protocol.start_call(
            head, buffers, deadline=deadline, reserve_reply=reserve_reply, now=now, in_parts=in_parts
        )
        self.last_used = now
        self._sinks[stream] = sink
        if self._timer is None or deadline < self._timer_at:
            self._arm_timer()
        before, self._was_alone = self._was_alone, len(self._sinks) == 1
        self._send(at_once=before and self._was_alone)
        return stream

    def _send(self, at_once: bool) -> None:
        """Send what waits; with `at_once`, small frames go without another turn of the loop. A flush sends the rest."""
        protocol = self.protocol
        channel, lane = self._channels[MAIN], protocol.lanes[MAIN]
        if protocol.life.num_on_bulk:  # the other channel is looked after from here
            self._arm_timer()
        if not at_once or self._flush_scheduled or channel is None or channel.paused or lane.large or not lane.small:
            self._schedule_flush()
            return
        try:
            channel.write(lane.data_to_send(0, protocol.now))
        except ProtocolError as error:
            self._loop.call_soon(self.abort, describe(error))
        if self._budgets.changed or protocol.events or protocol.has_data():  # a flush sees to them
            self._schedule_flush()

    async def call_parts(
        self, head: RequestHead, buffers: tuple[memoryview, ...], *, deadline: float, reserve_reply: bool
    ) -> AsyncGenerator[Message, None]:
        """Start a call whose reply may come in parts, and yield each. Closing it cancels the call."""
        parts: asyncio.Queue[ReplyEvent] = asyncio.Queue()

        def take(event: ReplyEvent) -> None:
            while isinstance(event, CallFailed) and event.drops_parts and not parts.empty():
                parts.get_nowait()
            parts.put_nowait(event)

        stream = self.start_call(head, buffers, take, deadline=deadline, reserve_reply=reserve_reply, in_parts=True)
        is_first = more = True
        try:
            while more:
                part = await parts.get()
                if isinstance(part, CallFailed):
                    raise part.error
                message, more = Message(part.body, part.buffers), isinstance(part, PartReceived)
                del part  # while the next one is awaited, its memory is the caller's alone
                if more:
                    self.protocol.outgoing.part_taken(stream)
                    self._schedule_flush()
                if more or is_first or message != Message():  # the end may be an empty one, where others came before
                    yield message
                del message
                is_first = False
        finally:
            if more:
                self.cancel_call(stream)

    def call_into(
        self, head: RequestHead, buffers: tuple[memoryview, ...], sink: Callable[[ReplyEvent], None], *, deadline: float
    ) -> Callable[[], None]:
        """As `call_parts`, without a task: `sink` is given each part, and last the end or the failure. Returns a
        function that cancels it, which does nothing once it is over."""

        def take(event: ReplyEvent) -> None:
            if isinstance(event, PartReceived):
                self.protocol.outgoing.part_taken(stream)
                self._schedule_flush()
            sink(event)

        def cancel() -> None:
            if stream in self._sinks:
                self.cancel_call(stream)

        stream = self.start_call(head, buffers, take, deadline=deadline, reserve_reply=False, in_parts=True)
        return cancel

    def cancel_call(self, stream: int) -> None:
        self._sinks.pop(stream, None)
        self.protocol.cancel_call(stream)
        self._wake()

    def _look(self) -> None:
        if self._budgets.changed:
            self._budgets.deliver()
        events = self.protocol.events
        if not events:
            return
        self.protocol.events = []
        for event in events:
            match event:
                case ReplyReceived() | PartReceived() | CallFailed():
                    is_part = type(event) is PartReceived
                    sink = self._sinks.get(event.stream) if is_part else self._sinks.pop(event.stream, None)
                    if not isinstance(sink, asyncio.Future):
                        if sink is not None:
                            sink(event)
                    elif sink.done():
                        pass
                    elif isinstance(event, CallFailed):
                        sink.set_exception(event.error)
                    else:
                        sink.set_result(tuple.__new__(Message, (event.body, event.buffers)))  # as in `heads`
                case CallReceived():
                    self.last_used = self.protocol.now
                    if not self._handlers.received(event):
                        self._schedule_flush()
                    if self._timer is None or event.deadline < self._timer_at:
                        self._arm_timer()
                case PartWanted():
                    self._handlers.part_wanted(event.stream)
                case CallCancelled():
                    self._handlers.cancel(event.stream)
                case BulkWanted():
                    self._bulk_task = self._loop.create_task(self._run_open_bulk())
                case PeerClosed():
                    self.abort(f"the peer closed it: {event.reason}")

    def _wake(self) -> None:
        self._look()
        self._schedule_flush()
        self._arm_timer()

    def room_changed(self, room: Reservation) -> None:
        if room is self._unsent:
            self._drop_unread()
        elif self._lost_reason is None:
            self.protocol.room_changed(room, self._loop.time())
            self._wake()

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        protocol = self.protocol
        try:
            for lane, channel in enumerate(self._channels):
                if channel is None:
                    continue
                room, queue = FLUSH_BYTES, protocol.lanes[lane]
                while not channel.paused and (queue.small or queue.large or (protocol.pong_due and lane == MAIN)):
                    if room <= 0:
                        self._schedule_flush()
                        break
                    pieces = protocol.data_to_send(lane, 1)
                    room -= sum(map(len, pieces))
                    channel.write(pieces)
        except ProtocolError as error:
            self.abort(describe(error))
        self._look()
        if self._handlers.flushed():
            self._schedule_flush()
        if self._lost_reason is None and (protocol.unsent_bytes > UNCOUNTED_UNSENT or self._unsent is not None):
            if self._unsent is not None:
                self._unsent.release()
                self._unsent = None
            if protocol.unsent_bytes > UNCOUNTED_UNSENT:
                self._unsent = self._budgets.replies.keep(self._owner, protocol.unsent_bytes)
                if self._unsent is None or protocol.unsent_bytes > self._bounds.max_unsent:
                    self._drop_unread()
            self._look()  # others may have lost their room to it

    def _drop_unread(self) -> None:
        why = "the peer does not read its replies"
        self._tell_dropped("peer_does_not_read", why)
        self.abort(why)

    async def _run_open_bulk(self) -> None:
        try:
            await self._open_bulk(self)
        except Exception as error:  # whatever it is, the main channel carries the calls
            logger.info("no bulk channel to %s: %s", self.peer_id.short, describe(error))
            self.protocol.bulk_failed(self._loop.time())

    def _arm_timer(self) -> None:
        if self._lost_reason is not None:
            return
        due = self.protocol.timer_at()
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_at(due, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        now = self._loop.time()
        try:
            self.protocol.handle_timer(now, late=now - self._timer_at)
        except ConnectionLost as error:
            self._tell_dropped("silent", error.reason)
            self.abort(error.reason)
            return
        for lane, channel in enumerate(self._channels):
            if channel is None:
                continue
            drained = channel.bytes_sent - channel.pipe.unsent
            if drained != self._drained[lane] or not channel.paused:
                self._drained[lane], self._drained_at[lane] = drained, now
            elif now - self._drained_at[lane] > UNREAD_TIMEOUT:
                self._drop_unread()
        self._wake()

    def _tell_dropped(self, reason: str, why: str) -> None:
        self._metrics.count("endpoint_connections_dropped", reason=reason)
        logger.warning("connection to %s dropped: %s", self.protocol.peer, why)

    def abort(self, reason: str, error: Exception | None = None) -> None:
        """End the connection now: calls made here fail with ConnectionLost, handlers are cancelled. Idempotent."""
        if self._lost_reason is not None:
            return
        self._lost_reason, self.is_open = reason, False
        self._release()
        for channel in self._channels:
            if channel is not None:
                channel.abort(error)

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.protocol.connection_lost(self._lost_reason or "")
        if self._unsent is not None:
            self._unsent.release()
        self._look()

    def _channel_lost(self, lane: int, error: Exception | None) -> None:
        self.count_bytes()
        self._channels[lane] = None
        if isinstance(error, ProtocolError):
            self._tell_dropped(type(error).__name__, str(error))
        self.abort("it was closed" if error is None else describe(error))
        self._schedule_flush()
        if not any(self._channels) and not self.closed.done():
            self.closed.set_result(None)
            self._on_closed(self)

    async def aclose(self, reason: str = "farewell") -> None:
        """Say farewell, fail what is under way, and wait until tasks and channels are gone."""
        if self._lost_reason is None:
            self.protocol.farewell(reason)
            self._flush()
            self._lost_reason, self.is_open = reason, False
            self._release()
            for channel in self._channels:
                if channel is not None:
                    channel.close()
        tasks = {*self._handlers.tasks, *([] if self._bulk_task is None else [self._bulk_task])}
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.wait([self.closed], timeout=1.0)
        for channel in self._channels:
            if channel is not None:
                channel.abort()
        await self.closed


class _LanePort:
    """One channel's receiver: bytes to the lane's reader, everything else to the connection."""

    def __init__(self, connection: Connection, lane: int, channel: Channel, reader: FrameReader) -> None:
        self._connection = connection
        self._channel = channel
        self._lane = lane
        self._reader = reader
        self._protocol = connection.protocol
        self._time = connection._loop.time
        self._turn_bytes = 0
        self._paused = False
        self.get_buffer = reader.get_buffer

    def channel_opened(self, peer_id: PeerID | None) -> None:
        raise AssertionError("the handshake is over")

    def buffer_updated(self, count: int) -> None:
        now = self._time()
        self._protocol.now = now
        self._protocol.life.received(count, now, self._lane)
        self._reader.buffer_updated(count)
        connection = self._connection
        connection._look()
        if not connection._flush_scheduled and self._protocol.has_data():
            connection._schedule_flush()
        if self._lane == BULK:
            if not self._turn_bytes:
                connection._loop.call_soon(self._next_turn)
            self._turn_bytes += count + 1
            if not self._paused and self._turn_bytes > self._protocol.budgets.pace.portion(now):
                # uvloop would go on for as long as the socket has any, and small calls would wait
                self._paused = True
                self._channel.pause_reading()

    def _next_turn(self) -> None:
        self._turn_bytes = 0
        if self._paused:
            self._paused = False
            self._channel.resume_reading()

    def channel_drained(self) -> None:
        self._connection._schedule_flush()

    def channel_lost(self, error: Exception | None) -> None:
        self._connection._channel_lost(self._lane, error)
