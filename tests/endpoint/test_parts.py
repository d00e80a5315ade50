"""Replies in parts: order, grants, bounds, cancellation, and peers that know none or break the rules."""

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.endpoint.budget import Owner
from tesseract_async.endpoint.call_table import LastPart
from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.endpoint.events import CallCancelled, CallFailed, CallReceived, PartReceived, ReplyReceived
from tesseract_async.endpoint.handlers import Handlers
from tesseract_async.endpoint.lanes import BULK, MAIN
from tesseract_async.errors import ConnectionLost, Overloaded, ProtocolError, RemoteError
from tesseract_async.identity import Identity
from tesseract_async.transport.tcp import TcpTransport
from tesseract_async.wire import frames, heads
from tests.endpoint.machines import SETTINGS, Pair, contents
from tests.faults.serving import serving, until

MIB = 2**20
AHEAD = frames.PARTS_AHEAD
PLAIN = EndpointSettings(security="plain")


class Stream:
    """One call whose reply comes in parts, over a pair of machines: the callee sends whatever it may."""

    def __init__(self, pair: Pair, sizes: list[int], *, max_reply: int | None = None, number: int = 0) -> None:
        self.pair = pair
        self.left = [*enumerate(sizes)]
        self.sizes = sizes
        self.taken: list[tuple[Any, list[int]]] = []
        self.untaken = 0
        self.ended: Any = None
        self.stream = pair.call(5, body=number, in_parts=True, max_reply=max_reply, timeout=1000.0)
        self.delivered = False
        self.callee_ended = False

    def send(self) -> None:
        """Sends parts as long as the machine takes some; then the end."""
        machine = self.pair.server.machine
        while self.delivered and not self.callee_ended and machine.incoming.takes_part(self.stream):
            if not self.left:
                machine.reply(self.stream, None, (), now=self.pair.now)
                self.callee_ended = True
            else:
                index, size = self.left.pop(0)
                buffers = (memoryview(contents(size)),)
                if not machine.reply(self.stream, index, buffers, now=self.pair.now, more=True):
                    self.callee_ended = True

    def take(self) -> None:
        """The caller takes one part."""
        assert self.untaken
        self.untaken -= 1
        self.pair.client.machine.outgoing.part_taken(self.stream)

    def hear(self, event: Any) -> None:
        """What the caller's machine told of this call."""
        if isinstance(event, PartReceived):
            self.untaken += 1
            assert self.untaken <= AHEAD
            assert all(bytes(buffer) == contents(len(buffer)) for buffer in event.buffers)
            self.taken.append((event.body, [len(buffer) for buffer in event.buffers]))
        else:
            assert self.ended is None
            self.ended = event

    @property
    def expected(self) -> list[tuple[int, list[int]]]:
        return [(index, [size]) for index, size in enumerate(self.sizes)]


def clean(pair: Pair) -> bool:
    """Whether nothing of any call is left at either end."""
    return all(
        side.machine.num_calls == 0
        and side.machine.backlog == 0
        and side.budget.used == 0
        and side.budgets.replies.used == 0
        and side.machine.windows.in_used == 0
        and side.machine.windows.out_used == 0
        and side.machine.life.num_on_bulk == 0
        and not side.machine.incoming.waiting.in_parts
        for side in (pair.client, pair.server)
    )


def turn(pair: Pair, streams: dict[int, Stream]) -> None:
    """Carries everything, and tells both ends what has happened."""
    pair.settle()
    for event in pair.server.take():
        if isinstance(event, CallReceived):
            assert event.in_parts
            streams[event.stream].delivered = True
        elif isinstance(event, CallCancelled):
            streams[event.stream].callee_ended = True
    for event in pair.client.take():
        streams[event.stream].hear(event)  # type: ignore[union-attr]
    for stream in streams.values():
        stream.send()


