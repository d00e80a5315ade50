"""Large messages, both ways: how they are announced, on which lane they travel, what room they take. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tesseract_async.endpoint.budget import Budget, Owner, Reservation
from tesseract_async.endpoint.events import BulkWanted, Event
from tesseract_async.endpoint.lanes import BULK, MAIN, Lane, Sending
from tesseract_async.endpoint.liveness import Liveness
from tesseract_async.endpoint.windows import Windows
from tesseract_async.errors import MessageTooLarge, ProtocolError
from tesseract_async.wire import frames

MAX_OVERTAKING: Final = 64 * 2**20
"""Bytes of other messages that may pass a half-received one."""
PROGRESS_BYTES: Final = 4096
"""What must come of a half-received message until it counts as moving: a byte now and then holds nothing open."""
BUFFER_BYTES: Final = 256
"""What a large message costs for each buffer after its first: a thousand empty ones take 270 KB."""
GRACE: Final = 60.0
LEAST_RATE: Final = 4096
"""A message may take `GRACE` seconds, and one more for each `LEAST_RATE` of its bytes."""


class CallState:
    """The large messages of one call, one each way at a time. Most calls have none: defaults are the class's."""

    grant_kind = 0
    """Of the frame that lets the peer send."""
    lane = MAIN
    """Where its request, or its reply if received here, travels."""
    on_bulk = False
    """Whether request or reply travel on the bulk lane."""
    sending: Sending | None = None
    announced: Announced | None = None
    """What a BEGIN told, until there is room for it."""
    room: Reservation | None = None
    """What it counts, from its BEGIN on."""
    arrival: Arrival | None = None
    window_bytes = 0
    """Bytes of the flow-control window that it uses."""

    def __init__(self, stream: int) -> None:
        self.stream = stream

    @property
    def given_up(self) -> bool:
        """Whether its room was taken back, of which its holder is yet to hear."""
        return self.room is not None and self.room.released


class Announced:
    """The sizes of a large message, and why its sender may send it."""

    __slots__ = ("head_bytes", "sizes", "size", "room", "more", "lane")

    def __init__(self, payload: memoryview, flags: int, lane: int, *, max_message: int) -> None:
        """Reads a BEGIN frame. Raises: ProtocolError."""
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

    __slots__ = ("assembly", "size", "lane", "progress", "begun", "granted_at", "_left", "_passed")

    def __init__(self, assembly: frames.Assembly, lane: Lane, now: float, *, granted: bool) -> None:
        self.assembly = assembly
        self.size = assembly.left
        self.lane = lane
        self.progress = now
        self.begun = now
        self.granted_at = now if granted else None
        """When its GRANT was sent, until something came or it is known to have arrived."""
        self._left = assembly.left
        self._passed = lane.bytes_received

    def look(self, now: float) -> None:
        """Notes whether enough came since the last look."""
        came = self._left - self.assembly.left
        if came:
            self.granted_at = None
        if came >= PROGRESS_BYTES:
            self._left = self.assembly.left
            self._passed = self.lane.bytes_received
            self.progress = now

    @property
    def overtaken(self) -> int:
        """Bytes that its lane brought since then."""
        return self.lane.bytes_received - self._passed


