"""Large messages, both ways: how they are announced, on which lane they travel, what room they take. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tesseract_async.endpoint.core import Announced, Arrival, CallState, ConnectionCore
from tesseract_async.endpoint.events import BulkWanted
from tesseract_async.endpoint.lanes import BULK, MAIN, Sending
from tesseract_async.errors import ProtocolError
from tesseract_async.wire import frames

MAX_OVERTAKING: Final = 64 * 2**20
"""Bytes of other messages that may pass a half-received one."""
BUFFER_BYTES: Final = 256
"""Cost of each buffer of a large message after its first: a thousand empty ones take 270 KB."""
GRACE: Final = 60.0
LEAST_RATE: Final = 4096
"""A message may take `GRACE` seconds, and one more for each `LEAST_RATE` of its bytes."""


class Transfers:
    """The large messages of one connection. `dialled`: whether this end opens the bulk lane."""

    def __init__(self, core: ConnectionCore, *, dialled: bool) -> None:
        self._core = core
        self._calls = {frames.CHUNK_REPLY: core.outgoing, frames.CHUNK_REQUEST: core.incoming}
        self._dialled = dialled
        self._bulk_wanted = False
        self._bulk_retry_at = 0.0

    # ---- out

    def choose_lane(self, call: CallState) -> int:
        """The lane on which all of a large message, or of a reply in parts, travels from now on."""
        if not self._core.lanes[BULK].open:
            self.want_bulk()
            return MAIN
        self.note_lane(call, BULK)
        return BULK

    def note_lane(self, call: CallState, lane: int) -> None:
        """Frames of this call travel on `lane`: as long as they may, the bulk lane has to live."""
        if lane == BULK and not call.on_bulk:
            call.on_bulk = True
            self._core.life.bulk_used(self._core.now)

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
        lane = self._core.lanes[call.lane]
        if sending.size <= reserved:
            room = frames.ROOM_RESERVED
        elif self._core.windows.try_use(sending.size):
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
            raise ProtocolError("a grant that was not asked for")
        sending.granted = True
        self._core.lanes[call.lane].large.append(sending)

    # ---- in

    def reserve(self, call: CallState, announced: Announced) -> None:
        """Makes room for a message that was announced, now or when its sender's earlier ones leave some.

        Raises: ValueError if there can never be room for it.
        """
        cost = announced.size + BUFFER_BYTES * max(0, len(announced.sizes) - 1)
        call.announced = announced
        if announced.room == frames.ROOM_ASKED:
            self._core.windows.open()
            call.room = self._core.budgets.messages.ask(self._core.owner, cost, call)
        else:
            call.room = self._core.budgets.messages.begin(self._core.owner, cost, call)
        if call.room.granted:
            self.receive(call)

    def receive(self, call: CallState) -> None:
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
        call.arrival = Arrival(assembly, self._core.lanes[announced.lane], self._core.now, granted=asked)
        if asked:
            self._core.lanes[MAIN].put(frames.frame(call.grant_kind, stream=call.stream))

    def chunk_started(self, lane: int, kind: int, stream: int, length: int) -> frames.Assembly | None:
        """Return the message that a chunk belongs to, or None to skip it. Raises: ProtocolError."""
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

    def chunk_finished(self, kind: int, stream: int, length: int) -> CallState | None:
        """Counts a chunk that came; the call if its message is whole now."""
        now = self._core.now
        if self._core.windows.measure(length, now, self._core.life.rtt):
            self._core.life.send_ping(now)
        call = self._calls[kind].get(stream)
        if call is None or call.arrival is None or call.room is None or call.room.released:
            return None
        call.arrival.look(now)
        return None if call.arrival.assembly.left else call

    def give_window_back(self, call: CallState) -> None:
        """The peer may use the window's bytes again that this call's message took."""
        if call.window_bytes:
            self._core.windows.give_back(call.window_bytes)
            call.window_bytes = 0

    def end(self, call: CallState) -> None:
        """The call has ended: nothing more of it is sent or received, and its room is given back."""
        if call.on_bulk:
            self._core.life.num_on_bulk -= 1
        if call.sending is not None:
            self._core.lanes[call.lane].drop(call.sending)
        if call.arrival is not None:
            call.arrival.lane.reader.forget(call.arrival.assembly)
            call.arrival = None
        if call.room is not None:
            call.room.release()
            call.room = None  # it refers to the call: a cycle would keep the message's memory until it is collected
        if call.window_bytes:
            self.give_window_back(call)

    def find_stalled(self) -> list[CallState]:
        """Calls to whose messages nothing came for long although it was their turn, or which take far
        too long.

        On a slow way a GRANT may be under way for long, and time counts from its arrival only: while one may still be,
        the peer is pinged. Messages take turns on a lane, so on a slow one a message may rest for long while others
        move: it has stalled when all on its lane rest, or after `MAX_OVERTAKING` bytes.
        """
        now, stall_after = self._core.now, self._core.bounds.stall_after
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
                if self._core.life.confirmed > arrival.granted_at:
                    arrival.granted_at = None
                else:
                    self._core.life.send_ping(now)
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
        self._core.lanes[BULK].open = True

    def bulk_failed(self, now: float) -> None:
        """The bulk lane could not be opened: large messages stay on the main lane, in chunks between small frames."""
        self._bulk_wanted = False
        self._bulk_retry_at = now + self._core.bounds.bulk_retry

    def bulk_asked(self) -> None:
        """The accepting side has a large message. Raises: ProtocolError if that is us."""
        if not self._dialled:
            raise ProtocolError("only the accepting side asks for a bulk lane")
        self.want_bulk()

    def want_bulk(self) -> None:
        """Has the dialler open the bulk lane, unless it is open or being opened."""
        if self._core.lanes[BULK].open or self._bulk_wanted or self._core.now < self._bulk_retry_at:
            return
        self._bulk_wanted = True
        if self._dialled:
            self._core.events.append(BulkWanted())
        else:
            self._core.lanes[MAIN].put(frames.frame(frames.BULK))
