"""Many calls over one connection, as a pure machine: bytes and the time go in; bytes, events and a wake-up come out.

A connection has a *main* lane and, from the first large message on, a *bulk* lane: two channels to the same peer, so
that large messages never stand in a small one's way. Everything about one message travels on one lane, in order.

Cycle of the driver: let the lane's `reader` receive, call `received`, take `events`, send `data_to_send` of each lane,
arm a timer for `timer_at`. Untrusted bytes raise only `ProtocolError`, from the readers; the driver closes then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from tesseract_async.endpoint.budget import Budget, FairCount, Owner
from tesseract_async.endpoint.events import (
    CallCancelled,
    CallFailed,
    CallReceived,
    Event,
    PeerClosed,
    ReplyReceived,
    RequestUnseen,
)
from tesseract_async.endpoint.lanes import BULK, MAIN, Lane, Pace, Sending
from tesseract_async.endpoint.liveness import Liveness
from tesseract_async.endpoint.quotas import Meter
from tesseract_async.endpoint.replies import Replies
from tesseract_async.endpoint.settings import ProtocolSettings
from tesseract_async.endpoint.small_calls import SmallCalls
from tesseract_async.endpoint.transfers import Transfers
from tesseract_async.endpoint.under_way import BUFFER_BYTES, Deadlines, Incoming, Outgoing, find_stalled
from tesseract_async.endpoint.windows import Windows
from tesseract_async.errors import ConnectionLost, MessageTooLarge, Overloaded, ProtocolError, RemoteError
from tesseract_async.wire import calls, frames
from tesseract_async.wire.calls import Hello, RequestHead


class ConnectionProtocol:
    """See the module. `wake` is called when something is to be sent or told although nobody called in; `meter` counts
    the peer's calls against its quota; `refusal` says why it may call nothing here, if so; `pace` is shared by the
    connections of a node, as are `budget`, for large messages that come in, `reply_budget`, for large replies that wait
    to be taken, and `small_budget`, for small calls under way: in all of them, the connection's part is `owner`'s.
    """

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
        meter: Meter | None = None,
        refusal: Callable[[], RemoteError | None] | None = None,
        pace: Pace | None = None,
        reply_budget: Budget | None = None,
        small_budget: FairCount | None = None,
        owner: Owner | None = None,
    ) -> None:
        self.peer = peer
        """How errors name the other end."""
        self.settings = settings
        self._theirs = hello
        self._budget = budget
        self._owner = owner = owner if owner is not None else Owner(self, self)
        self._wake = wake
        self.pace = pace if pace is not None else Pace()
        self._meter = meter
        self._refusal = refusal
        self._replies = Replies(reply_budget, owner, max_bytes=settings.max_replies)
        self._small_calls = SmallCalls(small_budget, owner)
        self._now = now
        self._pong_due = False
        self._arena = frames.Arena()
        self._events: list[Event] = []
        self._next_stream = 1
        self._outgoing: dict[int, Outgoing] = {}
        self._waiting: deque[int] = deque()  # own calls that wait for the peer's limits
        self._num_sent = 0
        self._small_out = 0
        self._incoming: dict[int, Incoming] = {}
        self._small_in = 0
        self._deadlines = Deadlines(self._outgoing, self._incoming)
        self._last_seen = 0  # the highest number of a call that the peer made
        self._peer_saw: int | None = None  # the same of our calls, once the peer has closed
        self._idle_frames = 0.0
        self._idle_frames_at = now
        handlers: dict[int, Callable[[int, int, int, memoryview], None]] = {
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
        self.lanes = tuple(
            Lane(index, handlers=handlers, chunk_started=self._chunk_started, chunk_finished=self._chunk_finished)
            for index in (MAIN, BULK)
        )
        self.windows = Windows(budget, owner, settings.standing_bytes, put=self.lanes[MAIN].put, now=now)
        self.transfers = Transfers(
            self.lanes,
            self.windows,
            dialled=dialled,
            max_message=settings.max_message,
            bulk_retry=settings.bulk_retry,
            tell=lambda event: self._events.append(event),
        )
        self.life = Liveness(peer, self.lanes, settings=settings, now=now)
        self.life.send_ping(now)

    # ---- calls of our own

    @property
    def was_called(self) -> bool:
        """Whether the peer has made a call."""
        return self._last_seen > 0

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
        sizes = [*map(len, buffers)]
        size = frames.message_bytes(len(encoded), sizes)
        if size > self._theirs.max_message:
            raise MessageTooLarge(size, self._theirs.max_message)
        if reserve_reply and head.max_reply > self._budget.total:
            raise MessageTooLarge(head.max_reply, self._budget.total)
        stream = self._next_stream
        self._next_stream += 1
        call = self._outgoing[stream] = Outgoing(head, buffers, sizes, deadline)
        self._deadlines.push(deadline, stream, own=True, num_calls=self.num_calls)
        if reserve_reply and head.max_reply > frames.MAX_SMALL:
            call.room = head.max_reply
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

    def _send_waiting(self) -> None:
        while self._waiting:
            stream = self._waiting[0]
            call = self._outgoing.get(stream)
            if call is not None and not self._send_request(stream, call, b""):
                return
            self._waiting.popleft()

    def _send_request(self, stream: int, call: Outgoing, encoded: bytes) -> bool:
        """Sends the request unless the peer's limits forbid it now."""
        if not encoded:
            head = call.head
            encoded = calls.encode_request(
                RequestHead(
                    head.method,
                    max(0.0, call.deadline - self._now),
                    head.priority,
                    call.room,
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
            self.pace.small_at = self._now
            call.small = size
            self._small_out += size
            self.lanes[MAIN].put(frames.encode_small(frames.REQUEST, stream, encoded, call.sizes, call.buffers))
            call.buffers = ()  # copied: no memory of the caller's is in use any more
        else:
            call.sending = Sending(frames.CHUNK_REQUEST, stream, encoded, call.buffers, call.head.priority)
            call.lane = self.transfers.begin(
                frames.BEGIN_REQUEST, call.sending, encoded, call.buffers, room=0, now=self._now
            )
            self._note_bulk(call, call.lane)
        call.sent = True
        self._num_sent += 1
        return True

    def _end_call(self, stream: int, call: Outgoing) -> None:
        del self._outgoing[stream]
        self._small_out -= call.small
        if call.sent:
            self._num_sent -= 1
        if call.on_bulk:
            self.life.num_on_bulk -= 1
        if call.sending is not None:
            self.lanes[call.lane].drop(call.sending)
        if call.arrival is not None:
            call.arrival.give_up()
        if call.held is not None:
            call.held.release()
        if call.standing:
            self.windows.give_back(call.standing)
        if self._waiting:
            self._send_waiting()

    def in_flight(self, stream: int) -> bool:
        """Whether bytes of this own call's buffers may have been given to a transport."""
        call = self._outgoing.get(stream)
        return call is not None and call.sending is not None and call.sending.begun

    # ---- large messages, sending

    def _note_bulk(self, call: Outgoing | Incoming, lane: int) -> None:
        if lane == BULK and not call.on_bulk:
            call.on_bulk = True
            self.life.bulk_used(self._now)

    def data_to_send(self, lane: int, room: int) -> list[bytes | memoryview]:
        """What to write to the lane's channel now, in order: small frames, then chunks of about `room` bytes.

        The memoryviews are on loan until the channel has drained.
        """
        if self._pong_due and lane == MAIN:
            self._pong_due = False
            self.life.send_pong(self._now)
        portion = self.pace.portion(self._now)
        return self.lanes[lane].data_to_send(room, self._now, portion=portion, sent=self._message_sent)

    def _message_sent(self, sending: Sending) -> None:
        if sending.kind == frames.CHUNK_REPLY:
            self._end_incoming(sending.stream)

    def has_data(self, lane: int) -> bool:
        """Whether `data_to_send` would give anything."""
        return self.lanes[lane].has_data or (self._pong_due and lane == MAIN)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of small frames that wait to be sent."""
        main, bulk = self.lanes
        return main.small_bytes + bulk.small_bytes

    @property
    def backlog(self) -> int:
        """Bytes of small frames and of large replies that wait to be sent."""
        return self.unsent_bytes + self._replies.num_bytes

    # ---- calls of the peer

    def reply(self, stream: int, body: Any, buffers: tuple[memoryview, ...], *, now: float) -> None:
        """Answers a received call; nothing happens if nobody waits any more. The buffers are on loan until sent.

        Raises: TypeError or ValueError for a body that msgpack cannot hold: answer with `fail` then.
        """
        self._now = now
        call = self._incoming.get(stream)
        if call is None or not call.delivered or call.sending is not None:
            return
        encoded = calls.encode_result(body)
        if len(buffers) > frames.MAX_BUFFERS:
            raise ValueError(f"a message has at most {frames.MAX_BUFFERS} buffers; got {len(buffers)}")
        sizes = [*map(len, buffers)]
        size = frames.message_bytes(len(encoded), sizes)
        limit = min(call.max_reply, self._theirs.max_message)
        if size > limit:
            self.fail(stream, RemoteError(f"the reply has {size} bytes, more than the {limit} that its caller accepts"))
            return
        if call.metered and self._meter is not None:
            self._meter.charge(size, now)
        if size <= frames.MAX_SMALL:
            self.lanes[MAIN].put(frames.encode_small(frames.REPLY, stream, encoded, sizes, buffers))
            self._end_incoming(stream)
        elif not self._replies.hold(call, size, now=now, give_up=lambda: self._not_taken(stream)):
            self.fail(stream, Overloaded("too many replies wait here for those who asked", retry_after=1.0))
        else:
            call.sending = Sending(frames.CHUNK_REPLY, stream, encoded, buffers, call.priority)
            room = call.reply_room
            call.lane = self.transfers.begin(
                frames.BEGIN_REPLY, call.sending, encoded, buffers, room=room, now=self._now
            )
            self._note_bulk(call, call.lane)

    def _not_taken(self, stream: int) -> None:
        """The memory of a large reply is wanted back."""
        self.fail(stream, Overloaded("the reply was not taken in time", retry_after=1.0))
        self._wake()

    def fail(self, stream: int, error: RemoteError) -> None:
        """Answers a received call with an error."""
        if stream in self._incoming:
            self.lanes[MAIN].put(frames.encode_small(frames.REPLY, stream, calls.encode_error(error), (), ()))
            self._end_incoming(stream)

    def _end_incoming(self, stream: int) -> None:
        call = self._incoming.pop(stream)
        self._small_in -= call.small
        if call.metered and self._meter is not None:
            self._meter.end()
        if call.on_bulk:
            self.life.num_on_bulk -= 1
        if call.sending is not None:
            self.lanes[call.lane].drop(call.sending)
        if call.arrival is not None:
            call.arrival.give_up()
        if call.reply_size:
            self._replies.drop(call)
        self._small_calls.cost -= call.cost
        if call.held is not None:
            call.held.release()
        if call.standing:
            self.windows.give_back(call.standing)

    # ---- frames

    def received(self, count: int, now: float, *, lane: int = MAIN) -> None:
        """Tells that a lane's reader was given `count` bytes; any of them counts as life."""
        self._now = now
        self.life.received(count, now, lane)

    @property
    def has_events(self) -> bool:
        """Whether `events` would give any."""
        return bool(self._events)

    def events(self) -> list[Event]:
        """What happened since the last time."""
        events, self._events = self._events, []
        return events

    def _new_incoming(self, lane: int, stream: int) -> Incoming:
        if stream in self._incoming:
            raise ProtocolError("a request's number is in use")
        # twice: the peer counts a call as ended when it cancels, and its cancel may travel on the other lane
        if len(self._incoming) >= 2 * self.settings.max_calls:
            raise ProtocolError(f"more than {self.settings.max_calls} calls at once")
        if stream > self._last_seen:
            self._last_seen = stream
        call = self._incoming[stream] = Incoming(lane)
        if lane == BULK:
            self._note_bulk(call, lane)
        return call

    def _request(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        call = self._new_incoming(lane, stream)
        call.small = len(payload)
        self.pace.small_at = self._now
        self._small_in += call.small
        if self._small_in > 2 * self.settings.max_small + frames.MAX_SMALL:
            raise ProtocolError(f"more than {self.settings.max_small} bytes of small requests at once")
        head, buffers = frames.decode_small(payload, self._arena)
        if not self._small_calls.began(call, len(payload), buffers):
            self._count_idle()
            self.fail(stream, Overloaded("too many calls are under way here", retry_after=0.5))
        elif self._meter is None or self._within_quota(stream, call, len(payload)):
            self._deliver(stream, call, head, buffers)

    def _within_quota(self, stream: int, call: Incoming, size: int) -> bool:
        """Counts a request; one that is too much is answered at once, before anything is done or received for it."""
        assert self._meter is not None
        wait = self._meter.begin(size, self._now)
        call.metered = wait == 0.0
        if not wait:
            return True
        self._count_idle()
        self.fail(stream, Overloaded("this peer has used up its quota here", retry_after=wait))
        return False

    def _deliver(self, stream: int, call: Incoming, value: Any, buffers: tuple[memoryview, ...]) -> None:
        head = calls.decode_request(value)
        call.delivered = True
        call.priority, call.reply_room, call.max_reply = head.priority, head.reply_room, head.max_reply
        deadline = self._now + head.time_left
        self._deadlines.push(deadline, stream, own=False, num_calls=self.num_calls)
        self._events.append(CallReceived(stream, head, buffers, deadline))

    def _reply(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        call = self._outgoing.get(stream)
        if call is None:
            return  # cancelled or expired meanwhile
        if not call.sent:
            raise ProtocolError("a reply to a request that was never sent")
        head, buffers = frames.decode_small(payload, self._arena)
        self._finish(stream, call, head, buffers)

    def _finish(self, stream: int, call: Outgoing, value: Any, buffers: tuple[memoryview, ...]) -> None:
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
        head_bytes, sizes, size = self.transfers.read_sizes(payload)
        call = self._new_incoming(lane, stream)
        if flags == frames.ROOM_STANDING:
            self.windows.take(size)
            call.standing = size
        error = self._refusal() if self._refusal is not None else None
        if error is not None:  # small ones are refused when they are read: they cost nothing
            self._count_idle()
            self.fail(stream, error)
            return
        if self._meter is not None and not self._within_quota(stream, call, size):
            return  # chunks that are on their way are skipped
        if flags not in (frames.ROOM_STANDING, frames.ROOM_ASKED):
            raise ProtocolError("malformed BEGIN")

        try:
            self._receive(call, stream, lane, (head_bytes, sizes, size), flags, own=False)
        except ValueError:
            self.fail(stream, Overloaded(f"{size} bytes never fit this node's memory bound", retry_after=60.0))
        if stream not in self._incoming:
            self._count_idle()

    def _receive(
        self,
        call: Incoming | Outgoing,
        stream: int,
        lane: int,
        table: tuple[int, tuple[int, ...], int],
        flags: int,
        *,
        own: bool,
    ) -> None:
        """Makes room for a large message that was announced, now or when its sender's earlier ones leave some.

        Raises: ValueError if there can never be room for it.
        """
        calls: Mapping[int, Incoming | Outgoing] = self._outgoing if own else self._incoming
        give_up = self._no_reply_room if own else self._no_room
        head_bytes, sizes, size = table

        def receive() -> None:
            if calls.get(stream) is not call:
                return
            room = call.held
            assert room is not None
            room.give_up = lambda: give_up(stream)
            asked = flags == frames.ROOM_ASKED
            call.arrival = self.transfers.arrival(lane, head_bytes, sizes, room=room, now=self._now, granted=asked)
            if call.arrival is None:
                give_up(stream)
            elif asked:
                kind = frames.GRANT_REPLY if own else frames.GRANT_REQUEST
                self.lanes[MAIN].put(frames.frame(kind, stream=stream))
                self._wake()

        cost = size + BUFFER_BYTES * len(sizes[1:])
        if flags == frames.ROOM_ASKED:
            self.windows.open()
            call.held = self._budget.ask(self._owner, cost, receive)
        else:
            call.held = self._budget.begin(self._owner, cost)
        if call.held.granted:
            receive()

    def _no_room(self, stream: int) -> None:
        """The memory of a half-received request is wanted for others, or there is none."""
        self.fail(stream, Overloaded("there was no room for all of the request", retry_after=1.0))
        self._wake()

    def _begin_reply(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        head_bytes, sizes, size = self.transfers.read_sizes(payload)
        call = self._outgoing.get(stream)
        if flags == frames.ROOM_STANDING:
            self.windows.take(size)
            if call is None:
                self.windows.give_back(size)
        if call is None:
            return  # cancelled or expired meanwhile: its chunks are skipped, or never asked for
        if not call.sent:
            raise ProtocolError("a reply to a request that was never sent")
        self._note_bulk(call, lane)
        if call.held is not None or size > call.head.max_reply:
            raise ProtocolError("a second or too large reply")
        if flags == frames.ROOM_RESERVED and size > call.room:
            raise ProtocolError("a reply is larger than the room reserved for it")
        if flags not in (frames.ROOM_RESERVED, frames.ROOM_STANDING, frames.ROOM_ASKED):
            raise ProtocolError("malformed BEGIN")
        if flags == frames.ROOM_STANDING:
            call.standing = size

        try:
            self._receive(call, stream, lane, (head_bytes, sizes, size), flags, own=True)
        except ValueError:
            self._fail_call(stream, call, MessageTooLarge(size, self._budget.total))

    def _no_reply_room(self, stream: int) -> None:
        call = self._outgoing.get(stream)
        if call is not None:
            sentence = f"the memory for messages is in use: there was no room for the reply of {call.head.method}"
            self._fail_call(stream, call, Overloaded(sentence, retry_after=1.0))
            self._wake()

    def _chunk_started(self, lane: int, kind: int, stream: int, length: int) -> frames.Assembly | None:
        call: Incoming | Outgoing | None
        call = self._incoming.get(stream) if kind == frames.CHUNK_REQUEST else self._outgoing.get(stream)
        if call is None or call.arrival is None:
            return None  # cancelled or expired meanwhile
        if call.arrival.lane.index != lane:  # two readers in one message would write over its end
            raise ProtocolError("a message changes its lane")
        assembly = call.arrival.assembly
        if length > assembly.left:
            raise ProtocolError("a message has more bytes than it announced")
        if length < frames.MIN_CHUNK and length != assembly.left:
            raise ProtocolError(f"a chunk of less than {frames.MIN_CHUNK} bytes is not its message's last")
        if not call.arrival.fill(length):
            self._no_room(stream) if kind == frames.CHUNK_REQUEST else self._no_reply_room(stream)
        return assembly if call.arrival is not None and not call.arrival.room.released else None

    def _chunk_finished(self, kind: int, stream: int, length: int) -> None:
        if self.windows.measure(length, self._now, self.life.rtt):
            self.life.send_ping(self._now)
        if kind == frames.CHUNK_REQUEST:
            incoming = self._incoming.get(stream)
            if incoming is None or incoming.arrival is None:
                return
            incoming.arrival.look(self._now)
            assembly = incoming.arrival.assembly
            if not assembly.left:
                incoming.arrival.room.keep()
                incoming.arrival = None
                self._deliver(stream, incoming, frames.unpack(assembly.head), assembly.buffers)
        else:
            outgoing = self._outgoing.get(stream)
            if outgoing is None or outgoing.arrival is None:
                return
            outgoing.arrival.look(self._now)
            assembly = outgoing.arrival.assembly
            if not assembly.left:
                self._finish(stream, outgoing, frames.unpack(assembly.head), assembly.buffers)

    def _grant_request(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        call = self._outgoing.get(stream)
        if call is not None:
            self.transfers.granted(call.sending, call.lane)
        else:
            self._count_idle()

    def _grant_reply(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        call = self._incoming.get(stream)
        if call is not None:
            self.transfers.granted(call.sending, call.lane)
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

    def _credit(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._count_idle()
        self.windows.credited(stream)

    def _window(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._count_idle()
        self.windows.told(stream)

    def _cancel(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        if stream in self._incoming:
            self._cancel_incoming(stream)
        else:
            self._count_idle()

    def _cancel_incoming(self, stream: int) -> None:
        delivered = self._incoming[stream].delivered
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
        if lane == MAIN:
            self.life.pong_received(stream, self._now, answer=flags != frames.REPORT)
        else:
            self.life.bulk_moved(self._now)

    def _close(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._peer_saw = stream
        self._events.append(PeerClosed(bytes(payload[:500]).decode("utf-8", "replace")))

    def _bulk(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._count_idle()
        self.transfers.bulk_asked(self._now)

    # ---- time and the end

    def timer_at(self) -> float:
        """When `handle_timer` wants to be called."""
        return min(self.life.timer_at(), self._deadlines.first)

    def handle_timer(self, now: float, *, late: float = 0.0) -> None:
        """Ends what is overdue, and pings. `late` tells by how many seconds the driver missed `timer_at`.

        Raises: ConnectionLost for a peer that has been silent for too long.
        """
        self._now = now
        while self._deadlines.first <= now:
            stream, own = self._deadlines.pop()
            if own:
                call = self._outgoing.get(stream)
                if call is not None:
                    sentence = f"{call.head.method} at {self.peer} was not answered in time"
                    self._fail_call(stream, call, TimeoutError(sentence))
            elif stream in self._incoming:
                self._cancel_incoming(stream)
        self._give_up_stalled(now)
        for stream in self._replies.overdue(self._incoming, now):
            self._not_taken(stream)
        self._small_calls.settle()
        if self.life.check(now, late):
            for lane in self.lanes:
                lane.reader.release_scratch()
            self._arena.release()

    def _give_up_stalled(self, now: float) -> None:
        """Takes room back from half-received messages that make no progress."""
        incoming = [(stream, call.arrival) for stream, call in self._incoming.items() if call.arrival is not None]
        outgoing = [(stream, call.arrival) for stream, call in self._outgoing.items() if call.arrival is not None]
        if not incoming and not outgoing:
            return
        arrivals = [arrival for _, arrival in (*incoming, *outgoing)]
        stalled, unconfirmed = find_stalled(
            arrivals, now=now, stall_after=self.settings.stall_after, confirmed=self.life.confirmed
        )
        if unconfirmed:
            self.life.send_ping(now)
        for stream, arrival in incoming:
            if arrival in stalled:
                self.fail(stream, Overloaded("the request stalled on its way", retry_after=1.0))
        for stream, arrival in outgoing:
            if arrival in stalled:
                call = self._outgoing[stream]
                error = ConnectionLost(self.peer, f"the reply of {call.head.method} stalled on its way")
                self._fail_call(stream, call, error)

    def _fail_call(self, stream: int, call: Outgoing, error: Exception) -> None:
        self._events.append(CallFailed(stream, error))
        self.cancel_call(stream)

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
            lane.drop_all()
        self.windows.release()
        self._small_calls.settle()