def finish(pair: Pair, streams: dict[int, Stream]) -> None:
    """Goes on, taking all that comes, until every call has ended."""
    for _ in range(2000):
        turn(pair, streams)
        for stream in streams.values():
            if stream.untaken:
                stream.take()
        if all(stream.ended is not None for stream in streams.values()):
            break
    pair.settle()
    pair.server.take()


def begin_part(stream: int, size: int, flags: int = frames.MORE) -> bytes:
    return frames.frame(frames.BEGIN_REPLY, stream=stream, flags=flags, payload=frames.encode_table(100, [size]))


def small_part(stream: int, *, more: bool = True, size: int = 0) -> bytes:
    head = heads.encode_result("part")
    return frames.encode_small(
        frames.REPLY, stream, head, [size], [memoryview(bytes(size))], flags=frames.MORE if more else 0
    )


@pytest.mark.parametrize("bulk", [True, False])
def test_parts_come_in_order_whatever_their_sizes(bulk: bool) -> None:
    for seed in range(4):
        pair = Pair(bulk=bulk, seed=seed)
        pick = random.Random(seed)
        streams = {}
        for number in range(3):
            sizes = [pick.choice((0, 5, 60_000, 70_000, MIB + 1)) for _ in range(9)]
            stream = Stream(pair, sizes, number=number)
            streams[stream.stream] = stream
        finish(pair, streams)
        for stream in streams.values():
            assert stream.taken == stream.expected
            assert isinstance(stream.ended, ReplyReceived) and stream.ended.body is None
        assert clean(pair)


def test_a_callee_waits_for_a_caller_that_takes_nothing() -> None:
    for size in (10, 70_000):
        pair = Pair()
        stream = Stream(pair, [size] * 20)
        for _ in range(5):
            turn(pair, {stream.stream: stream})
        assert stream.untaken == len(stream.taken) == AHEAD and len(stream.left) == 20 - AHEAD
        assert AHEAD * size <= pair.client.budget.used <= AHEAD * (size + 100), "each counts until it is taken"
        stream.take()
        turn(pair, {stream.stream: stream})
        turn(pair, {stream.stream: stream})
        assert len(stream.taken) == AHEAD + 1 and stream.untaken == AHEAD
        finish(pair, {stream.stream: stream})
        assert stream.taken == stream.expected and clean(pair)


def test_a_reply_in_one_is_one_for_a_caller_that_takes_parts() -> None:
    for size in (10, MIB):
        pair = Pair()
        stream = pair.call(5, in_parts=True)
        pair.settle()
        assert pair.received().in_parts
        pair.server.machine.reply(stream, "all", (memoryview(contents(size)),), now=0.0)
        pair.settle()
        (event,) = pair.client.take()
        assert isinstance(event, ReplyReceived) and event.body == "all" and len(event.buffers[0]) == size
        assert clean(pair)


def test_an_error_ends_a_reply_after_its_parts() -> None:
    pair = Pair()
    stream = Stream(pair, [10, MIB, 10, 10, 10])
    while len(stream.taken) < AHEAD:
        turn(pair, {stream.stream: stream})
    pair.server.machine.fail(stream.stream, RemoteError("half of it was lost"))
    stream.callee_ended = True
    turn(pair, {stream.stream: stream})
    assert len(stream.taken) == AHEAD and isinstance(stream.ended, CallFailed)
    assert "half of it" in str(stream.ended.error) and clean(pair), "what was not taken counts no more"


def test_an_error_does_not_overtake_the_parts_before_it() -> None:
    pair = Pair()
    stream = Stream(pair, [10] * 9)
    pair.carry(pair.client, MAIN)
    stream.delivered = bool(pair.server.take())
    stream.send()
    pair.server.machine.fail(stream.stream, RemoteError("half of it was lost"))
    for lane in (MAIN, BULK):
        pair.carry(pair.server, lane)
    for event in pair.client.take():
        stream.hear(event)
    assert len(stream.taken) == AHEAD and isinstance(stream.ended, CallFailed)


