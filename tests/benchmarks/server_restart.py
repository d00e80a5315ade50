"""How long a server is away: told to leave under load and started again, and killed and started again.

16 `ffn` experts of width 256 with Adam and checkpoints, four trainers that go on all the time. Measured: SIGTERM until
the process is gone; the start of the next process until another node reads the last uid in the directory, until its
next step is applied, and whether that continues the steps counted before. With a second server that follows
(`--replicas`), also the calls that failed at the trainers while the first one left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import tempfile
import time
from typing import Any

import torch

import tesseract_async as ta
from tesseract_async.errors import TesseractError, describe
from tests.benchmarks.cli_start_up import start, stop
from tests.benchmarks.figures import emit

UIDS = [f"ffn.{row}.{column}" for row in range(4) for column in range(4)]
WIDTH = 256
SERVE = ("serve", "--experts", "ffn.[0:4].[0:4]", "--size", f"in_features={WIDTH}", "--sync-every", "1")


class Trainers:
    """Four that train the experts in turns, and count."""

    def __init__(self, node: ta.TesseractNode) -> None:
        self.node = node
        self.num_steps = 0
        self.failures: list[str] = []
        self._stepped = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Trainers:
        self._tasks = [asyncio.create_task(self._train(index)) for index in range(4)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def steps(self, num_more: int) -> None:
        goal = self.num_steps + num_more
        async with self._stepped:
            await self._stepped.wait_for(lambda: self.num_steps >= goal)

    async def _train(self, index: int) -> None:
        while True:
            index = (index + 5) % len(UIDS)
            try:
                expert = await self.node.get_expert(UIDS[index])
                x = torch.randn(4, WIDTH, requires_grad=True)
                await ta.backward((await expert(x)).square().mean())
            except (TesseractError, TimeoutError) as error:
                self.failures.append(describe(error))
                await asyncio.sleep(0.1)
            else:
                async with self._stepped:
                    self.num_steps += 1
                    self._stepped.notify_all()


async def absence(directory: str, address: str, node: ta.TesseractNode, how: signal.Signals) -> dict[str, float]:
    """Seconds of one departure and return."""
    found: dict[str, float] = {}
    arguments = (*SERVE, "--checkpoint-dir", directory, "--checkpoint-period", "2", "-p", address)
    server, _ = await start(*arguments, "--identity", f"{directory}/identity.pem")
    async with Trainers(node) as trainers:
        await trainers.steps(64)
        begin = time.perf_counter()
        server.send_signal(how)
        await server.communicate()
        found["gone after"] = time.perf_counter() - begin
    before = trainers.num_steps
    begin = time.perf_counter()

    async def visible() -> float:
        # by reading the network, not the directory's memory of the server that left
        while True:
            with contextlib.suppress(TesseractError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await (await node.get_expert(UIDS[-1])).info()
                    return time.perf_counter() - begin
            await asyncio.sleep(0.02)

    looking = asyncio.create_task(visible())
    server, facts = await start(*arguments, "--identity", f"{directory}/identity.pem")
    found["ready"] = time.perf_counter() - begin
    found["answers another node"] = await looking
    restored = sum(facts["versions"].values())
    async with Trainers(node) as trainers:
        await trainers.steps(1)
        found["trains again"] = time.perf_counter() - begin
    found["steps lost"] = max(0, before - restored)
    await stop(server)
    return found


async def replicas(directory: str, address: str, node: ta.TesseractNode) -> tuple[int, int]:
    """Failed calls and steps at the trainers while the primary of two replicas of each expert leaves."""
    first, _ = await start(*SERVE, "--checkpoint-dir", f"{directory}/first", "-p", address)
    second, facts = await start(*SERVE, "--checkpoint-dir", f"{directory}/second", "-p", address)
    assert sorted(facts["followed"]) == sorted(UIDS), "the second one follows"
    async with Trainers(node) as trainers:
        await trainers.steps(64)
        first.send_signal(signal.SIGTERM)
        while first.returncode is None:
            await trainers.steps(4)
        await trainers.steps(64)
    await stop(second)
    return len(trainers.failures), trainers.num_steps


async def measure(num_repeats: int) -> None:
    torch.set_num_threads(1)
    bootstrap, facts = await start("dht")
    address: str = facts["address"]
    away: dict[str, list[dict[str, Any]]] = {"SIGTERM": [], "SIGKILL": []}
    async with ta.TesseractNode(initial_peers=[address]) as node:
        await node.network.wait_joined(10.0)
        for _ in range(num_repeats):
            for name, seen in away.items():
                with tempfile.TemporaryDirectory() as directory:
                    seen.append(await absence(directory, address, node, signal.Signals[name]))
        with tempfile.TemporaryDirectory() as directory:
            failures, num_steps = await replicas(directory, address, node)
    await stop(bootstrap)
    asked = {"answers another node": "< 5"}
    for how, seen in away.items():
        for name in seen[0]:
            values = sorted(one[name] for one in seen)
            unit, goal = ("steps", "<= 0" if how == "SIGTERM" else None) if "lost" in name else ("s", asked.get(name))
            emit(f"after {how}: {name}", values[len(values) // 2], unit, asked=goal, all=values)
    emit("calls failed while one of two replicas leaves", failures, "calls", asked="<= 0", steps=num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    asyncio.run(measure(parser.parse_args().repeats))


if __name__ == "__main__":
    main()
