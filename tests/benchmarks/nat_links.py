"""What do associations carry over a given link, by which rule, one or several? In virtual time: the processor is fast.

Two ends in one process, with aiortc's own DTLS and SCTP between them and a link in memory instead of ICE: a rate, a
delay, a queue of 100 ms that drops what does not fit, and losses at random (seeded). The associations share the link.
The rules: aiortc's own congestion control, TCP Reno's, and this package's (`nat/webrtc/association.py`). At last one
of each shares a link, to see what is left for the other. The same seed gives the same figures up to the sizes of DTLS'
random numbers, on a busy machine, too. What a processor carries is `nat_associations`' matter. One line of JSON per
figure.
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

from aiortc import RTCSctpTransport, rtcsctptransport

from tesseract_async.nat.webrtc import association
from tesseract_async.nat.webrtc.association import MAX_GAPS, Association
from tesseract_async.nat.webrtc.pipe import DataChannelPipe, Negotiation
from tesseract_async.testing import VirtualClock

T = TypeVar("T")

COUNTS = (1, 2, 4)


class Reno(RTCSctpTransport):
    """aiortc's association as it is, but for the acknowledgements, which else stop it for good (`association`)."""

    def __init__(self, dtls: Any, port: int, on_garbage: object) -> None:
        super().__init__(dtls, port)

    async def _send_chunk(self, chunk: Any) -> None:
        if isinstance(chunk, rtcsctptransport.SackChunk):
            chunk.gaps, chunk.duplicates = chunk.gaps[:MAX_GAPS], chunk.duplicates[:32]
        await super()._send_chunk(chunk)


RULES: dict[str, Any] = {"aiortc's rule": Reno, "own rule": Association}
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
        self._rate, self._delay, self.loss = rate, delay, loss
        self._free_at = 0.0
        self._rng = random.Random(seed)
        self.num_dropped = 0

    def send(self, data: bytes, queue: asyncio.Queue[bytes]) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        start = max(now, self._free_at)
        if start - now > 0.1 or self._rng.random() < self.loss:
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

    def __init__(self, *totals: Total) -> None:
        self.drained = asyncio.Event()
        self._totals = totals
        self._buffer = memoryview(bytearray(2**18))

    def get_buffer(self, sizehint: int = -1, /) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        for total in self._totals:
            total.add(count)

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


async def open_pipe(out: Link, back: Link, kind: Any = Association) -> tuple[DataChannelPipe, DataChannelPipe]:
    """A pipe over two links; `kind` makes its two associations."""
    association.Association = kind  # type: ignore[misc]
    try:
        return await _open_pipe(out, back)
    finally:
        association.Association = Association  # type: ignore[misc]


async def _open_pipe(out: Link, back: Link) -> tuple[DataChannelPipe, DataChannelPipe]:
    mine, theirs = Ice(out, "a"), Ice(back, "b")
    mine.other, theirs.other = theirs, mine
    made = []
    for ice in (mine, theirs):
        one = Negotiation(controlling=ice is mine, addresses=[], stun_server=None)
        await one._ice.close()
        one._ice = ice  # type: ignore[assignment]
        made.append(one)
    told = [await one.gather() for one in made]
    here, there = await asyncio.gather(made[0].connect(told[1]), made[1].connect(told[0]))
    return here, there


