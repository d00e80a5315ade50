"""What peers may ask for over time: against a brute-force count, in the machine of a connection, and over sockets."""

import asyncio
import copy
import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.admission import Policy, Quota
from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.endpoint.events import CallFailed, CallReceived, ReplyReceived
from tesseract_async.endpoint.quotas import BUSY_RETRY, Quotas
from tesseract_async.errors import Overloaded
from tesseract_async.identity import Identity, PeerID
from tesseract_async.transport.tcp import TcpTransport
from tests.endpoint.machines import SETTINGS, Pair
from tests.faults.serving import serving

MIB = 2**20
PEER = Identity.from_seed(b"q" * 32).peer_id


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 3000), st.integers(0, 3000)), min_size=1, max_size=60),
    st.floats(0.5, 8),
    st.floats(100, 5000),
    st.floats(1, 30),
)
def test_over_any_time_no_more_passes_than_promised(
    asked: list[tuple[float, int, int]], calls: float, num_bytes: float, period: float
) -> None:
    quotas = Quotas(Policy(quota=Quota(calls=calls, num_bytes=num_bytes, period=period)))
    now, passed = 0.0, []
    for pause, request, reply in asked:
        now += pause
        wait = quotas.begin(PEER, request, now)
        assert wait is not None
        if wait:
            # who comes back when told finds room, had nobody else asked; a copy tells without changing anything
            later = copy.deepcopy(quotas)
            assert later.begin(PEER, 1, now + wait + 0.002) == 0.0
            continue
        passed.append((now, request + reply))
        quotas.charge(PEER, reply, now)
        quotas.end(PEER)
    largest = max((size for _, size in passed), default=0)
    for first, last in itertools.combinations_with_replacement(range(len(passed)), 2):
        span = passed[last][0] - passed[first][0]
        assert last - first + 1 <= max(1.0, calls) + span / period * calls + 1e-6
        within = sum(size for _, size in passed[first : last + 1])
        assert within <= num_bytes * (1 + span / period) + largest + 1e-6
    assert passed, "the first one always passes"


def test_use_is_remembered_for_a_bounded_number_of_peers() -> None:
    reasons: list[str] = []
    quotas = Quotas(Policy(quota=Quota(calls=1, concurrent=1)), refused=reasons.append, max_peers=100)
    peers = [PeerID(index.to_bytes(32, "big")) for index in range(1000)]
    assert quotas.begin(peers[0], 1, 0.0) == 0.0
    for peer in peers[1:]:
        assert quotas.begin(peer, 1, 0.0) == 0.0
        quotas.end(peer)
    assert len(quotas) == 100
    assert quotas.begin(peers[0], 1, 0.0) == BUSY_RETRY and reasons == ["concurrent"], "its call is under way"
    assert quotas.begin(peers[-1], 1, 0.0) == pytest.approx(60.0) and reasons[-1] == "calls"


def test_a_call_for_several_things_counts_for_each() -> None:
    reasons: list[str] = []
    quotas = Quotas(Policy(quotas={PEER: Quota(calls=6)}), refused=reasons.append)
    assert quotas.begin(PEER, 1, 0.0) == 0.0
    assert [quotas.add(PEER, 0.0) for _ in range(5)] == [0.0] * 5
    assert quotas.add(PEER, 0.0) == pytest.approx(10.0) == quotas.begin(PEER, 1, 0.0)
    assert quotas.add(PEER, 10.0) == 0.0 and reasons == ["calls", "calls"]
    assert quotas.add(PeerID(bytes(32)), 0.0) == 0.0, "who has no quota has none here either"


def test_quotas_may_differ_by_peer_and_be_none() -> None:
    policy = Policy(quota=Quota(calls=1), quotas={PEER: None})
    quotas = Quotas(policy)
    assert [quotas.begin(PEER, 1, 0.0) for _ in range(3)] == [None] * 3 and len(quotas) == 0
    other = PeerID(bytes(32))
    assert quotas.begin(other, 1, 0.0) == 0.0 and quotas.begin(other, 1, 0.0) == pytest.approx(60.0)
    for wrong in ({"calls": 0}, {"num_bytes": -1}, {"period": float("inf")}, {"concurrent": 0}):
        with pytest.raises(ValueError, match="positive"):
            Quota(**wrong)  # type: ignore[arg-type]


def failed(pair: Pair) -> Overloaded:
    (event,) = pair.client.take()
    assert isinstance(event, CallFailed) and isinstance(event.error, Overloaded)
    return event.error


