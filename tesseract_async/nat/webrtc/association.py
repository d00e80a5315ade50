"""aiortc's SCTP association with another congestion control, acknowledgements that fit into packets, and bounds.

Imports aiortc: only `webrtc` imports this, when a data channel is made. aiortc has no seam for it: what is overridden
here are methods between its own, as they are in `AIORTC`. Another version's could be called at other times, or never,
so with any other this module raises ImportError; `tests/nat/webrtc/test_association.py` says what they must do.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import aiortc
from aiortc import RTCSctpTransport
from aiortc.rtcsctptransport import SCTP_TSN_MODULO, USERDATA_MAX_LENGTH, WEBRTC_DCEP, DataChunk, SackChunk
from aiortc.utils import uint32_gte

from tesseract_async.errors import ProtocolError, describe
from tesseract_async.nat.webrtc.congestion import CongestionWindow

AIORTC: Final = "1.16"
"""The version whose inner methods are known; pyproject.toml allows no other."""
if aiortc.__version__.split(".")[:2] != AIORTC.split("."):
    raise ImportError(f"aiortc {aiortc.__version__} is installed, data channels need {AIORTC}")

CHANNEL: Final = 0
"""The one data channel of an association."""

MAX_GAPS: Final = 256
MAX_DUPLICATES: Final = 32
"""Gaps and duplicates in one acknowledgement, so that it fits into a packet."""
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

    def __init__(
        self, dtls: Any, port: int, on_garbage: Callable[[ProtocolError], None], *, max_held: int = MAX_HELD
    ) -> None:
        super().__init__(dtls, port)
        self._on_garbage = on_garbage
        self._max_held = max_held
        self._broken = False
        self._time = asyncio.get_running_loop().time
        self._window = CongestionWindow(USERDATA_MAX_LENGTH)
        self._full = False
        """True if the window was used up when the present acknowledgement came."""
        self._missing: list[Any] = []
        """Packets that have not arrived although something behind them has, in order."""
        self._looked_at = 0
        """Packets at the head of the queue that have arrived or are among the missing."""
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
        if last is None or self._max_held < (chunk.tsn - last) % SCTP_TSN_MODULO < SCTP_TSN_MODULO // 2:
            return  # too far ahead: as if it had been lost
        await super()._receive_data_chunk(chunk)
        held = len(self._get_inbound_stream(CHANNEL).reassembly)
        if held - len(self._sack_misordered) > MAX_FRAGMENTS:
            raise ProtocolError("a message without an end")
        if max(held - MAX_FRAGMENTS, len(self._sack_misordered)) > self._max_held:
            raise ProtocolError("the peer begins anew again and again")  # which moves what is too far ahead

    async def _receive_forward_tsn_chunk(self, chunk: Any) -> None:
        raise ProtocolError("the peer skips what it was to deliver")

    def _mark_received(self, tsn: int) -> bool:
        """Return whether it came before. aiortc sorts all that waits for each packet."""
        last, waiting = self._last_received_tsn, self._sack_misordered
        assert last is not None
        if (last - tsn) % SCTP_TSN_MODULO < SCTP_TSN_MODULO // 2 or tsn in waiting:
            if len(self._sack_duplicates) < MAX_DUPLICATES:
                self._sack_duplicates.append(tsn)
            return True
        waiting.add(tsn)
        while (following := (last + 1) % SCTP_TSN_MODULO) in waiting:
            waiting.remove(following)
            last = following
        self._last_received_tsn = last
        return False

    # ---- what is under way

    async def _data_channel_flush(self) -> None:
        if len(self._sent_queue) < self._max_held:  # else with the next acknowledgement
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
        """Look at each packet once when something behind it has arrived, and then until it has; aiortc goes through the
        whole window, three times. An acknowledgement taken back does not count."""
        last = chunk.cumulative_tsn
        ahead = (last - self._last_sacked_tsn) % SCTP_TSN_MODULO
        if ahead > len(self._sent_queue):
            return  # an old one, or of what was never sent
        self._full = self._flight_size + USERDATA_MAX_LENGTH >= self._cwnd
        self._let_be_judged_again()
        self._last_sacked_tsn = last
        for number in range(ahead):
            one: Any = self._sent_queue.popleft()
            if number == 0 and one._sent_count == 1:
                self._update_rto(self._time() - one.sent_at)
            one._acked, one._retransmit = True, False
            self._flight_size_decrease(one)
        self._looked_at = max(self._looked_at - ahead, 0)
        self._missing = [one for one in self._missing if not one._acked]
        if self._strike(self._take_gaps(chunk.gaps)) and self._fast_recovery_exit is None:
            self._fast_recovery_exit, self._fast_recovery_transmit = self._sent_queue[-1].tsn, True
        elif self._fast_recovery_exit is not None and uint32_gte(last, self._fast_recovery_exit):
            self._fast_recovery_exit = None
        if not self._sent_queue:
            self._t3_cancel()
        elif ahead:
            self._t3_restart()
        self._update_advanced_peer_ack_point()
        await self._data_channel_flush()
        await self._transmit()

    def _take_gaps(self, gaps: list[tuple[int, int]]) -> int:
        """Take what arrived behind something missing; return the place of the last packet that is news."""
        queue, news = self._sent_queue, 0
        spans = sorted(
            (first, min(end, len(queue))) for first, end in gaps[:MAX_GAPS] if 0 < first <= min(end, len(queue))
        )
        missing, self._missing = self._missing, []
        begins = [first for first, _ in spans]
        first_tsn = self._last_sacked_tsn
        for one in missing:
            place = (one.tsn - first_tsn) % SCTP_TSN_MODULO
            at = bisect_right(begins, place) - 1
            if at >= 0 and place <= spans[at][1]:
                news = max(news, place)
                self._arrived(one)
            else:
                self._missing.append(one)
        for first, end in spans:
            for place in range(self._looked_at + 1, end + 1):
                one = queue[place - 1]
                if place < first:
                    self._missing.append(one)
                else:
                    news = place
                    self._arrived(one)
            self._looked_at = max(self._looked_at, end)
        return news

    def _arrived(self, chunk: Any) -> None:
        chunk._acked, chunk._retransmit = True, False
        self._flight_size_decrease(chunk)

    def _strike(self, news: int) -> bool:
        """Count a miss for what was sent before something that has just arrived; return whether any counts as lost."""
        any_lost = False
        for one in self._missing:
            if (one.tsn - self._last_sacked_tsn) % SCTP_TSN_MODULO < news:
                one._misses += 1
                if one._misses == 3:
                    one._misses, one._retransmit = 0, True
                    self._flight_size_decrease(one)
                    any_lost = True
        return any_lost

    def _let_be_judged_again(self) -> None:
        """Count misses of what was sent again only after a round trip: acknowledgements under way already say nothing
        of it."""
        patience = 1.25 * (self._srtt or FIRST_TIMEOUT)
        while self._sent_again and self._sent_again[0][0] + patience < self._time():
            self._sent_again.popleft()[1]._misses = 0

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
            # aiortc names every gap, and its DTLS cuts off what exceeds 1500 bytes. RFC 9260 (3.3.4): what fits
            chunk.gaps, chunk.duplicates = chunk.gaps[:MAX_GAPS], chunk.duplicates[:MAX_DUPLICATES]
        await super()._send_chunk(chunk)
