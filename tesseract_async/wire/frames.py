"""Frames: the meaning of the bytes on a channel between two endpoints. `docs/design/wire.md` is the specification.

A frame is 16 bytes of header and a payload. A message (a request or a reply) is a *head* (msgpack) and raw buffers;
it travels in one frame where it fits, else as a ``BEGIN`` frame that tells all sizes, and chunks. `FrameReader` cuts
received bytes into frames; a chunk's payload is received straight into the message's own memory (`Assembly`).

Everything here takes untrusted bytes and raises only `ProtocolError`; sizes are checked before memory is taken.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Final, Protocol

import msgpack
import numpy as np

from tesseract_async.errors import MessageTooLarge, ProtocolError
from tesseract_async.wire import packed
from tesseract_async.wire.packed import Value

VERSION: Final = 2

HEADER = struct.Struct(">BBHIQ")
"""kind, flags, zero, payload bytes, stream (number of the call; its caller counts up from 1)."""

HELLO: Final = 1
REQUEST: Final = 2
REPLY: Final = 3
BEGIN_REQUEST: Final = 4
BEGIN_REPLY: Final = 5
CHUNK_REQUEST: Final = 6
CHUNK_REPLY: Final = 7
GRANT_REQUEST: Final = 8
GRANT_REPLY: Final = 9
CREDIT: Final = 10
WINDOW: Final = 11
CANCEL: Final = 12
PING: Final = 13
PONG: Final = 14
CLOSE: Final = 15
BULK: Final = 16

ROOM_ASKED: Final = 0
"""Flag of a BEGIN frame: the sender waits for a GRANT."""
ROOM_WINDOW: Final = 1
"""Flag of a BEGIN frame: the message fits the flow-control window; CREDIT gives its bytes back."""
ROOM_RESERVED: Final = 2
"""Flag of BEGIN_REPLY: the reply fits the room that its request reserved."""

MORE: Final = 4
"""Flag of REPLY and BEGIN_REPLY: this is a part of a reply, and another one follows. Of REQUEST and BEGIN_REQUEST: the
reply may come in parts. Of GRANT_REPLY: a part was taken, and one more may begin."""
PARTS_AHEAD: Final = 4
"""Parts of a reply that may begin beyond those that its caller has taken. The last one may always follow."""
MAX_PARTS: Final = 1024
"""Parts of one reply, at most."""

REPORT: Final = 1
"""Flag of a PONG that answers no PING: it only tells what arrives."""

SCRATCH_BYTES: Final = 64 * 1024
MAX_SMALL: Final = SCRATCH_BYTES - HEADER.size
"""Payload bytes of any frame that is not a chunk: larger messages travel in chunks."""
MAX_CHUNK: Final = 1024 * 1024
MIN_CHUNK: Final = 4096
"""Payload bytes of every chunk but a message's last."""
MAX_BUFFERS: Final = 1024
MAX_HEAD: Final = 1024 * 1024
"""The most bytes of one message's head, and hence of its body: data belongs in buffers."""
ALIGNMENT: Final = 64
DIRECT_BYTES: Final = 8 * 1024
"""Room from which on a chunk is received straight into its message rather than through the scratch memory."""

_TABLE = struct.Struct(">II")
_SIZES = tuple(struct.Struct(f">{count}Q") for count in range(MAX_BUFFERS + 1))
_SMALL = tuple(struct.Struct(f"{HEADER.format}II{count}Q") for count in range(MAX_BUFFERS + 1))
"""A whole small message before its head: header and table."""

Buffer = bytes | bytearray | memoryview


def frame(kind: int, *, stream: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, flags, 0, len(payload), stream) + payload


byte_view: Final[Callable[[memoryview], memoryview]] = methodcaller("cast", "B")
"""Returns the bytes of a C-contiguous view, without a copy. Raises: TypeError for any other."""


def encode_table(head_bytes: int, sizes: Sequence[int]) -> bytes:
    return _TABLE.pack(head_bytes, len(sizes)) + _SIZES[len(sizes)].pack(*sizes)


def decode_table(payload: memoryview) -> tuple[int, tuple[int, ...], int]:
    """Read what `encode_table` wrote: head bytes, buffer sizes, bytes read. Untrusted. Raises: ProtocolError."""
    if len(payload) < _TABLE.size:
        raise ProtocolError("a message is shorter than its table")
    head_bytes, count = _TABLE.unpack_from(payload)
    if head_bytes > MAX_HEAD:
        raise MessageTooLarge(head_bytes, MAX_HEAD)
    if count > MAX_BUFFERS:
        raise ProtocolError(f"a message has more than {MAX_BUFFERS} buffers")
    end = _TABLE.size + 8 * count
    if len(payload) < end:
        raise ProtocolError("a message is shorter than its table")
    return head_bytes, _SIZES[count].unpack_from(payload, _TABLE.size), end


