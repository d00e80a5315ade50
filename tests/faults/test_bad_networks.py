"""Calls through a proxy that stalls, cuts, delays and corrupts: each ends in a result or a typed error, and the next
one works.
"""

import asyncio
import dataclasses
import logging

import pytest

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.errors import TesseractError
from tesseract_async.identity import Identity
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport
from tesseract_async.wire import frames
from tests.faults.proxy import Action, Fault, Proxy
from tests.faults.serving import echo, serving

BOUNDS = Bounds(ping_after=0.5, dead_after=2.0, bulk_retry=0.0, handshake_timeout=1.0, backoff_base=0.01)
QUICK = dataclasses.replace(BOUNDS, ping_after=0.05, dead_after=0.2, stall_after=0.3, handshake_timeout=0.3)
PLAIN = EndpointSettings(security="plain", bounds=BOUNDS)
STALLING = dataclasses.replace(PLAIN, bounds=QUICK)
TLS = dataclasses.replace(PLAIN, security="tls", bounds=dataclasses.replace(BOUNDS, handshake_timeout=3.0))
GENTLE = EndpointSettings(security="plain", bounds=Bounds(bulk_retry=0.0))
"""Where nothing may fail: the product's own time-outs, which a busy machine keeps."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


SMALL, LARGE = b"s" * 500, b"L" * 200_000


async def converse(
    client: Endpoint, address: PeerAddress, *, timeout: float, secure: bool = False
) -> list[BaseException]:
    """Two small calls and two large ones at once; the errors among their ends, all of them typed."""

    async def one(payload: bytes) -> None:
        reply = await client.call(address, "echo", len(payload), [payload], timeout=timeout)
        assert reply.body == len(payload) and len(reply.buffers[0]) == len(payload)
        if secure:
            assert reply.buffers[0] == payload

    results = await asyncio.gather(*(one(p) for p in (SMALL, LARGE, SMALL, LARGE)), return_exceptions=True)
    errors = [result for result in results if result is not None]
    for error in errors:
        assert isinstance(error, TesseractError | TimeoutError), repr(error)
    return errors


def boundaries(data: bytes) -> list[int]:
    """Where frames begin in the recorded bytes of a plain channel, and places inside their headers and payloads."""
    out, position = [], 0
    while position + 16 <= len(data):
        length = frames.HEADER.unpack_from(data, position)[3]
        out += [position, position + 3, position + 16, position + 16 + length // 2]
        position += 16 + length
    return [at for at in out if at < len(data)]


async def strike(settings: EndpointSettings, fault: Fault, *, timeout: float) -> tuple[bool, int]:
    """Whether the fault struck, and how many of the first calls failed."""
    secure = settings.security == "tls"
    async with serving(settings) as (server, address):
        async with Proxy(address.addresses[0], fault) as proxy:
            through = PeerAddress(server.peer_id, (proxy.address,))
            async with Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=settings) as client:
                errors = await converse(client, through, timeout=timeout, secure=secure)
                for _ in range(20):
                    again = await converse(client, through, timeout=2.0, secure=secure)
                    if not again:
                        break
                    proxy.fault = None  # the network is good from now on
                else:
                    raise AssertionError(f"after {fault}, calls go on to fail: {again}")
                assert not client.budgets.messages.num_waiting
    return proxy.struck.is_set(), len(errors)


async def record() -> dict[tuple[int, int], bytes]:
    """The bytes of an undisturbed conversation over plain channels: main and bulk, both directions."""
    async with serving(GENTLE) as (server, address), Proxy(address.addresses[0]) as proxy:
        through = PeerAddress(server.peer_id, (proxy.address,))
        async with Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=GENTLE) as client:
            for _ in range(2):
                assert not await converse(client, through, timeout=30.0)
        return {key: bytes(stream.data) for key, stream in proxy.streams.items()}


async def strike_all(settings: EndpointSettings, faults: list[Fault], *, timeout: float) -> int:
    """Strikes many at a time; how many calls failed. Most faults must have struck."""
    struck = failed = 0
    for begin in range(0, len(faults), 40):
        ends = await asyncio.gather(*(strike(settings, fault, timeout=timeout) for fault in faults[begin : begin + 40]))
        struck += sum(end[0] for end in ends)
        failed += sum(end[1] for end in ends)
    assert struck > len(faults) // 2
    return failed


# `thin` leaves places out, so that the quick run stays quick; the slow one visits each boundary.
@pytest.mark.parametrize("thin", [8, pytest.param(1, marks=pytest.mark.slow)])
async def test_at_frame_boundaries_and_inside_frames(thin: int) -> None:
    recorded = await record()
    assert set(recorded) == {(0, 0), (0, 1), (1, 0), (1, 1)}, "a main and a bulk channel"

    def faults(action: Action, every: int) -> list[Fault]:
        return [Fault(action, *key, at) for key, data in recorded.items() for at in boundaries(data)][::every]

    assert await strike_all(PLAIN, faults("cut", thin), timeout=5.0) > 0
    assert await strike_all(GENTLE, faults("delay", 3 * thin), timeout=30.0) == 0
    assert await strike_all(STALLING, faults("stall", 3 * thin), timeout=1.0) > 0
    await strike_all(PLAIN, faults("corrupt", 2 * thin), timeout=0.5)


async def test_corruption_under_tls_is_noticed_wherever_it_strikes() -> None:
    places = [*range(0, 4000, 801), *range(5000, 150_000, 70_001)]
    faults = [Fault("corrupt", connection, way, at) for connection in (0, 1) for way in (0, 1) for at in places]
    assert await strike_all(TLS, faults, timeout=5.0) > 0


async def test_cancelling_a_call_at_every_await_point() -> None:
    running: set[int] = set()

    async def slow_echo(call: IncomingCall) -> Message:
        running.add(id(call))
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            return await echo(call)
        finally:
            running.discard(id(call))

    for settings in (PLAIN, dataclasses.replace(TLS, bounds=dataclasses.replace(BOUNDS, handshake_timeout=5.0))):
        async with serving(settings) as (server, address):
            server.handle("slow", slow_echo)
            for payload in (SMALL, LARGE):
                turns = 0
                cancelled = True
                while cancelled:
                    turns += 1
                    # a client of its own each time, so that the dial, too, is cancelled at every point
                    async with Endpoint(
                        identity=Identity.generate(), transports=[TcpTransport()], settings=settings
                    ) as client:
                        task = asyncio.create_task(client.call(address, "slow", 1, [payload], timeout=30))
                        for _ in range(turns):
                            await asyncio.sleep(0)
                        task.cancel()
                        cancelled = task in (await asyncio.wait([task]))[0] and task.cancelled()
                        assert (await client.call(address, "echo", turns, timeout=30)).body == turns
                        async with asyncio.timeout(30):
                            while running:  # the cancel is on its way
                                await client.call(address, "echo", timeout=30)
                    turns += turns // 8
                assert turns > 10
