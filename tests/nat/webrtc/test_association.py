"""The association below a data channel: how fast it is on bad ways, and what it makes of packets that no peer sends.

In virtual time, over links in memory (`benchmarks/nat_links`).
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import aiortc
import pytest
from aiortc import RTCSctpTransport
from aiortc.rtcsctptransport import (
    WEBRTC_BINARY,
    WEBRTC_DCEP,
    WEBRTC_STRING,
    Chunk,
    DataChunk,
    ForwardTsnChunk,
    ReconfigChunk,
    SackChunk,
)

from tesseract_async.errors import ConnectionLost, ProtocolError
from tesseract_async.nat.webrtc import pipe as webrtc
from tesseract_async.nat.webrtc.association import (
    LEAST_MARGIN,
    LONGEST_TIMEOUT,
    MAX_FRAGMENTS,
    MAX_GAPS,
    MAX_HELD,
    Association,
)
from tests.benchmarks import nat_links
from tests.benchmarks.nat_links import MEGABIT, End, Link, Total
from tests.nat.webrtc.watched import Side, Watched
from tests.transport.pipes import Receiver


class Spoilt(Link):
    """Drops the full packets for which `spoil` says so."""

    spoil: Callable[[], bool] | None = None

    def send(self, data: bytes, queue: asyncio.Queue[bytes]) -> None:
        if len(data) > 1000 and self.spoil is not None and self.spoil():
            self.num_dropped += 1
            return
        super().send(data, queue)


def over_links(
    work: Callable[[Side, Side, Spoilt], Awaitable[None]],
    *,
    rate: float | None = None,
    delay: float = 0.05,
    max_held: int = MAX_HELD,
) -> None:
    """Runs `work(here, there, the link from here to there)` in virtual time."""

    async def main() -> None:
        out, back = (kind(rate=rate, delay=delay, loss=0.0, seed=0) for kind in (Spoilt, Link))
        made: dict[bool, Watched] = {}  # by who is the DTLS server: the controlling side

        def make(dtls: Any, port: int, on_garbage: Any) -> Watched:
            one = Watched(dtls, port, on_garbage, max_held=max_held)
            made[one.is_server] = one
            return one

        here, there = await nat_links.open_pipe(out, back, make)
        async with asyncio.timeout(300):
            await work(Side(here, made[True]), Side(there, made[False]), out)
        for pipe in (here, there):
            pipe.abort()
        await asyncio.sleep(5)

    nat_links.in_virtual_time(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (in virtual time)
        await asyncio.sleep(0.01)


def test_one_carries_on_a_lossy_link_what_several_by_the_librarys_rule_do() -> None:
    link = {"rate": 5 * MEGABIT, "round_trip": 0.16, "loss": 0.005, "seed": 0, "until": 6.0}
    one, theirs, several = (
        nat_links.run([rule] * count, **link)
        for rule, count in (("own rule", 1), ("aiortc's rule", 1), ("aiortc's rule", 4))
    )
    assert one["speed"] > 0.75 * 5 * MEGABIT
    assert one["speed"] > 3 * theirs["speed"]
    assert one["speed"] > 0.8 * several["speed"]
    assert one["cold"] < theirs["cold"] / 2


def test_only_what_was_lost_is_sent_again() -> None:
    async def work(here: Side, there: Side, out: Spoilt) -> None:
        total, unused = Total(), Total()
        here.pipe.start(End(unused))
        there.pipe.start(End(total))
        out.loss = 0.01
        size = 2**20
        here.pipe.write(bytes(size))
        await until(lambda: total.count == size)
        sent = here.association.sent
        again = len(sent) - len(set(sent))
        assert out.num_dropped > 5
        assert again <= 1.2 * out.num_dropped + 3

    over_links(work)


def lose_next(side: Side, out: Spoilt, times: int) -> list[int]:
    """The next packet of data is lost on the way so many times. What is sent, by TSN."""
    side.association.lose_next(times)
    out.spoil = lambda: side.association.losing
    return side.association.sent


def test_what_is_lost_a_second_time_is_sent_after_one_silence() -> None:
    async def work(here: Side, there: Side, out: Spoilt) -> None:
        total, unused = Total(), Total()
        here.pipe.start(End(unused))
        there.pipe.start(End(total))
        here.pipe.write(bytes(2**19))
        await until(lambda: total.count == 2**19)
        sent = lose_next(here, out, times=2)
        here.pipe.write(bytes(2**20))
        await until(lambda: total.count == 2**19 + 2**20)
        assert sent.count(sent[0]) == 3 and here.association.num_silences <= 2
        assert len(sent) - len(set(sent)) <= out.num_dropped + 2

    over_links(work, rate=10 * MEGABIT, delay=0.02)


def test_after_a_silence_nothing_is_sent_again_that_has_arrived() -> None:
    async def work(here: Side, there: Side, out: Spoilt) -> None:
        total, unused = Total(), Total()
        here.pipe.start(End(unused))
        there.pipe.start(End(total))
        await asyncio.sleep(1)  # what the stream says first is small
        lose_next(here, out, times=100)
        association = here.association
        here.pipe.write(bytes(2**17))
        await until(lambda: sum(one.arrived for one in association.queue) > 10)
        association.be_silent()
        assert any(one.again for one in association.queue)
        assert not any(one.again and one.arrived for one in association.queue)

    over_links(work)


def test_a_silence_is_noticed_after_seconds_whatever_was_measured_before() -> None:
    async def work(here: Side, there: Side, out: Spoilt) -> None:
        association = here.association
        for measured in (0.0, 3600.0, -3600.0, 1e9):
            association.measure(measured)
            for _ in range(300):
                assert LEAST_MARGIN <= association.timeout <= LONGEST_TIMEOUT
                association.measure(0.05)
            assert association.timeout < 0.3

    over_links(work)


def test_many_gaps_do_not_stop_a_channel() -> None:
    """A window of which every other packet is dropped: more gaps than one acknowledgement can name."""

    async def work(here: Side, there: Side, out: Spoilt) -> None:
        total, unused = Total(), Total()
        here.pipe.start(End(unused))
        there.pipe.start(End(total))
        here.pipe.write(bytes(5 * 2**20))
        await until(lambda: here.association.in_flight > 800 * 1160)
        seen = 0

        def spoil() -> bool:
            nonlocal seen
            seen += 1
            return seen <= 900 and seen % 2 == 0

        out.spoil = spoil
        await until(lambda: total.count == 5 * 2**20)
        assert out.num_dropped > MAX_GAPS

    over_links(work, delay=0.1)


class ShortData(Chunk):
    """As `DataChunk`, but any bytes."""

    type = DataChunk.type


def data_chunk(
    tsn: int, *, stream: int = 0, protocol: int = WEBRTC_BINARY, flags: int = 3, data: bytes = b"x"
) -> DataChunk:
    chunk = DataChunk(flags=flags)
    chunk.tsn, chunk.stream_id, chunk.stream_seq, chunk.protocol, chunk.user_data = (
        tsn % 2**32,
        stream,
        0,
        protocol,
        data,
    )
    return chunk


def garbage(kind: str, tsn: int) -> Chunk:
    """`tsn`: the one that comes next."""
    if kind == "another channel":
        return data_chunk(tsn, stream=7)
    if kind == "a channel is opened":
        return data_chunk(tsn, protocol=WEBRTC_DCEP, data=b"\x03" + bytes(11))
    if kind == "no text":
        return data_chunk(tsn, protocol=WEBRTC_STRING, data=b"\xff\xfe")
    if kind == "a short chunk":
        return ShortData(flags=3, body=b"abc")
    if kind == "what was to come is skipped":
        skip = ForwardTsnChunk()
        skip.cumulative_tsn, skip.streams = tsn, [(stream, 0) for stream in range(300)]
        return skip
    reconfig = ReconfigChunk()
    reconfig.params = [(13, b"\0")]
    return reconfig


@pytest.mark.parametrize(
    "kind",
    [
        "another channel",
        "a channel is opened",
        "no text",
        "a short chunk",
        "a short reset",
        "what was to come is skipped",
    ],
)
def test_garbage_ends_the_channel_with_the_documented_error(kind: str) -> None:
    async def work(here: Side, there: Side, out: Spoilt) -> None:
        receiver = Receiver()
        there.pipe.start(receiver)
        here.pipe.start(Receiver())
        await asyncio.sleep(1)
        await there.association.take(garbage(kind, there.association.last_received + 1))
        await receiver.until_lost()
        assert isinstance(receiver.lost[0], ProtocolError) and len(receiver.lost) == 1
        assert not receiver.received
        assert there.association.num_streams <= 1

    over_links(work)


def test_a_message_without_an_end_takes_bounded_memory() -> None:
    async def work(here: Side, there: Side, out: Spoilt) -> None:
        receiver = Receiver()
        there.pipe.start(receiver)
        await asyncio.sleep(1)
        association = there.association
        for flags in [2] + [0] * (2 * MAX_FRAGMENTS):
            await association.take(data_chunk(association.last_received + 1, flags=flags))
            assert association.num_held <= MAX_FRAGMENTS + 1
        await receiver.until_lost()
        assert isinstance(receiver.lost[0], ProtocolError)

    over_links(work)


@pytest.mark.parametrize("flags", [2, 7])
def test_a_peer_that_begins_anew_again_and_again_is_held_to_the_same_bound(flags: int) -> None:
    """With beginnings of messages, and with whole ones that need not wait for their turn."""

    async def work(here: Side, there: Side, out: Spoilt) -> None:
        receiver = Receiver()
        there.pipe.start(receiver)
        await asyncio.sleep(1)
        association = there.association
        begin = association.last_received + 1
        for number in range(10):
            await association.take_beginning(begin - 200 * number)
            for ahead in range(1, 100):
                await association.take(data_chunk(begin - 200 * number + ahead, flags=flags))
                assert association.num_held <= 100 + MAX_FRAGMENTS + 1
                assert len(association.out_of_order) <= 101
        await receiver.until_lost()
        assert isinstance(receiver.lost[0], ProtocolError)

    over_links(work, max_held=100)


def test_a_peer_that_never_acknowledges_the_first_has_little_kept_for_it() -> None:
    """It says that all arrived but one, and so has the window opened again and again."""

    async def work(here: Side, there: Side, out: Spoilt) -> None:
        here.pipe.start(Receiver())
        there.pipe.start(Receiver())
        here.pipe.write(bytes(2**21))
        await asyncio.sleep(3)
        there.association.deaf_to = here.association.next_tsn
        here.pipe.write(bytes(2**21))
        for _ in range(300):
            await asyncio.sleep(0.01)
            assert len(here.association.queue) < 2 * 400
        assert len(here.association.queue) >= 400
        there.association.deaf_to = None
        await until(lambda: not here.association.queue)

    over_links(work, max_held=400)


def test_beside_another_version_of_the_library_there_are_no_channels_and_no_surprises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aiortc, "__version__", "1.17.0")
    monkeypatch.delitem(sys.modules, "tesseract_async.nat.webrtc.association")
    with pytest.raises(ConnectionLost, match=r"aiortc 1\.17\.0 is installed"):
        asyncio.run(webrtc.load())
    assert "only direct connections and relays" in caplog.text


def test_what_is_overridden_is_there() -> None:
    for name, value in vars(Association).items():
        if callable(value) and not name.startswith("__"):
            assert callable(getattr(RTCSctpTransport, name))


def test_packets_far_ahead_are_not_kept() -> None:
    """Nor is their sender punished: those that come again, later, are taken."""

    async def work(here: Side, there: Side, out: Spoilt) -> None:
        there.pipe.start(Receiver())
        await asyncio.sleep(1)
        association = there.association
        first = association.last_received + 1
        for ahead in (MAX_HELD, 2 * MAX_HELD, 2**30, 2**31 - 2):
            await association.take(data_chunk(first + ahead, flags=2))
        assert not association.num_held and not association.out_of_order
        await association.take(data_chunk(first + MAX_HELD - 1, flags=2))
        assert association.num_held == 1
        await association.take(data_chunk(first - 2**31 + 5))  # long ago: a repetition
        assert association.num_held == 1 and not association.broken

    over_links(work)


@pytest.mark.parametrize("gaps", [[(5, 4)], [(0, 0)], [(2, 65535)] * 290, [(60000, 65535)]])
def test_acknowledgements_of_what_was_never_sent_cost_nothing(gaps: list[tuple[int, int]]) -> None:
    async def work(here: Side, there: Side, out: Spoilt) -> None:
        total, unused = Total(), Total()
        there.pipe.start(End(total))
        here.pipe.start(End(unused))
        await asyncio.sleep(1)
        here.pipe.write(bytes(2**20))
        await asyncio.sleep(0)
        association = here.association
        before = association.in_flight
        sack = SackChunk()
        for ahead in (0, 1000, -1):
            sack.cumulative_tsn = (association.last_acknowledged + ahead) % 2**32
            sack.advertised_rwnd, sack.gaps = 2**20, gaps
            await association.take_acknowledgement(sack)
        assert 0 < before <= association.in_flight and not association.broken
        await until(lambda: total.count == 2**20)

    over_links(work)