def test_what_is_too_much_is_refused_before_anything_is_done_and_comes_back_with_time() -> None:
    quotas = Quotas(Policy(quota=Quota(num_bytes=4 * MIB, period=100.0)))
    pair = Pair(quotas=quotas, server=dataclasses.replace(SETTINGS, window_bytes=0))
    for _ in range(2):
        pair.call(3 * MIB)
        pair.settle()
        pair.server.machine.reply(pair.received().stream, None, (), now=0.0)
        pair.settle()
        assert isinstance(pair.client.take()[0], ReplyReceived)
    before = sum(pair.bytes.values())
    pair.call(3 * MIB)
    pair.settle()
    error = failed(pair)
    assert not pair.server.take() and sum(pair.bytes.values()) - before < 1000, "the large request never left"
    assert error.retry_after == pytest.approx(50.0, rel=0.01) and "quota" in str(error)
    pair.call(10)
    pair.settle()
    failed(pair)
    pair.now = 51.0
    pair.call(10)
    pair.settle()
    pair.received()


def test_replies_count_and_a_refused_message_in_the_standing_window_gives_its_room_back() -> None:
    quotas = Quotas(Policy(quota=Quota(num_bytes=8 * MIB, period=1000.0)))
    pair = Pair(quotas=quotas)
    pair.call(MIB)  # opens the window
    pair.settle()
    pair.server.machine.reply(pair.received().stream, None, (memoryview(bytes(7 * MIB)),), now=0.0)
    pair.settle()
    assert isinstance(pair.client.take()[0], ReplyReceived)
    for _ in range(30):  # more than the window in all
        pair.call(MIB)
        pair.settle()
        failed(pair)
    assert not pair.server.take()
    windows = pair.server.machine.windows
    assert windows.in_used == 0 and pair.client.machine.windows.out_used == 0
    assert pair.server.budget.used == 0 and pair.server.machine.num_calls == 0


@pytest.mark.parametrize("how", ["answered", "cancelled", "failed", "lost"])
def test_calls_under_way_are_counted_until_they_end_however(how: str) -> None:
    quotas = Quotas(Policy(quota=Quota(concurrent=2)))
    pair = Pair(quotas=quotas)
    streams = [pair.call(10), pair.call(2 * MIB)]
    pair.settle()
    assert [type(event) for event in pair.server.take()] == [CallReceived] * 2
    pair.call(10)
    pair.settle()
    assert failed(pair).retry_after == BUSY_RETRY
    for stream in streams:
        if how == "answered":
            pair.server.machine.reply(stream, None, (), now=0.0)
        elif how == "cancelled":
            pair.client.machine.cancel_call(stream)
        elif how == "failed":
            pair.server.machine.fail(stream, Overloaded("x"))
    if how == "lost":
        pair.server.machine.connection_lost("cut")
        pair = Pair(quotas=quotas)
    pair.settle()
    pair.server.take()
    for _ in range(2):
        pair.call(10)
        pair.settle()
        pair.received()


async def test_a_peer_hears_when_to_come_back_and_others_are_not_concerned() -> None:
    plain = EndpointSettings(security="plain")
    started, release = asyncio.Event(), asyncio.Event()

    async def wait(call: IncomingCall) -> Message:
        started.set()
        await release.wait()
        return Message()

    async with serving(plain) as (server, address):
        greedy, modest = (
            Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=plain) for _ in range(2)
        )
        async with greedy, modest:
            server.policy = Policy(quota=Quota(calls=3, period=1000.0), quotas={modest.peer_id: Quota(concurrent=1)})
            for index in range(3):
                assert (await greedy.call(address, "echo", index, timeout=30)).body == index
            with pytest.raises(Overloaded, match="quota") as caught:
                await greedy.call(address, "echo", timeout=30)
            assert 300 < caught.value.retry_after < 340
            server.handle("wait", wait)
            waiting = asyncio.create_task(modest.call(address, "wait", timeout=30))
            await started.wait()
            with pytest.raises(Overloaded):
                await modest.call(address, "echo", timeout=30)
            release.set()
            await waiting
            assert (await modest.call(address, "echo", 1, timeout=30)).body == 1
            counted = {
                dict(labels)["reason"]: value
                for (name, labels), value in server.metrics.counters.items()
                if name == "endpoint_calls_over_quota"
            }
            assert counted == {"calls": 1, "concurrent": 1}