def encode_small(
    kind: int,
    stream: int,
    head: bytes,
    sizes: Sequence[int],
    buffers: Sequence[memoryview],
    *,
    size: int = 0,
    flags: int = 0,
) -> bytes:
    """A whole message as one frame. `size`: its `message_bytes`, where known; at most `MAX_SMALL`."""
    count, size = len(sizes), size or message_bytes(len(head), sizes)
    return b"".join((_SMALL[count].pack(kind, flags, 0, size, stream, len(head), count, *sizes), head, *buffers))


def message_bytes(head_bytes: int, sizes: Sequence[int]) -> int:
    """Encoded bytes of a message: what a frame carries, and what `MAX_SMALL` and every limit count."""
    return _TABLE.size + 8 * len(sizes) + head_bytes + sum(sizes)


def decode_small(payload: memoryview, arena: "Arena") -> tuple[Value, tuple[memoryview, ...]]:
    """The head's value and the buffers, copied into memory of `arena`. Untrusted. Raises: ProtocolError."""
    head_bytes, sizes, begin = decode_table(payload)
    position = begin + head_bytes
    num_bytes = len(payload) - position
    if sum(sizes) != num_bytes:
        raise ProtocolError("a message's table does not fit its frame")
    head = packed.unpack(payload[begin:position], max_bytes=MAX_HEAD)
    if not sizes:
        return head, ()
    buffers = arena.allocate(sizes, num_bytes)
    for buffer, size in zip(buffers, sizes, strict=True):
        buffer[:] = payload[position : position + size]
        position += size
    return head, buffers


