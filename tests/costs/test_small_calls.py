"""What a small call of an expert costs at its client and at its server."""

import asyncio
import collections
import contextlib
import gc
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tests.costs.counting import Calls, ServerThread, least
from tests.costs.limits import check

WIDTH = 1024
UID = "nop.0"


class Nop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


@dataclass
class Swarm:
    """A server on a loop of its own, and a client on the test's."""

    thread: ServerThread
    node: ta.TesseractNode
    server: ta.TesseractServer
    client: ta.TesseractNode
    call: Callable[[], Awaitable[None]]

    async def calls(self, count: int) -> None:
        for _ in range(count):
            await self.call()

    async def calls_at_once(self, count: int) -> None:
        await asyncio.gather(*(self.call() for _ in range(count)))


@contextlib.asynccontextmanager
async def swarm(security: Any = "tls") -> AsyncIterator[Swarm]:
    thread, ending = ServerThread(), contextlib.AsyncExitStack()

    async def start() -> tuple[ta.TesseractNode, ta.TesseractServer]:
        node = await ending.enter_async_context(ta.TesseractNode(security=security))
        backend = ta.ExpertBackend(Nop(), args_schema=(ta.TensorSpec((WIDTH,)),), max_batch_size=64)
        return node, await ending.enter_async_context(ta.TesseractServer(node, {UID: backend}))

    with thread.running():
        node, server = await thread.run(start())
        try:
            async with ta.TesseractNode(security=security, initial_peers=[str(node.peer_address)]) as client:
                expert = await client.get_expert(UID)
                row = torch.randn(1, WIDTH)

                async def call() -> None:
                    with torch.no_grad():
                        await expert(row)

                for _ in range(70):  # until what remembers the latest calls is full
                    await call()
                yield Swarm(thread, node, server, client, call)
        finally:
            await thread.run(ending.aclose())


async def test_calls_of_functions_and_turns_of_the_loops() -> None:
    async with swarm() as found:
        mine = Calls()

        async def here() -> collections.Counter[str]:
            return mine.snapshot()

        await found.thread.profile(True)
        server = await least(found.calls, found.thread.snapshot, size=10, num_blocks=6)
        server_of_8 = await least(found.calls_at_once, found.thread.snapshot, size=8, num_blocks=8)
        await found.thread.profile(False)
        sys.setprofile(mine)
        try:
            client = await least(found.calls, here, size=10, num_blocks=6)
            client_of_8 = await least(found.calls_at_once, here, size=8, num_blocks=8)
        finally:
            sys.setprofile(None)
    for side, costs, of_8 in (("client", client, client_of_8), ("server", server, server_of_8)):
        check(f"{side}: Python calls per small call", costs["python"])
        check(f"{side}: C calls per small call", costs["c"])
        check(f"{side}: turns of the loop per small call", costs["turns"])
        check(f"{side}: Python calls per small call of eight at once", of_8["python"])
        check(f"{side}: C calls per small call of eight at once", of_8["c"])


async def test_calls_of_functions_in_forward_and_backward() -> None:
    async with swarm() as found:
        expert, x, mine = await found.client.get_expert(UID), torch.randn(1, WIDTH), Calls()

        async def block(count: int) -> None:
            for _ in range(count):
                await ta.backward((await expert(x.detach().requires_grad_())).sum())

        async def here() -> collections.Counter[str]:
            return mine.snapshot()

        await block(70)
        await found.thread.profile(True)
        server = await least(block, found.thread.snapshot, size=10, num_blocks=4)
        await found.thread.profile(False)
        sys.setprofile(mine)
        try:
            client = await least(block, here, size=10, num_blocks=4)
        finally:
            sys.setprofile(None)
    for side, costs in (("client", client), ("server", server)):
        check(f"{side}: Python calls per forward and backward", costs["python"])
        check(f"{side}: turns of the loop per forward and backward", costs["turns"])


async def test_functions_that_a_forward_passes() -> None:
    """The package's own, on both loops, and the files they are in; ``-s`` lists them in the order of the first call."""
    async with swarm() as found:
        mine = Calls()
        await found.thread.profile(True)
        sys.setprofile(mine)
        try:
            await found.calls(20)
        finally:
            sys.setprofile(None)
        await found.thread.profile(False)
    passed = {
        side: [name for name, count in calls.own.items() if count >= 20]
        for side, calls in (("client", mine), ("server", found.thread.calls))
    }
    for side, functions in passed.items():
        print(f"{side}: {len(functions)} functions", *(f"  {file} {name}" for file, name in functions), sep="\n")
    functions = set(passed["client"]) | set(passed["server"])
    check("functions that a forward passes, both ends", len(functions))
    check("files that a forward passes, both ends", len({file for file, _ in functions}))


async def test_frames_and_bytes() -> None:
    async with swarm("plain") as found:
        mine = Calls()

        def num_bytes() -> float:
            found.client.endpoint.tick()
            total = found.client.metrics.total
            return total("transport_bytes_sent") + total("transport_bytes_received")

        async def here() -> collections.Counter[str]:
            return mine.snapshot()

        sent: list[float] = []

        async def block(count: int) -> None:
            before = num_bytes()
            await found.calls(count)
            sent.append((num_bytes() - before) / count)

        sys.setprofile(mine)
        try:
            received = await least(block, here, size=10, num_blocks=3)
        finally:
            sys.setprofile(None)
    # each request has one frame, as each reply
    check("frames per small call, both ways", received["Lane.put"] + received["OutgoingCalls.reply_received"])
    check("bytes per small call, both ways", min(sent))


async def test_what_is_kept() -> None:
    async with swarm() as found:
        await found.calls(128)
        kept: list[float] = []
        for _ in range(2):
            gc.collect()
            before = sys.getallocatedblocks()
            await found.calls(640)  # ended deadlines are dropped after 64 calls, blocks of memory hold 5 messages
            gc.collect()
            kept.append((sys.getallocatedblocks() - before) / 640)
    check("allocations kept per small call", min(kept))


async def test_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight calls come while the device is busy: neither side wakes the other for each of them."""
    async with swarm() as found:
        runtime, loop = found.server.runtimes[0], found.thread.loop
        num: collections.Counter[str] = collections.Counter()
        wake, test_thread = loop.call_soon_threadsafe, threading.get_ident()

        def counted_wake(*args: Any, **options: Any) -> Any:
            num["loop"] += threading.get_ident() != test_thread
            return wake(*args, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted_wake)
        await found.thread.profile(True)
        for _ in range(5):
            held, free = threading.Event(), threading.Event()

            def hold(held: threading.Event = held, free: threading.Event = free) -> None:
                held.set()
                assert free.wait(60)

            num_before = runtime.statistics().num_batches
            num.clear()
            rings = (await found.thread.snapshot())["Bell.ring"]
            holding = found.thread.run(runtime.call(hold))
            assert await asyncio.to_thread(held.wait, 60)
            calls = [asyncio.ensure_future(found.call()) for _ in range(8)]
            while runtime.statistics().num_waiting < 8:  # noqa: ASYNC110 (nobody tells what waits)
                await asyncio.sleep(0)
            await found.thread.run(asyncio.sleep(0))  # the turn in which they came is over
            free.set()
            await asyncio.gather(holding, *calls)
            num_ended = runtime.statistics().num_batches - num_before + 1  # with the one that held the device
            check("wake-ups of the loop per batch that ends", num["loop"] / num_ended)
            check(
                "wake-ups of the device's thread until it idles again",
                (await found.thread.snapshot())["Bell.ring"] - rings,
            )
        await found.thread.profile(False)
