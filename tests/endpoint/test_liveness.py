"""Who lives and what has stalled, over slow ways: two machines, a link of 0.5 Mbit/s, and virtual time."""

import dataclasses
from collections.abc import Callable

import pytest

from tesseract_async.endpoint.events import BulkWanted, CallFailed, CallReceived, ReplyReceived
from tesseract_async.endpoint.lanes import BULK, MAIN
from tesseract_async.errors import ConnectionLost
from tesseract_async.wire import frames
from tests.endpoint.machines import SETTINGS, Pair, Side, contents

MIB = 2**20
RATE = 500_000 / 8
STEP = 0.05
HIGH_WATER = 256 * 1024


class SlowLink:
    """Carries what the machines of a pair send at `RATE` each way, shared by both lanes; kernels buffer before it."""

    def __init__(self, pair: Pair, *, kernel_bytes: int) -> None:
        self.pair = pair
        self.dead: set[tuple[bool, int]] = set()  # (client's, lane): what is sent there vanishes
        self._kernel_bytes = kernel_bytes
        self._queues = {(side is pair.client, lane): bytearray() for side in self.sides for lane in (MAIN, BULK)}

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.pair.client, self.pair.server

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Whether `until` came true. Raises: what the machines' timers raise."""
        end = self.pair.now + seconds
        while not until():
            if self.pair.now >= end:
                return False
            self._step()
        return True

    def _step(self) -> None:
        pair = self.pair
        pair.now += STEP
        for side in self.sides:
            if pair.now >= side.machine.timer_at():
                side.machine.handle_timer(pair.now)
            for lane in (MAIN, BULK):
                queue = self._queues[side is pair.client, lane]
                while len(queue) < self._kernel_bytes + HIGH_WATER and side.machine.has_data(lane):
                    queue += b"".join(side.machine.data_to_send(lane, 1))
            side.look()
        for side in self.sides:
            busy = [lane for lane in (MAIN, BULK) if self._queues[side is pair.client, lane]]
            for lane in busy:
                queue = self._queues[side is pair.client, lane]
                count = int(RATE * STEP) // len(busy)
                data = bytes(queue[:count])
                del queue[:count]
                if (side is pair.client, lane) not in self.dead:
                    pair.other(side).receive(lane, data, pair.now)