def allocate(sizes: Sequence[int]) -> tuple[memoryview, ...]:
    """Uninitialized writable memory for each size, every part at a 64-byte aligned address, all in one block."""
    total = ALIGNMENT - 1
    for size in sizes:
        total += -(-size // ALIGNMENT) * ALIGNMENT
    block = np.empty(total, np.uint8)
    offset = -block.__array_interface__["data"][0] % ALIGNMENT
    view = memoryview(block)  # type: ignore[arg-type, unused-ignore]
    parts = []
    for size in sizes:
        parts.append(view[offset : offset + size])
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return tuple(parts)


class Arena:
    """Memory for the buffers of small messages, cut from shared blocks: an aligned block of their own costs more than
    such a message's copy. What is kept of a message keeps its block alive, so blocks are small.
    """

    __slots__ = ("_block", "_used")

    BLOCK_BYTES: Final = 24 * 1024
    LARGEST: Final = 8 * 1024
    """Bytes beyond which a message gets a block of its own."""

    def __init__(self) -> None:
        self._block: memoryview | None = None
        self._used = 0

    def allocate(self, sizes: Sequence[int], num_bytes: int) -> tuple[memoryview, ...]:
        """As `allocate`; `num_bytes` is the sum of the sizes."""
        most = num_bytes + ALIGNMENT * len(sizes)
        if most > self.LARGEST:
            return allocate(sizes)
        block, used = self._block, self._used
        if block is None or used + most > self.BLOCK_BYTES:
            (block,) = allocate((self.BLOCK_BYTES,))
            self._block, used = block, 0
        parts = []
        for size in sizes:
            parts.append(block[used : used + size])
            used += -(-size // ALIGNMENT) * ALIGNMENT
        self._used = used
        return tuple(parts)

    def release(self) -> None:
        self._block = None


_packers: list[msgpack.Packer] = []
"""Packers that are not in use: making one takes longer than packing the head of a small message."""


def pack(value: Value) -> bytes:
    """Pack a head. Raises: TypeError or ValueError for what msgpack cannot hold."""
    try:
        packer = _packers.pop()
    except IndexError:
        packer = msgpack.Packer()
    try:
        data: bytes = packer.pack(value)
    except OverflowError as error:
        raise ValueError(f"an integer is too large for msgpack: {error}") from None
    size = len(data)
    if size <= MAX_SMALL:  # one that has packed more keeps the memory for it
        _packers.append(packer)
    if size > MAX_HEAD:
        raise ValueError(f"a body of {size} bytes is too large (at most {MAX_HEAD}): send data as buffers")
    if size > packed.MAX_ITEMS:
        try:
            packed.count_items(data)
        except ProtocolError as error:
            raise ValueError(f"the receiver would refuse this body ({error}): send data as buffers") from None
    return data


def unpack(data: Buffer) -> Value:
    """Read a head. Untrusted. Raises: ProtocolError."""
    return packed.unpack(data, max_bytes=MAX_HEAD)


class Assembly:
    """A large message on its way into the memory in which it will be used."""

    __slots__ = ("head", "buffers", "left", "_parts", "_view")

    def __init__(self, head_bytes: int, sizes: Sequence[int]) -> None:
        self.head = memoryview(bytearray(head_bytes))  # apart: it is dropped long before the buffers
        self.buffers: tuple[memoryview, ...] = allocate(sizes)
        self.left = head_bytes + sum(sizes)
        """Bytes still to come."""
        self._parts = [part for part in reversed((self.head, *self.buffers)) if len(part)]
        self._view = self._parts.pop() if self._parts else memoryview(b"")

    def room(self, limit: int) -> memoryview:
        """The contiguous memory that the next bytes go to, at most `limit` of it."""
        return self._view[:limit]

    def advance(self, count: int) -> None:
        """`count` bytes were written into `room`."""
        self.left -= count
        self._view = self._view[count:]
        if not self._view and self._parts:
            self._view = self._parts.pop()

    def write(self, data: memoryview) -> None:
        while data:
            room = self._view[: len(data)]
            count = len(room)
            room[:] = data[:count]
            self.advance(count)
            data = data[count:]


FrameHandler = Callable[[int, int, int, memoryview], None]
"""Takes a whole frame that is no chunk: its sink's index, flags, stream and payload, which is valid during the call."""


class FrameSink(Protocol):
    """The receiver of a `FrameReader`'s reports. All it calls may raise ProtocolError, which ends the channel."""

    index: int
    handlers: Mapping[int, FrameHandler]
    """The handlers, by a frame's kind."""

    def chunk_started(self, kind: int, stream: int, length: int) -> Assembly | None:
        """Return the message to which the chunk's `length` bytes belong (it has that much left); None skips them."""

    def chunk_finished(self, kind: int, stream: int, length: int) -> None:
        """All `length` bytes of the chunk are where they belong."""


class FrameReader:
    """Cuts a channel's bytes into frames. The caller writes into `get_buffer` and then calls `buffer_updated`.

    Memory: one scratch block of 64 KiB, taken at the first read.
    """

    __slots__ = ("sink", "_scratch", "_start", "_end", "_direct", "_chunk_left", "_chunk", "_assembly", "_more_chunks")

    def __init__(self, sink: FrameSink) -> None:
        self.sink = sink
        """The receiver of frames; may be replaced from within its methods (after a hello)."""
        self._scratch: memoryview | None = None
        self._start = 0
        self._end = 0
        self._direct = False  # whether get_buffer gave the message's memory
        self._chunk_left = 0
        self._chunk = (0, 0, 0)  # kind, stream and length
        self._assembly: Assembly | None = None
        self._more_chunks = False  # the last thing read was a chunk of an unfinished message

    def get_buffer(self) -> memoryview:
        if self._chunk_left and self._assembly is not None and self._start == self._end:
            room = self._assembly.room(self._chunk_left)
            if len(room) >= DIRECT_BYTES:
                self._direct = True
                return room
        self._direct = False
        scratch = self._scratch
        if scratch is None:
            scratch = self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        if self._start:
            kept = self._end - self._start
            if kept < 4096 or self._end > SCRATCH_BYTES // 2:
                scratch[:kept] = scratch[self._start : self._end]
                self._start, self._end = 0, kept
        if self._more_chunks:
            # most likely one header and then a chunk's payload: leave the payload for its own memory
            return scratch[self._end : self._end + 4096]
        return scratch[self._end :]

    def buffer_updated(self, count: int) -> None:
        """Take `count` bytes that were written into what `get_buffer` gave. Raises: ProtocolError; nothing may follow
        then."""
        if self._direct:
            assert self._assembly is not None
            self._assembly.advance(count)
            self._chunk_left -= count
            if not self._chunk_left:
                self._finish_chunk()
            return
        self._end = end = self._end + count
        scratch, position = self._scratch, self._start
        assert scratch is not None
        while True:
            if self._chunk_left:
                count = min(self._chunk_left, end - position)
                if not count:
                    break
                if self._assembly is not None:
                    self._assembly.write(scratch[position : position + count])
                position += count
                self._chunk_left -= count
                if not self._chunk_left:
                    self._finish_chunk()
                continue
            if end - position < 16:
                break
            kind, flags, zero, length, stream = HEADER.unpack_from(scratch, position)
            if zero:
                raise ProtocolError("a frame header's reserved bytes are not zero")
            if kind == CHUNK_REQUEST or kind == CHUNK_REPLY:
                if not 0 < length <= MAX_CHUNK:
                    raise MessageTooLarge(length, MAX_CHUNK)
                self._assembly = self.sink.chunk_started(kind, stream, length)
                self._chunk = (kind, stream, length)
                self._chunk_left = length
                position += 16
                continue
            if length > MAX_SMALL:
                raise MessageTooLarge(length, MAX_SMALL)
            stop = position + 16 + length
            if stop > end:
                break
            self._more_chunks = False
            if (handler := self.sink.handlers.get(kind)) is None:
                raise ProtocolError("a frame of unknown kind")
            handler(self.sink.index, flags, stream, scratch[position + 16 : stop])
            position = stop
        self._start = position

    def release_scratch(self) -> None:
        """Give the scratch memory back while nothing is in it: idle connections are many."""
        if self._start == self._end and not self._direct:
            self._scratch = None
            self._start = self._end = 0

    def forget(self, assembly: Assembly) -> None:
        if self._assembly is assembly:
            self._assembly = None
            self._direct = False

    def _finish_chunk(self) -> None:
        assembly, self._assembly = self._assembly, None
        self._more_chunks = assembly is not None and assembly.left > 0
        if assembly is not None:
            self.sink.chunk_finished(*self._chunk)