class Transfers:
    """The large messages of one connection. Their calls are looked up in `outgoing` and `incoming`."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        windows: Windows,
        life: Liveness,
        *,
        budget: Budget,
        owner: Owner,
        events: list[Event],
        outgoing: Mapping[int, CallState],
        incoming: Mapping[int, CallState],
        dialled: bool,
        bulk_retry: float,
    ) -> None:
        self._lanes = lanes
        self._windows = windows
        self._life = life
        self._budget = budget
        self._owner = owner
        self._events = events
        self._calls: dict[int, Mapping[int, CallState]] = {
            frames.CHUNK_REPLY: outgoing,
            frames.CHUNK_REQUEST: incoming,
        }
        self._dialled = dialled
        self._bulk_retry = bulk_retry
        self._bulk_wanted = False
        self._bulk_retry_at = 0.0

    # ---- out

    def choose_lane(self, call: CallState, now: float) -> int:
        """The lane on which all of a large message, or of a reply in parts, travels from now on."""
        if not self._lanes[BULK].open:
            self.want_bulk(now)
            return MAIN
        self.note_lane(call, BULK, now)
        return BULK

    def note_lane(self, call: CallState, lane: int, now: float) -> None:
        """Frames of this call travel on `lane`: as long as they may, the bulk lane has to live."""
        if lane == BULK and not call.on_bulk:
            call.on_bulk = True
            self._life.bulk_used(now)

    def begin(
        self,
        kind: int,
        call: CallState,
        head: bytes,
        buffers: Sequence[memoryview],
        *,
        priority: int,
        reserved: int = 0,
        flags: int = 0,
    ) -> None:
        """Announces a large message on the call's lane. `kind` is that of its chunks. `reserved`: bytes for which its
        receiver has room."""
        sending = call.sending = Sending(kind, call.stream, head, buffers, priority)
        lane = self._lanes[call.lane]
        if sending.size <= reserved:
            room = frames.ROOM_RESERVED
        elif self._windows.try_use(sending.size):
            room = frames.ROOM_WINDOW
        else:
            room = frames.ROOM_ASKED
        begin = frames.BEGIN_REQUEST if kind == frames.CHUNK_REQUEST else frames.BEGIN_REPLY
        table = frames.encode_table(len(head), [len(buffer) for buffer in buffers])
        lane.put(frames.frame(begin, stream=call.stream, flags=room | flags, payload=table))
        if room != frames.ROOM_ASKED:
            sending.granted = True
            lane.large.append(sending)

    def granted(self, call: CallState) -> None:
        """The peer has room for a message that asked. Raises: ProtocolError if none did."""
        sending = call.sending
        if sending is None or sending.granted:
            raise ProtocolError("a grant that nobody asked for")
        sending.granted = True
        self._lanes[call.lane].large.append(sending)

    # ---- in

    def reserve(self, call: CallState, announced: Announced, now: float) -> None:
        """Makes room for a message that was announced, now or when its sender's earlier ones leave some.

        Raises: ValueError if there can never be room for it.
        """
        cost = announced.size + BUFFER_BYTES * max(0, len(announced.sizes) - 1)
        call.announced = announced
        if announced.room == frames.ROOM_ASKED:
            self._windows.open()
            call.room = self._budget.ask(self._owner, cost, call)
        else:
            call.room = self._budget.begin(self._owner, cost, call)
        if call.room.granted:
            self.receive(call, now)

    def receive(self, call: CallState, now: float) -> None:
        """Takes memory for a message whose room was granted, and tells its sender if that has asked.

        Without memory the room is given up, as if it were wanted for others.
        """
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
        call.arrival = Arrival(assembly, self._lanes[announced.lane], now, granted=asked)
        if asked:
            self._lanes[MAIN].put(frames.frame(call.grant_kind, stream=call.stream))

    def chunk_started(self, lane: int, kind: int, stream: int, length: int) -> frames.Assembly | None:
        """Where a chunk goes, or None to skip it. Raises: ProtocolError."""
        call = self._calls[kind].get(stream)
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

    def chunk_finished(self, kind: int, stream: int, length: int, now: float) -> CallState | None:
        """Counts a chunk that came; the call if its message is whole now."""
        if self._windows.measure(length, now, self._life.rtt):
            self._life.send_ping(now)
        call = self._calls[kind].get(stream)
        if call is None or call.arrival is None or call.room is None or call.room.released:
            return None
        call.arrival.look(now)
        return None if call.arrival.assembly.left else call

    def give_window_back(self, call: CallState) -> None:
        """The peer may use the window's bytes again that this call's message took."""
        if call.window_bytes:
            self._windows.give_back(call.window_bytes)
            call.window_bytes = 0

    def end(self, call: CallState) -> None:
        """The call has ended: nothing more of it is sent or received, and its room is given back."""
        if call.on_bulk:
            self._life.num_on_bulk -= 1
        if call.sending is not None:
            self._lanes[call.lane].drop(call.sending)
        if call.arrival is not None:
            call.arrival.lane.reader.forget(call.arrival.assembly)
        if call.room is not None:
            call.room.release()
        self.give_window_back(call)

    def find_stalled(self, now: float, *, stall_after: float) -> list[CallState]:
        """Calls to whose messages nothing came for `stall_after` seconds although it was their turn, or which take far
        too long.

        On a slow way a GRANT may be under way for long, and time counts from its arrival only: while one may still be,
        the peer is pinged. Messages take turns on a lane, so on a slow one a message may rest for long while others
        move: it has stalled when all on its lane rest, or after `MAX_OVERTAKING` bytes.
        """
        arrivals = [
            (call, call.arrival)
            for calls in self._calls.values()
            for call in calls.values()
            if call.arrival is not None
        ]
        moved: dict[int, float] = {}
        for _, arrival in arrivals:
            arrival.look(now)
            if arrival.granted_at is not None:
                arrival.progress = arrival.begun = now
                if self._life.confirmed > arrival.granted_at:
                    arrival.granted_at = None
                else:
                    self._life.send_ping(now)
            index = arrival.lane.index
            moved[index] = max(moved.get(index, arrival.progress), arrival.progress)
        return [
            call
            for call, arrival in arrivals
            if now - arrival.begun > GRACE + arrival.size / LEAST_RATE
            or (
                now - arrival.progress > stall_after
                and (now - moved[arrival.lane.index] > stall_after or arrival.overtaken > MAX_OVERTAKING)
            )
        ]

    # ---- the bulk lane

    def bulk_opened(self) -> None:
        """The bulk lane's channel is there; later large messages travel on it."""
        self._lanes[BULK].open = True

    def bulk_failed(self, now: float) -> None:
        """The bulk lane could not be opened: large messages stay on the main lane, in chunks between small frames."""
        self._bulk_wanted = False
        self._bulk_retry_at = now + self._bulk_retry

    def bulk_asked(self, now: float) -> None:
        """The accepting side has a large message. Raises: ProtocolError if that is us."""
        if not self._dialled:
            raise ProtocolError("only the accepting side asks for a bulk lane")
        self.want_bulk(now)

    def want_bulk(self, now: float) -> None:
        """Has the dialler open the bulk lane, unless it is open or being opened."""
        if self._lanes[BULK].open or self._bulk_wanted or now < self._bulk_retry_at:
            return
        self._bulk_wanted = True
        if self._dialled:
            self._events.append(BulkWanted())
        else:
            self._lanes[MAIN].put(frames.frame(frames.BULK))
