"""What loads do to each other: small calls beside large ones, and an expert's training beside bulk traffic."""

import asyncio
import contextlib
import os
import time
from multiprocessing.connection import Connection

import torch

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.transport.base import PeerAddress
from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.loads import Load
from tests.benchmarks.processes import child
from tests.benchmarks.swarm import Security, joined, make_backend, run_on, serving, stop_asked
from tests.computed import computed

SECONDS = 3.0
BULK = 8 << 20
NUM_BULK_PEERS = 2
BIG = Load("big", "nop", 2048, 1024, 1)
TRAINED = Load("trained", "ffn", 4, 256, 1, backward=True)


# -- Small calls beside large ones ---------------------------------------------------------------------------------


async def small_beside_big(address: str, security: Security) -> None:
    """Four large calls and one small one at a time, all to the same peer."""
    async with joined(address, security) as node:
        expert = await node.get_expert("nop.0")
        batch, row = torch.randn(BIG.rows, BIG.width), torch.randn(1, BIG.width)
        for x in (batch, row):
            await expert(x)
        stop_at = time.perf_counter() + SECONDS

        async def calls(x: torch.Tensor) -> list[float]:
            latencies = []
            while (begin := time.perf_counter()) < stop_at:
                with torch.no_grad():
                    await expert(x)
                latencies.append(time.perf_counter() - begin)
            return latencies

        small, *big = await asyncio.gather(calls(row), *(calls(batch) for _ in range(4)))
    big_median = percentile([each for some in big for each in some], 0.5)
    small_median = percentile(small, 0.5)
    emit(
        f"small call beside 4 x 8 MiB, {security}: share of the big calls' median",
        small_median / big_median,
        "",
        asked="< 0.1",
        small_ms=small_median * 1e3,
        small_p99_ms=percentile(small, 0.99) * 1e3,
        big_ms=big_median * 1e3,
    )


# -- Training beside bulk traffic ----------------------------------------------------------------------------------


def train(pipe: Connection, security: Security, loop: str) -> None:
    """A node that swallows bulk and trains an expert. Told to go, it sends backwards/s and its received bytes/s."""
    torch.set_num_threads(1)

    async def main() -> None:
        async with ta.TesseractNode(security=security) as node:
            num_bytes = 0

            async def swallow(call: IncomingCall) -> Message:
                nonlocal num_bytes
                num_bytes += sum(buffer.nbytes for buffer in call.buffers)
                return Message()

            node.endpoint.handle("bulk", swallow)
            backend = make_backend(TRAINED)
            runtime = ta.TesseractRuntime()
            await runtime.start()
            pipe.send(("value", str(node.peer_address)))
            loop = asyncio.get_running_loop()
            while await loop.run_in_executor(None, pipe.recv) == "go":
                batch = torch.randn(TRAINED.rows, TRAINED.width)
                gradient = torch.randn(TRAINED.rows, TRAINED.width)
                num_calls, bytes_before, begin = 0, num_bytes, time.perf_counter()
                while (now := time.perf_counter()) < begin + SECONDS:
                    await computed(runtime, backend, [batch], [gradient], call_id=os.urandom(16))
                    num_calls += 1
                pipe.send(("value", (num_calls / (now - begin), (num_bytes - bytes_before) / (now - begin))))
            await runtime.aclose()

    with contextlib.suppress(EOFError):
        run_on(loop, main())


def stream(pipe: Connection, address: str, security: Security, loop: str) -> None:
    """A process that sends bulk as fast as it is taken, from the moment it has said so until it is stopped."""

    async def main() -> None:
        async with ta.TesseractNode(security=security) as node:
            peer, payload = PeerAddress.parse(address), memoryview(bytearray(BULK))

            async def send() -> None:
                while True:
                    await node.endpoint.call(peer, "bulk", buffers=[payload], timeout=60.0)

            await node.endpoint.call(peer, "bulk", buffers=[payload], timeout=60.0)
            pipe.send(("value", "streaming"))
            sending = asyncio.create_task(send())
            await stop_asked(pipe)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    run_on(loop, main())


def training_beside_bulk(security: Security, loop: str) -> None:
    """Backwards/s in a node that two peers send bulk to, against the same while they send it to another process."""
    rates: dict[str, tuple[float, float]] = {}
    with child(train, (security, loop)) as trainer, child(train, (security, loop)) as other:
        addresses = {"same": trainer.receive(60), "other": other.receive(60)}
        for target in ("other", "same"):
            with contextlib.ExitStack() as stack:
                for _ in range(NUM_BULK_PEERS):
                    sender = stack.enter_context(child(stream, (addresses[target], security, loop)))
                    sender.receive(60)
                trainer.pipe.send("go")
                rates[target] = trainer.receive(60)
    emit(
        f"expert backwards beside bulk, {security}: share of those with the bulk elsewhere",
        rates["same"][0] / rates["other"][0],
        "",
        asked=">= 0.5" if security == "plain" else ">= 0.25",
        per_second_same=rates["same"][0],
        per_second_other=rates["other"][0],
        bulk_bytes_per_second=rates["same"][1],
    )


def main() -> None:
    loop = "uvloop"
    for security in ("plain", "tls"):
        training_beside_bulk(security, loop)
    for security in ("plain", "tls"):
        with serving(BIG, ["nop.0"], security=security) as (_, address):
            run_on(loop, small_beside_big(address, security))


if __name__ == "__main__":
    main()
