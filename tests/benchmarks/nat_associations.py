"""Are several associations next to one another faster than one? Two processes, whose datagrams take a given time.

On a short way the processor holds them up, and both processes' share of one is told: that is what this measures. What
windows and losses do on a long way, `nat_links` tells without noise; here it is seen with real sockets. Each round
takes every number of associations in an order drawn anew, and is compared with itself: a ratio per round, and in how
many rounds it was above one. The first MiB counts from the opening of the channels, the rate after the first seconds.
Run it on a machine that does nothing else: two processors are needed. One line of JSON per figure.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from tesseract_async.nat.webrtc import pipe as webrtc
from tesseract_async.nat.webrtc.pipe import DataChannelPipe, Negotiation

COUNTS = (1, 2, 4)
FIRST = 2**20
WARM_UP = 2.0
SECONDS = 3.0


class Far(webrtc._IcePort):
    """Datagrams leave `one_way` seconds late, in order."""

    one_way = 0.0

    def __init__(self, ice: Any, role: str) -> None:
        super().__init__(ice, role)
        if self.one_way:
            self._ice = ice
            self._send = self._send_late

    async def _send_late(self, data: bytes) -> None:
        asyncio.get_running_loop().call_later(self.one_way, self._send_now, data)

    def _send_now(self, data: bytes) -> None:
        sending = self._ice.send(data)
        try:
            sending.send(None)  # it never really waits
        except (StopIteration, ConnectionError):
            pass


class End:
    """Counts what arrives, and says when everything has left."""

    def __init__(self) -> None:
        self.count = 0
        self.first_at = float("inf")
        self.drained = asyncio.Event()
        self._buffer = memoryview(bytearray(2**18))

    def get_buffer(self, sizehint: int = -1, /) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.count += count
        if self.count >= FIRST and self.first_at == float("inf"):
            self.first_at = time.perf_counter()

    def pipe_drained(self) -> None:
        self.drained.set()

    def pipe_lost(self, error: Exception | None) -> None:
        pass


async def open_pipes(line: Connection, count: int, *, controlling: bool) -> list[DataChannelPipe]:
    made = [Negotiation(controlling=controlling, addresses=["127.0.0.1"], stun_server=None) for _ in range(count)]
    line.send(await asyncio.gather(*(one.gather() for one in made)))
    theirs = await asyncio.to_thread(line.recv)
    return list(await asyncio.gather(*(one.connect(other) for one, other in zip(made, theirs, strict=True))))


async def receive(line: Connection, count: int) -> None:
    """Tells the bytes per second and the share of a processor after the warm-up, and the seconds of the first MiB."""
    pipes = await open_pipes(line, count, controlling=False)
    end = End()
    opened = time.perf_counter()
    for pipe in pipes:
        pipe.start(end)
    await asyncio.sleep(WARM_UP)
    before, begun, cpu = end.count, time.perf_counter(), time.process_time()
    await asyncio.sleep(SECONDS)
    seconds = time.perf_counter() - begun
    line.send(((end.count - before) / seconds, (time.process_time() - cpu) / seconds, end.first_at - opened))


async def send(line: Connection, count: int) -> tuple[float, float, float, float]:
    """Bytes per second, the sender's and the receiver's share of a processor, and the seconds of the first MiB."""
    pipes = await open_pipes(line, count, controlling=True)
    data = bytes(2**16)

    async def pump(pipe: DataChannelPipe) -> None:
        end = End()
        pipe.start(end)
        while True:
            pipe.write(data)
            if pipe.paused:
                end.drained.clear()
                await end.drained.wait()

    pumps = [asyncio.ensure_future(pump(pipe)) for pipe in pipes]
    begun, cpu = time.perf_counter(), time.process_time()
    speed, theirs, first = await asyncio.to_thread(line.recv)
    mine = (time.process_time() - cpu) / (time.perf_counter() - begun)
    for task in pumps:
        task.cancel()
    await asyncio.wait(pumps)
    return speed, mine, theirs, first


def run_receiver(line: Connection, count: int, one_way: float) -> None:
    Far.one_way = one_way
    uvloop.run(receive(line, count))


def measure(count: int, round_trip: float) -> tuple[float, float, float, float]:
    Far.one_way = round_trip / 2
    context = multiprocessing.get_context("fork")
    line, other = context.Pipe()
    process = context.Process(target=run_receiver, args=(other, count, round_trip / 2), daemon=True)
    process.start()
    try:
        return uvloop.run(send(line, count))
    finally:
        process.terminate()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-trips", type=float, nargs="+", default=[0.0, 80.0], help="ms")
    arguments = parser.parse_args()
    webrtc._IcePort = Far  # type: ignore[misc]
    found: dict[tuple[float, int], list[tuple[float, float, float, float]]] = defaultdict(list)
    order, rng = list(COUNTS), random.Random(0)
    for _ in range(arguments.rounds):
        for round_trip in arguments.round_trips:
            rng.shuffle(order)
            for count in order:
                found[round_trip, count].append(measure(count, round_trip / 1000))
    for round_trip in arguments.round_trips:
        alone = found[round_trip, 1]
        for count in COUNTS:
            results = found[round_trip, count]
            speed, mine, theirs, first = (statistics.median(values) for values in zip(*results, strict=True))
            rates = [result[0] / max(other[0], 1.0) for result, other in zip(results, alone, strict=True)]
            starts = [other[3] / result[3] for result, other in zip(results, alone, strict=True)]
            facts: dict[str, Any] = {
                "name": f"data channel, {count} association(s), {round_trip:g} ms",
                "value": round(speed / 1e6, 2),
                "unit": "MB/s",
                "all": [round(result[0] / 1e6, 2) for result in results],
                "processors": [round(mine, 2), round(theirs, 2)],
                "processor seconds per MB": round((mine + theirs) / speed * 1e6, 3),
                "seconds for the first MiB": round(first, 2),
            }
            for name, ratios in (("against one", rates), ("against one, first MiB", starts)):
                facts[name] = round(statistics.median(ratios), 2)
                facts[f"{name}: rounds"] = [round(ratio, 2) for ratio in sorted(ratios)]
                facts[f"{name}: faster in"] = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)}"
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
