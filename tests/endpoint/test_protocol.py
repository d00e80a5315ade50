"""The machine of a connection: two of them joined by function calls, under a clock of the test's own."""

import dataclasses
import gc
import random
import tracemalloc

import pytest

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.events import (
    BulkWanted,
    CallCancelled,
    CallFailed,
    CallReceived,
    PeerClosed,
    ReplyReceived,
    RequestUnseen,
)
from tesseract_async.endpoint.lanes import BULK, MAIN
from tesseract_async.endpoint.protocol import ConnectionProtocol
from tesseract_async.errors import (
    ConnectionLost,
    ExpertFailed,
    MessageTooLarge,
    Overloaded,
    ProtocolError,
    RemoteError,
)
from tesseract_async.wire import frames
from tests.endpoint.machines import SETTINGS, Pair, Side, contents, taken

MIB = 2**20


def clean(pair: Pair) -> bool:
    """Whether nothing of any call is left at either end."""
    return all(
        side.machine.num_calls == 0 and side.machine.unsent_bytes == 0 and not side.budget.num_waiting
        for side in (pair.client, pair.server)
    )


def test_a_small_call_and_its_reply_are_one_frame_each() -> None:
    pair = Pair()
    before = dict(pair.bytes)
    stream = pair.call(100, 0, body={"x": 1})
    pair.settle()
    call = pair.received()
    assert call.head.body == {"x": 1} and [len(buffer) for buffer in call.buffers] == [100, 0]
    assert call.deadline == pytest.approx(10.0, abs=0.01)
    pair.server.machine.reply(call.stream, "done", call.buffers, now=0.0)
    pair.settle()
    (reply,) = pair.client.take()
    assert isinstance(reply, ReplyReceived) and reply.stream == stream and reply.body == "done"
    assert bytes(reply.buffers[0]) == bytes(call.buffers[0])
    assert clean(pair) and pair.bytes[BULK] == before[BULK]


@pytest.mark.parametrize("bulk", [True, False])
def test_large_messages_arrive_whole_in_any_order_of_bytes(bulk: bool) -> None:
    for seed in range(3):
        pair = Pair(bulk=bulk, seed=seed)
        pick = random.Random(seed)
        calls = {}
        for _ in range(6):
            sizes = tuple(pick.choice((0, 5, 70_000, MIB + 1, 2 * MIB)) for _ in range(3))
            calls[pair.call(*sizes)] = sizes
        answered = 0
        while answered < len(calls):
            pair.settle()
            for event in pair.server.take():
                assert isinstance(event, CallReceived)
                assert tuple(map(len, event.buffers)) == calls[event.stream]
                pair.server.machine.reply(event.stream, event.stream, event.buffers, now=0.0)
            for reply in pair.client.take():
                assert isinstance(reply, ReplyReceived) and reply.body == reply.stream
                sizes = calls[reply.stream]
                assert [bytes(b) for b in reply.buffers] == [contents(size) for size in sizes]
                answered += 1
        assert clean(pair)
        assert (pair.bytes[BULK] > 0) == bulk


def test_the_first_large_message_asks_and_later_ones_use_the_standing_window() -> None:
    pair = Pair()
    pair.call(MIB)
    assert pair.client.machine.has_data(BULK)
    pair.carry(pair.client, BULK)
    assert not pair.client.machine.has_data(BULK), "no chunk leaves before room was granted"
    pair.settle()
    call = pair.received()
    pair.server.machine.reply(call.stream, None, (), now=0.0)
    pair.settle()
    for _ in range(40):  # far more than the window in all: credit comes back with each reply
        pair.call(MIB)
        pair.carry(pair.client, BULK, 10 * MIB)
        (call,) = pair.server.take()
        assert isinstance(call, CallReceived), "it arrived without a round trip"
        pair.server.machine.reply(call.stream, None, (), now=0.0)
        pair.settle()
    assert clean(pair)


def test_large_replies_use_and_give_back_the_standing_window_too() -> None:
    pair = Pair()
    for index in range(40):
        pair.call(1)
        pair.settle()
        pair.server.machine.reply(pair.received().stream, None, (memoryview(bytes(MIB)),), now=0.0)
        pair.carry(pair.server, BULK, 10 * MIB)
        arrived = any(isinstance(event, ReplyReceived) for event in pair.client.take())
        assert arrived == (index > 0), "all but the first come without a round trip"
        pair.settle()
    assert clean(pair)


