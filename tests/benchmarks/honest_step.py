"""An honest trainer's processor time and Python calls per step, of this checkout and another one.

    python -m tests.benchmarks.honest_step OTHER_CHECKOUT     # for instance one made with `git worktree add`

A step is forward, backward and optimizer of a gate over eight experts, of which each row takes four; both nodes, client
and server, are in one process, so its processor time is that of the whole step. Both checkouts run next to each other,
each in a process of its own that computes only when it is its turn, and short turns alternate: what slows the machine
down slows both. Function calls are counted as well, since they do not depend on the machine: all of them, and those of
one small call of one expert. Without another checkout, this one's figures are printed alone.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NUM_PAIRS = 10
NUM_EXPERTS, K_BEST = 8, 4
SIZES = {"4 rows of 64": (4, 64, 50), "64 rows of 256": (64, 256, 30)}
"""Rows and width of a step, and steps in a turn."""
COUNTED = {"forward": "a small forward", "backward": "a small forward and backward", "step": "a step"}


class Side:
    """One checkout's process: told what to do by a line, it answers with a line."""

    def __init__(self, checkout: Path, *, counts: bool) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-P", __file__, "--serve", *(["--count"] if counts else [])]
        self._process = subprocess.Popen(
            command, env=environment, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str, size: str) -> Any:
        """The answer to ``"cpu"`` (seconds per step), ``"step"``, ``"forward"`` or ``"backward"`` (function calls)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, size]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._process.args!r} ended without an answer")
        return json.loads(line)

    def close(self) -> None:
        """Lets the process end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


# In the child process


class _Calls:
    """Counts calls of Python functions, in all threads, by room of the package."""

    def __init__(self) -> None:
        self.counts = False
        self.by_code: collections.Counter[Any] = collections.Counter()
        threading.setprofile(self)
        sys.setprofile(self)

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call" and self.counts:
            self.by_code[frame.f_code] += 1

    def by_room(self, times: int) -> dict[str, float]:
        found: collections.Counter[str] = collections.Counter()
        for code, number in self.by_code.items():
            _, inside, rest = code.co_filename.partition("tesseract_async/")
            found[rest.partition("/")[0] if inside else "elsewhere"] += number
        return {room: number / times for room, number in found.most_common()}

    def by_function(self, times: int) -> list[list[Any]]:
        names: collections.Counter[str] = collections.Counter()
        for code, number in self.by_code.items():
            path = code.co_filename.rpartition("tesseract_async/")[2].rpartition("site-packages/")[2]
            names[f"{path}:{code.co_qualname}"] += number
        return [[name, number / times] for name, number in names.most_common()]


async def _serve(calls: _Calls | None) -> None:
    import torch

    import tesseract_async as ta

    class FeedForward(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down(torch.relu(self.up(x)))
            return x + y

    def backend(width: int) -> ta.ExpertBackend:
        module = FeedForward(width)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-5)
        return ta.ExpertBackend(module, optimizer=optimizer, args_schema=(ta.TensorSpec((width,)),))

    torch.set_num_threads(1)
    torch.manual_seed(0)
    experts = {f"w{width}.{number}": backend(width) for _, width, _ in SIZES.values() for number in range(NUM_EXPERTS)}
    async with (
        ta.TesseractNode(refresh_period=600.0) as host,
        ta.TesseractServer(host, experts),
        ta.TesseractNode(initial_peers=[host.address], refresh_period=600.0) as node,
    ):

        async def steps(rows: int, width: int) -> Callable[[], Awaitable[None]]:
            torch.manual_seed(1)
            gate = ta.GatingFunction(
                node, uid_prefix=f"w{width}", grid_size=(NUM_EXPERTS,), in_features=width, k_best=K_BEST
            )
            optimizer = torch.optim.SGD(gate.parameters(), lr=1e-6)
            x, target = torch.randn(rows, width), torch.randn(rows, width)

            async def step() -> None:
                loss = (await gate(x) - target).square().mean()
                await ta.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

            for _ in range(30):
                await step()
            return step

        async def call(width: int, backward: bool) -> Callable[[], Awaitable[None]]:
            expert = await node.get_expert(f"w{width}.0")
            x = torch.randn(1, width)

            async def forward_alone() -> None:
                with torch.no_grad():
                    await expert(x)

            async def both() -> None:
                await ta.backward((await expert(x)).sum())

            chosen = both if backward else forward_alone
            for _ in range(10):
                await chosen()
            return chosen

        step_of = {size: await steps(rows, width) for size, (rows, width, _) in SIZES.items()}
        while line := await asyncio.to_thread(sys.stdin.readline):
            what, size = json.loads(line)
            _, width, num_steps = SIZES[size]
            answer: Any
            if what == "cpu":
                before = time.process_time()
                for _ in range(num_steps):
                    await step_of[size]()
                answer = (time.process_time() - before) / num_steps
            else:
                once = step_of[size] if what == "step" else await call(width, what == "backward")
                assert calls is not None
                calls.by_code.clear()
                calls.counts = True
                for _ in range(20):
                    await once()
                calls.counts = False
                answer = {"all": sum(calls.by_code.values()) / 20, "rooms": calls.by_room(20)}
                if os.environ.get("BY_FUNCTION"):
                    answer["functions"] = calls.by_function(20)
            print(json.dumps(answer), flush=True)


# In the parent process


def measure(checkouts: list[Path]) -> None:
    """Prints the figures of the first checkout, and their ratios to the second one's."""
    from tests.benchmarks.figures import emit  # not in the children, which have another checkout's modules

    with _sides(checkouts, counts=False) as sides:
        for size in SIZES:
            pairs = []
            for number in range(NUM_PAIRS):
                pair = [0.0] * len(sides)
                for index in range(len(sides)) if number % 2 else reversed(range(len(sides))):
                    pair[index] = sides[index].ask("cpu", size)
                pairs.append(pair)
            mine = statistics.median(pair[0] for pair in pairs)
            emit(f"processor time of a step of {size}", mine * 1e3, "ms", load=os.getloadavg()[0])
            if len(sides) > 1:
                ratios = [pair[0] / pair[1] for pair in pairs]
                name = f"processor time of a step of {size} / before, median of {NUM_PAIRS} pairs"
                emit(name, statistics.median(ratios), "", "<= 1.03", ratios=ratios, load=os.getloadavg()[0])
    with _sides(checkouts, counts=True) as sides:
        size = next(iter(SIZES))
        for what, name in COUNTED.items():
            counts = [side.ask(what, size) for side in sides]
            emit(f"function calls of {name}", counts[0]["all"], "", **counts[0])
            if len(sides) > 1:
                ratio = counts[0]["all"] / counts[1]["all"]
                emit(f"function calls of {name} / before", ratio, "", before=counts[1])


@contextlib.contextmanager
def _sides(checkouts: list[Path], *, counts: bool) -> Iterator[list[Side]]:
    sides = [Side(checkout, counts=counts) for checkout in checkouts]
    try:
        yield sides
    finally:
        for side in sides:
            side.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, help="the checkout to compare this one with")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        import uvloop

        uvloop.run(_serve(_Calls() if args.count else None))
    else:
        measure([ROOT, *([args.other.resolve()] if args.other is not None else [])])


if __name__ == "__main__":
    main()
