"""What the machine of a connection (`protocol`) tells its driver."""

from __future__ import annotations

from typing import Any, NamedTuple

from tesseract_async.errors import ConnectionLost
from tesseract_async.wire.calls import RequestHead


class CallReceived(NamedTuple):
    """Answer this call: `ConnectionProtocol.reply` or `fail`, unless `CallCancelled` comes first."""

    stream: int
    head: RequestHead
    buffers: tuple[memoryview, ...]
    deadline: float


class CallCancelled(NamedTuple):
    """Nobody waits for this received call any more (cancelled, or its deadline passed)."""

    stream: int


class ReplyReceived(NamedTuple):
    """An own call ended with a result."""

    stream: int
    body: Any
    buffers: tuple[memoryview, ...]


class CallFailed(NamedTuple):
    """An own call ended with an error: a RemoteError, ProtocolError, TimeoutError or ConnectionLost."""

    stream: int
    error: Exception


class BulkWanted(NamedTuple):
    """One side has a large message: open the bulk lane. Comes to the side that dialled only."""


class RequestUnseen(ConnectionLost):
    """The peer closed without having seen the request: repeating it is safe, whatever it does."""


class PeerClosed(NamedTuple):
    """The peer said farewell and sends nothing more."""

    reason: str


Event = CallReceived | CallCancelled | ReplyReceived | CallFailed | BulkWanted | PeerClosed
