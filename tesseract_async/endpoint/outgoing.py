"""The calls that this end makes on a connection: requests out, replies in. No I/O."""

from collections import deque
from collections.abc import Sequence

from tesseract_async.endpoint.budget import Reservation
from tesseract_async.endpoint.core import BUFFER_BYTES, Announced, CallState, ConnectionCore
from tesseract_async.endpoint.events import CallFailed, PartReceived, ReplyReceived, RequestUnseen
from tesseract_async.endpoint.lanes import BULK, MAIN
from tesseract_async.errors import ConnectionLost, MessageTooLarge, Overloaded, ProtocolError
from tesseract_async.wire import frames, heads, packed
from tesseract_async.wire.heads import RequestHead


class OutgoingCall(CallState):
    grant_kind = frames.GRANT_REPLY
    head: RequestHead
    buffers: tuple[memoryview, ...]
    sizes: list[int]
    deadline: float
    small = 0
    """Bytes counted against the peer's max_small."""
    reserved = 0
    """Bytes that the reply may have without asking."""
    sent = False
    in_parts = False
    """True if the reply may come in parts."""
    more = False
    """True if the large part that is arriving is not the last one."""
    reply_lane = MAIN
    num_parts = 0
    """Parts of the reply that have begun."""
    reply_bytes = 0
    """Bytes of these parts together."""
    untaken: tuple[Reservation, ...] = ()
    """Room of the parts that are here and that the caller has not taken."""


