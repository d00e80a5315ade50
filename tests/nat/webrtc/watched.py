"""An association that tells and takes what tests need: a subclass, as aiortc has no other seam (`association`)."""

from typing import Any, NamedTuple

from aiortc.rtcsctptransport import (
    Chunk,
    DataChunk,
    InitChunk,
    SackChunk,
    serialize_packet,
)

from tesseract_async.nat.webrtc.association import MAX_HELD, Association
from tesseract_async.nat.webrtc.pipe import DataChannelPipe

PORT = 5000


class Queued(NamedTuple):
    """A packet of the sending side that is not acknowledged as a whole."""

    tsn: int
    arrived: bool
    again: bool
    """It counts as lost and will be sent again."""
    in_flight: bool


class Watched(Association):
    """Records what it sends, loses what it is told to, and can be fed chunks of a peer."""

    def __init__(self, dtls: Any, port: int, on_garbage: Any, *, max_held: int = MAX_HELD) -> None:
        super().__init__(dtls, port, on_garbage, max_held=max_held)
        self.sent: list[int] = []
        """The TSNs of the packets of data, once for each time."""
        self.num_silences = 0
        self.losing = False
        """Whether the packet that is being sent is to be lost on the way."""
        self.deaf_to: int | None = None
        """The TSN of a packet that is not taken, however often it comes."""
        self._to_lose, self._times = -1, 0

    @property
    def queue(self) -> list[Queued]:
        return [Queued(one.tsn, *_marks(one)) for one in self._sent_queue]

    @property
    def in_flight(self) -> int:
        """Bytes."""
        return int(self._flight_size)

    @property
    def timeout(self) -> float:
        """Seconds of silence that count as loss."""
        return self._rto

    @property
    def next_tsn(self) -> int:
        """Of what it sends."""
        return int(self._local_tsn)

    @property
    def last_received(self) -> int:
        """The TSN up to which all has come."""
        assert self._last_received_tsn is not None
        return int(self._last_received_tsn)

    @property
    def last_acknowledged(self) -> int:
        return int(self._last_sacked_tsn)

    @property
    def out_of_order(self) -> set[int]:
        """The TSNs received of which one before is missing."""
        return set(self._sack_misordered)

    @property
    def num_held(self) -> int:
        """Packets of incomplete messages, and of those whose turn has not come."""
        return len(self._get_inbound_stream(0).reassembly)

    @property
    def num_streams(self) -> int:
        return len(self._inbound_streams)

    @property
    def broken(self) -> bool:
        return self._broken

    def lose_next(self, times: int) -> None:
        """`losing` is True the first `times` times that the next new packet is sent. Forgets what was `sent`."""
        self._to_lose, self._times = self.next_tsn, times
        self.sent.clear()

    def be_silent(self) -> None:
        """As if nothing had come from the peer for `timeout` seconds."""
        self._t3_cancel()
        self._t3_expired()

    def measure(self, round_trip: float) -> None:
        self._update_rto(round_trip)

    async def take(self, chunk: Chunk) -> None:
        """A packet of the peer's."""
        tag = 0 if isinstance(chunk, InitChunk) else self._local_verification_tag
        await self._handle_data(serialize_packet(PORT, PORT, tag, chunk))

    async def take_beginning(self, first_tsn: int) -> None:
        """The peer begins anew, with this TSN."""
        init = InitChunk()
        init.initial_tsn = first_tsn % 2**32
        init.initiate_tag, init.advertised_rwnd = self._remote_verification_tag, 2**20
        init.outbound_streams = init.inbound_streams = 1
        await self.take(init)

    async def take_acknowledgement(self, sack: SackChunk) -> None:
        await self._receive_sack_chunk(sack)

    async def _send_chunk(self, chunk: Any) -> None:
        if isinstance(chunk, DataChunk):
            self.sent.append(chunk.tsn)
            self.losing = chunk.tsn == self._to_lose and self.sent.count(chunk.tsn) <= self._times
        await super()._send_chunk(chunk)
        self.losing = False

    def _t3_expired(self) -> None:
        self.num_silences += 1
        super()._t3_expired()

    def _mark_received(self, tsn: int) -> bool:
        return tsn == self.deaf_to or super()._mark_received(tsn)


class Side(NamedTuple):
    """One end of a data channel."""

    pipe: DataChannelPipe
    association: Watched


def _marks(chunk: Any) -> tuple[bool, bool, bool]:
    return chunk._acked, chunk._retransmit, chunk._in_flight