def test_messages_beyond_a_peers_share_wait_whole_and_in_line() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, window_bytes=2**40), server_budget=32 * MIB)
    streams = [pair.call(2 * MIB - 1000) for _ in range(4)]
    for expected in (streams[:2], streams[2:]):
        pair.settle()
        arrived = [event.stream for event in pair.server.take() if isinstance(event, CallReceived)]
        assert arrived == expected and 3 * MIB < pair.server.budget.used <= 4 * MIB
        for stream in arrived:
            pair.server.machine.reply(stream, None, (), now=0.0)
    pair.settle()
    assert len(pair.client.take()) == 4 and clean(pair) and pair.server.budget.used == 0


def test_what_never_fits_the_budget_is_refused_not_waited_for() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, window_bytes=0), server_budget=MIB)
    pair.call(2 * MIB)
    pair.settle()
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and isinstance(event.error, Overloaded) and clean(pair)
    pair = Pair(client=dataclasses.replace(SETTINGS, window_bytes=0), client_budget=MIB)
    pair.call(1)
    pair.settle()
    pair.server.machine.reply(pair.received().stream, None, (memoryview(bytes(2 * MIB)),), now=0.0)
    pair.settle()
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and isinstance(event.error, MessageTooLarge)
    pair.settle()
    assert clean(pair)


def test_a_reserved_reply_comes_without_asking_and_its_room_is_given_back() -> None:
    pair = Pair(client=dataclasses.replace(SETTINGS, window_bytes=0))
    pair.call(10, max_reply=3 * MIB)
    pair.settle()
    assert pair.client.budget.used == 0, "what is expected takes nothing yet"
    pair.server.machine.reply(pair.received().stream, None, (memoryview(bytes(2 * MIB)),), now=0.0)
    pair.carry(pair.server, BULK, 10 * MIB)
    assert isinstance(pair.client.take()[0], ReplyReceived)
    pair.settle()
    assert pair.client.budget.used == 0 and clean(pair)


def test_a_reply_larger_than_its_caller_takes_becomes_an_error() -> None:
    pair = Pair()
    pair.call(10, max_reply=MIB)
    pair.settle()
    pair.server.machine.reply(pair.received().stream, None, (memoryview(bytes(2 * MIB)),), now=0.0)
    pair.settle()
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and "1048576" in str(event.error) and clean(pair)


def test_requests_that_are_too_large_are_refused_before_anything_is_sent() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, max_message=MIB))
    with pytest.raises(MessageTooLarge):
        pair.call(2 * MIB)
    with pytest.raises(ValueError, match="at most 1024 buffers"):
        pair.call(*[1] * 1025)
    with pytest.raises(TypeError):
        pair.call(body=object())
    assert not pair.client.machine.has_data(MAIN) and clean(pair)


def test_the_peers_limits_make_calls_wait_here() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, max_calls=2, max_small=50_000))
    streams = [pair.call(20_000) for _ in range(5)]
    seen = []
    for _ in range(3):
        pair.settle()
        arrived = [event.stream for event in pair.server.take()]  # type: ignore[union-attr]
        assert len(arrived) <= 2
        seen += arrived
        for stream in arrived:
            pair.server.machine.reply(stream, None, (), now=0.0)
    pair.settle()
    assert seen == streams and len(pair.client.take()) == 5 and clean(pair)


def test_a_waiting_call_can_be_cancelled_or_expire() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, max_calls=1))
    pair.call(1)
    second, third = pair.call(1, timeout=1.0), pair.call(1)
    pair.client.machine.cancel_call(third)
    pair.client.machine.handle_timer(2.0)
    assert [event.stream for event in pair.client.take()] == [second]  # type: ignore[union-attr]
    pair.settle()
    pair.server.machine.reply(pair.received().stream, None, (), now=0.0)
    pair.settle()
    assert not pair.server.take() and len(pair.client.take()) == 1 and clean(pair)