class OutgoingCalls:
    """The calls made here on one connection, by number. Some wait until the peer's limits allow their requests."""

    def __init__(self, core: ConnectionCore) -> None:
        self._core = core
        self._calls: dict[int, OutgoingCall] = {}
        core.calls[frames.CHUNK_REPLY] = self._calls
        self._next_stream = 1
        self._waiting: deque[int] = deque()
        self._num_sent = 0
        self._small_bytes = 0

    def start(
        self,
        head: RequestHead,
        buffers: tuple[memoryview, ...],
        *,
        deadline: float,
        reserve_reply: bool,
        now: float,
        in_parts: bool = False,
    ) -> int:
        """Send a request, now or when the peer's limits allow; the number that its events carry.

        Raises: TypeError or ValueError for a body that msgpack cannot hold; MessageTooLarge for more bytes than the
        peer accepts, or for more room than this node could ever reserve.
        """
        core = self._core
        core.now = now
        encoded = heads.encode_request(head, max(deadline - now, 0.001))
        if len(buffers) > frames.MAX_BUFFERS:
            raise ValueError(f"a message has at most {frames.MAX_BUFFERS} buffers; got {len(buffers)}")
        sizes = [*map(len, buffers)]
        size = frames.message_bytes(len(encoded), sizes)
        if size > core.theirs.max_message:
            raise MessageTooLarge(size, core.theirs.max_message)
        if reserve_reply and head.max_reply > core.budgets.messages.total:
            raise MessageTooLarge(head.max_reply, core.budgets.messages.total)
        stream = self._next_stream
        self._next_stream += 1
        call = self._calls[stream] = OutgoingCall()
        call.stream, call.head, call.deadline = stream, head, deadline
        call.buffers, call.sizes = buffers, sizes
        core.add_deadline(deadline, stream, own=True)
        if in_parts and heads.REPLY_PARTS in core.theirs.features:
            call.in_parts = True
        if reserve_reply and head.max_reply > frames.MAX_SMALL:
            call.reserved = head.max_reply
            encoded = b""
        if self._waiting or not self._send(call, encoded, size):
            self._waiting.append(stream)
        return stream

    def cancel(self, stream: int) -> None:
        """Forget a call and tell the peer. No event follows. Unknown numbers are ignored."""
        call = self._calls.get(stream)
        if call is not None:
            if call.sent:
                self._core.lanes[call.lane].put(frames.frame(frames.CANCEL, stream=stream))
            self._end(call)

    def fail(self, call: OutgoingCall, error: Exception) -> None:
        self._core.events.append(CallFailed(call.stream, error))
        self.cancel(call.stream)

    def expire(self, stream: int) -> None:
        call = self._calls.get(stream)
        if call is not None:
            self.fail(call, TimeoutError(f"{call.head.method} at {self._core.peer} was not answered in time"))

    def stalled(self, call: OutgoingCall) -> None:
        self.fail(call, ConnectionLost(self._core.peer, f"the reply of {call.head.method} stalled on its way"))

    def room_changed(self, call: OutgoingCall, room: Reservation) -> None:
        if self._calls.get(call.stream) is not call:
            return
        if not room.released:
            self._core.receive(call)
        elif room is call.room or room in call.untaken:
            sentence = f"the memory for messages is in use: there was no room for the reply of {call.head.method}"
            self._core.events.append(CallFailed(call.stream, Overloaded(sentence, retry_after=1.0), drops_parts=True))
            self.cancel(call.stream)

    def lost(self, reason: str, *, peer_saw: int | None) -> None:
        """Fail every call, because the connection is gone. `peer_saw`: the highest number that the peer has seen, if
        known."""
        calls = list(self._calls.values())
        self._waiting.clear()
        for call in calls:
            seen = peer_saw is None or call.stream <= peer_saw
            kind = ConnectionLost if seen and call.sent else RequestUnseen
            self._core.events.append(CallFailed(call.stream, kind(self._core.peer, reason)))
            self._end(call)

    def _send(self, call: OutgoingCall, encoded: bytes = b"", size: int = 0) -> bool:
        """Send the request unless the peer's limits forbid it now. `encoded`: its head, if that has not changed."""
        core = self._core
        if not encoded:
            time_left = max(0.0, call.deadline - core.now)
            encoded = heads.encode_request(call.head._replace(reply_room=call.reserved), time_left)
            size = frames.message_bytes(len(encoded), call.sizes)
        if self._num_sent >= core.theirs.max_calls:
            return False
        flags = frames.MORE if call.in_parts else 0
        if size <= frames.MAX_SMALL:
            if self._small_bytes and self._small_bytes + size > core.theirs.max_small:
                return False
            core.budgets.pace.small_at = core.now
            call.small = size
            self._small_bytes += size
            request = frames.encode_small(
                frames.REQUEST, call.stream, encoded, call.sizes, call.buffers, size=size, flags=flags
            )
            core.lanes[MAIN].put(request)
            call.buffers = ()  # copied: no memory of the caller's is in use any more
        else:
            core.choose_lane(call)
            kind, priority = frames.CHUNK_REQUEST, call.head.priority
            core.begin(kind, call, encoded, call.buffers, call.sizes, priority=priority, flags=flags)
        call.sent = True
        self._num_sent += 1
        return True

    def _end(self, call: OutgoingCall) -> None:
        del self._calls[call.stream]
        self._small_bytes -= call.small
        if call.sent:
            self._num_sent -= 1
        self._core.end(call)
        for room in call.untaken:
            room.release()
        call.untaken = ()
        while self._waiting:
            first = self._calls.get(self._waiting[0])
            if first is not None and not self._send(first):
                return
            self._waiting.popleft()

    def request_granted(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        call = self._calls.get(stream)
        if call is not None:
            self._core.granted(call)
        else:
            self._core.count_idle()

    def _expecting(self, stream: int) -> OutgoingCall | None:
        """Return the call that a reply is for; None if it was cancelled or expired meanwhile. Raises: ProtocolError."""
        call = self._calls.get(stream)
        if call is None or (call.room is not None and call.room.released):  # taken back: its end is under way
            return None
        if not call.sent:
            raise ProtocolError("a reply to a request that was never sent")
        return call

    def reply_received(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        """A REPLY frame: a whole reply, or a part of one."""
        more = bool(flags & frames.MORE)
        call = self._expecting(stream)
        if call is None:
            if more:
                self._core.count_idle()
            return
        value, buffers = frames.decode_small(payload, self._core.arena)
        body, error = heads.decode_reply(value)
        if error is None:
            if call.room is not None:
                raise ProtocolError("a second reply within another one")
            if more or call.num_parts:
                self._count_part(call, lane, len(payload), more=more)
            elif len(payload) > call.head.max_reply:
                raise ProtocolError("a reply is larger than its caller accepts")
            if more and not self._keep_room(call, len(payload), buffers):
                return
        self._part_arrived(call, body, error, buffers, more=more)

    def reply_announced(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        core = self._core
        announced = Announced(payload, flags, lane, max_message=core.bounds.max_message)
        call = self._expecting(stream)
        if announced.room == frames.ROOM_WINDOW:
            core.windows.take(announced.size)
        if call is None:  # its chunks are skipped, or never asked for
            if announced.room == frames.ROOM_WINDOW:
                core.windows.give_back(announced.size)
            if announced.more:
                core.count_idle()
            return
        if lane == BULK:
            core.note_bulk(call)
        if announced.room == frames.ROOM_WINDOW:
            call.window_bytes = announced.size
        elif announced.room == frames.ROOM_RESERVED:
            if announced.size > call.reserved:
                raise ProtocolError("a reply is larger than the room reserved for it")
        elif announced.room != frames.ROOM_ASKED:
            raise ProtocolError("malformed BEGIN")
        if call.room is not None:
            raise ProtocolError("a second reply within another one")
        self._count_part(call, lane, announced.size, more=announced.more)
        call.more = announced.more
        try:
            core.reserve(call, announced)
        except ValueError:
            self.fail(call, MessageTooLarge(announced.size, core.budgets.messages.total))

    def _keep_room(self, call: OutgoingCall, size: int, buffers: Sequence[memoryview]) -> bool:
        """Make room for a small part until its caller takes it. False if there is none."""
        budget = self._core.budgets.messages
        cost = size + BUFFER_BYTES * max(0, len(buffers) - 1)
        if size > packed.UNCOUNTED_BYTES:
            cost += packed.BYTES_PER_ITEM * min(size - sum(map(len, buffers)), packed.MAX_ITEMS)
        try:
            call.room = budget.begin(self._core.owner, cost, call)
        except ValueError:
            self.fail(call, MessageTooLarge(cost, budget.total))
            return False
        return call.room.fill(cost)

    def _count_part(self, call: OutgoingCall, lane: int, size: int, *, more: bool) -> None:
        """Count a part of a reply that begins. All parts keep to one lane, and to the bounds on a reply. Raises:
        ProtocolError."""
        if more and not call.in_parts:
            raise ProtocolError("a reply in parts to a caller that takes none")
        if call.num_parts and lane != call.reply_lane:
            raise ProtocolError("a reply changes its lane")
        call.reply_lane = lane
        call.num_parts += 1
        call.reply_bytes += size
        if call.reply_bytes > call.head.max_reply or call.num_parts > frames.MAX_PARTS:
            raise ProtocolError("a reply is larger than its caller accepts")
        if more and len(call.untaken) >= frames.PARTS_AHEAD:
            raise ProtocolError("a part of a reply that was not granted")

    def arrived(self, call: OutgoingCall) -> None:
        assert call.arrival is not None
        assembly, more = call.arrival.assembly, call.more
        body, error = heads.decode_reply(frames.unpack(assembly.head))
        if more:
            call.arrival = None
            self._core.give_window_back(call)
        self._part_arrived(call, body, error, assembly.buffers, more=more)

    def _part_arrived(
        self,
        call: OutgoingCall,
        body: object,
        error: Exception | None,
        buffers: tuple[memoryview, ...],
        *,
        more: bool,
    ) -> None:
        # an error may come before all of the request has left: `_end` drops the rest, its receiver has answered
        if error is not None:
            if more:
                raise ProtocolError("an error ends a reply")
            self._core.events.append(CallFailed(call.stream, error))
        elif call.sending is not None and call.sending.left:
            raise ProtocolError("a result of a request that was not sent yet")
        elif more:
            assert call.room is not None
            call.untaken = (*call.untaken, call.room)
            call.room = None
            self._core.events.append(PartReceived(call.stream, body, buffers))
            return
        else:
            received = tuple.__new__(ReplyReceived, (call.stream, body, buffers))  # as in `heads`
            self._core.events.append(received)
        self._end(call)

    def part_taken(self, stream: int) -> None:
        """The caller has taken the oldest part of a reply: its room is given back, and one more part may come."""
        call = self._calls.get(stream)
        if call is not None and call.untaken:
            call.untaken[0].release()
            call.untaken = call.untaken[1:]
            self._core.lanes[MAIN].put(frames.frame(frames.GRANT_REPLY, stream=stream, flags=frames.MORE))
