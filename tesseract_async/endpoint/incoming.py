"""The calls that a peer makes on a connection: requests in, replies out. No I/O."""

from collections.abc import Callable, Iterable
from typing import Final

from tesseract_async.endpoint.budget import Budget, Owner, Reservation
from tesseract_async.endpoint.core import GRACE, LEAST_RATE, Announced, CallState, ConnectionCore
from tesseract_async.endpoint.events import CallCancelled, CallReceived, PartWanted
from tesseract_async.endpoint.lanes import BULK, MAIN, Sending
from tesseract_async.endpoint.quotas import Quotas
from tesseract_async.errors import Overloaded, ProtocolError, RemoteError
from tesseract_async.identity import PeerID
from tesseract_async.wire import frames, heads, packed

PATIENCE: Final = 30.0
"""Seconds within which a caller must say that it has room, or take a part. Over the same time it is checked that a
caller takes anything at all."""
LEAST_TAKEN: Final = 240 * 1024
"""Bytes of its replies that a connection must take in `PATIENCE` seconds: 64 kbit/s."""
CALL_BYTES: Final = 24 * 1024
"""Cost of a small call apart from its bytes: the block that its buffers are cut from, its task, and the entries that
remember it."""
STEP: Final = 256 * 1024
"""Calls are counted in the node's budget in steps of this many bytes; the first step of each connection is free."""


class ReceivedCall(CallState):
    grant_kind = frames.GRANT_REQUEST
    delivered = False
    """True once the handler has it; its body is the handler's alone."""
    in_parts = False
    """True if the caller takes a reply in parts."""
    priority = 0
    reply_room = 0
    max_reply = 0
    small = 0
    cost = 0
    """Bytes counted for a small request."""
    metered = False
    """True while it counts against the peer's quota."""
    reply_held: Reservation | None = None
    """The memory of a large reply, or of a part of one, that waits to be taken."""
    reply_size = 0
    reply_since = 0.0
    """The time since which that reply waits; `reply_size` is its bytes."""
    more = False
    """True if what is being sent is not the reply's last part."""
    num_parts = 0
    """Parts of the reply that have begun."""
    num_taken = 0
    """Parts that the caller has taken."""
    replied_bytes = 0
    """Bytes of all parts that have begun."""
    waited = 0.0
    """Seconds for which its handler could not send the next one; since `reply_since` not counted."""

    @property
    def takes_part(self) -> bool:
        """True if earlier parts of the reply have left, and the caller has taken enough of them."""
        return self.sending is None and self.num_parts - self.num_taken < frames.PARTS_AHEAD

    def waits_too_long(self, now: float) -> bool:
        """Return whether the caller of a reply in parts takes none, or takes far too long over all of them."""
        wait = 0.0 if self.takes_part else now - self.reply_since
        is_idle = self.sending is None and wait > PATIENCE
        return is_idle or self.waited + wait > GRACE + self.replied_bytes / LEAST_RATE

    def note_wait(self, now: float) -> None:
        if not self.takes_part:
            self.waited += now - self.reply_since
        self.reply_since = now