def test_cancelling_at_every_step_leaves_nothing_behind() -> None:
    for size, reply_size in ((10, 10), (3 * MIB, 10), (10, 3 * MIB), (3 * MIB, 3 * MIB)):
        for steps in range(14):
            pair = Pair(client_budget=20 * MIB, server_budget=20 * MIB)
            stream = pair.call(size)
            ways = [(side, lane) for side in (pair.client, pair.server) for lane in (BULK, MAIN)]
            delivered = False
            for step in range(steps):
                pair.carry(*ways[step % 4], 300_000)
                for event in pair.server.take():
                    delivered = isinstance(event, CallReceived)
                    pair.server.machine.reply(stream, None, (memoryview(bytes(reply_size)),), now=0.0)
            finished = any(isinstance(event, ReplyReceived) for event in pair.client.take())
            pair.client.machine.cancel_call(stream)
            pair.settle()
            for event in pair.server.take():
                assert isinstance(event, CallReceived | CallCancelled)
            assert not pair.client.take()
            assert clean(pair), (size, reply_size, steps, delivered, finished)
            for side in (pair.client, pair.server):
                windows = side.machine.windows
                assert side.budget.used == 0 and side.budget.windows == windows.in_bytes
                assert windows.in_used == 0 and windows.out_used == 0
            pair.call(5)
            pair.settle()
            assert isinstance(pair.server.take()[-1], CallReceived), "the connection goes on"


def test_cancel_reaches_the_handler_once() -> None:
    pair = Pair()
    stream = pair.call(5)
    pair.settle()
    pair.received()
    pair.client.machine.cancel_call(stream)
    pair.client.machine.cancel_call(stream)
    pair.settle()
    assert pair.server.take() == [CallCancelled(stream)]
    pair.server.machine.reply(stream, None, (), now=0.0)
    pair.server.machine.fail(stream, RemoteError("late"))
    pair.settle()
    assert not pair.client.take()


def test_an_error_may_come_while_the_request_is_still_on_its_way() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, window_bytes=0))
    stream = pair.call(9 * MIB)
    pair.carry(pair.client, BULK)
    pair.carry(pair.server, MAIN)
    pair.carry(pair.client, BULK)
    pair.server.machine.fail(stream, Overloaded("full", retry_after=1.0))
    pair.carry(pair.client, BULK)  # chunks that were on the way are skipped
    pair.settle()
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and isinstance(event.error, Overloaded)
    assert clean(pair) and pair.bytes[BULK] < 4 * MIB, "the rest never left"


def test_errors_keep_their_class() -> None:
    pair = Pair()
    pair.call(5)
    pair.settle()
    pair.server.machine.fail(pair.received().stream, ExpertFailed("division by zero"))
    pair.settle()
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and isinstance(event.error, ExpertFailed) and clean(pair)


def test_deadlines_end_calls_on_both_sides() -> None:
    pair = Pair()
    stream = pair.call(5, timeout=2.0)
    pair.settle()
    pair.received()
    assert pair.client.machine.timer_at() == 2.0
    pair.client.machine.handle_timer(1.9)
    assert not pair.client.take()
    pair.client.machine.handle_timer(2.0)
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and isinstance(event.error, TimeoutError) and "m at peer" in str(event.error)
    pair.server.machine.handle_timer(2.1)
    assert pair.server.take() == [CallCancelled(stream)]
    pair.settle()
    assert clean(pair)


def test_old_deadlines_are_forgotten() -> None:
    pair = Pair()
    for _ in range(1000):
        pair.call(1, timeout=1000.0)
        pair.settle()
        pair.server.machine.reply(pair.received().stream, None, (), now=0.0)
        pair.settle()
        pair.client.take()
    assert all(len(side.machine.deadlines) <= 70 for side in (pair.client, pair.server))


def test_higher_priority_goes_first_and_equals_share() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, window_bytes=0))
    low = [pair.call(5 * MIB, priority=-1) for _ in range(2)]
    high = pair.call(5 * MIB, priority=1)
    pair.carry(pair.client, BULK)
    pair.carry(pair.server, MAIN)
    order = []
    for _ in range(50):
        pair.carry(pair.client, BULK, 1)
        order += [event.stream for event in pair.server.take() if isinstance(event, CallReceived)]
    assert order == [high, *low]
    assert len(pair.client.machine.lanes[BULK].large) == 0