@pytest.mark.parametrize("kernel_bytes", [64 * 1024, 5 * MIB // 2])
@pytest.mark.parametrize("bulk", [True, False])
def test_large_calls_end_well_over_half_a_megabit(bulk: bool, kernel_bytes: int) -> None:
    pair = Pair(bulk=bulk)
    link = SlowLink(pair, kernel_bytes=kernel_bytes)
    streams = [pair.call(3 * MIB, timeout=1000.0)] + [pair.call(MIB // 2, timeout=1000.0) for _ in range(4)]
    arrived: dict[int, float] = {}
    answered: list[int] = []
    small: dict[int, float] = {}
    slowest = 0.0
    while len(answered) < len(streams):
        assert link.run(1.0) is False and pair.now < 400
        if len(small) < 20:
            small[pair.call(100, timeout=100.0)] = pair.now
        for event in pair.server.take():
            assert isinstance(event, CallReceived)
            arrived[event.stream] = pair.now
        for stream, at in list(arrived.items()):
            if stream in small or pair.now > at + 20:  # large ones are computed for 20 s
                del arrived[stream]
                size = 10 if stream in small else MIB
                pair.server.machine.reply(stream, None, (memoryview(contents(size)),), now=pair.now)
        for event in pair.client.take():
            if isinstance(event, BulkWanted):
                continue  # it cannot be had
            assert isinstance(event, ReplyReceived), event
            if event.stream in small:
                slowest = max(slowest, pair.now - small[event.stream])
            else:
                assert bytes(event.buffers[0]) == contents(MIB)
                answered.append(event.stream)
    assert pair.now > 90, "the way was slow"
    if bulk:
        assert slowest < 5, "small calls did not wait for large ones"


def test_a_message_that_rests_while_others_move_has_not_stalled() -> None:
    pair = Pair()
    link = SlowLink(pair, kernel_bytes=0)
    pair.call(MIB, timeout=1000.0)  # opens the window
    assert link.run(60.0, lambda: any(isinstance(event, CallReceived) for event in pair.server.events))
    pair.server.machine.reply(pair.received().stream, None, (), now=pair.now)
    for priority in (0, 1, 1, 1):
        pair.call(2 * MIB, timeout=1000.0, priority=priority)
    arrived: list[int] = []

    def all_arrived() -> bool:
        arrived.extend(event.stream for event in pair.server.take() if isinstance(event, CallReceived))
        return len(arrived) == 4

    assert link.run(200.0, all_arrived)
    assert arrived[-1] == 2, "the one of low priority waited for more than a minute, and arrived"


@pytest.mark.parametrize("lanes", [(BULK,), (MAIN, BULK)])
@pytest.mark.parametrize("client_to_server", [True, False])
def test_a_way_that_is_dead_is_noticed_all_the_same(client_to_server: bool, lanes: tuple[int, ...]) -> None:
    pair = Pair()
    link = SlowLink(pair, kernel_bytes=5 * MIB // 2)
    pair.call(4 * MIB, timeout=1000.0)
    if not client_to_server:
        assert link.run(100.0, lambda: any(isinstance(event, CallReceived) for event in pair.server.events))
        pair.server.machine.reply(pair.received().stream, None, (memoryview(bytes(4 * MIB)),), now=pair.now)
    link.run(20.0)
    link.dead = {(client_to_server, lane) for lane in lanes}
    begin = pair.now
    with pytest.raises(ConnectionLost):
        link.run(60.0)
    assert pair.now - begin <= 16.0 if len(lanes) == 2 else 23.0


def test_a_granted_reply_that_stalls_gives_its_room_back_and_the_connection_lives() -> None:
    pair = Pair(client=dataclasses.replace(SETTINGS, window_bytes=0))
    pair.call(10, timeout=1000.0)
    pair.settle()
    pair.server.machine.reply(pair.received().stream, None, (memoryview(bytes(9 * MIB)),), now=0.0)
    pair.carry(pair.server, BULK)
    pair.carry(pair.client, MAIN)
    pair.carry(pair.server, BULK)  # the first chunk, and no more
    assert pair.client.budget.used > 0
    for pair.now in (5.0, 10.0, 14.0, 16.0):
        pair.client.receive(MAIN, frames.frame(frames.PONG), pair.now)
        pair.client.receive(BULK, frames.frame(frames.PONG), pair.now)
        pair.client.machine.handle_timer(pair.now)
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and isinstance(event.error, ConnectionLost) and "stalled" in str(event.error)
    assert pair.client.budget.used == 0
    pair.settle()
    pair.server.take()
    pair.call(10)
    pair.settle()
    pair.received()


def test_parts_of_chunks_count_as_progress_and_nothing_ends_it_with_its_memory_let_go() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, window_bytes=0))
    pair.call(MIB, timeout=1000.0)
    pair.carry(pair.client, BULK)
    pair.carry(pair.server, MAIN)
    chunk = b"".join(pair.client.machine.data_to_send(BULK, 1))
    for index in range(10):  # 4 kbit/s: slower than anything, and not still
        pair.now = 10.0 * index
        pair.server.receive(BULK, chunk[5000 * index : 5000 * (index + 1)], pair.now)
        pair.server.receive(MAIN, frames.frame(frames.PONG), pair.now)
        pair.server.machine.handle_timer(pair.now)
    assert pair.server.budget.used > 0
    reader = pair.server.machine.lanes[BULK].reader
    assert reader._assembly is not None
    for pair.now in (100.0, 110.0):
        pair.server.receive(MAIN, frames.frame(frames.PONG), pair.now)
        pair.server.machine.life.bulk_moved(pair.now)  # nothing else comes; keep the lane out of it
        pair.server.machine.handle_timer(pair.now)
    assert pair.server.budget.used == 0 and reader._assembly is None
    pair.server.receive(BULK, chunk[50_000:], pair.now)  # the rest comes after all, and is skipped
    assert not pair.server.take()
    while pair.carry(pair.server, MAIN):
        pass
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and "stalled" in str(event.error)
    pair.call(MIB)
    pair.settle()
    pair.received()


def test_who_receives_for_long_says_so_and_idle_ends_say_no_more_than_before() -> None:
    pair = Pair()
    link = SlowLink(pair, kernel_bytes=0)
    sent = dict(pair.bytes)
    link.run(300.0)
    assert pair.bytes == sent  # `carry` was not used: what follows counts
    counts = {side: side.machine.lanes[MAIN].bytes_received for side in link.sides}
    assert all(count < 300 / 3 * 40 for count in counts.values()), "a ping or an answer each 3 s"
