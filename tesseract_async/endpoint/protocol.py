"""Many calls over one connection, as a pure machine: bytes and the time go in; bytes, events and a wake-up come out.

A connection has a *main* lane and, from the first large message on, a *bulk* lane: two channels to the same peer, so
that large messages never stand in a small one's way. Everything about one message travels on one lane, in order.

Cycle of the driver: let the lane's `reader` receive, call `received`, take `events`, send `data_to_send` of each lane,
arm a timer for `timer_at`. Untrusted bytes raise only `ProtocolError`, from the readers; the driver closes then.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tesseract_async.endpoint.budget import Budget, Reservation
from tesseract_async.errors import ConnectionLost, MessageTooLarge, Overloaded, ProtocolError, RemoteError
from tesseract_async.wire import calls, frames
from tesseract_async.wire.calls import Hello, RequestHead

MAIN: Final = 0
BULK: Final = 1
CHUNK_BYTES: Final = (256 * 1024, 512 * 1024)
"""Payload of one chunk on the main and on the bulk lane: on main, small messages wait for it."""

MAX_JOINED: Final = 256 * 1024
"""Bytes of small frames that are sent at once."""


@dataclass(frozen=True, slots=True)
class ProtocolSettings:
    """Bounds of one connection."""

    max_calls: int = 1024
    """Calls that the peer may have under way at once; it queues more on its own side."""
    max_small: int = 8 * 2**20
    """Bytes of small requests that the peer may have under way at once."""
    max_message: int = 2**30
    """Bytes of the largest message that is accepted."""
    standing_bytes: int = 16 * 2**20
    """Room of the standing window: large messages within it need not ask first."""
    max_backlog: int = 32 * 2**20
    """Bytes of unsent replies beyond which further calls of the peer wait before they are handled."""
    max_unsent: int = 96 * 2**20
    """Bytes of small frames waiting for a peer that does not read, beyond which it is closed."""
    max_idle_frames: int = 10_000
    """Frames that do nothing (pings, cancels of ended calls) which the peer may send in a burst ..."""
    idle_frames_per_second: float = 5_000.0
    """... and how fast it may go on."""
    bulk_retry: float = 30.0
    """Seconds between attempts to open a bulk lane."""
    ping_after: float = 3.0
    """Seconds without a received byte after which the peer is pinged."""
    dead_after: float = 9.0
    """Seconds without a received byte after which it counts as dead."""
    stall_after: float = 15.0
    """Seconds without progress after which the room of a half-received message is taken back, and after which a bulk
    lane that is in use and does not answer a ping counts as dead, and its connection with it."""


class CallReceived(NamedTuple):
    """Answer this call: `ConnectionProtocol.reply` or `fail`, unless `CallCancelled` comes first."""

    stream: int
    head: RequestHead
    buffers: tuple[memoryview, ...]
    deadline: float


class CallCancelled(NamedTuple):
    """Nobody waits for this received call any more (cancelled, or its deadline passed)."""

    stream: int


class ReplyReceived(NamedTuple):
    """An own call ended with a result."""

    stream: int
    body: Any
    buffers: tuple[memoryview, ...]


class CallFailed(NamedTuple):
    """An own call ended with an error: a RemoteError, ProtocolError, TimeoutError or ConnectionLost."""

    stream: int
    error: Exception


class BulkWanted(NamedTuple):
    """One side has a large message: open the bulk lane. Comes to the side that dialled only."""


class RequestUnseen(ConnectionLost):
    """The peer closed without having seen the request: repeating it is safe, whatever it does."""


class PeerClosed(NamedTuple):
    """The peer said farewell and sends nothing more."""

    reason: str


Event = CallReceived | CallCancelled | ReplyReceived | CallFailed | BulkWanted | PeerClosed


class _Sending:
    """A large message on its way out."""

    __slots__ = ("kind", "stream", "size", "left", "priority", "standing", "parts", "granted", "begun")

    def __init__(self, kind: int, stream: int, head: bytes, buffers: Sequence[memoryview], priority: int) -> None:
        self.kind = kind  # CHUNK_REQUEST or CHUNK_REPLY
        self.stream = stream
        self.left = len(head) + sum(map(len, buffers))
        self.size = frames.message_bytes(len(head), [len(buffer) for buffer in buffers])
        self.priority = priority
        self.standing = False
        self.granted = False
        self.begun = False  # whether a byte of a buffer may be on loan to a transport
        self.parts = deque(part for part in (memoryview(head), *buffers) if len(part))


class _Outgoing:
    """An own call under way."""

    __slots__ = (
        *(
            "head",
            "buffers",
            "sizes",
            "on_bulk",
            "deadline",
            "lane",
            "small",
            "room",
            "sending",
            "assembly",
            "reply_held",
            "standing",
        ),
        "sent",
    )

    def __init__(self, head: RequestHead, buffers: tuple[memoryview, ...], sizes: list[int], deadline: float) -> None:
        self.head = head
        self.buffers = buffers
        self.sizes = sizes
        self.deadline = deadline
        self.lane = MAIN
        self.small = 0  # bytes counted against the peer's max_small
        self.room: Reservation | None = None  # reserved before the request went out
        self.sending: _Sending | None = None
        self.assembly: frames.Assembly | None = None
        self.reply_held: Reservation | None = None  # reserved when the reply asked
        self.standing = 0  # bytes of the standing window that the reply uses
        self.on_bulk = False  # whether request or reply travel there
        self.sent = False


class _Incoming:
    """A call that the peer made."""

    __slots__ = ("on_bulk", "lane", "head", "held", "standing", "assembly", "progress", "sending", "size", "small")

    def __init__(self, lane: int) -> None:
        self.lane = lane
        self.on_bulk = False
        self.head: RequestHead | None = None
        self.held: Reservation | None = None
        self.standing = 0
        self.assembly: frames.Assembly | None = None
        self.progress = 0.0
        self.sending: _Sending | None = None
        self.size = 0
        self.small = 0


class Lane:
    """One channel's side of the machine: a reader for what arrives, queues of what leaves."""

    def __init__(self, protocol: ConnectionProtocol, index: int) -> None:
        self.index = index
        self.reader = frames.FrameReader(self)
        self.open = index == MAIN
        self.small: list[bytes] = []
        self.small_bytes = 0
        self.large: deque[_Sending] = deque()
        self.moved = 0.0  # when bytes last came in, or chunks went out
        self.pinged = False
        self._protocol = protocol
        self._handlers = protocol._handlers

    def put(self, data: bytes) -> None:
        self.small.append(data)
        self.small_bytes += len(data)

    def take(self, limit: int) -> bytes:
        """The oldest small frames, together not much more than `limit` bytes."""
        count = size = 0
        while count < len(self.small) and size < limit:
            size += len(self.small[count])
            count += 1
        taken, self.small = self.small[:count], self.small[count:]
        self.small_bytes -= size
        return b"".join(taken)

    def frame_received(self, kind: int, flags: int, stream: int, payload: memoryview) -> None:
        handler = self._handlers.get(kind)
        if handler is None:
            raise ProtocolError("a frame of unknown kind")
        handler(self.index, flags, stream, payload)

    def chunk_started(self, kind: int, stream: int, length: int) -> frames.Assembly | None:
        return self._protocol._chunk_started(self.index, kind, stream, length)

    def chunk_finished(self, kind: int, stream: int, length: int) -> None:
        self._protocol._chunk_finished(kind, stream, length)


