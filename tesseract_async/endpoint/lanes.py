"""One channel's side of a connection: what waits to be sent on it, and the reader of what arrives. No I/O."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tesseract_async.wire import frames

MAIN: Final = 0
BULK: Final = 1
CHUNK_BYTES: Final = (256 * 1024, 1024 * 1024)
"""Payload of one chunk on the main and on the bulk lane, at most: on main, small messages wait for it."""
SMALLEST_CHUNK: Final = 16 * 1024
"""Payload of one chunk on the slowest way."""

MAX_JOINED: Final = 256 * 1024
"""Bytes of small frames that are sent at once."""
SMALL_PORTION: Final = 256 * 1024
"""Portion of large messages that goes at once while there are small calls, which wait for it."""
CALM: Final = 0.2
"""Seconds without a small call after which portions grow."""


@dataclass(slots=True)
class Pace:
    """The portions in which large messages are moved: small while any connection of the node has small calls."""

    small_at: float = float("-inf")
    """Time of the last small request."""

    def portion(self, now: float) -> int:
        return CHUNK_BYTES[BULK] if now - self.small_at > CALM else SMALL_PORTION


class Sending:
    __slots__ = ("kind", "stream", "size", "left", "priority", "parts", "granted")

    def __init__(
        self,
        kind: int,
        stream: int,
        head: bytes,
        buffers: Sequence[memoryview],
        sizes: Sequence[int],
        priority: int,
    ) -> None:
        self.kind = kind  # CHUNK_REQUEST or CHUNK_REPLY
        self.stream = stream
        self.left = len(head) + sum(sizes)
        self.size = frames.message_bytes(len(head), sizes)
        self.priority = priority
        self.granted = False
        self.parts = deque(filter(len, (memoryview(head), *buffers)))

    def next_chunk(self, limit: int, out: list[bytes | memoryview]) -> int:
        """Append a chunk of at most `limit` bytes to `out`, header and pieces; its length."""
        length = count = min(self.left, limit)
        out.append(frames.HEADER.pack(self.kind, 0, 0, length, self.stream))
        self.left -= length
        while count:
            part = self.parts[0]
            if len(part) <= count:
                out.append(part)
                count -= len(part)
                self.parts.popleft()
            else:
                out.append(part[:count])
                self.parts[0] = part[count:]
                count = 0
        return length


class Lane:
    """Queues of what leaves, and a reader for what arrives. `handlers`: by the kind of a frame that is no chunk."""

    def __init__(
        self,
        index: int,
        handlers: Mapping[int, frames.FrameHandler],
        *,
        pace: Pace,
        chunk_started: Callable[[int, int, int, int], frames.Assembly | None],
        chunk_finished: Callable[[int, int, int], None],
    ) -> None:
        self.index = index
        self.handlers = handlers
        self.sent: Callable[[Sending], None]
        """Called for each message that has left whole."""
        self.reader = frames.FrameReader(self)
        self.open = index == MAIN
        self.small: list[bytes] = []
        self.small_bytes = 0
        self.large: deque[Sending] = deque()
        self.moved = 0.0  # when bytes last came in here or at the other end
        self.pinged = False
        self.bytes_received = 0
        self.chunk_finished = chunk_finished
        self._chunk_bytes = CHUNK_BYTES[index]
        self._chunk_at = 0.0
        self._chunks_follow = False
        self._pace = pace
        self._chunk_started = chunk_started

    def put(self, data: bytes) -> None:
        self.small.append(data)
        self.small_bytes += len(data)

    def drop(self, sending: Sending) -> None:
        sending.left = 0
        if sending in self.large:
            self.large.remove(sending)

    def data_to_send(self, room: int, now: float) -> list[bytes | memoryview]:
        """Return small frames first, then chunks of about `room` bytes, in portions of the node's pace."""
        out: list[bytes | memoryview] = []
        if self.small:
            taken, self.small = self.small, []
            if self.small_bytes > MAX_JOINED:
                count = size = 0
                while count < len(taken) and size < MAX_JOINED:
                    size += len(taken[count])
                    count += 1
                taken, self.small = taken[:count], taken[count:]
                self.small_bytes -= size
                room = 0 if self.small else room
            else:
                self.small_bytes = 0
            out.append(b"".join(taken) if len(taken) > 1 else taken[0])
        if self.large and room > 0:
            if self._chunks_follow:  # chunks of about a second: on a slow path, what is urgent stands behind them
                if now - self._chunk_at > 1.0:
                    self._chunk_bytes = max(SMALLEST_CHUNK, self._chunk_bytes // 2)
                elif now - self._chunk_at < 0.25:
                    self._chunk_bytes = min(CHUNK_BYTES[self.index], self._chunk_bytes * 2)
            self._chunk_at = now
            limit = min(self._chunk_bytes, self._pace.portion(now))
            while self.large and room > 0:
                sending = self.large[0]
                if len(self.large) > 1:
                    sending = max(self.large, key=lambda item: item.priority)
                    self.large.remove(sending)
                    self.large.append(sending)
                room -= sending.next_chunk(limit, out)
                if not sending.left:
                    self.large.remove(sending)
                    self.sent(sending)
        self._chunks_follow = bool(self.large)
        return out

    def chunk_started(self, kind: int, stream: int, length: int) -> frames.Assembly | None:
        return self._chunk_started(self.index, kind, stream, length)
