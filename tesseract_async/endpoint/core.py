"""State that both halves of a connection (outgoing and incoming calls) share, and their large messages. No I/O."""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.budget import NodeBudgets, Owner, Reservation
from tesseract_async.endpoint.events import BulkWanted, ConnectionEvent
from tesseract_async.endpoint.lanes import BULK, MAIN, Lane, Sending
from tesseract_async.endpoint.liveness import Liveness
from tesseract_async.endpoint.windows import Windows
from tesseract_async.errors import MessageTooLarge, ProtocolError
from tesseract_async.transport.token_bucket import TokenBucket
from tesseract_async.wire import frames
from tesseract_async.wire.heads import Hello

PROGRESS_BYTES: Final = 4096
"""Bytes that must come of a half-received message for it to count as moving: a byte now and then does not keep it
open."""
MAX_OVERTAKING: Final = 64 * 2**20
"""Bytes of other messages that may pass a half-received one."""
BUFFER_BYTES: Final = 256
"""Cost of each buffer of a message after its first: a thousand empty ones take 270 KB."""
GRACE: Final = 60.0
LEAST_RATE: Final = 4096
"""A message may take `GRACE` seconds, and one second more for each `LEAST_RATE` of its bytes."""
MAX_IDLE_FRAMES: Final = 10_000
"""Frames that do nothing (pings, cancels of ended calls) which the peer may send in a burst."""
IDLE_FRAMES_PER_SECOND: Final = 5_000.0
"""The frames of that kind that the peer may send each second after that."""


class CallState:
    """The large messages of one call, one each way at a time. Most calls have none: defaults are the class's."""

    stream: int
    grant_kind = 0
    """Kind of the frame that lets the peer send."""
    lane = MAIN
    """The lane of its request, or of its reply if it was received here."""
    on_bulk = False
    """True if request or reply travel on the bulk lane."""
    sending: Sending | None = None
    announced: "Announced | None" = None
    """A message that waits for room."""
    room: Reservation | None = None
    """Room of the message that comes in, from its BEGIN on."""
    arrival: "Arrival | None" = None
    window_bytes = 0
    """Bytes of the flow-control window that it uses."""


class Announced:
    """The sizes of a large message, and why its sender may send it."""

    __slots__ = ("head_bytes", "sizes", "size", "room", "more", "lane")

    def __init__(self, payload: memoryview, flags: int, lane: int, *, max_message: int) -> None:
        """Read a BEGIN frame. Raises: ProtocolError."""
        self.head_bytes, self.sizes, read = frames.decode_table(payload)
        self.size = frames.message_bytes(self.head_bytes, self.sizes)
        """Encoded bytes."""
        if read != len(payload) or self.size <= frames.MAX_SMALL:
            raise ProtocolError("malformed BEGIN")
        if self.size > max_message:
            raise MessageTooLarge(self.size, max_message)
        self.more = bool(flags & frames.MORE)
        self.room = flags & ~frames.MORE
        self.lane = lane


class Arrival:
    """A large message on its way in, and when the last of it came. Bytes of an unfinished chunk count, too."""

    __slots__ = ("assembly", "size", "lane", "progress", "begun", "granted_at", "left", "passed")

    def __init__(self, assembly: frames.Assembly, lane: Lane, now: float, *, granted: bool) -> None:
        self.assembly = assembly
        self.size = self.left = assembly.left
        self.lane = lane
        self.progress = now
        self.begun = now
        self.granted_at = now if granted else None
        """Time at which its GRANT was sent, until something came or the GRANT is known to have arrived."""
        self.passed = lane.bytes_received
        """Bytes that its lane had brought at `progress`, when `left` were to come."""

    def look(self, now: float) -> None:
        came = self.left - self.assembly.left
        if came:
            self.granted_at = None
        if came >= PROGRESS_BYTES:
            self.left = self.assembly.left
            self.passed = self.lane.bytes_received
            self.progress = now


