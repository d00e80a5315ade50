"""The association below a data channel: how fast it is on bad ways, and what it makes of packets that no peer sends.

In virtual time, over links in memory (`benchmarks/nat_links`).
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import aiortc
import pytest
from aiortc import RTCSctpTransport
from aiortc.rtcsctptransport import (
    USERDATA_MAX_LENGTH,
    WEBRTC_BINARY,
    WEBRTC_DCEP,
    WEBRTC_STRING,
    Chunk,
    DataChunk,
    ForwardTsnChunk,
    InitChunk,
    ReconfigChunk,
    SackChunk,
    serialize_packet,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.errors import ConnectionLost, ProtocolError
from tesseract_async.nat.webrtc import association
from tesseract_async.nat.webrtc import pipe as webrtc
from tesseract_async.nat.webrtc.association import (
    LEAST_MARGIN,
    LONGEST_TIMEOUT,
    MAX_FRAGMENTS,
    MAX_GAPS,
    MAX_HELD,
    Association,
)
from tesseract_async.nat.webrtc.pipe import DataChannelPipe
from tests.benchmarks import nat_links
from tests.benchmarks.nat_links import MEGABIT, End, Link, Total
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
    work: Callable[[DataChannelPipe, DataChannelPipe, Spoilt], Awaitable[None]],
    *,
    rate: float | None = None,
    delay: float = 0.05,
) -> None:
    """Runs `work(here, there, the link from here to there)` in virtual time."""

    async def main() -> None:
        out, back = (kind(rate=rate, delay=delay, loss=0.0, seed=0) for kind in (Spoilt, Link))
        here, there = await nat_links.open_pipe(out, back)
        async with asyncio.timeout(300):
            await work(here, there, out)
        for pipe in (here, there):
            pipe.abort()
        await asyncio.sleep(5)

    nat_links.in_virtual_time(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (in virtual time)
        await asyncio.sleep(0.01)


# ---- good peers on bad ways


def test_one_carries_on_a_lossy_link_what_several_by_the_librarys_rule_do() -> None:
    link = {"rate": 5 * MEGABIT, "round_trip": 0.16, "loss": 0.005, "seed": 0, "until": 6.0}
    one, theirs, several = (
        nat_links.run([rule] * count, **link)
        for rule, count in (("own rule", 1), ("aiortc's rule", 1), ("aiortc's rule", 4))
    )
    assert one["speed"] > 0.75 * 5 * MEGABIT
    assert one["speed"] > 3 * theirs["speed"]
    assert one["speed"] > several["speed"]
    assert one["cold"] < theirs["cold"] / 2


def test_only_what_was_lost_is_sent_again() -> None:
    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        total, unused = Total(), Total()
        here.start(End(unused))
        there.start(End(total))
        out._loss = 0.01
        numbers: list[int] = []
        send = here._sctp._send_chunk

        async def counted(chunk: Any) -> None:
            if isinstance(chunk, DataChunk):
                numbers.append(chunk.tsn)
            await send(chunk)

        here._sctp._send_chunk = counted
        size = 2**20
        here.write(bytes(size))
        await until(lambda: total.count == size)
        again = len(numbers) - len(set(numbers))
        assert out.num_dropped > 5
        assert again <= 1.2 * out.num_dropped + 3

    over_links(work)


def lose_first(here: DataChannelPipe, out: Spoilt, times: int) -> list[int]:
    """The next packet of data is lost on the way so many times. What is sent, by TSN."""
    sctp, sent = here._sctp, []
    send, first = sctp._send_chunk, sctp._local_tsn
    dropping = False
    out.spoil = lambda: dropping

    async def spoilt(chunk: Any) -> None:
        nonlocal dropping
        if isinstance(chunk, DataChunk):
            sent.append(chunk.tsn)
            dropping = chunk.tsn == first and sent.count(first) <= times
        await send(chunk)
        dropping = False

    sctp._send_chunk = spoilt
    return sent


def test_what_is_lost_a_second_time_is_not_waited_for_in_silence() -> None:
    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        total, unused = Total(), Total()
        here.start(End(unused))
        there.start(End(total))
        sctp, expired, silences = here._sctp, here._sctp._t3_expired, 0

        def silence() -> None:
            nonlocal silences
            silences += 1
            expired()

        sctp._t3_expired = silence
        here.write(bytes(2**19))
        await until(lambda: total.count == 2**19)
        sent = lose_first(here, out, times=2)
        here.write(bytes(2**20))
        await until(lambda: total.count == 2**19 + 2**20)
        assert sent.count(sent[0]) == 3 and silences == 0
        assert len(sent) - len(set(sent)) <= out.num_dropped + 2

    over_links(work, rate=10 * MEGABIT, delay=0.02)


def test_after_a_silence_nothing_is_sent_again_that_has_arrived() -> None:
    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        total, unused = Total(), Total()
        here.start(End(unused))
        there.start(End(total))
        await asyncio.sleep(1)  # what the stream says first is small
        lose_first(here, out, times=100)
        sctp = here._sctp
        here.write(bytes(2**17))
        await until(lambda: sum(chunk._acked for chunk in sctp._sent_queue) > 10)
        sctp._t3_cancel()
        sctp._t3_expired()
        assert any(chunk._retransmit for chunk in sctp._sent_queue)
        assert not any(chunk._retransmit and chunk._acked for chunk in sctp._sent_queue)
        assert sctp._window.starting and sctp._window.size < 2000

    over_links(work)


def test_losses_that_are_more_than_chance_cost_half_of_the_window() -> None:
    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        total, unused = Total(), Total()
        here.start(End(unused))
        there.start(End(total))
        here.write(bytes(2**20))
        await until(lambda: total.count > 2**18)
        window, sizes, seen = here._sctp._window, [0], 0

        def spoil() -> bool:
            nonlocal seen
            seen += 1
            return seen <= 200 and seen % 5 == 0

        out.spoil = spoil

        def halved() -> bool:
            sizes.append(window.size)
            return sizes[-1] <= 0.6 * max(sizes)

        await until(lambda: halved() or total.count == 2**20)
        assert out.num_dropped > 3 and max(sizes) > 2**17
        assert halved() and window.size > 2000 and not window.starting, "no silence either"

    over_links(work)


def test_a_silence_is_noticed_after_seconds_whatever_was_measured_before() -> None:
    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        sctp = here._sctp
        for measured in (0.0, 3600.0, -3600.0, 1e9):
            sctp._update_rto(measured)
            for _ in range(300):
                assert LEAST_MARGIN <= sctp._rto <= LONGEST_TIMEOUT
                sctp._update_rto(0.05)
            assert sctp._rto < 0.3

    over_links(work)


def test_many_gaps_do_not_stop_a_channel() -> None:
    """A window of which every other packet is dropped: more gaps than one acknowledgement can name."""

    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        total, unused = Total(), Total()
        here.start(End(unused))
        there.start(End(total))
        here.write(bytes(5 * 2**20))
        await until(lambda: here._sctp._flight_size > 800 * 1160)
        seen = 0

        def spoil() -> bool:
            nonlocal seen
            seen += 1
            return seen <= 900 and seen % 2 == 0

        out.spoil = spoil
        await until(lambda: total.count == 5 * 2**20)
        assert out.num_dropped > MAX_GAPS

    over_links(work, delay=0.1)


class Nowhere:
    """A DTLS transport whose packets go nowhere."""

    state, transport, _data_receiver = "connected", None, None

    def _register_data_receiver(self, receiver: object) -> None: ...
    def _unregister_data_receiver(self, receiver: object) -> None: ...
    async def _send_data(self, data: bytes) -> None: ...


class Plain(Association):
    """Takes acknowledgements as aiortc does: the reference, which goes through everything each time."""

    async def _receive_sack_chunk(self, chunk: Any) -> None:
        self._full = self._flight_size + USERDATA_MAX_LENGTH >= self._cwnd
        self._let_be_judged_again()
        chunk.gaps.sort()  # they are not where the numbers begin anew
        await RTCSctpTransport._receive_sack_chunk(self, chunk)

    def _update_advanced_peer_ack_point(self) -> None:
        for chunk in self._sent_queue:  # aiortc would send again what a silence took for lost, although it arrived
            chunk._retransmit = chunk._retransmit and not chunk._acked
        super()._update_advanced_peer_ack_point()

    def _mark_received(self, tsn: int) -> bool:
        return RTCSctpTransport._mark_received(self, tsn)


def disconnected(kind: type[Association], begin: int) -> tuple[Any, list[Any]]:
    """An association that knows nobody, whose first TSN and whose peer's is `begin`; and what it sends."""
    made: Any = kind(Nowhere(), 5000, lambda error: None)
    made._time, made._remote_port = lambda: 0.0, 5000
    before = (begin - 1) % 2**32
    made._local_tsn = begin
    made._last_sacked_tsn = made._advanced_peer_ack_tsn = made._last_received_tsn = before
    made._srtt, made._rttvar, made._ssthresh = 0.1, 0.01, 2**20
    sent: list[Any] = []
    send = made._send_chunk

    async def keep(chunk: Any) -> None:
        sent.append(chunk)
        await send(chunk)

    made._send_chunk = keep
    return made, sent


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([5, 2**32 - 20]), st.floats(0.0, 0.5))
def test_acknowledgements_are_taken_as_by_going_through_everything(seed: int, begin: int, loss: float) -> None:
    """The same packets count as arrived and as lost, and the same ones are sent, whatever arrives in which order."""
    rng = random.Random(seed)

    async def main() -> None:
        (mine, my_sent), (reference, its_sent) = (disconnected(kind, begin) for kind in (Association, Plain))
        receiver, acknowledgements = disconnected(Association, begin)
        arrived: set[int] = set()
        on_the_way: list[int] = []
        for sender in (mine, reference):
            await sender._send(0, WEBRTC_BINARY, bytes(40 * USERDATA_MAX_LENGTH))
        for step in range(100):
            assert [chunk.tsn for chunk in my_sent] == [chunk.tsn for chunk in its_sent]
            on_the_way += [(chunk.tsn - begin) % 2**32 for chunk in my_sent if rng.random() >= loss]
            my_sent.clear()
            its_sent.clear()
            if step % 40 == 39 or not on_the_way:
                for sender in (mine, reference):
                    sender._t3_cancel()
                    sender._t3_expired()
                await asyncio.sleep(0)
            else:
                number = on_the_way.pop(rng.randrange(min(4, len(on_the_way))))
                assert receiver._mark_received((begin + number) % 2**32) == (number in arrived)
                arrived.add(number)
                complete = next(one for one in range(50) if one not in arrived)
                assert receiver._last_received_tsn == (begin + complete - 1) % 2**32
                assert receiver._sack_misordered == {(begin + one) % 2**32 for one in arrived if one > complete}
                await receiver._send_sack()
                sack = acknowledgements.pop()
                if rng.random() >= loss:
                    for sender in (mine, reference):
                        await sender._receive_sack_chunk(sack)
            first, second = (
                [
                    [(one.tsn, one._acked, one._retransmit, one._in_flight) for one in sender._sent_queue],
                    [sender._flight_size, sender._window.size, sender._fast_recovery_exit],
                ]
                for sender in (mine, reference)
            )
            assert first == second
        for sender in (mine, reference):
            sender._t3_cancel()

    asyncio.run(main())


