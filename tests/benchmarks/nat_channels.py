"""What the ways through NATs cost: a data channel against bare aiortc, a relay against direct TCP, in the same run.

Prints one line of JSON per figure. Both ends of a data channel run in this process, as in the bare measurement; the
relay and both of its ends are processes of their own. Rounds alternate, and the median of their ratios counts.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from multiprocessing.connection import Connection

import uvloop
from aiortc import RTCConfiguration, RTCPeerConnection

from tesseract_async.endpoint.endpoint import Endpoint, IncomingCall, Message
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.nat import preamble
from tesseract_async.nat.demux import PreambleDemultiplexer
from tesseract_async.nat.relay import Relay, RelaySettings
from tesseract_async.nat.webrtc.message_stream import MESSAGE_BYTES
from tesseract_async.nat.webrtc.pipe import Negotiation
from tesseract_async.transport import tcp
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe

ROUNDS = 5
CHANNEL_BYTES = 8 * 2**20
RELAY_BYTES = 128 * 2**20


class OnePath:
    """A transport that opens pipes in one given way."""

    def __init__(self, open_pipe: Callable[[], Awaitable[Pipe]]) -> None:
        self._open = open_pipe

    async def listen(self, accept: Callable[[Pipe], None]) -> None:
        pass

    def paths(self, peer: PeerAddress) -> Sequence[DialPath]:
        return [DialPath("path", 0.0, self._open)]

    def path_finished(self, peer: PeerAddress, path: DialPath, error: BaseException | None) -> None:
        pass

    def peer_known(self, peer: PeerAddress) -> None:
        pass

    async def aclose(self) -> None:
        pass


async def swallow(call: IncomingCall) -> Message:
    return Message(sum(map(len, call.buffers)))


async def send(endpoint: Endpoint, peer_id: PeerID, num_bytes: int) -> float:
    """Bytes per second of one call with a large request."""
    data = memoryview(bytearray(num_bytes))
    begun = time.perf_counter()
    reply = await endpoint.call(PeerAddress(peer_id, ("192.0.2.1:1",)), "swallow", None, [data], timeout=120)
    assert reply.body == num_bytes
    return num_bytes / (time.perf_counter() - begun)


async def bare_channel(num_bytes: int) -> float:
    """Bytes per second through aiortc alone."""
    one, other = (RTCPeerConnection(RTCConfiguration(iceServers=[])) for _ in range(2))
    channel = one.createDataChannel("bare")
    opened, done, low = asyncio.Event(), asyncio.Event(), asyncio.Event()
    left = num_bytes

    def received(message: bytes) -> None:
        nonlocal left
        left -= len(message)
        if left <= 0:
            done.set()

    channel.on("open", opened.set)
    channel.on("bufferedamountlow", low.set)
    other.on("datachannel", lambda theirs: theirs.on("message", received))
    await one.setLocalDescription(await one.createOffer())
    await other.setRemoteDescription(one.localDescription)
    await other.setLocalDescription(await other.createAnswer())
    await one.setRemoteDescription(other.localDescription)
    await opened.wait()
    channel.bufferedAmountLowThreshold = 2**20
    message = bytes(MESSAGE_BYTES)
    begun = time.perf_counter()
    for _ in range(num_bytes // MESSAGE_BYTES):
        if channel.bufferedAmount > 4 * 2**20:
            low.clear()
            await low.wait()
        channel.send(message)
    await done.wait()
    seconds = time.perf_counter() - begun
    await one.close()
    await other.close()
    return num_bytes / seconds


@contextlib.asynccontextmanager
async def channel_endpoints() -> AsyncIterator[tuple[Endpoint, PeerID]]:
    """An endpoint that reaches another one through data channels only, TLS inside."""
    server = Endpoint(identity=Identity.generate())
    server.handle("swallow", swallow)

    async def open_pipe() -> Pipe:
        one, other = (
            Negotiation(controlling=controlling, addresses=["127.0.0.1"], stun_server=None)
            for controlling in (True, False)
        )
        mine, theirs = await asyncio.gather(one.gather(), other.gather())
        pipe, accepted = await asyncio.gather(one.connect(theirs), other.connect(mine))
        server.accept(accepted)
        return pipe

    async with server, Endpoint(identity=Identity.generate(), transports=[OnePath(open_pipe)]) as client:
        yield client, server.peer_id


async def measure_channel() -> tuple[float, float]:
    """Bytes per second, and the ratio to the bare channel."""
    speeds, ratios = [], []
    async with channel_endpoints() as (client, peer_id):
        await send(client, peer_id, 2**20)
        for _ in range(ROUNDS):
            bare = await bare_channel(CHANNEL_BYTES)
            speeds.append(await send(client, peer_id, CHANNEL_BYTES))
            ratios.append(speeds[-1] / bare)
    return statistics.median(speeds), statistics.median(ratios)


def bound_socket() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def run_server(sock: socket.socket, seed: bytes, meetings: Connection) -> None:
    """Answers calls; for each (address, token) from `meetings` it comes to the relay."""

    async def main() -> None:
        endpoint = Endpoint(identity=Identity.from_seed(seed), transports=[tcp.TcpTransport(sock)])
        endpoint.handle("swallow", swallow)
        await endpoint.start()
        while True:
            address, token = await asyncio.to_thread(meetings.recv)
            pipe = await tcp.connect(address)
            pipe.write(preamble.encode_preamble(preamble.RELAY, token))
            endpoint.accept(pipe)

    uvloop.run(main())


def run_relay(sock: socket.socket, orders: Connection) -> None:
    async def main() -> None:
        relay = Relay(settings=RelaySettings(max_rate=None), metrics=Metrics())
        demultiplexer = PreambleDemultiplexer(
            tcp.TcpTransport(sock),
            special=lambda kind, token, pipe: relay.pipe_arrived(token, pipe),
            metrics=Metrics(),
        )
        await demultiplexer.listen(lambda pipe: pipe.abort())
        while True:
            await asyncio.to_thread(orders.recv)
            orders.send(relay.reserve(PeerID(bytes(32))))

    uvloop.run(main())


async def measure_relay(
    server_address: str, relay_address: str, seed: bytes, meet: Connection, order: Connection
) -> tuple[float, float]:
    peer_id = Identity.from_seed(seed).peer_id

    async def open_relayed() -> Pipe:
        order.send(None)
        mine, theirs = order.recv()
        meet.send((relay_address, theirs))
        pipe = await tcp.connect(relay_address)
        pipe.write(preamble.encode_preamble(preamble.RELAY, mine))
        return pipe

    speeds, ratios = [], []
    direct_way, relayed_way = OnePath(lambda: tcp.connect(server_address)), OnePath(open_relayed)
    async with (
        Endpoint(identity=Identity.generate(), transports=[direct_way]) as direct,
        Endpoint(identity=Identity.generate(), transports=[relayed_way]) as relayed,
    ):
        for endpoint in (direct, relayed):
            await send(endpoint, peer_id, 16 * 2**20)
        for _ in range(ROUNDS):
            plain = await send(direct, peer_id, RELAY_BYTES)
            speeds.append(await send(relayed, peer_id, RELAY_BYTES))
            ratios.append(speeds[-1] / plain)
    return statistics.median(speeds), statistics.median(ratios)


def relay_figures() -> tuple[float, float]:
    context = multiprocessing.get_context("fork")
    server, relay, seed = bound_socket(), bound_socket(), os.urandom(32)
    addresses = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in (server, relay)]
    meet, meetings = context.Pipe()
    order, orders = context.Pipe()
    processes = [
        context.Process(target=run_server, args=(server, seed, meetings), daemon=True),
        context.Process(target=run_relay, args=(relay, orders), daemon=True),
    ]
    for process in processes:
        process.start()
    try:
        return uvloop.run(measure_relay(addresses[0], addresses[1], seed, meet, order))
    finally:
        for process in processes:
            process.terminate()


def report(name: str, value: float, unit: str, asked: str) -> None:
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "asked": asked}), flush=True)


def main() -> None:
    speed, ratio = relay_figures()
    report("relay: throughput, TLS end to end", speed / 1e6, "MB/s", "")
    report("relay: throughput against direct TCP", ratio, "ratio", ">= 0.65")
    speed, ratio = uvloop.run(measure_channel())
    report("data channel: throughput, TLS inside", speed / 1e6, "MB/s", "")
    report("data channel: throughput against bare aiortc", ratio, "ratio", ">= 0.8")


if __name__ == "__main__":
    main()
