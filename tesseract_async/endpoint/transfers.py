"""Large messages on their way: how they are announced, on which lane they travel, when the bulk lane opens. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tesseract_async.endpoint.budget import Reservation
from tesseract_async.endpoint.events import BulkWanted, Event
from tesseract_async.endpoint.lanes import BULK, MAIN, Lane, Sending
from tesseract_async.endpoint.under_way import Arrival
from tesseract_async.endpoint.windows import Windows
from tesseract_async.errors import MessageTooLarge, ProtocolError
from tesseract_async.wire import frames


class Transfers:
    """The large messages of one connection, both ways. `tell` takes events for the driver."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        windows: Windows,
        *,
        dialled: bool,
        max_message: int,
        bulk_retry: float,
        tell: Callable[[Event], None],
    ) -> None:
        self._lanes = lanes
        self._windows = windows
        self._dialled = dialled
        self._max_message = max_message
        self._bulk_retry = bulk_retry
        self._tell = tell
        self._bulk_wanted = False
        self._bulk_retry_at = 0.0

    # ---- out

    def begin(
        self, kind: int, sending: Sending, head: bytes, buffers: Sequence[memoryview], *, room: int, now: float
    ) -> int:
        """Announces a large message; the lane on which all of it travels. `room`: bytes that its receiver reserved."""
        lane = self._lanes[BULK] if self._lanes[BULK].open else self._lanes[MAIN]
        self._want_bulk(now)
        flags = frames.ROOM_ASKED
        if sending.size <= room:
            flags = frames.ROOM_RESERVED
        elif self._windows.try_use(sending.size):
            flags = frames.ROOM_STANDING
        table = frames.encode_table(len(head), [len(buffer) for buffer in buffers])
        lane.put(frames.frame(kind, stream=sending.stream, flags=flags, payload=table))
        if flags != frames.ROOM_ASKED:
            sending.granted = True
            lane.large.append(sending)
        return lane.index

    def granted(self, sending: Sending | None, lane: int) -> None:
        """The peer has room for a message that asked. Raises: ProtocolError if none did."""
        if sending is None or sending.granted:
            raise ProtocolError("a grant that nobody asked for")
        sending.granted = True
        self._lanes[lane].large.append(sending)

    # ---- in

    def read_sizes(self, payload: memoryview) -> tuple[int, tuple[int, ...], int]:
        """What a BEGIN frame announces: bytes of the head, of the buffers, and encoded. Raises: ProtocolError."""
        head_bytes, sizes, read = frames.decode_table(payload)
        size = frames.message_bytes(head_bytes, sizes)
        if read != len(payload) or size <= frames.MAX_SMALL:
            raise ProtocolError("malformed BEGIN")
        if size > self._max_message:
            raise MessageTooLarge(size, self._max_message)
        return head_bytes, sizes, size

    def arrival(
        self, lane: int, head_bytes: int, sizes: Sequence[int], *, room: Reservation, now: float, granted: bool
    ) -> Arrival | None:
        """Memory for a message that may come now; None if the system has no more, or the budget."""
        if not room.fill(0):
            return None
        try:
            assembly = frames.Assembly(head_bytes, sizes)
        except MemoryError:
            return None
        return Arrival(assembly, room, self._lanes[lane], now, granted=granted)

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
        self._want_bulk(now)

    def _want_bulk(self, now: float) -> None:
        if self._lanes[BULK].open or self._bulk_wanted or now < self._bulk_retry_at:
            return
        self._bulk_wanted = True
        if self._dialled:
            self._tell(BulkWanted())
        else:
            self._lanes[MAIN].put(frames.frame(frames.BULK))
