"""Two protocol machines joined by function calls: no socket, no clock, every byte in the test's hands."""

import functools
import random
from typing import Any

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.budget import NodeBudgets, Owner, Reservation
from tesseract_async.endpoint.events import (
    BulkWanted,
    CallReceived,
    ConnectionEvent,
)
from tesseract_async.endpoint.lanes import BULK, MAIN
from tesseract_async.endpoint.protocol import ConnectionProtocol
from tesseract_async.endpoint.quotas import Quotas
from tesseract_async.wire.heads import FEATURES, Hello, RequestHead

SETTINGS = Bounds()


@functools.cache
def contents(size: int) -> bytes:
    """What a buffer of this size holds in these tests."""
    return random.Random(size).randbytes(size)


def taken(machine: ConnectionProtocol) -> list[ConnectionEvent]:
    """The events since the last time."""
    events, machine.events = machine.events, []
    return events


class Side:
    """One machine, what it told so far, and answers to what it was asked."""

    def __init__(
        self,
        theirs: Bounds,
        ours: Bounds,
        budget: int,
        dialed: bool,
        quotas: Quotas | None = None,
        small_budget: int | None = None,
    ) -> None:
        limits = (theirs.max_calls, theirs.max_small, theirs.max_message)
        hello = Hello(bytes(16), False, bytes(32), *limits, features=FEATURES)
        self.budgets = NodeBudgets(budget)
        self.budget = self.budgets.messages
        if small_budget is not None:
            self.budgets.small_calls.total = small_budget
        self.now = 0.0
        self.machine = ConnectionProtocol(
            "peer",
            hello,
            dialed=dialed,
            budgets=self.budgets,
            owner=Owner("range", "peer", self),
            bounds=ours,
            now=0.0,
            quotas=quotas,
        )
        self.events: list[ConnectionEvent] = []

    def room_changed(self, room: Reservation) -> None:
        self.machine.room_changed(room, self.now)

    def look(self) -> None:
        """What a driver does at the end of its cycle."""
        self.budgets.deliver()
        self.events += taken(self.machine)

    def take(self) -> list[ConnectionEvent]:
        """Events since the last time."""
        self.look()
        events, self.events = self.events, []
        return events

    def receive(self, lane: int, data: bytes, now: float, step: int | None = None) -> None:
        self.now = now
        reader = self.machine.lanes[lane].reader
        view = memoryview(data)
        while view:
            buffer = reader.get_buffer()
            count = min(len(buffer), len(view), step or len(view))
            buffer[:count] = view[:count]
            view = view[count:]
            self.machine.now = now
            self.machine.life.received(count, now, lane)
            reader.buffer_updated(count)
            self.look()


class Pair:
    """`client` dialed `server`. `settle` carries bytes both ways until nothing is left to send."""

    def __init__(
        self,
        *,
        client: Bounds = SETTINGS,
        server: Bounds = SETTINGS,
        client_budget: int = 2**30,
        server_budget: int = 2**30,
        bulk: bool = True,
        seed: int | None = None,
        quotas: Quotas | None = None,
        small_budget: int | None = None,
    ) -> None:
        self.now = 0.0
        self.client = Side(server, client, client_budget, True)
        self.server = Side(client, server, server_budget, False, quotas, small_budget)
        self.bytes = {MAIN: 0, BULK: 0}
        self._pick = random.Random(seed) if seed is not None else None
        if bulk:
            self.client.machine.lanes[BULK].open = True
            self.server.machine.lanes[BULK].open = True
        self.settle()

    def other(self, side: Side) -> Side:
        return self.server if side is self.client else self.client

    def carry(self, side: Side, lane: int, room: int = 1) -> bool:
        """Brings what one side has for one lane to the other; whether there was anything."""
        data = b"".join(side.machine.data_to_send(lane, room))
        side.look()
        self.bytes[lane] += len(data)
        step = self._pick.choice((1, 100, 4096, 100_000, 1 << 20)) if self._pick and len(data) < 3000 else None
        self.other(side).receive(lane, data, self.now, step)
        return bool(data)

    def settle(self) -> None:
        ways = [(side, lane) for side in (self.client, self.server) for lane in (MAIN, BULK)]
        while any(side.machine.has_data(lane) for side, lane in ways):
            if self._pick:
                self._pick.shuffle(ways)
            for side, lane in ways:
                self.carry(side, lane)
        for side in (self.client, self.server):
            side.look()
            side.events = [event for event in side.events if not isinstance(event, BulkWanted)]

    def call(self, *sizes: int, timeout: float = 10.0, max_reply: int | None = None, **head: Any) -> int:
        """Starts a call of the client with buffers of these sizes."""
        request = RequestHead("m", timeout, head.get("priority", 0), 0, max_reply or 2**30, head.get("body"))
        buffers = tuple(memoryview(contents(size)) for size in sizes)
        return self.client.machine.start_call(
            request,
            buffers,
            deadline=self.now + timeout,
            reserve_reply=max_reply is not None,
            now=self.now,
            in_parts=head.get("in_parts", False),
        )

    def received(self) -> CallReceived:
        """The one thing that the server heard: a call."""
        (event,) = self.server.take()
        assert isinstance(event, CallReceived)
        return event
