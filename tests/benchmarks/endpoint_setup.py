"""What it costs to meet a peer: TCP, TLS 1.3 with both sides' proof, and the hello, on loopback."""

import asyncio
import time
from multiprocessing.connection import Connection

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import Endpoint, IncomingCall, Message
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport
from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.processes import child
from tests.benchmarks.swarm import run_on, stop_asked

NUM_DIALS = 100


async def answer(call: IncomingCall) -> Message:
    return Message(call.body)


def serve(pipe: Connection, loop: str) -> None:
    """A node in a process of its own; sends its address."""

    async def main() -> None:
        async with ta.TesseractNode(security="tls") as node:
            node.endpoint.handle("echo", answer)
            pipe.send(("value", str(node.peer_address)))
            await stop_asked(pipe)

    run_on(loop, main())


async def dial(address: str) -> list[float]:
    """Seconds from a first call to its answer, each from a fresh endpoint, less those of a second call."""
    seconds = []
    peer = PeerAddress.parse(address)
    for _ in range(NUM_DIALS):
        endpoint = Endpoint(identity=ta.Identity.generate(), transports=[TcpTransport()])
        begin = time.perf_counter()
        await endpoint.call(peer, "echo", 1, timeout=10.0)
        connected = time.perf_counter()
        await endpoint.call(peer, "echo", 1, timeout=10.0)
        seconds.append(2 * connected - begin - time.perf_counter())
        await endpoint.aclose()
    return seconds


def main() -> None:
    for loop in ("uvloop", "asyncio"):
        with child(serve, (loop,)) as server:
            seconds = run_on(loop, asyncio.wait_for(dial(server.receive(30)), 60))
        emit(
            f"connection set-up with tls, {loop}",
            percentile(seconds, 0.5) * 1e3,
            "ms",
            asked="< 10",
            p99_ms=percentile(seconds, 0.99) * 1e3,
        )


if __name__ == "__main__":
    main()
