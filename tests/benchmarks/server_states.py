"""A state from one source, from four, and from four of which one freezes half-way; and what sending costs training.

The full size (400 MB, 25 Mbit/s each) in virtual time, and a smaller file between real nodes that upload as slowly;
``--megabytes 400`` takes four minutes. Then a trainer's steps each second at a server, with and without another process
that fetches a state.
"""

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.server.checkpoint import EncodedState
from tesseract_async.server.fetching import SealFetcher
from tesseract_async.server.state_files import SealedFile, SealedFiles
from tesseract_async.server.state_transfer import SealedState, StateSource
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.throttle import Throttle
from tesseract_async.wire import messages
from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.loads import Load
from tests.benchmarks.processes import Child, child
from tests.benchmarks.swarm import make_backend
from tests.experts.piece_world import throttled

UID = "ffn.0"
RATE = 25e6 / 8
TRAINED = Load("trained", "ffn", 16, 512, 1, backward=True)


async def aside(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


def full_size() -> None:
    """400 MB at 25 Mbit/s each, by `PieceFetch` alone."""
    one, four = throttled(1), throttled(4)
    emit("400 MB from 4 sources, virtual time: times as fast as from one", one / four, "", asked=">= 3.2", seconds=four)
    late = [throttled(4, frozen=1, at=share * four) - four for share in (0.25, 0.5, 0.75, 0.9, 0.99)]
    emit(
        "400 MB from 4 sources of which one freezes half-way, virtual time: more", late[1], "s", asked="<= 10", all=late
    )


@contextlib.asynccontextmanager
async def source(file: SealedFile, files: SealedFiles, freeze_after: float) -> Any:
    """A node that sends the file, and after so many seconds nothing any more."""
    states = StateSource(aside, throttle=(throttle := Throttle(upload_rate=RATE)))
    states.find_sealed = files.find
    async with ta.TesseractNode(throttle=throttle) as node:
        begin = time.perf_counter()

        async def answer(call: IncomingCall) -> Message:
            if time.perf_counter() - begin > freeze_after:
                await asyncio.Event().wait()
            return await states.answer(SealedState(UID, 1, file, aside), call)

        node.host_expert(UID, {messages.STATE: answer})
        yield node.peer_address
        states.close()


async def fetch(num: int, size: int, *, freeze_after: float = float("inf")) -> float:
    """Seconds for a file of this size from so many sources, of which the first freezes."""
    with tempfile.TemporaryDirectory() as folder:
        files = SealedFiles(Path(folder, "theirs"))
        file = files.keep(UID, EncodedState(os.urandom(size), []))
        seal: Any = SimpleNamespace(root=file.root, size=file.size)
        async with contextlib.AsyncExitStack() as stack:
            guest = await stack.enter_async_context(ta.TesseractNode())
            peers: list[PeerAddress] = [
                await stack.enter_async_context(source(file, files, freeze_after if number == 0 else float("inf")))
                for number in range(num)
            ]
            fetcher = SealFetcher(guest, SealedFiles(Path(folder, "own")), timeout=30.0, aside=aside)
            begin = time.perf_counter()
            await fetcher.fetch(UID, seal, peers, max_bytes=size)
            return time.perf_counter() - begin


def take(pipe: Connection) -> None:
    """A process that is told a server and a file, and fetches that from there while it is told "go" and not "stop"."""
    address, seal = pipe.recv()

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with ta.TesseractNode() as node:
                peer, files = PeerAddress.parse(address), SealedFiles(Path(folder))
                fetcher = SealFetcher(node, files, timeout=30.0, aside=aside)
                while await aside(pipe.recv) == "go":
                    stop = asyncio.create_task(aside(pipe.recv))
                    while not stop.done():
                        work = asyncio.create_task(fetcher.fetch(UID, seal, [peer], max_bytes=1 << 40))
                        await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
                        work.cancel()
                        await asyncio.gather(work, return_exceptions=True)
                        for path in Path(folder).rglob("*.part"):  # noqa: ASYNC240
                            path.unlink()

    with contextlib.suppress(EOFError):
        asyncio.run(main())


async def beside_training(taker: Child, seconds: float) -> None:
    """Steps each second at a server from which another process fetches a state, against those without."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            ta.TesseractNode() as host,
            ta.TesseractNode(initial_peers=[host.address]) as trainer,
            ta.TesseractServer(host, {UID: make_backend(TRAINED)}) as server,
        ):
            files = SealedFiles(Path(folder))
            file = files.keep(UID, EncodedState(os.urandom(256 << 20), []))
            states = StateSource(server.call_aside)
            states.find_sealed = files.find
            server.handle(messages.STATE, states.answer)
            taker.pipe.send((str(host.peer_address), SimpleNamespace(root=file.root, size=file.size)))
            expert = await trainer.get_expert(UID)
            x = torch.randn(TRAINED.rows, TRAINED.width)

            async def train() -> tuple[float, float]:
                num, begin, sent = 0, time.perf_counter(), host.metrics.total("transport_bytes_sent")
                while (took := time.perf_counter() - begin) < seconds:
                    await ta.backward((await expert(x)).square().mean())
                    num += 1
                return num / took, (host.metrics.total("transport_bytes_sent") - sent) / took

            await train()
            found = []
            for _ in range(5):
                alone = await train()
                taker.pipe.send("go")
                beside = await train()
                taker.pipe.send("stop")
                found.append((beside[0] / alone[0], beside[1] - alone[1] * beside[0] / alone[0]))
            states.close()
    emit(
        "steps each second while a state is fetched, of those without",
        percentile([share for share, _ in found], 0.5),
        "",
        asked=">= 0.95",
        all=[share for share, _ in found],
        state_bytes_per_second=[rate for _, rate in found],
    )


async def measure(taker: Child, seconds: float, megabytes: float) -> None:
    size = int(megabytes * 1e6)
    one, four = await fetch(1, size), await fetch(4, size)
    name = f"{megabytes:g} MB from 4 nodes throttled to 25 Mbit/s"
    emit(f"{name}: times as fast as from one", one / four, "", asked=">= 3.2", one=one, four=four)
    frozen = await fetch(4, size, freeze_after=four / 2)
    emit(f"{name}, one frozen half-way: more", frozen - four, "s", asked="<= 10")
    await beside_training(taker, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--megabytes", type=float, default=25.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    full_size()
    with child(take) as taker:
        asyncio.run(measure(taker, asked.seconds, asked.megabytes))


if __name__ == "__main__":
    main()
