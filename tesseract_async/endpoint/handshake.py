"""The first frames on a fresh channel: both sides say hello, and the channel finds its connection."""

import asyncio
from collections.abc import Callable, Mapping

from tesseract_async.errors import HandshakeFailed, ProtocolError
from tesseract_async.identity import PeerID
from tesseract_async.transport.base import Pipe
from tesseract_async.transport.channel import Channel
from tesseract_async.transport.throttle import Throttle
from tesseract_async.transport.tls import TlsMachine
from tesseract_async.wire import frames, heads
from tesseract_async.wire.heads import Hello


def _refuse(index: int, flags: int, stream: int, payload: memoryview) -> None:
    raise HandshakeFailed("hello", "the peer did not begin with a hello")


_REFUSED: dict[int, frames.FrameHandler] = dict.fromkeys(range(256), _refuse)
"""Handlers of every kind of frame."""


class Handshake:
    """Brings a pipe to the point where frames of calls may follow, or to a typed failure, within `timeout` seconds.

    The dialer (`own` is given) speaks first and counts the channel open after the acceptor's answer. The acceptor
    answers with what `answer_for` makes of the dialer's hello. `established` then takes the channel over, within the
    call that brought the last byte: it replaces the channel's receiver and the reader's sink.
    """

    def __init__(
        self,
        pipe: Pipe,
        tls: TlsMachine | None,
        *,
        own: Hello | None,
        answer_for: Callable[[Hello], Hello],
        expected: PeerID | None,
        established: Callable[[Channel, frames.FrameReader, PeerID, Hello], None],
        timeout: float,
        throttle: Throttle | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = loop.create_future()
        """Ends with None, or a ProtocolError or OSError."""
        self.origin = pipe.origin
        self.description = pipe.description
        self.dialed = own is not None
        self.index = 0
        self.handlers: Mapping[int, frames.FrameHandler] = _REFUSED | {frames.HELLO: self._hello_received}
        self._own = own
        self._answer_for = answer_for
        self._expected = expected
        self._established = established
        self._peer_id: PeerID | None = None
        self._reader = frames.FrameReader(self)
        self._channel = Channel(pipe, tls, self, throttle=throttle)
        late = HandshakeFailed("timeout", f"the peer did not finish the handshake within {timeout:g} s")
        self._timer = loop.call_later(timeout, self._channel.abort, late)

    def start(self) -> None:
        self._channel.start()

    def abort(self) -> None:
        self._channel.abort(HandshakeFailed("aborted", "this node is closing"))

    def channel_opened(self, peer_id: PeerID | None) -> None:
        self._peer_id = peer_id
        if self._own is not None:
            self._send(self._own)

    def get_buffer(self) -> memoryview:
        return self._reader.get_buffer()

    def buffer_updated(self, count: int) -> None:
        self._reader.buffer_updated(count)
        if self._channel.receiver is not self:
            # frames that came along with the hello are the successor's: let it act on them
            self._channel.receiver.buffer_updated(0)

    def channel_drained(self) -> None:
        pass

    def channel_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        if not self.done.done():
            self.done.set_exception(error or HandshakeFailed("eof", "the peer hung up during the handshake"))

    def _hello_received(self, index: int, flags: int, stream: int, payload: memoryview) -> None:
        try:
            hello = heads.decode_hello(payload)
        except ProtocolError:
            if self._own is None:  # tell what we speak before closing, so that the dialer learns why
                self._send(Hello(bytes(16), False, bytes(32), 1, 1, 1))
            raise
        claimed = PeerID(hello.peer_id)
        peer_id = claimed if self._peer_id is None else self._peer_id
        if claimed != peer_id or (self._expected is not None and peer_id != self._expected):
            raise HandshakeFailed("wrong_peer", f"another peer ({claimed.short}) answers there")
        self._established(self._channel, self._reader, peer_id, hello)
        if self._own is None:  # only now: to the dialer, this answer means that it was taken in
            self._send(self._answer_for(hello))
        self._timer.cancel()
        if not self.done.done():
            self.done.set_result(None)

    def chunk_started(self, kind: int, stream: int, length: int) -> frames.Assembly | None:
        raise HandshakeFailed("hello", "the peer did not begin with a hello")

    def chunk_finished(self, kind: int, stream: int, length: int) -> None:
        raise AssertionError("no chunk was started")

    def _send(self, hello: Hello) -> None:
        self._channel.write([frames.frame(frames.HELLO, payload=heads.encode_hello(hello))])
