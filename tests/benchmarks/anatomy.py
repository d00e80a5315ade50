"""Where the time of one small expert call goes: processor time of each layer alone, `nop`, 1 x 1024.

The client's and the server's parts run against the other side cut off; the endpoint's is both ends in one process.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.wire.messages import FORWARD
from tests.benchmarks.figures import emit
from tests.benchmarks.loads import Load
from tests.benchmarks.swarm import Security, make_backend, run_on

LOAD = Load("nop", "nop", 1, 1024, 1)
NUM_BATCHES, BATCH = 40, 50


async def microseconds(call: Callable[[], Awaitable[Any]]) -> float:
    """Processor time of this process per call: of the best batch, which a busy machine disturbs least."""
    least = float("inf")
    for _ in range(NUM_BATCHES):
        begin = time.process_time()
        for _ in range(BATCH):
            await call()
        least = min(least, (time.process_time() - begin) / BATCH * 1e6)
    return least


class Recorder(ta.TesseractNode):
    """Keeps the last expert call and its reply, and repeats that reply without a network once told to."""

    last: tuple[dict[str, Any], tuple[memoryview, ...], Message]
    cut_off = False

    async def call_expert(self, peer: Any, method: str, body: Any = None, buffers: Any = (), **options: Any) -> Message:
        if self.cut_off:
            return self.last[2]
        reply = await super().call_expert(peer, method, body, buffers, **options)
        self.last = (body, tuple(memoryview(bytearray(each)) for each in buffers), reply)
        return reply


async def measure(security: Security) -> None:
    backend = make_backend(LOAD)
    async with (
        ta.TesseractNode(security=security) as host,
        ta.TesseractServer(host, {"nop.0": backend}),
        Recorder(security=security, initial_peers=[str(host.peer_address)]) as node,
    ):
        expert = await node.get_expert("nop.0")
        row = torch.randn(1, LOAD.width)

        async def call() -> None:
            with torch.no_grad():
                await expert(row)

        whole = await microseconds(call)
        body, buffers, _ = node.last

        async def answer() -> None:  # a call to one's own node goes straight to its server
            await host.call_expert(host.peer_address, FORWARD, body, buffers, timeout=30.0)

        async def echo(incoming: IncomingCall) -> Message:
            return Message(incoming.body, incoming.buffers)

        host.endpoint.handle("echo", echo)

        async def endpoint() -> None:
            await node.endpoint.call(host.peer_address, "echo", body, buffers, timeout=30.0)

        parts = {
            "server alone": await microseconds(answer),
            f"endpoint alone, {security}": await microseconds(endpoint),
        }
        node.cut_off = True
        parts["client alone"] = await microseconds(call)
    emit(f"small call: both ends in one process, {security}", whole, "us")
    for name, value in parts.items():
        emit(f"small call: {name}", value, "us")


def main() -> None:
    torch.set_num_threads(1)
    run_on("uvloop", measure("tls"))


if __name__ == "__main__":
    main()
