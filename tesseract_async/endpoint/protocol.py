"""Many calls over one connection, as a pure machine: bytes and the time go in; bytes and events come out.

A connection has a *main* lane and, from the first large message on, a *bulk* lane: two channels to the same peer, so
that large messages never hold up small ones. Everything about one message travels on one lane, in order.

Cycle of the driver: set `now`, tell `life` what came, let the lane's `reader` receive it, take
`events`, send `data_to_send` of each lane, arm a timer for `timer_at`, and `deliver` what has changed in the node's
budgets, of which other connections may hear by `room_changed`. Untrusted bytes raise only `ProtocolError`, from the
readers; the driver closes then.
"""

import heapq
from collections.abc import Callable

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.budget import NodeBudgets, Owner, Reservation
from tesseract_async.endpoint.core import ConnectionCore
from tesseract_async.endpoint.events import PeerClosed
from tesseract_async.endpoint.incoming import IncomingCalls, ReceivedCall
from tesseract_async.endpoint.lanes import BULK, MAIN
from tesseract_async.endpoint.outgoing import OutgoingCall, OutgoingCalls
from tesseract_async.endpoint.quotas import Quotas
from tesseract_async.errors import RemoteError, printable
from tesseract_async.identity import PeerID
from tesseract_async.wire import frames
from tesseract_async.wire.heads import Hello


class ConnectionProtocol(ConnectionCore):
    """See the module. `hello` is the peer's. `budgets` are shared by the connections of a node; this one's part in them
    is `owner`'s. `quotas` counts the calls of `hello.peer_id`; `refusal` says why it may call nothing here, if so.
    """

    def __init__(
        self,
        peer: str,
        hello: Hello,
        *,
        dialed: bool,
        budgets: NodeBudgets,
        owner: Owner,
        bounds: Bounds,
        now: float,
        quotas: Quotas | None = None,
        refusal: Callable[[], RemoteError | None] | None = None,
    ) -> None:
        self.pong_due = False
        """True if a PING was not answered yet, on the main lane."""
        self._peer_saw: int | None = None  # the highest number of our calls that the peer saw, once it has closed
        super().__init__(peer, hello, dialed=dialed, bounds=bounds, budgets=budgets, owner=owner, now=now)
        self.outgoing = OutgoingCalls(self)
        self.incoming = IncomingCalls(self, quotas=quotas, peer_id=PeerID(hello.peer_id), refusal=refusal)
        self.reply = self.incoming.reply
        self.fail = self.incoming.fail
        self.start_call = self.outgoing.start
        self.cancel_call = self.outgoing.cancel
        self.handlers |= {
            frames.REQUEST: self.incoming.request_received,
            frames.REPLY: self.outgoing.reply_received,
            frames.BEGIN_REQUEST: self.incoming.request_announced,
            frames.BEGIN_REPLY: self.outgoing.reply_announced,
            frames.GRANT_REQUEST: self.outgoing.request_granted,
            frames.GRANT_REPLY: self.incoming.reply_granted,
            frames.CREDIT: self._credit,
            frames.WINDOW: self._window,
            frames.CANCEL: self.incoming.cancel_received,
            frames.PING: self._ping,
            frames.PONG: self._pong,
            frames.CLOSE: self._close,
        }
        for lane in self.lanes:
            lane.sent = self.incoming.sent
        self.life.send_ping(now)

    @property
    def was_called(self) -> bool:
        return self.incoming.last_seen > 0

    @property
    def num_calls(self) -> int:
        return sum(map(len, self.calls.values()))

    def room_changed(self, room: Reservation, now: float) -> None:
        self.now = now
        call = room.call
        if isinstance(call, OutgoingCall):
            self.outgoing.room_changed(call, room)
        elif isinstance(call, ReceivedCall):
            self.incoming.room_changed(call, room)

    def data_to_send(self, lane: int, room: int) -> list[bytes | memoryview]:
        """Return what to write to the lane's channel now, in order: small frames, then chunks of about `room` bytes.

        The memoryviews are those of messages that may be cancelled later: copy or encrypt them at once.
        """
        now = self.now
        if self.pong_due and lane == MAIN:
            self.pong_due = False
            self.life.send_pong(now)
        return self.lanes[lane].data_to_send(room, now)

    def has_data(self, lane: int | None = None) -> bool:
        main, bulk = self.lanes
        if lane != BULK and (main.small or main.large or self.pong_due):
            return True
        return lane != MAIN and bool(bulk.small or bulk.large)

    @property
    def unsent_bytes(self) -> int:
        main, bulk = self.lanes
        return main.small_bytes + bulk.small_bytes

    @property
    def backlog(self) -> int:
        main, bulk = self.lanes
        return main.small_bytes + bulk.small_bytes + self.incoming.waiting.num_bytes

    def _chunk_finished(self, kind: int, stream: int, length: int) -> None:
        call = self.whole_after(kind, stream, length)
        if isinstance(call, OutgoingCall):
            self.outgoing.arrived(call)
        elif isinstance(call, ReceivedCall):
            self.incoming.arrived(call)

    def _credit(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self.count_idle()
        self.windows.credited(stream)

    def _window(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self.count_idle()
        self.windows.told(stream)

    def _ping(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self.count_idle()
        if lane == MAIN:
            self.pong_due = True  # one for however many
        else:
            self.lanes[lane].put(frames.frame(frames.PONG))

    def _pong(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self.count_idle()
        if lane == MAIN:
            self.life.pong_received(stream, self.now, answer=flags != frames.REPORT)
        else:
            self.life.bulk_moved(self.now)

    def _close(self, lane: int, flags: int, stream: int, payload: memoryview) -> None:
        self._peer_saw = stream
        self.events.append(PeerClosed(printable(bytes(payload[:500]).decode("utf-8", "replace"))))

    def timer_at(self) -> float:
        deadlines, due = self.deadlines, self.life.timer_at()
        return min(due, deadlines[0][0]) if deadlines else due

    def handle_timer(self, now: float, *, late: float = 0.0) -> None:
        """End what is overdue, and ping. `late` tells by how many seconds the driver missed `timer_at`.

        Raises: ConnectionLost for a peer that has been silent for too long.
        """
        self.now = now
        while self.deadlines and self.deadlines[0][0] <= now:
            _, stream, own = heapq.heappop(self.deadlines)
            if own:
                self.outgoing.expire(stream)
            else:
                self.incoming.cancel(stream)
        for call in self.find_stalled():
            if isinstance(call, OutgoingCall):
                self.outgoing.stalled(call)
            elif isinstance(call, ReceivedCall):
                self.incoming.stalled(call)
        self.incoming.handle_timer(now)
        if self.life.check(now, late):
            for lane in self.lanes:
                lane.reader.release_scratch()
            self.arena.release()

    def farewell(self, reason: str) -> None:
        close = frames.frame(frames.CLOSE, stream=self.incoming.last_seen, payload=reason.encode()[:500])
        self.lanes[MAIN].put(close)

    def connection_lost(self, reason: str) -> None:
        """End everything, because the channels are gone: outgoing calls fail, incoming ones are cancelled, all room is
        given back."""
        self.outgoing.lost(reason, peer_saw=self._peer_saw)
        self.incoming.lost()
        for lane in self.lanes:
            lane.small, lane.small_bytes = [], 0
            lane.large.clear()
        self.windows.release()
