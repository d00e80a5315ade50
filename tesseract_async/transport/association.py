"""aiortc's SCTP association with another congestion control, acknowledgements that fit into packets, and bounds.

Imports aiortc: only `webrtc` imports this, when a data channel is made. aiortc has no seam for it: what is overridden
here are methods between its own, as they are in `AIORTC`. Another version's could be called at other times, or never,
so with any other this module raises ImportError; `tests/transport/test_association.py` says what they must do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import aiortc
from aiortc import RTCSctpTransport
from aiortc.rtcsctptransport import SCTP_TSN_MODULO, USERDATA_MAX_LENGTH, WEBRTC_DCEP, DataChunk, SackChunk

from tesseract_async.errors import ProtocolError, describe
from tesseract_async.transport.congestion import CongestionWindow

AIORTC: Final = "1.16"
"""The version whose inner methods are known; pyproject.toml allows no other."""
if aiortc.__version__.split(".")[:2] != AIORTC.split("."):
    raise ImportError(f"aiortc {aiortc.__version__} is installed, data channels need {AIORTC}")

CHANNEL: Final = 0
"""The one data channel of an association."""

MAX_GAPS: Final = 256
MAX_DUPLICATES: Final = 32
"""What one acknowledgement may tell, so that it fits into a packet."""
FIRST_TIMEOUT: Final = 1.0
"""Seconds before anything is repeated while no round trip is known (RFC 6298)."""
LEAST_MARGIN: Final = 0.2
"""Seconds beyond the usual round trip before the silence counts as loss, at least. TCP's, in most systems."""
LONGEST_TIMEOUT: Final = 3.0
"""Seconds: the channel's own heartbeat ends it after 7."""
MAX_HELD: Final = 4096
"""Packets received and not yet handed on because one before them is missing: twice what the channel's credit allows to
be under way in full packets. aiortc has no bound. Nor are more sent that the peer has not acknowledged as a whole: it
could name all of them as received but the first, and have them kept for ever."""
MAX_FRAGMENTS: Final = 256
"""Packets of one message; `message_stream`'s take fifteen."""
NEVER: Final = -(2**30)


class Association(RTCSctpTransport):
    """Differs from its base in when it sends, not in what: the peer need not know.

    `on_garbage` is called once, with a `ProtocolError`, when the peer sends what no such peer sends; nothing that comes
    after that is looked at.
    """

    def __init__(self, dtls: Any, port: int, on_garbage: Callable[[ProtocolError], None]) -> None:
        super().__init__(dtls, port)
        self._on_garbage = on_garbage
        self._broken = False
        self._time = asyncio.get_running_loop().time
        self._window = CongestionWindow(USERDATA_MAX_LENGTH)
        self._full = False
        """Whether the window was used up when the present acknowledgement came."""
        self._sent_again: deque[tuple[float, Any]] = deque()
        self._rto = FIRST_TIMEOUT

    # ---- what comes

    async def _handle_data(self, data: bytes) -> None:
        if self._broken:
            return
        try:
            await super()._handle_data(data)
        except ConnectionError:
            raise
        except ProtocolError as error:
            self._break(error)
        except Exception as failure:  # aiortc checks few of the peer's numbers
            self._break(ProtocolError(f"the peer's SCTP makes no sense: {describe(failure)}"))

    def _break(self, error: ProtocolError) -> None:
        self._broken = True
        self._on_garbage(error)

    async def _receive_data_chunk(self, chunk: Any) -> None:
        if chunk.stream_id != CHANNEL or chunk.protocol == WEBRTC_DCEP:
            raise ProtocolError("the peer uses a data channel that was not agreed on")
        last = self._last_received_tsn
        if last is None or MAX_HELD < (chunk.tsn - last) % SCTP_TSN_MODULO < SCTP_TSN_MODULO // 2:
            return  # too far ahead: as if it had been lost
        await super()._receive_data_chunk(chunk)
        held = len(self._get_inbound_stream(CHANNEL).reassembly)
        # each new INIT moves what counts as far ahead
        if held - len(self._sack_misordered) > MAX_FRAGMENTS or held > MAX_HELD + MAX_FRAGMENTS:
            raise ProtocolError("a message without an end")

    async def _receive_forward_tsn_chunk(self, chunk: Any) -> None:
        raise ProtocolError("the peer skips what it was to deliver")

    # ---- what is under way

    async def _data_channel_flush(self) -> None:
        if len(self._sent_queue) < MAX_HELD:  # else with the next acknowledgement
            await super()._data_channel_flush()

    async def _transmit(self) -> None:
        self._cwnd = self._window.size
        await super()._transmit()

    def _flight_size_increase(self, chunk: Any) -> None:
        if not chunk._in_flight:
            chunk.number, chunk.sent_at = self._window.sent(), self._time()
        super()._flight_size_increase(chunk)

    def _flight_size_decrease(self, chunk: Any) -> None:
        if chunk._in_flight:
            if chunk._retransmit:
                self._window.lost(chunk.number)
            else:
                taken = self._time() - chunk.sent_at if chunk._sent_count == 1 else None
                self._window.acknowledged(chunk.number, chunk._book_size, round_trip=taken, full=self._full)
        super()._flight_size_decrease(chunk)

    # ---- what is lost

    async def _receive_sack_chunk(self, chunk: Any) -> None:
        if (chunk.cumulative_tsn - self._local_tsn) % SCTP_TSN_MODULO < SCTP_TSN_MODULO // 2:
            raise ProtocolError("the peer acknowledges what was never sent")
        self._full = self._flight_size + USERDATA_MAX_LENGTH >= self._cwnd
        # aiortc counts acknowledgements that were under way already against what it has just sent again, and sends it
        # once more for every three of them: that may begin a round trip later
        patience = 1.25 * (self._srtt or FIRST_TIMEOUT)
        while self._sent_again and self._sent_again[0][0] + patience < self._time():
            self._sent_again.popleft()[1]._misses = 0
        # a gap of a few bytes may name 65,536 packets, which aiortc lists one by one; and so may the next
        last, reached, gaps = len(self._sent_queue), 0, []
        for first, end in chunk.gaps[:MAX_GAPS]:
            if reached < first <= min(end, last):
                reached = min(end, last)
                gaps.append((first, reached))
        chunk.gaps = gaps
        await super()._receive_sack_chunk(chunk)

    def _update_rto(self, R: float) -> None:
        super()._update_rto(R)
        usual, spread = self._srtt or 0.0, self._rttvar or 0.0
        self._rto = min(usual + max(4 * spread, LEAST_MARGIN), LONGEST_TIMEOUT)

    def _t3_expired(self) -> None:
        self._window.timed_out()
        super()._t3_expired()
        for chunk in self._sent_queue:
            if chunk._acked:  # it arrived: only what lies before it is missing
                chunk._retransmit = False
        self._rto = min(2 * self._rto, LONGEST_TIMEOUT)

    # ---- what leaves

    async def _send_chunk(self, chunk: Any) -> None:
        if isinstance(chunk, DataChunk):
            if chunk._sent_count > 1:
                chunk._misses = NEVER
                self._sent_again.append((self._time(), chunk))
        elif isinstance(chunk, SackChunk):
            # aiortc names every gap, and its DTLS cuts off what exceeds 1500 bytes: once a full queue on the way had
            # dropped packets in 360 places, no acknowledgement got through any more. RFC 9260 (3.3.4): what fits
            chunk.gaps, chunk.duplicates = chunk.gaps[:MAX_GAPS], chunk.duplicates[:MAX_DUPLICATES]
        await super()._send_chunk(chunk)
