"""aiortc's SCTP association, with bounds on what a peer can make it keep, and another reaction to loss.

Imports aiortc: only `webrtc` imports this, when a data channel is made. aiortc has no seam for it: what is overridden
here are methods between its own, as they are in `AIORTC`; with any other version this module raises ImportError.

aiortc's congestion control is TCP Reno's: each loss halves the window, and one packet per round trip comes back, which
leaves little of a long path that loses a few packets by chance. Here, a loss without a queue changes nothing; the queue
is the time by which a round trip exceeds the shortest one.
"""

from collections.abc import Callable
from typing import Any, Final

import aiortc
from aiortc import RTCSctpTransport
from aiortc.rtcsctptransport import SCTP_TSN_MODULO, WEBRTC_DCEP, DataChunk, SackChunk

from tesseract_async.errors import ProtocolError, describe

AIORTC: Final = "1.16"
"""The version whose inner methods are known; pyproject.toml allows no other."""
if aiortc.__version__.split(".")[:2] != AIORTC.split("."):
    raise ImportError(f"aiortc {aiortc.__version__} is installed, data channels need {AIORTC}")

CHANNEL: Final = 0
"""The data channel of an association; it has no other."""
MAX_GAPS: Final = 256
MAX_DUPLICATES: Final = 32
"""Gaps and duplicates in one acknowledgement, so that it fits into a packet (RFC 9260, 3.3.4)."""
LEAST_MARGIN: Final = 0.2
"""The least seconds beyond the usual round trip after which silence counts as loss: TCP's value in most systems."""
LONGEST_TIMEOUT: Final = 3.0
"""Seconds: the connection's heartbeat ends it after 9."""
LEAST_QUEUE: Final = 0.02
"""Seconds beyond the shortest round trip that are no queue: a busy processor's delays."""
MAX_HELD: Final = 4096
"""Packets received and not yet handed on because one before them is missing: twice what the channel's credit allows to
be under way in full packets. Nor are more sent that the peer has not acknowledged as a whole."""
MAX_FRAGMENTS: Final = 256
"""Packets of one message; `message_stream`'s take fifteen."""
NEVER: Final = -(2**30)


class Association(RTCSctpTransport):
    """`on_garbage` is called once, with a ProtocolError, when the peer sends what no such peer sends; nothing that
    comes after that is looked at."""

    def __init__(
        self, dtls: Any, port: int, on_garbage: Callable[[ProtocolError], None], *, max_held: int = MAX_HELD
    ) -> None:
        super().__init__(dtls, port)
        self._on_garbage = on_garbage
        self._max_held = max_held
        self._broken = False
        self._shortest = float("inf")
        self._queue = 0.0
        """Seconds that the last measured round trip took beyond the shortest one."""

    async def _handle_data(self, data: bytes) -> None:
        if self._broken:
            return
        try:
            await super()._handle_data(data)
        except ConnectionError:
            raise
        except Exception as failure:  # aiortc checks few of the peer's numbers
            self._broken = True
            if not isinstance(failure, ProtocolError):
                failure = ProtocolError(f"the peer's SCTP makes no sense: {describe(failure)}")
            self._on_garbage(failure)

    async def _receive_data_chunk(self, chunk: Any) -> None:
        if chunk.stream_id != CHANNEL or chunk.protocol == WEBRTC_DCEP:
            raise ProtocolError("the peer uses a data channel that was not agreed on")
        last = self._last_received_tsn
        if last is None or self._max_held < (chunk.tsn - last) % SCTP_TSN_MODULO < SCTP_TSN_MODULO // 2:
            return  # too far ahead: as if it had been lost
        await super()._receive_data_chunk(chunk)
        del self._sack_duplicates[MAX_DUPLICATES:]
        held = len(self._get_inbound_stream(CHANNEL).reassembly)
        if held - len(self._sack_misordered) > MAX_FRAGMENTS:
            raise ProtocolError("a message without an end")
        if max(held - MAX_FRAGMENTS, len(self._sack_misordered)) > self._max_held:
            raise ProtocolError("the peer begins anew again and again")  # which moves what is too far ahead

    async def _receive_forward_tsn_chunk(self, chunk: Any) -> None:
        raise ProtocolError("the peer skips data that it should deliver")

    async def _receive_sack_chunk(self, chunk: Any) -> None:
        num_sent = len(self._sent_queue)
        ahead = (chunk.cumulative_tsn - self._last_sacked_tsn) % SCTP_TSN_MODULO
        if ahead > num_sent:
            return  # an old one, or of what was never sent
        chunk.gaps = sorted(gap for gap in chunk.gaps[:MAX_GAPS] if 0 < gap[0] <= gap[1] <= num_sent - ahead)
        before = self._cwnd, self._ssthresh, self._fast_recovery_exit
        await super()._receive_sack_chunk(chunk)
        if self._cwnd < before[0] and self._queue < LEAST_QUEUE:
            self._cwnd, self._ssthresh, self._fast_recovery_exit = before

    async def _data_channel_flush(self) -> None:
        if len(self._sent_queue) < self._max_held:  # else with the next acknowledgement
            await super()._data_channel_flush()

    def _update_rto(self, R: float) -> None:
        super()._update_rto(R)
        self._shortest = min(self._shortest, R)
        self._queue = R - self._shortest
        usual, spread = self._srtt or 0.0, self._rttvar or 0.0
        self._rto = min(usual + max(4 * spread, LEAST_MARGIN), LONGEST_TIMEOUT)

    def _t3_expired(self) -> None:
        super()._t3_expired()
        for chunk in self._sent_queue:
            chunk._retransmit = not chunk._acked  # what arrived behind something missing need not come again
        self._rto = min(2 * self._rto, LONGEST_TIMEOUT)

    async def _send_chunk(self, chunk: Any) -> None:
        if isinstance(chunk, DataChunk):
            if chunk._sent_count > 1:  # acknowledgements under way already say nothing of it
                chunk._misses = NEVER
        elif isinstance(chunk, SackChunk):
            chunk.gaps = chunk.gaps[:MAX_GAPS]  # aiortc names every gap, and its DTLS cuts off what exceeds 1500 bytes
        await super()._send_chunk(chunk)
