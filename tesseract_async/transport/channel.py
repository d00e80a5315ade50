"""A pipe and, unless the network is trusted, TLS: an ordered byte channel to a known peer."""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, Protocol
from weakref import WeakKeyDictionary

from tesseract_async.errors import HandshakeFailed, ProtocolError
from tesseract_async.identity import PeerID
from tesseract_async.transport.base import Pipe
from tesseract_async.transport.throttle import Throttle
from tesseract_async.transport.tls import TlsMachine

CIPHERTEXT_BYTES: Final = 256 * 1024
FAREWELL_TIMEOUT: Final = 1.0
"""Seconds in which a closed channel may send what is queued."""
SMALL_PIECE: Final = 8 * 1024
"""Neighboring pieces up to this size are joined: a system call costs more than their copy."""

# One block serves all channels of an event loop: ciphertext is consumed within the call that tells of it. The loops of
# other threads (a BackgroundNode next to another node) receive at the same time, and need blocks of their own.
_blocks: WeakKeyDictionary[asyncio.AbstractEventLoop, memoryview] = WeakKeyDictionary()


class ChannelReceiver(Protocol):
    """The receiver of a channel's bytes. `channel_opened` and `buffer_updated` may raise ProtocolError to end it."""

    def channel_opened(self, peer_id: PeerID | None) -> None:
        """The handshake is done, and the peer is this one (None on a plain channel, which proves nothing)."""

    def get_buffer(self) -> memoryview:
        """Writable memory for the next bytes: a memoryview, never empty."""

    def buffer_updated(self, count: int) -> None:
        """`count` bytes were received into it."""

    def channel_drained(self) -> None:
        """After `paused` was true: everything has left."""

    def channel_lost(self, error: Exception | None) -> None:
        """The end, once; `error` says why, None that one side closed it."""


class Channel:
    """See the module. `receiver` may be replaced at any time."""

    def __init__(
        self, pipe: Pipe, tls: TlsMachine | None, receiver: ChannelReceiver, *, throttle: Throttle | None = None
    ) -> None:
        self.pipe = pipe
        self.receiver = receiver
        self.bytes_received = self.bytes_sent = 0
        """Raw bytes so far, as a data quota counts them."""
        self.bytes_counted = (0, 0)
        """The bytes that the metrics know of."""
        self._tls = tls
        self._ciphertext: memoryview | None = None
        self._open = False
        self._closed = False
        self._lost = False
        self._error: Exception | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._throttle = throttle
        self._reading_again: asyncio.TimerHandle | None = None
        self._sending_again: asyncio.TimerHandle | None = None
        self._reading_paused = False

    def start(self) -> None:
        self.pipe.start(self)
        try:
            if self._tls is not None:
                self._handshake()
            else:
                self._open = True
                self.receiver.channel_opened(None)
        except ProtocolError as error:
            self._fail(error)

    @property
    def paused(self) -> bool:
        """Return whether enough is waiting to be sent; `channel_drained` follows."""
        return self.pipe.paused or self._sending_again is not None

    def write(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Send the pieces, in order; ignored after the end. Their memory is free again on return."""
        if self._closed:
            return
        if self._tls is None:
            data = b"".join(pieces)
        else:
            for piece in _joined(pieces) if len(pieces) > 1 else pieces:
                self._tls.write(piece)
            data = self._tls.data_to_send()
        self.bytes_sent += len(data)
        self.pipe.write(data)
        if self._throttle is not None:
            loop = asyncio.get_running_loop()
            wait = self._throttle.sent(len(data), loop.time())
            if wait > 0:
                if self._sending_again is not None:
                    self._sending_again.cancel()
                self._sending_again = loop.call_later(wait, self._send_again)

    def _send_again(self) -> None:
        self._sending_again = None
        self.pipe_drained()

    def pause_reading(self) -> None:
        self._reading_paused = True
        self.pipe.pause_reading()

    def resume_reading(self) -> None:
        self._reading_paused = False
        if self._reading_again is None:
            self.pipe.resume_reading()

    def _read_again(self) -> None:
        self._reading_again = None
        if not self._reading_paused:
            self.pipe.resume_reading()

    def close(self) -> None:
        """Say farewell, send what was written, end. Repeating it does nothing."""
        if not self._closed:
            if self._tls is not None and self._open:
                self._tls.close()
                self._write_ciphertext(self._tls)
            self._closed = True
            self._close_pipe()

    def _close_pipe(self) -> None:
        # sends what is queued, such as a TLS alert or a farewell, unless the peer does not read
        self.pipe.close()
        self._abort_timer = asyncio.get_running_loop().call_later(FAREWELL_TIMEOUT, self.pipe.abort)

    def abort(self, error: Exception | None = None) -> None:
        """End the channel now; the receiver hears `error` soon, not from within this call."""
        if self._error is None:
            self._error = error
        self._closed = True
        self.pipe.abort()

    def get_buffer(self, sizehint: int = -1, /) -> memoryview:
        if self._tls is None:
            return self.receiver.get_buffer()
        if self._ciphertext is None:
            loop = asyncio.get_running_loop()
            block = _blocks.get(loop)
            if block is None:
                block = _blocks[loop] = memoryview(bytearray(CIPHERTEXT_BYTES))
            self._ciphertext = block
        return self._ciphertext

    def buffer_updated(self, count: int) -> None:
        self.bytes_received += count
        if self._closed:
            return
        if self._throttle is not None:
            loop = asyncio.get_running_loop()
            wait = self._throttle.received(count, loop.time())
            if wait > 0 and self._reading_again is None:
                self.pipe.pause_reading()
                self._reading_again = loop.call_later(wait, self._read_again)
        try:
            if self._tls is None:
                self.receiver.buffer_updated(count)
            else:
                assert self._ciphertext is not None
                self._tls.receive_data(self._ciphertext[:count])
                if not self._open:
                    self._handshake()
                while self._open and not self._closed:
                    buffer = self.receiver.get_buffer()
                    if not (count := self._tls.read_into(buffer)):
                        break
                    self.receiver.buffer_updated(count)
                    if count < len(buffer) and not self._tls.ciphertext.pending:
                        break  # what came is read to its end
        except EOFError:
            self.close()
        except ProtocolError as error:
            self._fail(error)

    def _handshake(self) -> None:
        assert self._tls is not None
        try:
            done = self._tls.handshake()
        finally:
            self._write_ciphertext(self._tls)
        if done:
            self._open = True
            self.receiver.channel_opened(self._tls.peer_id)

    def _write_ciphertext(self, tls: TlsMachine) -> None:
        if data := tls.data_to_send():
            self.bytes_sent += len(data)
            self.pipe.write(data)

    def _fail(self, error: ProtocolError) -> None:
        self._error = error
        self._closed = True
        self._close_pipe()

    def pipe_drained(self) -> None:
        if not self.paused:
            self.receiver.channel_drained()

    def pipe_lost(self, error: Exception | None) -> None:
        self._closed = self._lost = True
        for timer in (self._abort_timer, self._reading_again, self._sending_again):
            if timer is not None:
                timer.cancel()
        reason = self._error or error
        if reason is None and not self._open:
            reason = HandshakeFailed("eof", "the peer hung up during the handshake")
        self.receiver.channel_lost(reason)


def _joined(pieces: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for is_small, group in groupby(pieces, key=lambda piece: len(piece) <= SMALL_PIECE):
        if is_small:
            yield b"".join(group)
        else:
            yield from group
