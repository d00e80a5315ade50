"""Events of the machine of a connection (`protocol`) for its driver."""

from typing import NamedTuple

from tesseract_async.errors import ConnectionLost
from tesseract_async.wire.heads import RequestHead


class CallReceived(NamedTuple):
    """Answer this call: `ConnectionProtocol.reply` or `fail`, unless `CallCancelled` comes first."""

    stream: int
    head: RequestHead
    buffers: tuple[memoryview, ...]
    deadline: float
    in_parts: bool = False
    """True if the caller takes a reply in parts."""


class CallCancelled(NamedTuple):
    """This received call has ended early: it was cancelled, its deadline passed, or its reply was not taken."""

    stream: int


class PartWanted(NamedTuple):
    stream: int


class PartReceived(NamedTuple):
    """A part of the reply to an outgoing call: `part_taken` once the caller has it. More follow, or `CallFailed`."""

    stream: int
    body: object
    buffers: tuple[memoryview, ...]


class ReplyReceived(NamedTuple):
    stream: int
    body: object
    buffers: tuple[memoryview, ...]


class CallFailed(NamedTuple):
    """An outgoing call ended with an error: a RemoteError, ProtocolError, TimeoutError or ConnectionLost."""

    stream: int
    error: Exception
    drops_parts: bool = False
    """True if the memory of parts that the caller has not taken is needed for others: the caller no longer gets these
    parts."""


ReplyEvent = PartReceived | ReplyReceived | CallFailed
"""A part of a reply, its last one, or the failure that it ends in."""


class BulkWanted(NamedTuple):
    """One side has a large message: open the bulk lane. Comes to the side that dialed only."""


class RequestUnseen(ConnectionLost):
    """The peer closed without having seen the request: repeating it is safe, whatever it does."""


class PeerClosed(NamedTuple):
    reason: str


ConnectionEvent = (
    CallReceived | CallCancelled | PartWanted | PartReceived | ReplyReceived | CallFailed | BulkWanted | PeerClosed
)