def test_the_dialer_opens_the_bulk_lane_when_either_side_needs_it() -> None:
    pair = Pair(bulk=False)
    pair.call(MIB)
    assert BulkWanted() in taken(pair.client.machine)
    pair.client.machine.bulk_failed(0.0)
    pair.settle()
    call = pair.received()
    pair.server.machine.reply(call.stream, None, call.buffers, now=0.0)
    assert not any(isinstance(event, BulkWanted) for event in taken(pair.server.machine))
    pair.now = 100.0
    pair.carry(pair.server, MAIN)
    assert any(isinstance(event, BulkWanted) for event in pair.client.take())
    pair.settle()
    assert clean(pair)


def test_a_silent_peer_is_pinged_and_then_dead() -> None:
    pair = Pair()
    machine = pair.client.machine
    assert machine.life.rtt == 0.0
    assert machine.timer_at() == SETTINGS.ping_after
    machine.handle_timer(3.0)
    assert machine.has_data(MAIN) and machine.timer_at() == SETTINGS.dead_after
    pair.now = 3.5
    pair.settle()
    assert machine.life.rtt == pytest.approx(0.0625)
    assert machine.timer_at() == pytest.approx(6.5), "any byte counts as life"
    machine.handle_timer(6.5)
    with pytest.raises(ConnectionLost, match="nothing was heard"):
        machine.handle_timer(12.5)


def test_after_our_own_stall_nobody_is_judged_before_the_socket_was_read() -> None:
    machine = Pair().client.machine
    machine.handle_timer(4.0)
    machine.handle_timer(60.0, late=48.0)
    with pytest.raises(ConnectionLost):
        machine.handle_timer(70.0)


def test_a_bulk_lane_that_stands_still_is_noticed_while_main_lives() -> None:
    pair = Pair()
    pair.call(MIB, timeout=1000.0)
    pair.settle()
    pair.received()  # its handler takes its time
    machine = pair.client.machine
    for pair.now in (7.5, 15.0, 22.5):
        machine.handle_timer(pair.now)
        assert machine.has_data(BULK), "pinged, as long as a call uses it"
        pair.settle()
    pair.now = 30.0
    machine.handle_timer(pair.now)
    machine.data_to_send(BULK, 1)  # lost on the way
    while pair.carry(pair.client, MAIN) or pair.carry(pair.server, MAIN):
        pass
    pair.now = 37.5
    machine.life.received(1, pair.now, MAIN)
    with pytest.raises(ConnectionLost, match="bulk channel has stood still"):
        machine.handle_timer(pair.now)


def test_a_main_lane_that_stands_still_is_noticed_while_bulk_lives() -> None:
    machine = Pair().client.machine
    machine.handle_timer(3.0)
    for now in (5.0, 10.0, 14.9):
        machine.life.received(10, now, BULK)
        assert machine.timer_at() == pytest.approx(min(now + 9.0, 15.0))
        machine.handle_timer(now)
    with pytest.raises(ConnectionLost):
        machine.handle_timer(15.0)


def test_half_received_requests_that_stall_are_given_up() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, window_bytes=0))
    pair.call(9 * MIB, timeout=1000.0)
    pair.carry(pair.client, BULK)
    pair.carry(pair.server, MAIN)
    pair.carry(pair.client, BULK)
    assert 0 < pair.server.budget.used <= 2 * MIB, "what has not come does not count"
    pair.server.machine.handle_timer(20.0)
    assert pair.server.budget.used == 0
    pair.now = 20.0
    pair.settle()
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and "stalled" in str(event.error) and clean(pair)


def test_a_request_that_comes_too_slowly_is_given_up_although_it_moves() -> None:
    side = Pair().server
    side.receive(MAIN, begin(frames.BEGIN_REQUEST, MIB, frames.ROOM_ASKED), 0.0)
    seconds = 0.0
    while side.budget.used:
        seconds += 10.0
        side.receive(MAIN, frames.HEADER.pack(frames.CHUNK_REQUEST, 0, 0, 4096, 1) + bytes(4096), seconds)
        side.machine.handle_timer(seconds)
    assert 60 + MIB / 4096 < seconds < 80 + MIB / 4096