class ConnectionProtocol:
    """See the module. `wake` is called when something is to be sent or told although nobody called in."""

    def __init__(
        self,
        peer: str,
        hello: Hello,
        *,
        dialled: bool,
        budget: Budget,
        settings: ProtocolSettings,
        now: float,
        wake: Callable[[], None],
    ) -> None:
        self.peer = peer
        """How errors name the other end."""
        self.settings = settings
        self.rtt: float | None = None
        """Seconds for a ping and its answer, smoothed; None until the first one came."""
        self.bytes_per_second = 0.0
        """Rate at which large messages last arrived, smoothed."""
        self._theirs = hello
        self._dialled = dialled
        self._budget = budget
        self._wake = wake
        self._now = now
        self._heard = now  # on any lane
        self._main_heard = now
        self._pinged = False
        self._pinged_at: float | None = None  # when a ping left whose answer is still to come
        self._pong_due = False
        self._burst_begin = now  # of chunks without a pause, for the rate
        self._burst_last = now
        self._burst_bytes = 0
        self._arena = frames.Arena()
        self._events: list[Event] = []
        self._next_stream = 1
        self._outgoing: dict[int, _Outgoing] = {}
        self._waiting: deque[int] = deque()  # own calls that wait for the peer's limits
        self._num_sent = 0
        self._small_out = 0
        self._incoming: dict[int, _Incoming] = {}
        self._small_in = 0
        self._deadlines: list[tuple[float, int, bool]] = []  # heap: time, stream, whether the call is our own
        self._window_out = 0  # the peer's standing window for us, and what of it is used
        self._standing_out = 0
        self._window_in: Reservation | None = None  # our standing window for the peer
        self._window_extra: list[Reservation] = []
        self._standing_in = 0
        self._bulk_wanted = False
        self._num_on_bulk = 0  # calls that use the bulk lane
        self._bulk_retry_at = 0.0
        self._last_seen = 0  # the highest number of a call that the peer made
        self._peer_saw: int | None = None  # the same of our calls, once the peer has closed
        self._idle_frames = 0.0
        self._idle_frames_at = now
        self._handlers: dict[int, Callable[[int, int, int, memoryview], None]] = {
            frames.REQUEST: self._request,
            frames.REPLY: self._reply,
            frames.BEGIN_REQUEST: self._begin_request,
            frames.BEGIN_REPLY: self._begin_reply,
            frames.GRANT_REQUEST: self._grant_request,
            frames.GRANT_REPLY: self._grant_reply,
            frames.CREDIT: self._credit,
            frames.WINDOW: self._window,
            frames.CANCEL: self._cancel,
            frames.PING: self._ping,
            frames.PONG: self._pong,
            frames.CLOSE: self._close,
            frames.BULK: self._bulk,
        }
        self.lanes = (Lane(self, MAIN), Lane(self, BULK))
        self._send_ping()

    # ---- calls of our own

    @property
    def num_calls(self) -> int:
        """Own and received calls under way: an idle connection has none."""
        return len(self._outgoing) + len(self._incoming)

    def start_call(
        self, head: RequestHead, buffers: tuple[memoryview, ...], *, deadline: float, reserve_reply: bool, now: float
    ) -> int:
        """Sends a request, now or when the peer's limits allow; the number that its events carry.

        Raises: TypeError or ValueError for a body that msgpack cannot hold; MessageTooLarge for more bytes than the
        peer accepts, or for more room than this node could ever reserve.
        """
        self._now = now
        encoded = calls.encode_request(head)
        if len(buffers) > frames.MAX_BUFFERS:
            raise ValueError(f"a message has at most {frames.MAX_BUFFERS} buffers; got {len(buffers)}")
        sizes = [len(buffer) for buffer in buffers]
        size = frames.message_bytes(len(encoded), sizes)
        if size > self._theirs.max_message:
            raise MessageTooLarge(size, self._theirs.max_message)
        if reserve_reply and head.max_reply > self._budget.total:
            raise MessageTooLarge(head.max_reply, self._budget.total)
        stream = self._next_stream
        self._next_stream += 1
        call = self._outgoing[stream] = _Outgoing(head, buffers, sizes, deadline)
        self._push_deadline(deadline, stream, True)
        if reserve_reply and head.max_reply > frames.MAX_SMALL:
            call.room = self._budget.reserve(head.max_reply, self._room_granted)
            encoded = b""
        if self._waiting or not self._send_request(stream, call, encoded):
            self._waiting.append(stream)
        return stream

    def cancel_call(self, stream: int) -> None:
        """Forgets an own call and tells the peer. No event follows. Unknown numbers are ignored."""
        call = self._outgoing.get(stream)
        if call is not None:
            if call.sent:
                self.lanes[call.lane].put(frames.frame(frames.CANCEL, stream=stream))
            self._end_call(stream, call)

    def _room_granted(self) -> None:
        self._send_waiting()
        self._wake()

    def _send_waiting(self) -> None:
        while self._waiting:
            stream = self._waiting[0]
            call = self._outgoing.get(stream)
            if call is not None and not self._send_request(stream, call, b""):
                return
            self._waiting.popleft()

    def _send_request(self, stream: int, call: _Outgoing, encoded: bytes) -> bool:
        """Sends the request unless the peer's limits forbid it now."""
        if call.room is not None and not call.room.held:
            return False
        if not encoded:
            head = call.head
            encoded = calls.encode_request(
                RequestHead(
                    head.call_id,
                    head.method,
                    max(0.0, call.deadline - self._now),
                    head.priority,
                    call.room.size if call.room else 0,
                    head.max_reply,
                    head.body,
                )
            )
        size = frames.message_bytes(len(encoded), call.sizes)
        if self._num_sent >= self._theirs.max_calls:
            return False
        if size <= frames.MAX_SMALL:
            if self._small_out and self._small_out + size > self._theirs.max_small:
                return False
            call.small = size
            self._small_out += size
            self.lanes[MAIN].put(frames.encode_small(frames.REQUEST, stream, encoded, call.sizes, call.buffers))
            call.buffers = ()  # copied: no memory of the caller's is in use any more
        else:
            call.sending = _Sending(frames.CHUNK_REQUEST, stream, encoded, call.buffers, call.head.priority)
            call.lane = self._begin(frames.BEGIN_REQUEST, call.sending, encoded, call.buffers, None)
            self._note_bulk(call, call.lane)
        call.sent = True
        self._num_sent += 1
        return True

    def _end_call(self, stream: int, call: _Outgoing) -> None:
        del self._outgoing[stream]
        self._small_out -= call.small
        self._num_on_bulk -= call.on_bulk
        if call.sent:
            self._num_sent -= 1
        self._drop_sending(call.sending, call.lane)
        for reservation in (call.room, call.reply_held):
            if reservation is not None:
                reservation.release()
        if call.standing:
            self._give_credit(call.standing)
        if self._waiting:
            self._send_waiting()

    def in_flight(self, stream: int) -> bool:
        """Whether bytes of this own call's buffers may have been given to a transport."""
        call = self._outgoing.get(stream)
        return call is not None and call.sending is not None and call.sending.begun

    # ---- large messages, sending

    def _begin(
        self,
        kind: int,
        sending: _Sending,
        head: bytes,
        buffers: Sequence[memoryview],
        room: int | None,
    ) -> int:
        """Announces a large message; the lane on which all of it travels."""
        lane = self.lanes[BULK] if self.lanes[BULK].open else self.lanes[MAIN]
        self._want_bulk()
        flags = frames.ROOM_ASKED
        if room is not None and sending.size <= room:
            flags = frames.ROOM_RESERVED
        elif self._standing_out + sending.size <= self._window_out:
            flags = frames.ROOM_STANDING
            sending.standing = True
            self._standing_out += sending.size
        table = frames.encode_table(len(head), [len(buffer) for buffer in buffers])
        lane.put(frames.frame(kind, stream=sending.stream, flags=flags, payload=table))
        if flags != frames.ROOM_ASKED:
            sending.granted = True
            lane.large.append(sending)
        return lane.index

    def _note_bulk(self, call: _Outgoing | _Incoming, lane: int) -> None:
        if lane == BULK and not call.on_bulk:
            call.on_bulk = True
            if not self._num_on_bulk:
                self.lanes[BULK].moved = self._now
            self._num_on_bulk += 1

    def _drop_sending(self, sending: _Sending | None, lane: int) -> None:
        if sending is not None and sending.left:
            sending.left = 0
            if sending in self.lanes[lane].large:
                self.lanes[lane].large.remove(sending)

    def data_to_send(self, lane: int, room: int) -> list[bytes | memoryview]:
        """What to write to the lane's channel now, in order: small frames, then chunks of about `room` bytes.

        The memoryviews are on loan until the channel has drained.
        """
        if self._pong_due and lane == MAIN:
            self._pong_due = False
            self.lanes[MAIN].put(frames.frame(frames.PONG))
        queues = self.lanes[lane]
        out: list[bytes | memoryview] = []
        if queues.small:
            if queues.small_bytes <= MAX_JOINED:
                out.append(b"".join(queues.small) if len(queues.small) > 1 else queues.small[0])
                queues.small = []
                queues.small_bytes = 0
            else:
                out.append(queues.take(MAX_JOINED))
            room = 0 if queues.small else room
        if queues.large and room > 0:
            queues.moved = self._now
        while queues.large and room > 0:
            sending = queues.large[0]
            if len(queues.large) > 1:
                sending = max(queues.large, key=lambda item: item.priority)
                queues.large.remove(sending)
                queues.large.append(sending)
            length = min(sending.left, CHUNK_BYTES[lane])
            out.append(frames.HEADER.pack(sending.kind, 0, 0, length, sending.stream))
            room -= length
            sending.left -= length
            sending.begun = True
            while length:
                part = sending.parts[0]
                if len(part) <= length:
                    out.append(part)
                    length -= len(part)
                    sending.parts.popleft()
                else:
                    out.append(part[:length])
                    sending.parts[0] = part[length:]
                    length = 0
            if not sending.left:
                queues.large.remove(sending)
                if sending.kind == frames.CHUNK_REPLY:
                    self._end_incoming(sending.stream)
        return out

    def has_data(self, lane: int) -> bool:
        """Whether `data_to_send` would give anything."""
        queues = self.lanes[lane]
        return bool(queues.small or queues.large or (self._pong_due and lane == MAIN))

    @property
    def unsent_bytes(self) -> int:
        """Bytes of small frames that wait to be sent."""
        return sum(lane.small_bytes for lane in self.lanes)

    def bulk_opened(self) -> None:
        """The bulk lane's channel is there; later large messages travel on it."""
        self.lanes[BULK].open = True

    def bulk_failed(self) -> None:
        """The bulk lane could not be opened: large messages stay on the main lane, in chunks between small frames."""
        self._bulk_wanted = False
        self._bulk_retry_at = self._now + self.settings.bulk_retry

    @property
    def backlog(self) -> int:
        """Bytes of small frames and of large replies that wait to be sent."""
        main, bulk = self.lanes
        small = main.small_bytes + bulk.small_bytes
        if not main.large and not bulk.large:
            return small
        return small + sum(sending.left for sending in (*main.large, *bulk.large))

    # ---- calls of the peer

    def reply(self, stream: int, body: Any, buffers: tuple[memoryview, ...], *, now: float) -> None:
        """Answers a received call; nothing happens if nobody waits any more. The buffers are on loan until sent.

        Raises: TypeError or ValueError for a body that msgpack cannot hold: answer with `fail` then.
        """
        self._now = now
        call = self._incoming.get(stream)
        if call is None or call.head is None or call.sending is not None:
            return
        encoded = calls.encode_result(body)
        if len(buffers) > frames.MAX_BUFFERS:
            raise ValueError(f"a message has at most {frames.MAX_BUFFERS} buffers; got {len(buffers)}")
        sizes = [len(buffer) for buffer in buffers]
        size = frames.message_bytes(len(encoded), sizes)
        limit = min(call.head.max_reply, self._theirs.max_message)
        if size > limit:
            self.fail(stream, RemoteError(f"the reply has {size} bytes, more than the {limit} that its caller accepts"))
        elif size <= frames.MAX_SMALL:
            self.lanes[MAIN].put(frames.encode_small(frames.REPLY, stream, encoded, sizes, buffers))
            self._end_incoming(stream)
        else:
            call.sending = _Sending(frames.CHUNK_REPLY, stream, encoded, buffers, call.head.priority)
            room = call.head.reply_room
            call.lane = self._begin(frames.BEGIN_REPLY, call.sending, encoded, buffers, room or None)
            self._note_bulk(call, call.lane)

    def fail(self, stream: int, error: RemoteError) -> None:
        """Answers a received call with an error."""
        if stream in self._incoming:
            self.lanes[MAIN].put(frames.encode_small(frames.REPLY, stream, calls.encode_error(error), (), ()))
            self._end_incoming(stream)

    def _end_incoming(self, stream: int) -> None:
        call = self._incoming.pop(stream)
        self._small_in -= call.small
        self._num_on_bulk -= call.on_bulk
        self._drop_sending(call.sending, call.lane)
        if call.held is not None:
            call.held.release()
        if call.standing:
            self._give_credit(call.standing)

    def _give_credit(self, size: int) -> None:
        self._standing_in -= size
        self.lanes[MAIN].put(frames.frame(frames.CREDIT, stream=size))

    # ---- frames

    def received(self, count: int, now: float, *, lane: int = MAIN) -> None:
        """Tells that a lane's reader was given `count` bytes; any of them counts as life."""
        self._now = self._heard = now
        if lane == MAIN:
            self._main_heard = now
            self._pinged = False
        else:
            self.lanes[BULK].moved = now
            self.lanes[BULK].pinged = False

    @property
    def has_events(self) -> bool:
        """Whether `events` would give any."""
        return bool(self._events)

    def events(self) -> list[Event]:
        """What happened since the last time."""
        events, self._events = self._events, []
        return events

    def _new_incoming(self, lane: int, stream: int) -> _Incoming:
        if stream in self._incoming:
            raise ProtocolError("a request's number is in use")
        # twice: the peer counts a call as ended when it cancels, and its cancel may travel on the other lane
        if len(self._incoming) >= 2 * self.settings.max_calls:
            raise ProtocolError(f"more than {self.settings.max_calls} calls at once")
        self._last_seen = max(self._last_seen, stream)
        call = self._incoming[stream] = _Incoming(lane)
        call.progress = self._now
        self._note_bulk(call, lane)
        return call

    def _request(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        call = self._new_incoming(lane, stream)
        call.small = len(payload)
        self._small_in += call.small
        if self._small_in > 2 * self.settings.max_small + frames.MAX_SMALL:
            raise ProtocolError(f"more than {self.settings.max_small} bytes of small requests at once")
        head, buffers = frames.decode_small(payload, self._arena)
        self._deliver(stream, call, head, buffers)

    def _deliver(self, stream: int, call: _Incoming, value: Any, buffers: tuple[memoryview, ...]) -> None:
        head = call.head = calls.decode_request(value)
        deadline = self._now + head.time_left
        self._push_deadline(deadline, stream, False)
        self._events.append(CallReceived(stream, head, buffers, deadline))

    def _reply(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        call = self._outgoing.get(stream)
        if call is None:
            return  # cancelled or expired meanwhile
        self._check_sent(call)
        head, buffers = frames.decode_small(payload, self._arena)
        self._finish(stream, call, head, buffers)

    def _check_sent(self, call: _Outgoing) -> None:
        if not call.sent:
            raise ProtocolError("a reply to a request that was never sent")

    def _finish(self, stream: int, call: _Outgoing, value: Any, buffers: tuple[memoryview, ...]) -> None:
        body, error = calls.decode_reply(value)
        # an error may come before all of the request has left: `_end_call` drops the rest, nobody waits for it
        if error is not None:
            self._events.append(CallFailed(stream, error))
        elif call.sending is not None and call.sending.left:
            raise ProtocolError("a result of a request that was not sent yet")
        else:
            self._events.append(ReplyReceived(stream, body, buffers))
        self._end_call(stream, call)

    def _begin_request(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        head_bytes, sizes, size = self._sizes(payload)
        call = self._new_incoming(lane, stream)
        if flags == frames.ROOM_STANDING:
            self._take_standing(size)
            call.standing = size
            call.assembly = frames.Assembly(head_bytes, sizes)
        elif flags == frames.ROOM_ASKED:
            self._open_window()

            def granted() -> None:
                if self._incoming.get(stream) is call:
                    call.progress = self._now
                    call.assembly = frames.Assembly(head_bytes, sizes)
                    self.lanes[MAIN].put(frames.frame(frames.GRANT_REQUEST, stream=stream))
                    self._wake()

            try:
                call.held = self._budget.reserve(size, granted)
            except ValueError:
                self.fail(stream, Overloaded(f"{size} bytes never fit this node's memory bound", retry_after=60.0))
                return
            if call.held.held:
                granted()
        else:
            raise ProtocolError("malformed BEGIN")

    def _begin_reply(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        head_bytes, sizes, size = self._sizes(payload)
        call = self._outgoing.get(stream)
        if flags == frames.ROOM_STANDING:
            self._take_standing(size)
            if call is None:
                self._give_credit(size)
        if call is None:
            return  # cancelled or expired meanwhile: its chunks are skipped, or never asked for
        self._check_sent(call)
        self._note_bulk(call, lane)
        if call.assembly is not None or call.reply_held is not None or size > call.head.max_reply:
            raise ProtocolError("a second or too large reply")
        if flags == frames.ROOM_RESERVED:
            if call.room is None or size > call.room.size:
                raise ProtocolError("a reply is larger than the room reserved for it")
            call.assembly = frames.Assembly(head_bytes, sizes)
        elif flags == frames.ROOM_STANDING:
            call.standing = size
            call.assembly = frames.Assembly(head_bytes, sizes)
        elif flags == frames.ROOM_ASKED:
            self._open_window()

            def granted() -> None:
                if self._outgoing.get(stream) is call:
                    call.assembly = frames.Assembly(head_bytes, sizes)
                    self.lanes[MAIN].put(frames.frame(frames.GRANT_REPLY, stream=stream))
                    self._wake()

            try:
                call.reply_held = self._budget.reserve(size, granted)
            except ValueError:
                self._fail_call(stream, call, MessageTooLarge(size, self._budget.total))
                return
            if call.reply_held.held:
                granted()
        else:
            raise ProtocolError("malformed BEGIN")

    def _sizes(self, payload: memoryview) -> tuple[int, tuple[int, ...], int]:
        head_bytes, sizes, read = frames.decode_table(payload)
        size = frames.message_bytes(head_bytes, sizes)
        if read != len(payload) or size <= frames.MAX_SMALL:
            raise ProtocolError("malformed BEGIN")
        if size > self.settings.max_message:
            raise MessageTooLarge(size, self.settings.max_message)
        return head_bytes, sizes, size

    def _open_window(self) -> None:
        if self._window_in is None:
            self._window_in = self._budget.try_reserve(self.settings.standing_bytes)
            if self._window_in is not None:
                self.lanes[MAIN].put(frames.frame(frames.WINDOW, stream=self._window_in.size))

    def _take_standing(self, size: int) -> None:
        self._standing_in += size
        if self._window_in is None or self._standing_in > self._window_in_bytes:
            raise ProtocolError("a message does not fit the standing window")

    def _chunk_started(self, lane: int, kind: int, stream: int, length: int) -> frames.Assembly | None:
        call: _Incoming | _Outgoing | None
        call = self._incoming.get(stream) if kind == frames.CHUNK_REQUEST else self._outgoing.get(stream)
        if call is None or call.assembly is None:
            return None  # cancelled or expired meanwhile
        if length > call.assembly.left:
            raise ProtocolError("a message has more bytes than it announced")
        if length < frames.MIN_CHUNK and length != call.assembly.left:
            raise ProtocolError(f"a chunk of less than {frames.MIN_CHUNK} bytes is not its message's last")
        return call.assembly

    def _measure_rate(self, count: int) -> None:
        """Counts a chunk that arrived, and widens the standing window where rate times delay asks for more."""
        now = self._now
        if now - self._burst_last > 0.1:
            self._burst_begin, self._burst_bytes = now, 0  # the first chunk of a burst only starts the clock
        else:
            self._burst_bytes += count
        self._burst_last = now
        if now - self._burst_begin < 0.1:
            return
        rate = self._burst_bytes / (now - self._burst_begin)
        self._burst_begin, self._burst_bytes = now, 0
        self.bytes_per_second = rate if not self.bytes_per_second else 0.5 * (self.bytes_per_second + rate)
        self._send_ping()
        if self._window_in is None or self.rtt is None:
            return
        # twice: a message's room comes back a round trip after its last byte
        more = int(2 * self.bytes_per_second * self.rtt) - self._window_in_bytes
        if more > self._window_in_bytes // 4:
            extra = self._budget.try_reserve(more)
            if extra is not None:
                self._window_extra.append(extra)
                self.lanes[MAIN].put(frames.frame(frames.WINDOW, stream=self._window_in_bytes))

    @property
    def _window_in_bytes(self) -> int:
        held = 0 if self._window_in is None else self._window_in.size
        return held + sum(extra.size for extra in self._window_extra)

    def _chunk_finished(self, kind: int, stream: int, length: int) -> None:
        self._measure_rate(length)
        if kind == frames.CHUNK_REQUEST:
            incoming = self._incoming.get(stream)
            if incoming is None or incoming.assembly is None:
                return
            incoming.progress = self._now
            assembly = incoming.assembly
            if not assembly.left:
                incoming.assembly = None
                self._deliver(stream, incoming, frames.unpack(assembly.head), assembly.buffers)
        else:
            outgoing = self._outgoing.get(stream)
            if outgoing is None or outgoing.assembly is None:
                return
            assembly = outgoing.assembly
            if not assembly.left:
                self._finish(stream, outgoing, frames.unpack(assembly.head), assembly.buffers)

    def _grant_request(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        call = self._outgoing.get(stream)
        if call is not None:
            self._granted(call.sending, call.lane)
        else:
            self._count_idle()

    def _grant_reply(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        call = self._incoming.get(stream)
        if call is not None:
            self._granted(call.sending, call.lane)
        else:
            self._count_idle()

    def _count_idle(self) -> None:
        """Counts a frame that does nothing: a few are normal, a flood is not."""
        settings = self.settings
        passed = self._now - self._idle_frames_at
        self._idle_frames_at = self._now
        self._idle_frames = max(0.0, self._idle_frames - passed * settings.idle_frames_per_second) + 1
        if self._idle_frames > settings.max_idle_frames:
            raise ProtocolError("the peer sends a flood of frames that do nothing")

    def _granted(self, sending: _Sending | None, lane: int) -> None:
        if sending is None or sending.granted:
            raise ProtocolError("a grant that nobody asked for")
        sending.granted = True
        self.lanes[lane].large.append(sending)

    def _credit(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._count_idle()
        if stream > self._standing_out:
            raise ProtocolError("more credit than was taken")
        self._standing_out -= stream

    def _window(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._count_idle()
        if stream < self._window_out or stream > 2**48:
            raise ProtocolError("a standing window never shrinks")
        self._window_out = stream

    def _cancel(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        if stream in self._incoming:
            self._cancel_incoming(stream)
        else:
            self._count_idle()

    def _cancel_incoming(self, stream: int) -> None:
        delivered = self._incoming[stream].head is not None
        self._end_incoming(stream)
        if delivered:
            self._events.append(CallCancelled(stream))

    def _ping(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._count_idle()
        if lane == MAIN:
            self._pong_due = True  # one for however many
        else:
            self.lanes[lane].put(frames.frame(frames.PONG))

    def _pong(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._count_idle()
        if self._pinged_at is not None and lane == MAIN:
            measured = self._now - self._pinged_at
            self._pinged_at = None
            self.rtt = measured if self.rtt is None else 0.875 * self.rtt + 0.125 * measured  # RFC 6298, 2.3

    def _send_ping(self) -> None:
        if self._pinged_at is None:
            self._pinged_at = self._now
            self.lanes[MAIN].put(frames.frame(frames.PING))

    def _close(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._peer_saw = stream
        self._events.append(PeerClosed(bytes(payload[:500]).decode("utf-8", "replace")))

    def _bulk(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._count_idle()
        if not self._dialled:
            raise ProtocolError("only the accepting side asks for a bulk lane")
        self._want_bulk()

    def _want_bulk(self) -> None:
        if self.lanes[BULK].open or self._bulk_wanted or self._now < self._bulk_retry_at:
            return
        self._bulk_wanted = True
        if self._dialled:
            self._events.append(BulkWanted())
        else:
            self.lanes[MAIN].put(frames.frame(frames.BULK))

    # ---- time and the end

    def timer_at(self) -> float:
        """When `handle_timer` wants to be called."""
        if self._pinged:
            due = min(self._heard + self.settings.dead_after, self._main_heard + self.settings.stall_after)
        else:
            due = self._main_heard + self.settings.ping_after
        if self._deadlines and self._deadlines[0][0] < due:
            due = self._deadlines[0][0]
        if self._num_on_bulk:
            bulk = self.lanes[BULK]
            due = min(due, bulk.moved + self.settings.stall_after * (1.0 if bulk.pinged else 0.5))
        return due

    def handle_timer(self, now: float, *, late: float = 0.0) -> None:
        """Ends what is overdue, and pings. `late` tells by how many seconds the driver missed `timer_at`.

        Raises: ConnectionLost for a peer that has been silent for too long.
        """
        self._now = now
        while self._deadlines and self._deadlines[0][0] <= now:
            _, stream, own = heapq.heappop(self._deadlines)
            if own:
                call = self._outgoing.get(stream)
                if call is not None:
                    sentence = f"{call.head.method} at {self.peer} was not answered in time"
                    self._fail_call(stream, call, TimeoutError(sentence))
            elif stream in self._incoming:
                self._cancel_incoming(stream)
        for stream, incoming in list(self._incoming.items()):
            if incoming.assembly is not None and now - incoming.progress > self.settings.stall_after:
                self.fail(stream, Overloaded("the request stalled on its way", retry_after=1.0))
        if self._num_on_bulk:
            self._check_bulk(now, late)
        self._check_main(now, late)

    def _check_main(self, now: float, late: float) -> None:
        """Pings a silent peer, and judges one that does not answer: sooner where the bulk lane is silent, too."""
        settings = self.settings
        silent, main_silent = now - self._heard, now - self._main_heard
        if self._pinged and (silent >= settings.dead_after or main_silent >= settings.stall_after):
            if late < settings.dead_after / 8:
                raise ConnectionLost(self.peer, f"nothing was heard for {main_silent:.0f} s")
            # our own loop stood still: what the peer sent meanwhile is still in the socket, so read that first
            self._heard = self._main_heard = now - settings.ping_after
        elif main_silent >= settings.ping_after and not self._pinged:
            self._pinged = True
            self._pinged_at = None
            self._send_ping()
            for lane in self.lanes:
                lane.reader.release_scratch()
            self._arena.release()

    def _check_bulk(self, now: float, late: float) -> None:
        """A bulk lane may stand still while main lives: some box on the way has forgotten one of two flows."""
        bulk, limit = self.lanes[BULK], self.settings.stall_after
        quiet = now - bulk.moved
        if quiet >= limit / 2 and not bulk.pinged:
            bulk.pinged = True
            bulk.put(frames.frame(frames.PING))
        elif quiet >= limit and late >= limit / 8:
            bulk.moved = now - limit / 2  # our own loop stood still: read first, then judge
        elif quiet >= limit:
            raise ConnectionLost(self.peer, f"its bulk channel has stood still for {quiet:.0f} s")

    def _fail_call(self, stream: int, call: _Outgoing, error: Exception) -> None:
        self._events.append(CallFailed(stream, error))
        self.cancel_call(stream)

    def _push_deadline(self, deadline: float, stream: int, own: bool) -> None:
        heapq.heappush(self._deadlines, (deadline, stream, own))
        if len(self._deadlines) > 64 and len(self._deadlines) > 4 * self.num_calls:
            # most calls end long before their deadline
            live = [entry for entry in self._deadlines if entry[1] in (self._outgoing if entry[2] else self._incoming)]
            heapq.heapify(live)
            self._deadlines = live

    def farewell(self, reason: str) -> None:
        """Queues the CLOSE frame, after which nothing may be sent."""
        self.lanes[MAIN].put(frames.frame(frames.CLOSE, stream=self._last_seen, payload=reason.encode()[:500]))

    def connection_lost(self, reason: str) -> None:
        """The channels are gone: every own call fails, every received one is cancelled, all room is given back."""
        for stream, call in list(self._outgoing.items()):
            if stream in self._outgoing:
                seen = self._peer_saw is None or stream <= self._peer_saw
                kind = ConnectionLost if seen and call.sent else RequestUnseen
                self._events.append(CallFailed(stream, kind(self.peer, reason)))
                call.sent = False
        self._waiting.clear()
        for stream, call in list(self._outgoing.items()):
            self._num_sent = 0
            self._end_call(stream, call)
        for stream in list(self._incoming):
            self._cancel_incoming(stream)
        for lane in self.lanes:
            lane.small, lane.small_bytes = [], 0
            lane.large.clear()
        for reservation in (self._window_in, *self._window_extra):
            if reservation is not None:
                reservation.release()
        self._window_in = None
        self._window_extra = []
