"""A stream of bytes over a channel of messages (WebRTC's), with backpressure. No I/O.

aiortc queues what is sent without bound, and delivers what it receives whether wanted or not. So each side says how
many bytes the other one may still send.
"""

from collections import deque
from typing import Final

from tesseract_async.errors import ProtocolError

MESSAGE_BYTES: Final = 16 * 1024
"""Bytes of one message: aiortc's fastest size, and what every WebRTC implementation takes (RFC 8831, 6.6)."""
INITIAL_CREDIT: Final = 256 * 1024
"""Bytes that may be sent before the peer's first ``w``: part of the protocol."""
MAX_CONTROL: Final = 16
"""Characters of the longest text message."""
WINDOW_BYTES: Final = 2 * 2**20
"""Bytes that the peer may send before they are consumed here; at most this many are held."""
HIGH_WATER: Final = 256 * 1024
"""Bytes written but not sent beyond which the stream is paused."""


class MessageStream:
    """One end. Feed `receive`; send what `messages_to_send` gives; hand on what `read` gives."""

    def __init__(self, *, window_bytes: int = WINDOW_BYTES) -> None:
        """`window_bytes`: at least `INITIAL_CREDIT`."""
        self._window_bytes = window_bytes
        self.unsent = 0
        """Bytes written that `messages_to_send` has not given yet."""
        self.ended = False
        """True once the peer has sent its last byte."""
        self.held = 0
        """Bytes received but not read."""
        self._outgoing: deque[bytes] = deque()
        self._control = [f"w{window_bytes - INITIAL_CREDIT}"]
        self._incoming: deque[memoryview] = deque()
        self._credit = INITIAL_CREDIT
        self._room = window_bytes
        self._consumed = 0
        self._finishing = False
        self._said_all = False

    @property
    def paused(self) -> bool:
        return self.unsent > HIGH_WATER

    def write(self, data: bytes | memoryview) -> None:
        """Queue a copy of `data`. Nothing may follow `finish`."""
        assert not self._finishing
        view = memoryview(data)
        for start in range(0, len(view), MESSAGE_BYTES):
            self._outgoing.append(bytes(view[start : start + MESSAGE_BYTES]))
        self.unsent += len(view)

    def finish(self) -> None:
        self._finishing = True

    def messages_to_send(self, room: int) -> list[bytes | str]:
        """Return messages with about `room` bytes of data, as far as the peer allows, and all control messages."""
        messages: list[bytes | str] = list(self._control)
        self._control.clear()
        while self._outgoing and room > 0 and self._credit >= len(self._outgoing[0]):
            message = self._outgoing.popleft()
            room -= len(message)
            self._credit -= len(message)
            self.unsent -= len(message)
            messages.append(message)
        if self._finishing and not self._outgoing and not self._said_all:
            self._said_all = True
            messages.append("f")
        return messages

    def receive(self, message: bytes | str) -> None:
        """Take one message. Untrusted. Raises: ProtocolError; nothing may follow then."""
        if isinstance(message, str):
            if message == "f":
                self.ended = True
            elif message[:1] == "w" and len(message) <= MAX_CONTROL and message[1:].isascii() and message[1:].isdigit():
                self._credit = min(self._credit + int(message[1:]), 2**40)
            else:
                raise ProtocolError("a malformed control message")
            return
        if self.ended:
            raise ProtocolError("data after the end of the stream")
        if len(message) > self._room:
            raise ProtocolError("the peer sends more than it was allowed")
        if message:
            self._room -= len(message)
            self.held += len(message)
            self._incoming.append(memoryview(message))

    def read_into(self, buffer: memoryview) -> int:
        """Move received bytes into `buffer`; return how many. The peer is allowed more in time."""
        count = 0
        while self._incoming and count < len(buffer):
            view = self._incoming[0]
            part = view[: len(buffer) - count]
            buffer[count : count + len(part)] = part
            count += len(part)
            if len(part) == len(view):
                self._incoming.popleft()
            else:
                self._incoming[0] = view[len(part) :]
        self.held -= count
        self._consumed += count
        if self._consumed >= self._window_bytes // 4:
            self._control.append(f"w{self._consumed}")
            self._room += self._consumed
            self._consumed = 0
        return count