def test_a_farewell_tells_which_calls_were_never_seen() -> None:
    pair = Pair()
    first = pair.call(1)
    pair.settle()
    second = pair.call(1)
    pair.server.machine.farewell("leaving")
    pair.carry(pair.server, MAIN)
    assert pair.client.take() == [PeerClosed("leaving")]
    pair.client.machine.connection_lost("closed")
    failed = {event.stream: event.error for event in pair.client.take() if isinstance(event, CallFailed)}
    assert type(failed[first]) is ConnectionLost and type(failed[second]) is RequestUnseen


def test_the_end_of_a_connection_ends_everything_in_it() -> None:
    pair = Pair(client_budget=40 * MIB, server_budget=40 * MIB)
    streams = {pair.call(10), pair.call(3 * MIB), pair.call(10, max_reply=MIB), pair.call(30 * MIB)}
    pair.settle()
    for side in (pair.client, pair.server):
        side.machine.connection_lost("cut")
        assert side.budget.used == 0 == side.budget.windows and side.machine.num_calls == 0
    lost = [event for event in pair.client.take() if isinstance(event, CallFailed)]
    assert {event.stream for event in lost} == streams
    assert all(isinstance(event.error, ConnectionLost) for event in lost)
    delivered = {event.stream for event in pair.server.events if isinstance(event, CallReceived)}
    cancelled = {event.stream for event in pair.server.take() if isinstance(event, CallCancelled)}
    assert cancelled == delivered


def test_a_fast_far_peer_gets_a_wider_window() -> None:
    pair = Pair()
    pair.server.machine.life.rtt = 0.2
    for index in range(80):
        pair.now = index * 0.01
        pair.call(4 * MIB)
        pair.settle()
        pair.server.machine.life.rtt = 0.2
        pair.server.machine.reply(pair.received().stream, None, (), now=pair.now)
        pair.settle()
    assert pair.server.machine.windows.bytes_per_second == pytest.approx(400 * MIB, rel=0.2)
    assert pair.client.machine.windows.out_bytes > 100 * MIB
    assert pair.server.budget.windows == pair.client.machine.windows.out_bytes


def hostile(settings: Bounds = SETTINGS) -> tuple[Side, ConnectionProtocol]:
    side = Pair(server=settings).server
    return side, side.machine


def begin(kind: int, size: int, flags: int, stream: int = 1) -> bytes:
    return frames.frame(kind, stream=stream, flags=flags, payload=frames.encode_table(100, [size]))


@pytest.mark.parametrize(
    "data",
    [
        begin(frames.BEGIN_REQUEST, 2**40, frames.ROOM_ASKED),
        begin(frames.BEGIN_REQUEST, 2**63, frames.ROOM_ASKED),
        begin(frames.BEGIN_REQUEST, MIB, frames.ROOM_WINDOW),
        begin(frames.BEGIN_REQUEST, MIB, frames.ROOM_RESERVED),
        begin(frames.BEGIN_REQUEST, MIB, 77),
        begin(frames.BEGIN_REQUEST, 10, frames.ROOM_ASKED),
        begin(frames.BEGIN_REQUEST, MIB, frames.ROOM_ASKED) * 2,
        begin(frames.BEGIN_REQUEST, MIB, frames.ROOM_ASKED)
        + frames.HEADER.pack(frames.CHUNK_REQUEST, 0, 0, MIB, 1)
        + bytes(MIB)
        + frames.HEADER.pack(frames.CHUNK_REQUEST, 0, 0, MIB, 1),
        begin(frames.BEGIN_REQUEST, MIB, frames.ROOM_ASKED)
        + (frames.HEADER.pack(frames.CHUNK_REQUEST, 0, 0, 1, 1) + b"x") * 2,
        frames.frame(99),
        frames.frame(frames.HELLO),
        frames.frame(frames.CREDIT, stream=1),
        frames.frame(frames.REQUEST, stream=1),
        frames.frame(frames.REQUEST, stream=1, payload=frames.encode_table(5, []) + b"\x91" * 5),
        frames.frame(frames.REQUEST, stream=1, payload=frames.encode_table(1, []) + b"\xc0"),
        frames.frame(frames.BULK),
        frames.frame(frames.PING) * 10_001,
        frames.frame(frames.CANCEL, stream=5) * 10_001,
        frames.frame(frames.WINDOW, stream=2**60),
    ],
    ids=str,
)
def test_broken_rules_raise_protocol_errors_and_take_no_memory(data: bytes) -> None:
    side, machine = hostile()
    with pytest.raises(ProtocolError):
        side.receive(MAIN, data, 0.0)
    machine.connection_lost("broken rules")
    assert side.budget.used == 0 and machine.num_calls == 0