# ---- what no peer sends


class ShortData(Chunk):
    """As `DataChunk`, but any bytes."""

    type = DataChunk.type


def packet(pipe: DataChannelPipe, chunk: Chunk) -> bytes:
    return serialize_packet(5000, 5000, pipe._sctp._local_verification_tag, chunk)


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


def next_tsn(pipe: DataChannelPipe) -> int:
    return int(pipe._sctp._last_received_tsn) + 1


def garbage(kind: str, pipe: DataChannelPipe) -> Chunk:
    tsn = next_tsn(pipe)
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
    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        receiver = Receiver()
        there.start(receiver)
        here.start(Receiver())
        await asyncio.sleep(1)
        await there._sctp._handle_data(packet(there, garbage(kind, there)))
        await receiver.until_lost()
        assert isinstance(receiver.lost[0], ProtocolError) and len(receiver.lost) == 1
        assert not receiver.received
        assert len(there._sctp._inbound_streams) <= 1

    over_links(work)


def test_a_message_without_an_end_takes_bounded_memory() -> None:
    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        receiver = Receiver()
        there.start(receiver)
        await asyncio.sleep(1)
        sctp = there._sctp
        for flags in [2] + [0] * (2 * MAX_FRAGMENTS):
            await sctp._handle_data(packet(there, data_chunk(next_tsn(there), flags=flags)))
            assert len(sctp._get_inbound_stream(0).reassembly) <= MAX_FRAGMENTS + 1
        await receiver.until_lost()
        assert isinstance(receiver.lost[0], ProtocolError)

    over_links(work)


