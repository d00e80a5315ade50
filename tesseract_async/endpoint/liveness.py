"""Whether the peer lives: pings, round-trip times, and when to give a silent connection up. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from tesseract_async.endpoint.lanes import BULK, MAIN, Lane
from tesseract_async.endpoint.settings import ProtocolSettings
from tesseract_async.errors import ConnectionLost
from tesseract_async.wire import frames


class Liveness:
    """Judges a connection by when its lanes were last heard of. `peer` is how errors name the other end."""

    def __init__(self, peer: str, lanes: Sequence[Lane], *, settings: ProtocolSettings, now: float) -> None:
        self.rtt: float | None = None
        """Seconds for a ping and its answer, smoothed; None until the first one came."""
        self.num_on_bulk = 0
        """Calls that use the bulk lane: only then it is judged."""
        self._peer = peer
        self._lanes = lanes
        self._settings = settings
        self._heard = now  # on any lane
        self._main_heard = now
        self._pinged = False
        self._pinged_at: float | None = None  # when a ping left whose answer is still to come

    def received(self, now: float, lane: int) -> None:
        """Bytes came in on this lane; any of them counts as life."""
        self._heard = now
        if lane == MAIN:
            self._main_heard = now
            self._pinged = False
        else:
            self._lanes[BULK].moved = now
            self._lanes[BULK].pinged = False

    def bulk_used(self, now: float) -> None:
        """One more call uses the bulk lane."""
        if not self.num_on_bulk:
            self._lanes[BULK].moved = now
        self.num_on_bulk += 1

    def send_ping(self, now: float) -> None:
        """Measures the round-trip time, unless a ping is under way."""
        if self._pinged_at is None:
            self._pinged_at = now
            self._lanes[MAIN].put(frames.frame(frames.PING))

    def answered(self, now: float) -> None:
        """A PONG came on the main lane."""
        if self._pinged_at is not None:
            measured = now - self._pinged_at
            self._pinged_at = None
            self.rtt = measured if self.rtt is None else 0.875 * self.rtt + 0.125 * measured  # RFC 6298, 2.3

    def timer_at(self) -> float:
        """When `check` wants to be called."""
        settings = self._settings
        if self._pinged:
            due = min(self._heard + settings.dead_after, self._main_heard + settings.stall_after)
        else:
            due = self._main_heard + settings.ping_after
        if self.num_on_bulk:
            bulk = self._lanes[BULK]
            due = min(due, bulk.moved + settings.stall_after * (1.0 if bulk.pinged else 0.5))
        return due

    def check(self, now: float, late: float) -> bool:
        """Pings where it is silent; True if the peer has just fallen silent. `late` as in `handle_timer`.

        Raises: ConnectionLost for a peer that has been silent for too long.
        """
        if self.num_on_bulk:
            self._check_bulk(now, late)
        return self._check_main(now, late)

    def _check_main(self, now: float, late: float) -> bool:
        """Judges sooner where the bulk lane is silent, too."""
        settings = self._settings
        silent, main_silent = now - self._heard, now - self._main_heard
        if self._pinged and (silent >= settings.dead_after or main_silent >= settings.stall_after):
            if late < settings.dead_after / 8:
                raise ConnectionLost(self._peer, f"nothing was heard for {main_silent:.0f} s")
            # our own loop stood still: what the peer sent meanwhile is still in the socket, so read that first
            self._heard = self._main_heard = now - settings.ping_after
        elif main_silent >= settings.ping_after and not self._pinged:
            self._pinged = True
            self._pinged_at = None
            self.send_ping(now)
            return True
        return False

    def _check_bulk(self, now: float, late: float) -> None:
        """A bulk lane may stand still while main lives: some box on the way has forgotten one of two flows."""
        bulk, limit = self._lanes[BULK], self._settings.stall_after
        quiet = now - bulk.moved
        if quiet >= limit / 2 and not bulk.pinged:
            bulk.pinged = True
            bulk.put(frames.frame(frames.PING))
        elif quiet >= limit and late >= limit / 8:
            bulk.moved = now - limit / 2  # our own loop stood still: read first, then judge
        elif quiet >= limit:
            raise ConnectionLost(self._peer, f"its bulk channel has stood still for {quiet:.0f} s")