class ConnectionCore(ABC):
    """Lanes, flow control, time, events and large messages of one connection. `peer` is the other end's name in errors;
    `dialed`: whether this end opens the bulk lane."""

    def __init__(
        self,
        peer: str,
        theirs: Hello,
        *,
        dialed: bool,
        bounds: Bounds,
        budgets: NodeBudgets,
        owner: Owner,
        now: float,
    ) -> None:
        self.peer = peer
        self.theirs = theirs
        self.bounds = bounds
        self.budgets = budgets
        self.owner = owner
        self.now = now
        self.handlers: dict[int, frames.FrameHandler] = {frames.BULK: self._bulk_asked}
        """Handlers by the kind of a frame that is no chunk; the parts that use the core add theirs."""
        main, bulk = (
            Lane(
                index,
                self.handlers,
                pace=budgets.pace,
                chunk_started=self._chunk_started,
                chunk_finished=self._chunk_finished,
            )
            for index in (MAIN, BULK)
        )
        self.lanes = (main, bulk)
        self.life = Liveness(peer, self.lanes, bounds=bounds, now=now)
        self.windows = Windows(budgets.messages, owner, bounds.window_bytes, put=main.put, now=now)
        self.deadlines: list[tuple[float, int, bool]] = []
        """Deadlines of calls, a heap: time, stream, whether the call is our own. Some may have ended."""
        self.events: list[ConnectionEvent] = []
        self.arena = frames.Arena()
        self.calls: dict[int, Mapping[int, CallState]] = {}
        """The outgoing and the incoming calls, by the kind of chunk that brings their messages here."""
        self._dialed = dialed
        self._bulk_wanted = False
        self._bulk_retry_at = 0.0
        self._idle_frames = TokenBucket(IDLE_FRAMES_PER_SECOND, burst=MAX_IDLE_FRAMES, now=now)

    def count_idle(self) -> None:
        """Count a frame that does nothing: a few are normal. Raises: ProtocolError for a flood."""
        if not self._idle_frames.spend(1, self.now):
            raise ProtocolError("the peer sends a flood of frames that do nothing")

    def add_deadline(self, deadline: float, stream: int, *, own: bool) -> None:
        heap = self.deadlines
        heapq.heappush(heap, (deadline, stream, own))
        if len(heap) > 64 and len(heap) > 4 * sum(map(len, self.calls.values())):  # most calls end long before
            outgoing, incoming = self.calls.values()
            heap[:] = [entry for entry in heap if entry[1] in (outgoing if entry[2] else incoming)]
            heapq.heapify(heap)

    def choose_lane(self, call: CallState) -> None:
        """Choose the lane on which all of a large message, or all parts of a reply, travel."""
        if self.lanes[BULK].open:
            call.lane = BULK
            self.note_bulk(call)
        else:
            call.lane = MAIN
            self.want_bulk()

    def note_bulk(self, call: CallState) -> None:
        """Note that frames of this call travel on the bulk lane, which must live for as long as they may."""
        if not call.on_bulk:
            call.on_bulk = True
            self.life.bulk_used(self.now)

    def begin(
        self,
        kind: int,
        call: CallState,
        head: bytes,
        buffers: Sequence[memoryview],
        sizes: Sequence[int],
        *,
        priority: int,
        reserved: int = 0,
        flags: int = 0,
    ) -> None:
        """Announce a large message on the call's lane. `kind` is that of its chunks. `reserved`: bytes for which its
        receiver has room."""
        sending = call.sending = Sending(kind, call.stream, head, buffers, sizes, priority)
        lane = self.lanes[call.lane]
        if sending.size <= reserved:
            room = frames.ROOM_RESERVED
        elif self.windows.try_use(sending.size):
            room = frames.ROOM_WINDOW
        else:
            room = frames.ROOM_ASKED
        begin = frames.BEGIN_REQUEST if kind == frames.CHUNK_REQUEST else frames.BEGIN_REPLY
        table = frames.encode_table(len(head), sizes)
        lane.put(frames.frame(begin, stream=call.stream, flags=room | flags, payload=table))
        if room != frames.ROOM_ASKED:
            sending.granted = True
            lane.large.append(sending)

    def granted(self, call: CallState) -> None:
        """Send a message for which the peer now has room. Raises: ProtocolError if no message had asked."""
        sending = call.sending
        if sending is None or sending.granted:
            raise ProtocolError("a grant that was not asked for")
        sending.granted = True
        self.lanes[call.lane].large.append(sending)

    def reserve(self, call: CallState, announced: Announced) -> None:
        """Make room for a message that was announced, now or when its sender's earlier ones leave some.

        Raises: ValueError if there can never be room for it.
        """
        cost = announced.size + BUFFER_BYTES * max(0, len(announced.sizes) - 1)
        call.announced = announced
        if announced.room == frames.ROOM_ASKED:
            self.windows.open()
            call.room = self.budgets.messages.ask(self.owner, cost, call)
        else:
            call.room = self.budgets.messages.begin(self.owner, cost, call)
        if call.room.granted:
            self.receive(call)

    def receive(self, call: CallState) -> None:
        """Take memory for a message whose room was granted, and tell its sender if that has asked."""
        announced, call.announced = call.announced, None
        room = call.room
        assert room is not None and announced is not None
        if not room.fill(0):
            return
        try:
            assembly = frames.Assembly(announced.head_bytes, announced.sizes)
        except MemoryError:
            room.give_up()
            return
        asked = announced.room == frames.ROOM_ASKED
        call.arrival = Arrival(assembly, self.lanes[announced.lane], self.now, granted=asked)
        if asked:
            self.lanes[MAIN].put(frames.frame(call.grant_kind, stream=call.stream))

    def _chunk_started(self, lane: int, kind: int, stream: int, length: int) -> frames.Assembly | None:
        """Return the message that a chunk belongs to, or None to skip it. Raises: ProtocolError."""
        call = self.calls[kind].get(stream)
        if call is None or call.arrival is None or call.room is None:
            return None  # cancelled or expired meanwhile
        if call.arrival.lane.index != lane:  # two readers in one message would write over its end
            raise ProtocolError("a message changes its lane")
        assembly = call.arrival.assembly
        if length > assembly.left:
            raise ProtocolError("a message has more bytes than it announced")
        if length < frames.MIN_CHUNK and length != assembly.left:
            raise ProtocolError(f"a chunk of less than {frames.MIN_CHUNK} bytes is not its message's last")
        return assembly if call.room.fill(call.arrival.size - assembly.left + length) else None

    @abstractmethod
    def _chunk_finished(self, kind: int, stream: int, length: int) -> None:
        """Note that a chunk of this many bytes has come."""

    def whole_after(self, kind: int, stream: int, length: int) -> CallState | None:
        """Take note of a chunk that came; return the call whose message it has made whole, if it has."""
        if self.windows.measure(length, self.now, self.life.rtt):
            self.life.send_ping(self.now)
        call = self.calls[kind].get(stream)
        if call is None or call.arrival is None or call.room is None or call.room.released:
            return None
        call.arrival.look(self.now)
        return None if call.arrival.assembly.left else call

    def give_window_back(self, call: CallState) -> None:
        if call.window_bytes:
            self.windows.give_back(call.window_bytes)
            call.window_bytes = 0

    def end(self, call: CallState) -> None:
        """End a call: nothing more of it is sent or received, and its room is given back."""
        if call.on_bulk:
            self.life.num_on_bulk -= 1
        if call.sending is not None:
            self.lanes[call.lane].drop(call.sending)
        if call.arrival is not None:
            call.arrival.lane.reader.forget(call.arrival.assembly)
            call.arrival = None
        if call.room is not None:
            call.room.release()
            call.room = None  # it refers to the call: a cycle would keep the message's memory until it is collected
        if call.window_bytes:
            self.give_window_back(call)

    def find_stalled(self) -> list[CallState]:
        """Return the calls whose messages received nothing for long although it was their turn, or take far too long.

        On a slow path a GRANT may be under way for long, and time counts from its arrival only: while one may still be,
        the peer is pinged. Messages take turns on a lane, so on a slow one a message may rest for long while others
        move: it has stalled when all on its lane rest, or after `MAX_OVERTAKING` bytes.
        """
        now, stall_after = self.now, self.bounds.stall_after
        arrivals = [
            (call, call.arrival) for calls in self.calls.values() for call in calls.values() if call.arrival is not None
        ]
        moved = [0.0, 0.0]
        for _, arrival in arrivals:
            arrival.look(now)
            if arrival.granted_at is not None:
                arrival.progress = arrival.begun = now
                if self.life.confirmed > arrival.granted_at:
                    arrival.granted_at = None
                else:
                    self.life.send_ping(now)
            index = arrival.lane.index
            moved[index] = max(moved[index], arrival.progress)
        return [
            call
            for call, arrival in arrivals
            if now - arrival.begun > GRACE + arrival.size / LEAST_RATE
            or (
                now - arrival.progress > stall_after
                and (
                    now - moved[arrival.lane.index] > stall_after
                    or arrival.lane.bytes_received - arrival.passed > MAX_OVERTAKING
                )
            )
        ]

    def bulk_failed(self, now: float) -> None:
        """The bulk lane could not be opened: large messages stay on the main lane, in chunks between small frames."""
        self._bulk_wanted = False
        self._bulk_retry_at = now + self.bounds.bulk_retry

    def _bulk_asked(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        """A BULK frame: the accepting side has a large message. Raises: ProtocolError if that is us."""
        self.count_idle()
        if not self._dialed:
            raise ProtocolError("only the accepting side asks for a bulk lane")
        self.want_bulk()

    def want_bulk(self) -> None:
        if self.lanes[BULK].open or self._bulk_wanted or self.now < self._bulk_retry_at:
            return
        self._bulk_wanted = True
        if self._dialed:
            self.events.append(BulkWanted())
        else:
            self.lanes[MAIN].put(frames.frame(frames.BULK))
