"""Are several associations beside one another faster than one? Two processes, whose datagrams take a given time.

aiortc's SCTP opens its window by one packet per acknowledgement, and sends in short bursts: on a long way one
association might not fill the time, on a short one the processor alone holds it up. Rounds alternate; the bytes that
arrive after the first seconds count, and both processes' share of a processor is told. One line of JSON per figure.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from tesseract_async.transport import webrtc
from tesseract_async.transport.webrtc import DataChannelPipe, Negotiation, WebrtcSettings

COUNTS = (1, 2, 4)
ROUND_TRIPS = (0.0, 0.05)
ROUNDS = 3
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
        self.drained = asyncio.Event()
        self._buffer = memoryview(bytearray(2**18))

    def get_buffer(self) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.count += count

    def pipe_drained(self) -> None:
        self.drained.set()

    def pipe_lost(self, error: Exception | None) -> None:
        pass


async def open_pipes(line: Connection, count: int, *, controlling: bool) -> list[DataChannelPipe]:
    settings = WebrtcSettings()
    made = [
        Negotiation(controlling=controlling, addresses=["127.0.0.1"], stun_server=None, settings=settings)
        for _ in range(count)
    ]
    line.send(await asyncio.gather(*(one.gather() for one in made)))
    theirs = await asyncio.to_thread(line.recv)
    return list(await asyncio.gather(*(one.connect(other) for one, other in zip(made, theirs, strict=True))))


async def receive(line: Connection, count: int) -> None:
    """Tells the bytes per second and the share of a processor after the warm-up."""
    pipes = await open_pipes(line, count, controlling=False)
    end = End()
    for pipe in pipes:
        pipe.start(end)
    await asyncio.sleep(WARM_UP)
    before, begun, cpu = end.count, time.perf_counter(), time.process_time()
    await asyncio.sleep(SECONDS)
    seconds = time.perf_counter() - begun
    line.send(((end.count - before) / seconds, (time.process_time() - cpu) / seconds))


async def send(line: Connection, count: int) -> tuple[float, float, float]:
    """Bytes per second, and the sender's and the receiver's share of a processor."""
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
    speed, theirs = await asyncio.to_thread(line.recv)
    mine = (time.process_time() - cpu) / (time.perf_counter() - begun)
    for task in pumps:
        task.cancel()
    await asyncio.wait(pumps)
    return speed, mine, theirs


def run_receiver(line: Connection, count: int, one_way: float) -> None:
    Far.one_way = one_way
    uvloop.run(receive(line, count))


def measure(count: int, round_trip: float) -> tuple[float, float, float]:
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
    webrtc._IcePort = Far  # type: ignore[misc]
    found: dict[tuple[float, int], list[tuple[float, float, float]]] = defaultdict(list)
    for _ in range(ROUNDS):
        for round_trip in ROUND_TRIPS:
            for count in COUNTS:
                found[round_trip, count].append(measure(count, round_trip))
    for (round_trip, count), results in found.items():
        speed, mine, theirs = (statistics.median(values) for values in zip(*results, strict=True))
        one = statistics.median(speed for speed, _, _ in found[round_trip, 1])
        name = f"data channel, {count} association(s), {1000 * round_trip:.0f} ms"
        facts = {"processors": [round(mine, 2), round(theirs, 2)], "against one": round(speed / one, 2)}
        all_speeds = [round(speed / 1e6, 2) for speed, _, _ in results]
        print(json.dumps({"name": name, "value": round(speed / 1e6, 2), "unit": "MB/s", **facts, "all": all_speeds}))


if __name__ == "__main__":
    main()