def test_all_parts_together_keep_to_the_callers_bound() -> None:
    pair = Pair()
    stream = Stream(pair, [200_000] * 9, max_reply=MIB)
    finish(pair, {stream.stream: stream})
    assert 4 <= len(stream.taken) <= 5 and isinstance(stream.ended, CallFailed)
    assert "more than the" in str(stream.ended.error) and clean(pair)


def test_a_reply_has_no_more_parts_than_the_wire_allows() -> None:
    pair = Pair()
    stream = Stream(pair, [0] * (frames.MAX_PARTS + 5))
    finish(pair, {stream.stream: stream})
    assert len(stream.taken) == frames.MAX_PARTS - 1 and "more than 1024 parts" in str(stream.ended.error)
    pair = Pair()
    stream = Stream(pair, [0] * (frames.MAX_PARTS - 1))
    finish(pair, {stream.stream: stream})
    assert stream.taken == stream.expected and isinstance(stream.ended, ReplyReceived) and clean(pair)


def test_a_caller_that_takes_nothing_for_long_loses_the_rest() -> None:
    for size in (10, 70_000):
        pair = Pair()
        stream = Stream(pair, [size] * 20)
        for _ in range(5):
            turn(pair, {stream.stream: stream})
        pair.server.machine.handle_timer(29.0, late=29.0)
        turn(pair, {stream.stream: stream})
        assert stream.ended is None
        pair.now = 31.0
        pair.server.machine.handle_timer(31.0, late=31.0)
        turn(pair, {stream.stream: stream})
        assert stream.callee_ended, "the handler is cancelled"
        assert isinstance(stream.ended, CallFailed) and isinstance(stream.ended.error, Overloaded) and clean(pair)


def test_a_caller_that_takes_a_part_now_and_then_holds_its_handler_no_longer_than_their_bytes_allow() -> None:
    for size, longest in ((10, 3 * 29.0), (70_000, 10 * 29.0)):  # a minute, and 17 s for each of the larger ones
        pair = Pair()
        stream = Stream(pair, [size] * 1000)
        for _ in range(5):
            turn(pair, {stream.stream: stream})
        while stream.ended is None and pair.now < 1000.0:
            pair.now += 29.0
            pair.server.machine.handle_timer(pair.now, late=0.0)
            turn(pair, {stream.stream: stream})
            stream.take()
            turn(pair, {stream.stream: stream})
        assert pair.now == longest and stream.callee_ended, "the handler is cancelled"
        assert isinstance(stream.ended, CallFailed) and isinstance(stream.ended.error, Overloaded) and clean(pair)


def test_the_deadline_ends_a_reply_in_parts_at_both_ends() -> None:
    pair = Pair()
    stream = Stream(pair, [MIB] * 20)
    for _ in range(5):
        turn(pair, {stream.stream: stream})
    for side in (pair.client, pair.server):
        side.machine.handle_timer(1000.1, late=990.0)
    turn(pair, {stream.stream: stream})
    assert stream.callee_ended and isinstance(stream.ended, CallFailed)
    assert isinstance(stream.ended.error, TimeoutError) and clean(pair)


@pytest.mark.parametrize("size", [10, 70_000, MIB])
def test_a_cancel_at_any_moment_leaves_nothing_behind(size: int) -> None:
    for steps in range(16):
        pair = Pair()
        stream = Stream(pair, [size] * 9)
        ways = [(side, lane) for side in (pair.client, pair.server) for lane in (BULK, MAIN)]
        for step in range(steps):
            pair.carry(*ways[step % 4], 100_000)
            stream.delivered = stream.delivered or any(isinstance(e, CallReceived) for e in pair.server.take())
            stream.send()
            for event in pair.client.take():
                stream.hear(event)
            if stream.untaken and step % 3 == 0:
                stream.take()
        pair.client.machine.cancel_call(stream.stream)
        pair.settle()
        assert not pair.client.take()
        pair.server.take()
        assert clean(pair), steps
        pair.call(5)
        pair.settle()
        assert isinstance(pair.server.take()[-1], CallReceived), "the connection goes on"