@pytest.mark.parametrize("flags", [2, 7])
def test_a_peer_that_begins_anew_again_and_again_is_held_to_the_same_bound(
    flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With beginnings of messages, and with whole ones that need not wait for their turn."""
    monkeypatch.setattr(association, "MAX_HELD", 100)

    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        receiver = Receiver()
        there.start(receiver)
        await asyncio.sleep(1)
        sctp, begin = there._sctp, next_tsn(there)
        for number in range(10):
            init = InitChunk()
            init.initial_tsn = (begin - 200 * number) % 2**32
            init.initiate_tag, init.advertised_rwnd = sctp._remote_verification_tag, 2**20
            init.outbound_streams = init.inbound_streams = 1
            await sctp._handle_data(serialize_packet(5000, 5000, 0, init))
            for ahead in range(1, 100):
                await sctp._handle_data(packet(there, data_chunk(begin - 200 * number + ahead, flags=flags)))
                assert len(sctp._get_inbound_stream(0).reassembly) <= 100 + MAX_FRAGMENTS + 1
                assert len(sctp._sack_misordered) <= 101
        await receiver.until_lost()
        assert isinstance(receiver.lost[0], ProtocolError)

    over_links(work)


def test_a_peer_that_never_acknowledges_the_first_has_little_kept_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that all arrived but one, and so has the window opened again and again."""
    monkeypatch.setattr(association, "MAX_HELD", 400)

    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        here.start(Receiver())
        await asyncio.sleep(1)
        sctp, theirs = here._sctp, there._sctp
        lose, first = theirs._mark_received, sctp._local_tsn
        theirs._mark_received = lambda tsn: tsn == first or lose(tsn)
        here.write(bytes(2**21))
        for _ in range(300):
            await asyncio.sleep(0.01)
            assert len(sctp._sent_queue) < 2 * 400
        assert len(sctp._sent_queue) >= 400
        theirs._mark_received = lose
        await until(lambda: not sctp._sent_queue)

    over_links(work)


def test_beside_another_version_of_the_library_there_are_no_channels_and_no_surprises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aiortc, "__version__", "1.17.0")
    monkeypatch.delitem(sys.modules, "tesseract_async.nat.webrtc.association")
    with pytest.raises(ConnectionLost, match=r"aiortc 1\.17\.0 is installed"):
        asyncio.run(webrtc.load())
    assert "only direct connections and relays" in caplog.text


