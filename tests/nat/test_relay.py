import asyncio
import random

import pytest

from tesseract_async.errors import Overloaded
from tesseract_async.identity import Identity
from tesseract_async.metrics import Metrics
from tesseract_async.nat.relay import Relay, RelayLedger, RelaySettings
from tesseract_async.transport.base import PipeReceiver
from tests.transport.pipes import relay_pair, started

ALICE, BOB = (Identity.from_seed(bytes([number]) * 32).peer_id for number in (1, 2))


def tokens(number: int) -> tuple[bytes, bytes]:
    return number.to_bytes(16, "big"), (number + 1000).to_bytes(16, "big")


def test_a_token_is_good_for_one_connection() -> None:
    ledger = RelayLedger(RelaySettings())
    splice = ledger.reserve(ALICE, tokens(1), now=0.0)
    assert ledger.arrive(tokens(2)[0], now=0.0) is None
    assert ledger.arrive(tokens(1)[0], now=0.0) is splice
    assert ledger.arrive(tokens(1)[0], now=0.0) is None
    assert ledger.arrive(tokens(1)[1], now=0.0) is splice
    assert splice.num_arrived == 2


def test_a_token_expires() -> None:
    ledger = RelayLedger(RelaySettings())
    splice = ledger.reserve(ALICE, tokens(1), now=0.0)
    ledger.arrive(tokens(1)[0], now=9.0)
    assert ledger.expired(now=9.9) == []
    assert ledger.arrive(tokens(1)[1], now=10.0) is None
    assert ledger.expired(now=10.0) == [splice]
    ledger.remove(splice)
    ledger.remove(splice)
    assert len(ledger) == 0


@pytest.mark.parametrize("most", [1, 4, 256])
def test_the_number_of_splices_is_limited_and_shared(most: int) -> None:
    ledger = RelayLedger(RelaySettings(max_splices=most))
    peers = [Identity.from_seed(number.to_bytes(32, "big")).peer_id for number in range(30)]
    counts, first = [], None
    for peer in peers:
        count = 0
        with pytest.raises(Overloaded, match="too many"):
            while True:
                splice = ledger.reserve(peer, tokens(10_000 * len(counts) + count), now=0.0)
                first, count = first or splice, count + 1
        counts.append(count)
    assert len(ledger) == sum(counts) == most and counts[0] <= most / 3 + 1
    if most == 256:
        assert all(counts[:10]), "one that takes all it can get leaves some to the next ones"
    assert first is not None
    ledger.remove(first)
    ledger.remove(first)
    ledger.reserve(peers[-1], tokens(1_000_000), now=0.0)


def test_the_peers_of_one_range_share_a_part() -> None:
    ledger = RelayLedger(RelaySettings())
    taken = 0
    with pytest.raises(Overloaded):
        for number in range(256):
            peer = Identity.from_seed(number.to_bytes(32, "big")).peer_id
            ledger.reserve(peer, tokens(number), now=0.0, origin=f"8.8.8.{number}")
            taken += 1
    assert taken == 129
    ledger.reserve(BOB, tokens(300), now=0.0, origin="8.8.9.1")


def test_bytes_and_rate_are_limited() -> None:
    ledger = RelayLedger(RelaySettings(max_bytes=5000, max_rate=1000.0))
    splice = ledger.reserve(ALICE, tokens(1), now=0.0)
    for token in tokens(1):
        ledger.arrive(token, now=0.0)
    assert ledger.account(splice, 1000, now=1.0) == 0.0
    assert ledger.account(splice, 500, now=1.0) == pytest.approx(0.5)
    assert ledger.account(splice, 500, now=1.0) == pytest.approx(1.0)
    assert ledger.account(splice, 1000, now=10.0) == 0.0  # no more than a second's worth was saved up
    assert ledger.account(splice, 1000, now=10.0) == pytest.approx(1.0)
    assert ledger.expired(now=69.0) == []
    assert ledger.expired(now=70.0) == [splice]
    assert ledger.account(splice, 1001, now=10.0) is None