async def measure(
    rules: list[str], *, rate: float, round_trip: float, loss: float, seed: int, until: float = STEADY[1]
) -> dict[str, Any]:
    """One association for each of `rules`; their steady rates, and what they did together."""
    loop = asyncio.get_running_loop()
    out = Link(rate=rate, delay=round_trip / 2, loss=0.0, seed=seed)
    back = Link(rate=None, delay=round_trip / 2, loss=0.0, seed=seed + 1)
    pipes = [await open_pipe(out, back, RULES[rule]) for rule in rules]
    out.loss = loss
    together, unused = Total(), Total()
    totals = [Total() for _ in rules]
    data = bytes(2**16)

    async def pump(pipe: DataChannelPipe) -> None:
        end = End(unused)
        pipe.start(end)
        while True:
            pipe.write(data)
            if pipe.paused:
                end.drained.clear()
                await end.drained.wait()

    for (_, there), total in zip(pipes, totals, strict=True):
        there.start(End(total, together))
    begun = loop.time()
    dropped = out.num_dropped
    pumps = [loop.create_task(pump(here)) for here, _ in pipes]
    await asyncio.sleep(STEADY[0])
    before = [total.count for total in totals]
    await asyncio.sleep(until - STEADY[0])
    speeds = [(total.count - old) / (until - STEADY[0]) for total, old in zip(totals, before, strict=True)]
    for task in pumps:
        task.cancel()
    await asyncio.wait(pumps)
    for pair in pipes:
        for pipe in pair:
            pipe.abort()
    await asyncio.sleep(5.0)
    cold = (together.complete_at if together.complete_at is not None else float("inf")) - begun
    return {"speed": sum(speeds), "speeds": speeds, "cold": cold, "dropped": out.num_dropped - dropped}


def run(rules: list[str], **link: Any) -> dict[str, Any]:
    """See `measure`."""
    return in_virtual_time(measure(rules, **link))


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
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument(
        "--beside", type=float, default=30.0, help="seconds of the comparison on a shared link; 0: none"
    )
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("aiortc").setLevel(logging.ERROR)
    for rate in arguments.rates:
        for round_trip in arguments.round_trips:
            for loss in arguments.losses:
                link = {"rate": rate * MEGABIT, "round_trip": round_trip / 1000, "loss": loss / 100}
                where = f"{rate:g} Mbit/s, {round_trip:g} ms, {loss:g} % lost"
                compare(link, where, arguments.counts, arguments.seeds)
            if arguments.beside:
                link = {"rate": rate * MEGABIT, "round_trip": round_trip / 1000, "loss": 0.0}
                beside(link, f"{rate:g} Mbit/s, {round_trip:g} ms", arguments.beside)


def compare(link: dict[str, float], where: str, counts: list[int], seeds: int) -> None:
    """Both rules, with every number of associations."""
    first: dict[str, float] = {}
    for rule in RULES:
        one: dict[str, float] = {}
        for count in counts:
            results = [run([rule] * count, **link, seed=seed) for seed in range(seeds)]
            found = {
                name: statistics.median(result[name] for result in results) for name in ("speed", "cold", "dropped")
            }
            one, first = one or found, first or found
            facts = {
                "name": f"{rule}, {count} association(s), {where}",
                "value": round(found["speed"] / 1e6, 3),
                "unit": "MB/s",
                "share of the link": round(found["speed"] / link["rate"], 2),
                "against one": round(found["speed"] / max(one["speed"], 1.0), 2),
                "against one by aiortc's rule": round(found["speed"] / max(first["speed"], 1.0), 2),
                "all": [round(result["speed"] / 1e6, 3) for result in results],
                "seconds for the first MiB": round(found["cold"], 3),
                "against one, first MiB": round(one["cold"] / found["cold"], 2),
                "packets dropped": found["dropped"],
            }
            print(json.dumps(facts), flush=True)


def beside(link: dict[str, float], where: str, seconds: float) -> None:
    """What an association by aiortc's rule is left beside another one, and beside four of its own kind."""
    for name, others in (("aiortc's rule", 1), ("own rule", 1), ("aiortc's rule", 4)):
        speeds = run(["aiortc's rule"] + [name] * others, **link, seed=0, until=seconds)["speeds"]
        facts = {
            "name": f"one by aiortc's rule beside {others} by {name}, {where}",
            "value": round(speeds[0] / sum(speeds), 2),
            "unit": "of what they carry",
            "all, MB/s": [round(speed / 1e6, 3) for speed in speeds],
        }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