def test_what_is_overridden_is_there() -> None:
    own = {"_break", "_take_gaps", "_arrived", "_strike", "_let_be_judged_again"}
    for name, value in vars(Association).items():
        if callable(value) and not name.startswith("__") and name not in own:
            assert callable(getattr(RTCSctpTransport, name))


def test_packets_far_ahead_are_not_kept() -> None:
    """Nor is their sender punished: those that come again, later, are taken."""

    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        there.start(Receiver())
        await asyncio.sleep(1)
        sctp = there._sctp
        first = next_tsn(there)
        for ahead in (MAX_HELD, 2 * MAX_HELD, 2**30, 2**31 - 2):
            await sctp._handle_data(packet(there, data_chunk(first + ahead, flags=2)))
        assert not sctp._get_inbound_stream(0).reassembly and not sctp._sack_misordered
        await sctp._handle_data(packet(there, data_chunk(first + MAX_HELD - 1, flags=2)))
        assert len(sctp._get_inbound_stream(0).reassembly) == 1
        await sctp._handle_data(packet(there, data_chunk(first - 2**31 + 5)))  # long ago: a repetition
        assert len(sctp._get_inbound_stream(0).reassembly) == 1 and not sctp._broken

    over_links(work)


@pytest.mark.parametrize("gaps", [[(5, 4)], [(0, 0)], [(2, 65535)] * 290, [(60000, 65535)]])
def test_acknowledgements_of_what_was_never_sent_cost_nothing(gaps: list[tuple[int, int]]) -> None:
    async def work(here: DataChannelPipe, there: DataChannelPipe, out: Spoilt) -> None:
        total, unused = Total(), Total()
        there.start(End(total))
        here.start(End(unused))
        await asyncio.sleep(1)
        here.write(bytes(2**20))
        await asyncio.sleep(0)
        sctp = here._sctp
        before = sctp._flight_size
        sack = SackChunk()
        for ahead in (0, 1000, -1):
            sack.cumulative_tsn = (sctp._last_sacked_tsn + ahead) % 2**32
            sack.advertised_rwnd, sack.gaps = 2**20, gaps
            await sctp._receive_sack_chunk(sack)
        assert sctp._looked_at <= len(sctp._sent_queue) and len(sctp._missing) <= sctp._looked_at
        assert 0 < before <= sctp._flight_size and not sctp._broken
        await until(lambda: total.count == 2**20)

    over_links(work)