def test_parts_for_calls_that_ended_or_never_were_are_skipped() -> None:
    pair = Pair()
    stream = pair.call(5, in_parts=True)
    pair.settle()
    pair.client.machine.cancel_call(stream)
    pair.settle()
    chunk = frames.HEADER.pack(frames.CHUNK_REPLY, 0, 0, 100_100, stream) + bytes(100_100)
    for number in (stream, 1000):
        data = small_part(number, size=1000) + begin_part(number, 100_000) + chunk + small_part(number, more=False)
        pair.client.receive(MAIN, data, 0.0)
    assert not pair.client.take() and pair.client.budget.used == 0 and pair.client.machine.num_calls == 0
    with pytest.raises(ProtocolError, match="flood"):
        pair.client.receive(MAIN, small_part(1000) * 10_001, 0.0)
    with pytest.raises(ProtocolError, match="flood"):
        Pair().client.receive(MAIN, begin_part(1000, 100_000) * 10_001, 0.0)


RULES = {
    "more for ever": (small_part(1) * (AHEAD + 1), "not granted"),
    "large ones for ever": (begin_part(1, 70_000) * 2, "within another"),
    "one within another": (begin_part(1, 70_000) + small_part(1), "within another"),
    "the end within a part": (begin_part(1, 70_000) + small_part(1, more=False), "within another"),
    "more than the bound": (small_part(1, size=60_000) * 3, "larger than its caller accepts"),
    "a part larger than the bound": (begin_part(1, 200_000), "larger than its caller accepts"),
    "an error and more": (
        frames.encode_small(frames.REPLY, 1, heads.encode_error(RemoteError("x")), (), (), flags=frames.MORE),
        "an error ends a reply",
    ),
    "in the window that is not there": (begin_part(1, 70_000, frames.MORE | frames.ROOM_WINDOW), "window"),
    "unknown room": (begin_part(1, 70_000, frames.MORE | 3), "malformed"),
}


@pytest.mark.parametrize("rule", RULES)
def test_callees_that_break_the_rules_are_cut_off(rule: str) -> None:
    data, sentence = RULES[rule]
    pair = Pair()
    pair.call(5, in_parts=True, max_reply=150_000)
    pair.settle()
    with pytest.raises(ProtocolError, match=sentence):
        pair.client.receive(MAIN, data, 0.0)
    pair.client.machine.connection_lost("broken rules")
    assert pair.client.budget.used == 0 and pair.client.machine.num_calls == 0


def test_a_reply_in_parts_to_a_caller_that_takes_none_breaks_the_rules() -> None:
    for data in (small_part(1), begin_part(1, 70_000)):
        pair = Pair()
        pair.call(5)
        pair.settle()
        assert not pair.received().in_parts
        with pytest.raises(ProtocolError, match="takes none"):
            pair.client.receive(MAIN, data, 0.0)


def test_parts_keep_to_one_lane() -> None:
    pair = Pair()
    pair.call(5, in_parts=True)
    pair.settle()
    pair.client.receive(BULK, small_part(1), 0.0)
    with pytest.raises(ProtocolError, match="lane"):
        pair.client.receive(MAIN, small_part(1), 0.0)


def test_callers_that_take_what_was_not_sent_are_cut_off() -> None:
    pair = Pair()
    stream = Stream(pair, [10] * 9)
    turn(pair, {stream.stream: stream})
    taken = frames.frame(frames.GRANT_REPLY, stream=stream.stream, flags=frames.MORE)
    pair.server.receive(MAIN, taken * AHEAD, 0.0)
    with pytest.raises(ProtocolError, match="not sent"):
        pair.server.receive(MAIN, taken, 0.0)
    pair = Pair()
    pair.call(5)
    pair.settle()
    with pytest.raises(ProtocolError, match="not sent"):
        pair.server.receive(MAIN, frames.frame(frames.GRANT_REPLY, stream=1, flags=frames.MORE), 0.0)


