"""How long the command lets its user wait: importing, ``--help``, and `tesseract serve` until it can be found.

The server hosts 16 `ffn` experts of width 1024, 1.6 GB of weights, and joins a bootstrap node. Measured from before its
process starts: until it says ``ready``, until another node reads it in the directory, until a first row is answered,
and until a first gradient is applied. `import torch` is measured as well: what no server can go below.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from typing import Any

from tests.benchmarks.figures import emit, percentile

NUM_REPEATS = 5
COMMAND = (sys.executable, "-m", "tesseract_async.cli")


def best_of(num: int, *command: str) -> list[float]:
    """Seconds of each run, the best first."""
    seconds = []
    for _ in range(num):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)


async def start(*arguments: str) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    """A running command, and what it said when it was ready."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, limit=2**20
    )
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError(f"tesseract {' '.join(arguments)} ended with {await process.wait()}")
    return process, json.loads(line)


async def stop(process: asyncio.subprocess.Process) -> None:
    process.terminate()
    await process.communicate()


async def serve(num_repeats: int) -> dict[str, list[float]]:
    """Seconds until each of the four moments, once per repeat."""
    from tesseract_async.node import TesseractNode

    found: dict[str, list[float]] = {}
    bootstrap, facts = await start("dht")
    async with TesseractNode(initial_peers=[facts["address"]]) as node:
        await node.network.wait_joined(10.0)
        for number in range(num_repeats):
            prefix = f"start{number}"  # a grid of its own: nothing is known of it before
            last = f"{prefix}.3.3"
            begin = time.perf_counter()

            async def visible(last: str = last, begin: float = begin) -> float:
                while not await node.directory.find(last):  # noqa: ASYNC110 the moment itself is measured
                    await asyncio.sleep(0.02)
                return time.perf_counter() - begin

            looking = asyncio.create_task(visible())
            arguments = ("--experts", f"{prefix}.[0:4].[0:4]", "--size", "in_features=1024", "-p", facts["address"])
            server, _ = await start("serve", *arguments)
            moments = {"ready": time.perf_counter() - begin, "in the directory": await looking}
            import torch  # only now: this process, too, would otherwise hold a core while the first server starts

            import tesseract_async as ta

            torch.set_num_threads(1)
            expert = await node.get_expert(last)
            asked = time.perf_counter()
            y = await expert(torch.ones(1, 1024, requires_grad=True))
            answered = time.perf_counter()
            await ta.backward(y.sum())
            found.setdefault("first answer, after it was asked for", []).append(answered - asked)
            found.setdefault("first step, after it was asked for", []).append(time.perf_counter() - answered)
            for name, seconds in moments.items():
                found.setdefault(name, []).append(seconds)
            await stop(server)
    await stop(bootstrap)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="starts of the server")
    args = parser.parse_args()
    for name, command, asked in (
        ("python alone", (sys.executable, "-c", ""), None),
        ("import tesseract_async", (sys.executable, "-c", "import tesseract_async"), "< 0.3"),
        ("tesseract --help", (*COMMAND, "--help"), "< 0.3"),
        ("import torch", (sys.executable, "-c", "import torch"), None),
    ):
        seconds = best_of(NUM_REPEATS, *command)
        emit(f"start-up: {name}", percentile(seconds, 0.5), "s", asked=asked, all_seconds=seconds)
    goals = {"ready": "< 3", "in the directory": "< 3"}
    for name, seconds in asyncio.run(serve(args.repeats)).items():
        what = f"start-up: serve 16 ffn experts 1024 wide, {name}"
        emit(what, percentile(seconds, 0.5), "s", asked=goals.get(name), all_seconds=seconds)


if __name__ == "__main__":
    main()
