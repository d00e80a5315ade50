"""One model from four trainers: its loss, the bytes that sharing costs, and its processor time.

The model is that of `examples/train_lm.py`, small, on the standard library's sources; four trainers in one process,
each a node of its own, train equal numbers of tokens over the same hosted experts. Compared are: the local layers
shared by `SharedParameters`, their gradients averaged at every step (what an all-reduce does, taken in memory), and
nothing shared.
`--steps`, `--seeds` and `--every` make it longer than the minutes that it takes.
"""

import argparse
import asyncio
import contextlib
import copy
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import msgpack
import torch

import tesseract_async as ta
from tesseract_async.wire import messages
from tests.benchmarks.figures import emit

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_lm.py"
TRAINERS, PAIRS = 4, 10
SIZES = {"layers": 1, "grid": 2, "k_best": 2, "width": 48, "length": 48, "batch_size": 8, "lr": 2e-3}


def load_example() -> Any:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("train_lm", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Swarm:
    """Experts at one node, and a node and a model for each trainer."""

    def __init__(self, lm: Any, seed: int, stack: contextlib.AsyncExitStack) -> None:
        self.lm, self.seed, self.stack = lm, seed, stack
        self.args = argparse.Namespace(**SIZES, seed=seed, out="", eval_batches=32)
        tokens = lm.read_text(None, 1_000_000)
        self.train_tokens, self.valid_tokens = tokens[:-100_000], tokens[-100_000:]
        self.nodes: list[ta.TesseractNode] = []
        self.models: list[torch.nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.draws = [torch.Generator().manual_seed(1000 * seed + number) for number in range(TRAINERS)]
        self.num_bytes = 0

    async def start(self) -> None:
        args, lm = self.args, self.lm
        host = await self.stack.enter_async_context(ta.TesseractNode())
        experts = lm.hosted(host, args).experts
        await self.stack.enter_async_context(ta.TesseractServer(host, experts))
        options = {"grid_size": (args.grid, args.grid), "in_features": args.width, "k_best": args.k_best}
        for _ in range(TRAINERS):
            node = await self.stack.enter_async_context(ta.TesseractNode(initial_peers=[host.address]))
            torch.manual_seed(self.seed + 1)
            gates = [ta.GatingFunction(node, uid_prefix="layer0", route="token", **options)]
            model = lm.Transformer(gates, args)
            self.nodes.append(node)
            self.models.append(model)
            self.optimizers.append(torch.optim.Adam(model.parameters(), args.lr))

    def count(self, node: ta.TesseractNode) -> None:
        """Count what pushes and their answers hold, heads and digests included."""
        call = node.call_expert

        async def counted(peer: Any, method: str, body: Any = None, buffers: Any = (), **options: Any) -> Any:
            reply = await call(peer, method, body, buffers, **options)
            if method in (messages.PUSH, messages.PULL):
                for one_body, some in ((body, buffers), (reply.body, reply.buffers)):
                    self.num_bytes += 64 + len(msgpack.packb(one_body)) + sum(len(one) for one in some)
            return reply

        node.call_expert = counted  # type: ignore[method-assign]

    async def gradients(self, number: int) -> None:
        """One forward and backward of a trainer."""
        loss = await self.lm.loss_of(
            self.models[number], self.lm.sample(self.train_tokens, self.args, self.draws[number])
        )
        self.optimizers[number].zero_grad()
        await ta.backward(loss)

    async def loss(self, model: torch.nn.Module) -> float:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            batches = [self.lm.sample(self.valid_tokens, self.args, draw) for _ in range(self.args.eval_batches)]
            return statistics.mean([float(await self.lm.loss_of(model, batch)) for batch in batches])


async def share_nothing(swarm: Swarm, steps: int, every: int) -> float:
    """The mean loss of the trainers' own models."""

    async def train(number: int) -> float:
        for _ in range(steps):
            await swarm.gradients(number)
            swarm.optimizers[number].step()
        return await swarm.loss(swarm.models[number])

    return statistics.mean(await asyncio.gather(*map(train, range(TRAINERS))))


async def reduce_all(swarm: Swarm, steps: int, every: int) -> float:
    """The loss with gradients averaged at every step."""
    for _ in range(steps):
        await asyncio.gather(*map(swarm.gradients, range(TRAINERS)))
        for same in zip(*(model.parameters() for model in swarm.models), strict=True):
            mean = torch.stack([one.grad for one in same if one.grad is not None]).mean(0)
            for one in same:
                one.grad = mean.clone()
        for optimizer in swarm.optimizers:
            optimizer.step()
    return await swarm.loss(swarm.models[0])


async def share(swarm: Swarm, steps: int, every: int) -> float:
    """The loss of the merged copy. Prints what sharing costs."""
    shared: list[ta.SharedParameters[torch.nn.Module]] = []
    for node, model in zip(swarm.nodes, swarm.models, strict=True):
        swarm.count(node)
        one = ta.SharedParameters(node, model, run="bench", every=every, host=not shared)
        shared.append(await swarm.stack.enter_async_context(one))
    longest = 0.0

    async def train(number: int) -> None:
        nonlocal longest
        for _ in range(steps):
            await swarm.gradients(number)
            swarm.optimizers[number].step()
            began = time.perf_counter()
            await shared[number].step()
            longest = max(longest, time.perf_counter() - began)

    before = swarm.num_bytes
    await asyncio.gather(*map(train, range(TRAINERS)))
    per_step = (swarm.num_bytes - before) / (steps * TRAINERS)
    await asyncio.gather(*(one.flush() for one in shared))
    await shared[0].flush()
    numel = sum(one.numel() for one in swarm.models[0].parameters())
    full = 2 * 4 * numel * (TRAINERS - 1) / TRAINERS  # sent in a ring
    emit("shared parameters: bytes per trainer and step", per_step, "B", None, all_reduce=full)
    emit("shared parameters: bytes, share of fp32 all-reduce", per_step / full, "", "<= 0.00667")
    emit("shared parameters: longest pause in step()", 1000 * longest, "ms")
    await measure_time(swarm, shared[0], every)
    return await swarm.loss(shared[0].merged())


async def measure_time(swarm: Swarm, shared: ta.SharedParameters[torch.nn.Module], every: int) -> None:
    ratios = []
    state = copy.deepcopy(swarm.optimizers[0].state_dict())
    for _ in range(PAIRS):
        seconds = []
        for shares in (False, True):
            began = time.process_time()
            for _ in range(every):
                await swarm.gradients(0)
                swarm.optimizers[0].step()
                if shares:
                    await shared.step()
            seconds.append(time.process_time() - began)
        ratios.append(seconds[1] / seconds[0])
    swarm.optimizers[0].load_state_dict(state)
    emit("shared parameters: processor time with sharing / without", statistics.median(ratios), "", "<= 1.03")


async def main(steps: int, seeds: int, every: int) -> None:
    torch.set_num_threads(1)
    lm = load_example()
    losses: dict[str, list[float]] = {}
    for seed in range(seeds):
        for variant in (reduce_all, share_nothing, share):
            async with contextlib.AsyncExitStack() as stack:
                swarm = Swarm(lm, seed, stack)
                await swarm.start()
                losses.setdefault(variant.__name__, []).append(await variant(swarm, steps, every))
    mean = {name: statistics.mean(some) for name, some in losses.items()}
    emit("shared parameters: loss, merged / all-reduced every step", mean["share"] / mean["reduce_all"], "", "<= 1.015")
    emit("shared parameters: loss, merged / nothing shared", mean["share"] / mean["share_nothing"], "", "<= 0.92")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256, help="of each trainer")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--every", type=int, default=32)
    given = parser.parse_args()
    asyncio.run(main(given.steps, given.seeds, given.every))