def test_parts_that_are_not_taken_make_room_for_other_peers() -> None:
    pair = Pair(client_budget=32 * MIB)
    stream = Stream(pair, [900_000] * 9)
    for _ in range(8):
        turn(pair, {stream.stream: stream})
    assert stream.untaken == 4 and pair.client.budget.used >= 4 * 900_000
    others = [pair.client.budget.begin(Owner(peer, peer), 3 * MIB) for peer in range(10)]
    assert all(other.fill(3 * MIB) for other in others)
    turn(pair, {stream.stream: stream})
    assert isinstance(stream.ended, CallFailed) and isinstance(stream.ended.error, Overloaded)
    for other in others:
        other.release()
    turn(pair, {stream.stream: stream})
    assert clean(pair)


def test_parts_of_many_buffers_or_values_count_what_they_cost() -> None:
    empty = frames.encode_small(frames.REPLY, 1, heads.encode_result(None), [0] * 1000, [], flags=frames.MORE)
    values = frames.encode_small(frames.REPLY, 1, heads.encode_result([[]] * 8000), [], [], flags=frames.MORE)
    for part, cost in ((empty, 250_000), (values, 500_000)):
        pair = Pair()
        pair.call(5, in_parts=True)
        pair.settle()
        pair.client.receive(MAIN, part * AHEAD, 0.0)
        assert len(part) < 10_000 and pair.client.budget.used > AHEAD * cost
        pair.client.machine.outgoing.part_taken(1)
        assert AHEAD * cost > pair.client.budget.used > (AHEAD - 1) * cost or part is empty


def test_the_end_of_a_connection_ends_replies_in_parts() -> None:
    pair = Pair()
    stream = Stream(pair, [MIB] * 9)
    for _ in range(3):
        turn(pair, {stream.stream: stream})
    for side in (pair.client, pair.server):
        side.machine.connection_lost("cut")
        assert side.budget.used == 0 == side.budgets.replies.used and side.machine.num_calls == 0
    turn(pair, {stream.stream: stream})
    assert isinstance(stream.ended, CallFailed) and isinstance(stream.ended.error, ConnectionLost)
    assert stream.callee_ended


@given(st.data())
def test_any_mixture_of_replies_in_parts_arrives_and_leaves_nothing(data: st.DataObject) -> None:
    pair = Pair(
        bulk=data.draw(st.booleans()),
        client=dataclasses.replace(SETTINGS, window_bytes=data.draw(st.sampled_from((0, 200_000, 16 * MIB)))),
        seed=data.draw(st.integers(0, 100)),
    )
    streams: dict[int, Stream] = {}
    size = st.sampled_from((0, 10, 60_000, 66_000, 300_000))
    for number in range(data.draw(st.integers(1, 4))):
        max_reply = data.draw(st.sampled_from((None, 2 * MIB)))
        parts = data.draw(st.lists(size, max_size=7 if max_reply is None else 6))  # within 2 MiB, with their heads
        stream = Stream(pair, parts, number=number, max_reply=max_reply)
        streams[stream.stream] = stream
    cancelled = set()
    for _ in range(data.draw(st.integers(0, 12))):
        one = data.draw(st.sampled_from(sorted(streams)))
        match data.draw(st.sampled_from(("turn", "carry", "take", "cancel"))):
            case "turn":
                turn(pair, streams)
            case "carry":
                side = data.draw(st.sampled_from((pair.client, pair.server)))
                pair.carry(side, data.draw(st.sampled_from((MAIN, BULK))), 100_000)
            case "take":
                if streams[one].untaken:
                    streams[one].take()
            case "cancel":
                pair.client.machine.cancel_call(one)
                pair.client.look()
                pair.client.events = [event for event in pair.client.events if getattr(event, "stream", 0) != one]
                cancelled.add(one)
                streams[one].ended = streams[one].ended or "cancelled"
    for one in cancelled:
        streams[one].untaken = 0
    finish(pair, streams)
    for stream in streams.values():
        if stream.stream not in cancelled:
            assert stream.taken == stream.expected and isinstance(stream.ended, ReplyReceived)
    assert clean(pair)