class IncomingCalls:
    """The peer's calls on one connection, by their number.

    `quotas` counts them against the quota of `peer_id`; `refusal` says why the peer may call nothing here, if so.
    """

    def __init__(
        self,
        core: ConnectionCore,
        *,
        quotas: Quotas | None,
        peer_id: PeerID,
        refusal: Callable[[], RemoteError | None] | None,
    ) -> None:
        self.last_seen = 0
        """The highest number of a call that the peer has made."""
        self.waiting = WaitingReplies(core.budgets.replies, core.owner, max_bytes=core.bounds.max_replies)
        self._core = core
        self._calls: dict[int, ReceivedCall] = {}
        core.calls[frames.CHUNK_REQUEST] = self._calls
        self._quotas = quotas
        self._peer_id = peer_id
        self._refusal = refusal
        self._small_bytes = 0
        self._small_cost = 0  # of the small calls under way: each costs far more than its bytes
        self._counted = STEP  # what of it the node's budget has counted

    def _begin(self, lane: int, flags: int, stream: int) -> ReceivedCall:
        bounds = self._core.bounds
        if stream in self._calls:
            raise ProtocolError("a request's number is in use")
        # twice: the peer counts a call as ended when it cancels, and its cancel may travel on the other lane
        if len(self._calls) >= 2 * bounds.max_calls:
            raise ProtocolError(f"more than {bounds.max_calls} calls at once")
        if stream > self.last_seen:
            self.last_seen = stream
        call = self._calls[stream] = ReceivedCall()
        call.stream = stream
        if flags & frames.MORE:
            call.in_parts = True
        if lane == BULK:
            call.lane = lane
            self._core.note_bulk(call)
        return call

    def request_received(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        core = self._core
        call = self._begin(lane, flags, stream)
        call.small = len(payload)
        core.budgets.pace.small_at = core.now
        self._small_bytes += call.small
        if self._small_bytes > 2 * core.bounds.max_small + frames.MAX_SMALL:
            raise ProtocolError(f"more than {core.bounds.max_small} bytes of small requests at once")
        value, buffers = frames.decode_small(payload, core.arena)
        call.cost = CALL_BYTES + call.small
        if call.small > packed.UNCOUNTED_BYTES:
            call.cost += packed.BYTES_PER_ITEM * min(call.small - sum(map(len, buffers)), packed.MAX_ITEMS)
        self._small_cost += call.cost
        if self._small_cost > self._counted:
            more = -(-(self._small_cost - self._counted) // STEP) * STEP
            if not core.budgets.small_calls.take(core.owner, more):
                core.count_idle()
                self.fail(stream, Overloaded("too many calls are under way here", retry_after=0.5))
                return
            self._counted += more
        if self._within_quota(call, call.small):
            self._deliver(call, value, buffers)

    def _settle(self) -> None:
        less = (self._counted - max(self._small_cost, STEP)) // STEP * STEP
        if less > 0:
            self._counted -= less
            self._core.budgets.small_calls.give_back(self._core.owner, less)

    def request_announced(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        core = self._core
        announced = Announced(payload, flags, lane, max_message=core.bounds.max_message)
        call = self._begin(lane, flags, stream)
        if announced.room == frames.ROOM_WINDOW:
            core.windows.take(announced.size)
            call.window_bytes = announced.size
        error = self._refusal() if self._refusal is not None else None
        if error is not None:  # small ones are refused when they are read: they cost nothing
            core.count_idle()
            self.fail(stream, error)
            return
        if not self._within_quota(call, announced.size):
            return  # chunks that are on their way are skipped
        if announced.room not in (frames.ROOM_WINDOW, frames.ROOM_ASKED):
            raise ProtocolError("malformed BEGIN")
        try:
            self._core.reserve(call, announced)
        except ValueError:
            sentence = f"{announced.size} bytes never fit this node's memory bound"
            self.fail(stream, Overloaded(sentence, retry_after=60.0))
        if call.room is None or call.room.released:
            core.count_idle()

    def _within_quota(self, call: ReceivedCall, size: int) -> bool:
        """Count a request. One that exceeds the quota is refused at once, before anything is done or received for
        it."""
        wait = None if self._quotas is None else self._quotas.begin(self._peer_id, size, self._core.now)
        call.metered = wait == 0.0
        if not wait:
            return True
        self._core.count_idle()
        self.fail(call.stream, Overloaded("this peer has used up its quota here", retry_after=wait))
        return False

    def arrived(self, call: ReceivedCall) -> None:
        assert call.room is not None and call.arrival is not None
        call.room.keep()
        assembly, call.arrival = call.arrival.assembly, None
        self._deliver(call, frames.unpack(assembly.head), assembly.buffers)

    def _deliver(self, call: ReceivedCall, value: object, buffers: tuple[memoryview, ...]) -> None:
        head = heads.decode_request(value)
        call.delivered = True
        call.priority, call.reply_room, call.max_reply = head.priority, head.reply_room, head.max_reply
        deadline = self._core.now + head.time_left
        self._core.add_deadline(deadline, call.stream, own=False)
        received = tuple.__new__(CallReceived, (call.stream, head, buffers, deadline, call.in_parts))  # as in `heads`
        self._core.events.append(received)

    def cancel_received(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        if stream in self._calls:
            self.cancel(stream)
        else:
            self._core.count_idle()

    def cancel(self, stream: int) -> None:
        """End a call for which its caller does not wait any more, if it is still under way."""
        call = self._calls.get(stream)
        if call is not None:
            self._end(call)
            if call.delivered:
                self._core.events.append(CallCancelled(stream))

    def reply(
        self, stream: int, body: object, buffers: tuple[memoryview, ...], *, now: float, more: bool = False
    ) -> bool:
        """Answer a received call, or with `more` send a part of its reply, once `takes_part`. The buffers are on loan
        until sent. False if the call has ended: its caller does not wait any more, or accepts no reply of this size.

        Raises: TypeError or ValueError for a body that msgpack cannot hold: answer with `fail` then.
        """
        core = self._core
        core.now = now
        call = self._calls.get(stream)
        if call is None or not call.delivered or call.sending is not None:
            return False
        encoded = heads.encode_result(body)
        if len(buffers) > frames.MAX_BUFFERS:
            raise ValueError(f"a message has at most {frames.MAX_BUFFERS} buffers; got {len(buffers)}")
        sizes = [*map(len, buffers)]
        size = frames.message_bytes(len(encoded), sizes)
        limit = min(call.max_reply - call.replied_bytes, core.theirs.max_message)
        if size > limit:
            sentence = f"the reply has {size} bytes, more than the {limit} that its caller accepts"
            return self.fail(stream, RemoteError(sentence))
        if call.metered and self._quotas is not None:
            self._quotas.charge(self._peer_id, size, now)
        if more or call.num_parts:
            if call.num_parts + more >= frames.MAX_PARTS:
                return self.fail(stream, RemoteError(f"the reply has more than {frames.MAX_PARTS} parts"))
            if not call.num_parts:
                core.choose_lane(call)  # all parts of a reply keep to one lane
                self.waiting.in_parts[stream] = call
            call.num_parts += 1
            call.replied_bytes += size
            call.reply_since = now
        call.more = more
        flags = frames.MORE if more else 0
        if size <= frames.MAX_SMALL:
            lane = call.lane if call.num_parts else MAIN
            reply = frames.encode_small(frames.REPLY, stream, encoded, sizes, buffers, size=size, flags=flags)
            core.lanes[lane].put(reply)
            if not more:
                self._end(call)
        elif not self.waiting.hold(call, size, now=now):
            return self.fail(stream, Overloaded("too many replies wait here for those who asked", retry_after=1.0))
        else:
            if not call.num_parts:
                core.choose_lane(call)
            room = call.reply_room
            kind = frames.CHUNK_REPLY
            core.begin(kind, call, encoded, buffers, sizes, priority=call.priority, reserved=room, flags=flags)
        return True

    def takes_part(self, stream: int) -> bool:
        """Return whether `reply` may send more for this call: earlier parts have left, and its caller has taken enough
        of them. If not, `PartWanted` follows, unless the call ends."""
        call = self._calls.get(stream)
        return call is None or call.takes_part

    def sent(self, sending: Sending) -> None:
        if sending.kind != frames.CHUNK_REPLY:
            return
        call = self._calls[sending.stream]
        if not call.more:
            self._end(call)
            return
        self.waiting.drop(call)
        call.note_wait(self._core.now)
        call.sending = None
        self._want_part(call)

    def reply_granted(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        """A GRANT_REPLY frame: there is room for a large reply, or one more part may come."""
        call = self._calls.get(stream)
        if call is None:
            self._core.count_idle()
        elif flags & frames.MORE:
            if call.num_taken >= call.num_parts:
                raise ProtocolError("a part was taken that was not sent")
            call.note_wait(self._core.now)
            call.num_taken += 1
            self._want_part(call)
        else:
            self._core.granted(call)

    def _want_part(self, call: ReceivedCall) -> None:
        if call.takes_part:
            self._core.events.append(PartWanted(call.stream))

    def fail(self, stream: int, error: RemoteError) -> bool:
        """Answer a received call with an error. Returns False: the call has ended."""
        call = self._calls.get(stream)
        if call is not None:
            lane = call.lane if call.num_parts else MAIN  # behind the parts
            error_reply = frames.encode_small(frames.REPLY, stream, heads.encode_error(error), (), ())
            self._core.lanes[lane].put(error_reply)
            self._end(call)
        return False

    def stalled(self, call: ReceivedCall) -> None:
        self.fail(call.stream, Overloaded("the request stalled on its way", retry_after=1.0))

    def _not_taken(self, call: ReceivedCall) -> None:
        self.fail(call.stream, Overloaded("the reply was not taken in time", retry_after=1.0))
        if call.num_parts:  # its handler has more of them
            self._core.events.append(CallCancelled(call.stream))

    def room_changed(self, call: ReceivedCall, room: Reservation) -> None:
        """See `RoomHolder`: there is room for the request, or none any more, or the reply's is wanted back."""
        if self._calls.get(call.stream) is not call:
            return
        if not room.released:
            self._core.receive(call)
        elif room is call.room:
            self.fail(call.stream, Overloaded("there was no room for all of the request", retry_after=1.0))
        elif room is call.reply_held:
            self._not_taken(call)

    def handle_timer(self, now: float) -> None:
        for call in self.waiting.overdue(self._calls.values(), now):
            self._not_taken(call)
        self._settle()

    def lost(self) -> None:
        for stream in list(self._calls):
            self.cancel(stream)
        self._settle()

    def _end(self, call: ReceivedCall) -> None:
        del self._calls[call.stream]
        self._small_bytes -= call.small
        self._small_cost -= call.cost
        if call.metered and self._quotas is not None:
            self._quotas.end(self._peer_id)
        self._core.end(call)
        if call.reply_held is not None:
            self.waiting.drop(call)
        if call.num_parts:
            del self.waiting.in_parts[call.stream]


class WaitingReplies:
    """Large replies of one connection that wait for their callers to take them: how many bytes, and for how long."""

    def __init__(self, budget: Budget, owner: Owner, *, max_bytes: int) -> None:
        self.num_bytes = 0
        """Bytes that wait to be granted or sent."""
        self.in_parts: dict[int, ReceivedCall] = {}
        """Calls of whose replies a part has begun."""
        self._budget = budget
        self._owner = owner
        self._max_bytes = max_bytes
        self._added = 0  # bytes of all replies so far
        self._taken = 0  # what of them had left at `_taken_at`
        self._taken_at = 0.0

    def hold(self, call: ReceivedCall, size: int, *, now: float) -> bool:
        """Count a reply of `size` bytes that waits; False if it exceeds the bounds on such memory (one always may)."""
        if self.num_bytes and self.num_bytes + size > self._max_bytes:
            return False
        call.reply_held = self._budget.keep(self._owner, size, call)
        if call.reply_held is None:
            return False
        if not self.num_bytes:
            self._taken, self._taken_at = self._added, now
        self.num_bytes += size
        self._added += size
        call.reply_size, call.reply_since = size, now
        return True

    def drop(self, call: ReceivedCall) -> None:
        """Free the memory of this call's reply, if one waited here: it was taken or given up."""
        if call.reply_held is not None:
            self.num_bytes -= call.reply_size
            call.reply_held.release()
            call.reply_held = None

    def overdue(self, calls: Iterable[ReceivedCall], now: float) -> list[ReceivedCall]:
        overdue = [call for call in self.in_parts.values() if call.waits_too_long(now)]
        if not self.num_bytes:
            return overdue
        waiting = [(call, call.sending) for call in calls if call.reply_held is not None and call.sending]
        taken = self._added - sum(sending.left for _, sending in waiting)
        stands_still = False
        if now - self._taken_at > PATIENCE:
            stands_still = taken - self._taken < LEAST_TAKEN
            self._taken, self._taken_at = taken, now
        overdue += [
            call
            for call, sending in waiting
            if now - call.reply_since > PATIENCE and (stands_still or not sending.granted) and call not in overdue
        ]
        return overdue