class FakePipe:
    """A pipe whose other end is the test."""

    def __init__(self) -> None:
        self.receiver: PipeReceiver | None = None
        self.sent = bytearray()
        self.paused = False
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.gone = asyncio.Event()
        self.ended = ""
        self.origin = "192.0.2.1"
        self.description = "fake"
        self.unsent = 0

    def start(self, receiver: PipeReceiver) -> None:
        self.receiver = receiver

    def write(self, data: bytes | memoryview) -> None:
        self.sent += data

    @property
    def reading(self) -> bool:
        return self.may_read.is_set()

    def pause_reading(self) -> None:
        self.may_read.clear()

    def resume_reading(self) -> None:
        self.may_read.set()

    def close(self) -> None:
        self.ended = self.ended or "closed"
        self.gone.set()

    def abort(self) -> None:
        self.ended = self.ended or "aborted"
        self.gone.set()

    def bring(self, data: bytes) -> None:
        assert self.receiver is not None and self.reading
        self.receiver.get_buffer()[: len(data)] = data
        self.receiver.buffer_updated(len(data))


def joined(settings: RelaySettings | None = None) -> tuple[Relay, FakePipe, FakePipe]:
    relay = Relay(settings=settings or RelaySettings(), metrics=Metrics())
    one, other = FakePipe(), FakePipe()
    for token, pipe in zip(relay.reserve(ALICE), (one, other), strict=True):
        relay.pipe_arrived(token, pipe)
    return relay, one, other


async def test_one_end_waits_unread_for_the_other() -> None:
    relay = Relay(settings=RelaySettings(), metrics=Metrics())
    mine, theirs = relay.reserve(ALICE)
    one, other = FakePipe(), FakePipe()
    relay.pipe_arrived(mine, one)
    assert not one.reading
    relay.pipe_arrived(theirs, other)
    assert one.reading and other.reading
    one.bring(b"hello")
    other.bring(b"there")
    assert (one.sent, other.sent) == (b"there", b"hello")
    assert relay.metrics.total("relay_bytes") == 10
    await relay.aclose()
    assert one.ended and other.ended


async def test_a_slow_end_stops_the_other_one() -> None:
    relay, one, other = joined()
    other.paused = True
    one.bring(b"x")
    assert not one.reading
    other.paused = False
    assert other.receiver is not None
    other.receiver.pipe_drained()
    assert one.reading
    await relay.aclose()


async def test_the_rate_holds_both_ends_back() -> None:
    relay, one, other = joined(RelaySettings(max_rate=1e6))
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for _ in range(12):
        await one.may_read.wait()
        one.bring(bytes(100_000))
    await one.may_read.wait()
    # a second's worth passes at once, counted from the ledger's beginning; then 0.2 s for the rest
    assert loop.time() - begun >= 0.15
    assert len(other.sent) == 1_200_000
    await relay.aclose()


async def test_when_one_end_goes_the_other_is_told() -> None:
    relay, one, other = joined()
    assert one.receiver is not None and other.receiver is not None
    one.receiver.pipe_lost(None)
    assert other.ended == "closed"
    other.receiver.pipe_lost(None)
    assert len(relay.ledger) == 0
    assert relay.metrics.snapshot()["relay_parted{reason=ended}"] == 1
    await relay.aclose()


async def test_who_sends_too_much_is_parted() -> None:
    relay, one, other = joined(RelaySettings(max_bytes=100))
    one.bring(bytes(100))
    one.bring(b"x")
    assert one.ended == other.ended == "closed"
    assert len(other.sent) == 100
    await relay.aclose()


async def test_an_unknown_token_is_sent_away() -> None:
    relay = Relay(settings=RelaySettings(), metrics=Metrics())
    stranger = FakePipe()
    relay.pipe_arrived(bytes(16), stranger)
    assert stranger.ended == "aborted"
    assert relay.metrics.snapshot()["relay_refused{reason=unknown_token}"] == 1
    await relay.aclose()


@pytest.mark.both_loops
async def test_nobody_comes_to_a_reserved_place() -> None:
    relay = Relay(settings=RelaySettings(), metrics=Metrics(), waiting_timeout=0.01)
    mine, _ = relay.reserve(ALICE)
    pipe = FakePipe()
    relay.pipe_arrived(mine, pipe)
    await pipe.gone.wait()
    assert pipe.ended == "closed"
    assert len(relay.ledger) == 0
    await relay.aclose()


@pytest.mark.both_loops
async def test_a_relay_under_rate_loses_nothing() -> None:
    data = random.Random(1).randbytes(3_000_000)
    async with started(relay_pair(RelaySettings(max_rate=4e6))) as (one, here, _, there):
        for start in range(0, len(data), 100_000):
            one.write(data[start : start + 100_000])
            await here.until(lambda: not one.paused)
        await there.until_bytes(len(data))
        assert there.received == data