def client_of(**options: Any) -> Endpoint:
    return Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=PLAIN, **options)


async def count(call: IncomingCall) -> AsyncGenerator[Message, None]:
    """Parts of the sizes that the body lists."""
    for index, size in enumerate(call.body):
        yield Message(index, (memoryview(contents(size)),))


def either(call: IncomingCall) -> Any:
    """As `count` for callers that take parts; for others all at once."""

    async def whole() -> Message:
        return Message(len(call.body), tuple(memoryview(contents(size)) for size in call.body))

    return count(call) if call.in_parts else whole()


@pytest.mark.both_loops
async def test_a_handler_yields_parts_and_the_caller_iterates() -> None:
    sizes = [10, 0, 500_000, 3 * MIB, 20, 70_000] * 3
    async with serving(PLAIN) as (server, address), client_of() as client:
        server.handle("count", count)
        for _ in range(2):
            seen = []
            async for part in client.call_parts(address, "count", sizes, timeout=30):
                seen.append((part.body, bytes(part.buffers[0])))
            assert seen == [(index, contents(size)) for index, size in enumerate(sizes)]
        assert [part async for part in client.call_parts(address, "count", [], timeout=30)] == [Message()]
        (whole,) = [part async for part in client.call_parts(address, "echo", "one", timeout=30)]
        assert whole.body == "one"
        with pytest.raises(RemoteError, match="count replies in parts, which its caller does not take"):
            await client.call(address, "count", sizes, timeout=30)
        assert client.budgets.messages.used == 0 and server.budgets.replies.used == 0


@pytest.mark.parametrize("size", [10, 3 * MIB])
async def test_a_handler_that_knows_its_last_part_is_not_asked_for_another(size: int) -> None:
    closed = asyncio.Event()

    async def two(call: IncomingCall) -> AsyncGenerator[Message, None]:
        try:
            yield Message(0, (memoryview(contents(size)),))
            yield LastPart(1, (memoryview(contents(size)),))
            raise AssertionError("asked for more")
        finally:
            closed.set()

    async with serving(PLAIN) as (server, address), client_of() as client:
        server.handle("two", two)
        for _ in range(2):
            closed.clear()
            parts = [part async for part in client.call_parts(address, "two", timeout=30)]
            assert [(part.body, len(part.buffers[0])) for part in parts] == [(0, size), (1, size)]
            await closed.wait()
        assert client.budgets.messages.used == 0 and server.budgets.replies.used == 0


async def test_a_handler_works_no_further_ahead_than_its_caller_takes() -> None:
    made = 0

    async def endless(call: IncomingCall) -> AsyncGenerator[Message, None]:
        nonlocal made
        try:
            while True:
                made += 1
                yield Message(made)
        finally:
            made = -1

    async with serving(PLAIN) as (server, address), client_of() as client:
        server.handle("endless", endless)
        async with contextlib.aclosing(client.call_parts(address, "endless", timeout=30)) as parts:
            assert (await anext(parts)).body == 1
            await until(lambda: made == AHEAD + 1)
            await client.call(address, "echo", timeout=30)
            assert made == AHEAD + 1
            assert (await anext(parts)).body == 2
        await until(lambda: made == -1)
        await until(lambda: not any(info.num_calls for info in (*client.connections(), *server.connections())))


async def test_parts_whose_memory_is_wanted_for_others_are_dropped() -> None:
    size = 900_000
    async with serving(PLAIN) as (server, address):
        server.handle("count", count)
        settings = dataclasses.replace(PLAIN, max_receive_bytes=16 * MIB)
        async with Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=settings) as client:
            budget = client.budgets.messages
            async with contextlib.aclosing(client.call_parts(address, "count", [size] * 9, timeout=30)) as parts:
                assert (await anext(parts)).body == 0
                await until(lambda: budget.used >= AHEAD * size)
                others = [budget.begin(Owner(peer, peer), 3 * MIB) for peer in range(5)]
                assert all(other.fill(3 * MIB) for other in others)
                client.budgets.deliver()
                with pytest.raises(Overloaded):
                    await anext(parts)


