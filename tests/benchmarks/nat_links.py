"""What do several associations carry over a given link that one does not? In virtual time: the processor has no say.

Two ends in one process, with aiortc's own DTLS and SCTP between them and a link in memory instead of ICE: a rate, a
delay, a queue of 100 ms that drops what does not fit, and losses at random (seeded). The associations share the link.
The same seed gives the same figures up to the sizes of DTLS' random numbers, on a busy machine, too. What a processor
carries is `nat_associations`' matter. One line of JSON per figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import selectors
import statistics
import time
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

from aiortc import rtcsctptransport

from tesseract_async.testing import VirtualClock
from tesseract_async.transport.webrtc import DataChannelPipe, Negotiation, WebrtcSettings

T = TypeVar("T")

COUNTS = (1, 2, 4)
MEGABIT = 1e6 / 8
MESSAGE = 2**20
"""Bytes of a call whose time from a cold start is told."""
STEADY = (2.0, 8.0)
"""Seconds between which the steady rate is counted."""
UDP_HEADER = 28


class Selector(selectors.DefaultSelector):  # type: ignore[valid-type, misc]
    """Makes the loop's next timer due instead of waiting for it."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        happened = super().select(0 if timeout is not None else 0.05)
        if not happened and timeout is not None and timeout > 0:
            self._clock.run(timeout)
        return happened


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = VirtualClock()
        super().__init__(Selector(self._virtual))

    def time(self) -> float:
        return self._virtual.now


class Link:
    """One direction: `rate` in bytes per second (None: any), `delay` in seconds, `loss` as a share of the packets."""

    def __init__(self, *, rate: float | None, delay: float, loss: float, seed: int) -> None:
        self._rate, self._delay, self._loss = rate, delay, loss
        self._free_at = 0.0
        self._rng = random.Random(seed)
        self.num_dropped = 0

    def send(self, data: bytes, queue: asyncio.Queue[bytes]) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        start = max(now, self._free_at)
        if start - now > 0.1 or self._rng.random() < self._loss:
            self.num_dropped += 1
            return
        # never the same moment twice: asyncio would let the later one overtake
        self._free_at = start + ((len(data) + UDP_HEADER) / self._rate if self._rate is not None else 1e-8)
        loop.call_at(self._free_at + self._delay, queue.put_nowait, data)


class Ice:
    """As much of an ICE connection as a `Negotiation` uses, over two links."""

    def __init__(self, link: Link, name: str) -> None:
        self.local_username, self.local_password = name, name
        self.remote_username = self.remote_password = ""
        self.local_candidates: list[Any] = []
        self._nominated: dict[int, Any] = {}
        self._link = link
        self._arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self.other: Ice

    async def gather_candidates(self) -> None: ...
    async def add_remote_candidate(self, candidate: object) -> None: ...
    async def connect(self) -> None: ...
    async def close(self) -> None: ...

    async def send(self, data: bytes) -> None:
        self._link.send(data, self.other._arrived)

    async def recv(self) -> bytes:
        return await self._arrived.get()


class End:
    """Counts what arrives, and says when everything has left."""

    def __init__(self, total: Total) -> None:
        self.drained = asyncio.Event()
        self._total = total
        self._buffer = memoryview(bytearray(2**18))

    def get_buffer(self) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self._total.add(count)

    def pipe_drained(self) -> None:
        self.drained.set()

    def pipe_lost(self, error: Exception | None) -> None:
        self.drained.set()


class Total:
    """Bytes that arrived, over all associations; and when the first `MESSAGE` was complete."""

    def __init__(self) -> None:
        self.count = 0
        self.complete_at: float | None = None

    def add(self, count: int) -> None:
        self.count += count
        if self.complete_at is None and self.count >= MESSAGE:
            self.complete_at = asyncio.get_running_loop().time()


async def open_pipe(out: Link, back: Link) -> tuple[DataChannelPipe, DataChannelPipe]:
    mine, theirs = Ice(out, "a"), Ice(back, "b")
    mine.other, theirs.other = theirs, mine
    made = []
    for ice in (mine, theirs):
        one = Negotiation(controlling=ice is mine, addresses=[], stun_server=None, settings=WebrtcSettings())
        await one._ice.close()
        one._ice = ice  # type: ignore[assignment]
        made.append(one)
    told = [await one.gather() for one in made]
    here, there = await asyncio.gather(made[0].connect(told[1]), made[1].connect(told[0]))
    return here, there


async def measure(count: int, *, rate: float, round_trip: float, loss: float, seed: int) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    out = Link(rate=rate, delay=round_trip / 2, loss=0.0, seed=seed)
    back = Link(rate=None, delay=round_trip / 2, loss=0.0, seed=seed + 1)
    pipes = await asyncio.gather(*(open_pipe(out, back) for _ in range(count)))
    out._loss = loss
    total, unused = Total(), Total()
    data = bytes(2**16)

    async def pump(pipe: DataChannelPipe) -> None:
        end = End(unused)
        pipe.start(end)
        while True:
            pipe.write(data)
            if pipe.paused:
                end.drained.clear()
                await end.drained.wait()

    for _, there in pipes:
        there.start(End(total))
    begun = loop.time()
    dropped = out.num_dropped
    pumps = [loop.create_task(pump(here)) for here, _ in pipes]
    await asyncio.sleep(STEADY[0])
    before = total.count
    await asyncio.sleep(STEADY[1] - STEADY[0])
    speed = (total.count - before) / (STEADY[1] - STEADY[0])
    for task in pumps:
        task.cancel()
    await asyncio.wait(pumps)
    for pair in pipes:
        for pipe in pair:
            pipe.abort()
    await asyncio.sleep(5.0)
    cold = (total.complete_at if total.complete_at is not None else float("inf")) - begun
    return {"speed": speed, "cold": cold, "dropped": out.num_dropped - dropped}


def run(count: int, **link: Any) -> dict[str, float]:
    """See `measure`."""
    return in_virtual_time(measure(count, **link))


def in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    """aiortc's own estimate of the round trip asks the wall clock: it gets this loop's."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        rtcsctptransport.time = SimpleNamespace(time=lambda: 1e9 + loop.time())
        try:
            return runner.run(work)
        finally:
            rtcsctptransport.time = time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0, 40.0], help="Mbit/s")
    parser.add_argument("--round-trips", type=float, nargs="+", default=[20.0, 80.0], help="ms")
    parser.add_argument("--losses", type=float, nargs="+", default=[0.0, 0.5], help="%%, beside the full queue's")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("aiortc").setLevel(logging.ERROR)
    for rate in arguments.rates:
        for round_trip in arguments.round_trips:
            for loss in arguments.losses:
                one: dict[str, float] = {}
                for count in COUNTS:
                    results = [
                        run(count, rate=rate * MEGABIT, round_trip=round_trip / 1000, loss=loss / 100, seed=seed)
                        for seed in range(arguments.seeds)
                    ]
                    found = {name: statistics.median(result[name] for result in results) for name in results[0]}
                    one = one or found
                    facts = {
                        "name": f"{count} association(s), {rate:g} Mbit/s, {round_trip:g} ms, {loss:g} % lost",
                        "value": round(found["speed"] / 1e6, 3),
                        "unit": "MB/s",
                        "share of the link": round(found["speed"] / rate / MEGABIT, 2),
                        "against one": round(found["speed"] / max(one["speed"], 1.0), 2),
                        "all": [round(result["speed"] / 1e6, 3) for result in results],
                        "seconds for the first MiB": round(found["cold"], 3),
                        "against one, first MiB": round(one["cold"] / found["cold"], 2),
                        "packets dropped": found["dropped"],
                    }
                    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