@pytest.mark.parametrize("first", [MAIN, BULK])
def test_a_message_keeps_to_its_lane(first: int) -> None:
    other = BULK if first == MAIN else MAIN
    for kind in (frames.CHUNK_REQUEST, frames.CHUNK_REPLY):
        pair = Pair()
        if kind == frames.CHUNK_REQUEST:
            side, start = pair.server, begin(frames.BEGIN_REQUEST, MIB, frames.ROOM_ASKED)
        else:
            side, start = pair.client, begin(frames.BEGIN_REPLY, MIB, frames.ROOM_ASKED, pair.call(1))
            pair.settle()
        chunk = frames.HEADER.pack(kind, 0, 0, MIB, 1)
        side.receive(first, start + chunk + bytes(9), 0.0)
        with pytest.raises(ProtocolError, match="lane"):
            side.receive(other, chunk + bytes(MIB), 0.0)
        side.machine.connection_lost("broken rules")
        assert side.budget.used == 0 and side.machine.num_calls == 0


def test_a_flood_of_small_calls_that_are_refused_is_cut_off() -> None:
    side = Pair(small_budget=0).server
    head = frames.pack(("m", 1000, 0, 0, 5, None))
    with pytest.raises(ProtocolError, match="flood"):
        for stream in range(1, 20_000):
            side.receive(MAIN, frames.encode_small(frames.REQUEST, stream, head, (), ()), 0.0)
    assert side.machine.num_calls < 20


def test_memory_of_large_messages_is_free_without_the_collector() -> None:
    pair = Pair()

    def exchange() -> None:
        pair.call(2 * MIB)
        pair.call(5, in_parts=True, max_reply=9 * MIB)
        pair.settle()
        received = [event for event in pair.server.take() if isinstance(event, CallReceived)]
        first, second = sorted(received, key=lambda event: event.stream)
        pair.server.machine.reply(first.stream, None, first.buffers, now=0.0)
        pair.server.machine.reply(second.stream, None, first.buffers, now=0.0, more=True)
        pair.settle()
        pair.server.machine.reply(second.stream, None, first.buffers, now=0.0)
        pair.settle()
        assert len(pair.client.take()) == 3 and clean(pair)

    exchange()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(4):
            exchange()
        assert tracemalloc.get_traced_memory()[0] < MIB
    finally:
        tracemalloc.stop()
        gc.enable()


def test_many_tiny_buffers_count_what_they_cost() -> None:
    sizes = [1] * 1023 + [frames.MAX_SMALL]
    tracemalloc.start()
    try:
        assembly = frames.Assembly(8, sizes)
        cost = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert assembly.left < 100_000
    side = Pair().server
    payload = frames.encode_table(8, sizes)
    side.receive(MAIN, frames.frame(frames.BEGIN_REQUEST, stream=1, payload=payload), 0.0)
    assert side.budget.used > 0.9 * cost > 250_000
    side.machine.connection_lost("cut")
    assert side.budget.used == 0


def test_more_calls_than_allowed_are_a_broken_rule() -> None:
    side, machine = hostile(dataclasses.replace(SETTINGS, max_calls=5))
    head = frames.pack(("m", 1000, 0, 0, 5, None))
    with pytest.raises(ProtocolError, match="more than 5 calls"):
        for stream in range(1, 20):
            side.receive(MAIN, frames.encode_small(frames.REQUEST, stream, head, [], []), 0.0)
    assert machine.num_calls == 10


def test_replies_to_calls_that_ended_are_ignored_but_not_to_calls_that_never_left() -> None:
    pair = Pair(server=dataclasses.replace(SETTINGS, max_calls=1))
    pair.call(1)
    waiting = pair.call(1)
    ok = frames.pack((0, None))
    pair.client.receive(MAIN, frames.encode_small(frames.REPLY, 1000, ok, [], []), 0.0)
    assert not pair.client.take()
    with pytest.raises(ProtocolError, match="never sent"):
        pair.client.receive(MAIN, frames.encode_small(frames.REPLY, waiting, ok, [], []), 0.0)