async def test_a_number_used_anew_does_not_free_the_second_call_from_its_end() -> None:
    """A caller that cancels, and uses the number again while the first handler cleans up."""
    pair, cleans_up, ended = Pair(), asyncio.Event(), []

    async def endless(call: IncomingCall) -> AsyncGenerator[Message, None]:
        try:
            while True:
                yield Message(bytes(10))
        finally:
            await cleans_up.wait()
            ended.append(call.body)

    handlers = Handlers(
        pair.server.machine, endless, Identity.generate().peer_id, "", max_backlog=2**20, done=lambda is_last: None
    )
    cancel = frames.frame(frames.CANCEL, stream=1)
    for number in range(2):
        head = heads.encode_request(heads.RequestHead("m", 10.0, 0, 0, 2**20, number))
        pair.server.receive(MAIN, frames.encode_small(frames.REQUEST, 1, head, [], [], flags=frames.MORE), 0.0)
        handlers.received(pair.received())
        await until(lambda: pair.server.machine.unsent_bytes > 0)
        pair.settle()
        if not number:
            pair.server.receive(MAIN, cancel, 0.0)
            assert isinstance(pair.server.take()[0], CallCancelled)
            handlers.cancel(1)
    cleans_up.set()
    await until(lambda: ended == [0])
    pair.server.receive(MAIN, cancel, 0.0)
    handlers.cancel(1)
    await until(lambda: ended == [0, 1] and not handlers.tasks)


async def test_errors_and_deadlines_reach_both_ends_of_a_reply_in_parts() -> None:
    closed = asyncio.Event()

    async def breaks(call: IncomingCall) -> AsyncGenerator[Message, None]:
        try:
            yield Message("first")
            if call.body == "raise":
                raise KeyError("lost")
            if call.body == "refuse":
                raise Overloaded("full", retry_after=2.0)
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with serving(PLAIN) as (server, address), client_of() as client:
        server.handle("breaks", breaks)
        for how, kind in (("raise", RemoteError), ("refuse", Overloaded), ("hang", TimeoutError)):
            closed.clear()
            seen = []
            with pytest.raises(kind):
                async for part in client.call_parts(address, "breaks", how, timeout=0.3 if how == "hang" else 30):
                    seen.append(part.body)
            assert seen == ["first"]
            await asyncio.wait_for(closed.wait(), 30)
        assert (await client.call(address, "echo", 1, timeout=30)).body == 1


async def test_closing_a_node_ends_replies_in_parts() -> None:
    closed = asyncio.Event()

    async def forever(call: IncomingCall) -> AsyncGenerator[Message, None]:
        try:
            yield Message(1)
            await asyncio.Event().wait()
        finally:
            closed.set()

    for close_server in (True, False):
        closed.clear()
        async with serving(PLAIN) as (server, address), client_of() as client:
            server.handle("forever", forever)
            parts = client.call_parts(address, "forever", timeout=30)
            await anext(parts)
            await (server if close_server else client).aclose()
            with pytest.raises(ConnectionLost):
                await anext(parts)
            await asyncio.wait_for(closed.wait(), 30)


@pytest.mark.parametrize("old", ["client", "server"])
async def test_nodes_of_different_features_talk(old: str) -> None:
    """A living swarm is upgraded node by node: what the other end has not named is not sent to it."""
    sizes = [10, 70_000]
    nothing: frozenset[str] = frozenset()
    async with client_of(features=nothing if old == "client" else heads.FEATURES | {"of the future"}) as client:
        features = nothing if old == "server" else heads.FEATURES | {"another one"}
        async with serving(PLAIN, features=features) as (server, address):
            server.handle("either", either)
            (whole,) = [part async for part in client.call_parts(address, "either", sizes, timeout=30)]
            assert whole.body == 2 and [len(buffer) for buffer in whole.buffers] == sizes
            assert (await client.call(address, "either", sizes, timeout=30)).body == 2
