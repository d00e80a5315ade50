"""The endpoint alone, without experts and tensors: echoes between two processes. `ceilings` is what to compare with."""

import asyncio
import time
from multiprocessing.connection import Connection

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport
from tests.benchmarks.figures import emit
from tests.benchmarks.processes import child
from tests.benchmarks.swarm import Security, run_on, stop_asked

SECONDS = 2.0
LOADS = (("4 KiB, 32 at a time", 4096, 32), ("4 KiB, one at a time", 4096, 1), ("8 MiB, 4 at a time", 8 << 20, 4))


async def echo(call: IncomingCall) -> Message:
    return Message(call.body, call.buffers)


def serve(pipe: Connection, security: Security, loop: str) -> None:
    async def main() -> None:
        async with ta.TesseractNode(security=security) as node:
            node.endpoint.handle("echo", echo)
            pipe.send(("value", str(node.peer_address)))
            await stop_asked(pipe)

    run_on(loop, main())


async def load(address: str, security: Security, size: int, callers: int) -> tuple[float, float]:
    """Calls per second, and this process's CPU seconds per call."""
    peer, payload = PeerAddress.parse(address), memoryview(bytearray(size))
    settings = EndpointSettings(security=security)
    async with Endpoint(identity=ta.Identity.generate(), transports=[TcpTransport()], settings=settings) as endpoint:
        for _ in range(3):
            await endpoint.call(peer, "echo", None, [payload], timeout=30.0)
        count, begin, cpu = 0, time.perf_counter(), time.process_time()

        async def caller() -> None:
            nonlocal count
            while time.perf_counter() - begin < SECONDS:
                await endpoint.call(peer, "echo", None, [payload], timeout=30.0)
                count += 1

        await asyncio.gather(*(caller() for _ in range(callers)))
        return count / (time.perf_counter() - begin), (time.process_time() - cpu) / count


def main() -> None:
    for loop in ("uvloop", "asyncio"):
        for security in ("plain", "tls"):
            with child(serve, (security, loop)) as server:
                address = server.receive(30)
                for name, size, callers in LOADS:
                    rate, cpu = run_on(loop, load(address, security, size, callers))
                    large = size > 1 << 20
                    emit(
                        f"endpoint echo, {name}, {security}, {loop}",
                        rate * size / 1e6 if large else rate,
                        "MB/s" if large else "calls/s",
                        client_cpu_us_per_call=cpu * 1e6,
                    )


if __name__ == "__main__":
    main()
