"""Liveness of a peer: pings, round-trip times, and the moment to give up a silent connection. No I/O."""

from collections.abc import Sequence
from typing import Final

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.lanes import BULK, MAIN, Lane
from tesseract_async.errors import ConnectionLost
from tesseract_async.wire import frames

DATA_BYTES: Final = 128
"""More bytes than pings and their answers can amount to within the times that are judged here."""


class Liveness:
    """Judges a connection by when its lanes were last heard of. `peer` is how errors name the other end."""

    def __init__(self, peer: str, lanes: Sequence[Lane], *, bounds: Bounds, now: float) -> None:
        self.rtt: float | None = None
        """Seconds for a ping and its answer, smoothed; None until the first one came."""
        self.confirmed = now
        """All that left on the main lane before this time has arrived: a ping that left then was answered."""
        self.num_on_bulk = 0
        """Calls that use the bulk lane: only then it is judged."""
        self._peer = peer
        self._lanes = lanes
        self._bounds = bounds
        self._heard = now  # on any lane
        self._main_heard = now
        self._pinged = False
        self._pinged_at: float | None = None  # when a ping left whose answer is still to come
        self._told_at = now  # when the peer was last told what came in ...
        self._untold = 0  # ... and the bytes since then
        self._bulk_in = 0  # bytes of the bulk lane that came in since it last counted as moving ...
        self._bulk_out = 0  # ... and of what we sent, those that had come in there by then

    def received(self, count: int, now: float, lane: int) -> None:
        self._heard = now
        self._untold += count
        self._lanes[lane].bytes_received += count
        if lane == MAIN:
            self._main_heard = now
            self._pinged = False
        else:
            self._bulk_in += count
            if self._bulk_in >= DATA_BYTES:
                self.bulk_moved(now)

    def bulk_moved(self, now: float) -> None:
        """Note that the bulk lane is alive: data moved on it, or a ping was answered. Pings alone prove only one
        direction."""
        self._bulk_in = 0
        self._lanes[BULK].moved = now
        self._lanes[BULK].pinged = False

    def bulk_used(self, now: float) -> None:
        if not self.num_on_bulk:
            self.bulk_moved(now)
        self.num_on_bulk += 1

    def send_ping(self, now: float) -> None:
        if self._pinged_at is None:
            self._pinged_at = now
            self._lanes[MAIN].put(frames.frame(frames.PING))

    def send_pong(self, now: float, *, flags: int = 0) -> None:
        self._told_at = now
        self._untold = 0
        count = self._lanes[BULK].bytes_received
        self._lanes[MAIN].put(frames.frame(frames.PONG, flags=flags, stream=count))

    def pong_received(self, bulk_bytes: int, now: float, *, answer: bool) -> None:
        """Take a PONG on the main lane, which says that the peer has received this many bytes on the bulk lane."""
        if bulk_bytes >= self._bulk_out + DATA_BYTES:
            # on a slow way bytes leave this machine long after they were sent: they count when they arrive
            self._bulk_out = bulk_bytes
            self.bulk_moved(now)
        if answer and self._pinged_at is not None:
            measured = now - self._pinged_at
            self.confirmed, self._pinged_at = self._pinged_at, None
            self.rtt = measured if self.rtt is None else 0.875 * self.rtt + 0.125 * measured  # RFC 6298, 2.3

    def timer_at(self) -> float:
        bounds = self._bounds
        if self._pinged:
            due = min(self._heard + bounds.dead_after, self._main_heard + bounds.stall_after)
        else:
            due = self._main_heard + bounds.ping_after
        if self._untold >= DATA_BYTES:
            due = min(due, self._told_at + bounds.ping_after)
        if self.num_on_bulk:
            bulk = self._lanes[BULK]
            due = min(due, bulk.moved + bounds.stall_after * (1.0 if bulk.pinged else 0.5))
        return due

    def check(self, now: float, late: float) -> bool:
        """Ping where it is silent; True if the peer has just fallen silent. `late` as in `handle_timer`.

        Judges sooner where both lanes are silent. If our loop stood still, what the peer sent meanwhile is still in
        the socket: that is read first.

        Raises: ConnectionLost for a peer that has been silent for too long.
        """
        bounds = self._bounds
        if self._untold >= DATA_BYTES and now - self._told_at >= bounds.ping_after:
            # a peer that sends a large message over a slow path hears nothing else for long
            self.send_pong(now, flags=frames.REPORT)
        if self.num_on_bulk:  # it may stand still while main lives: some box on the way has forgotten one of two flows
            bulk, limit = self._lanes[BULK], bounds.stall_after
            quiet = now - bulk.moved
            if quiet >= limit / 2 and not bulk.pinged:
                bulk.pinged = True
                bulk.put(frames.frame(frames.PING))
            elif quiet >= limit and late >= limit / 8:
                bulk.moved = now - limit / 2
            elif quiet >= limit:
                raise ConnectionLost(self._peer, f"its bulk channel has stood still for {quiet:.0f} s")
        silent, main_silent = now - self._heard, now - self._main_heard
        if self._pinged and (silent >= bounds.dead_after or main_silent >= bounds.stall_after):
            if late < bounds.dead_after / 8:
                raise ConnectionLost(self._peer, f"nothing was heard for {main_silent:.0f} s")
            self._heard = self._main_heard = now - bounds.ping_after
        elif main_silent >= bounds.ping_after and not self._pinged:
            self._pinged = True
            self.send_ping(now)
            return True
        return False
