"""One model from four trainers in four processes, against all-reducing at every step and against sharing nothing.

The model is that of `examples/train_lm.py`, small; a fifth process hosts the experts, of which all variants have the
same ones at first. Each trainer takes equally many steps on samples of its own. `reduce`: the local layers' gradients
are averaged at every step by torch.distributed (gloo). `nothing`: each trains its own from first values of its own;
their losses' mean counts. `alike`: the same from equal first values, which share a little. `share`: `SharedParameters`;
the merged copy's loss counts. Numbers behind a name are steps in flight: with several, gradients are stale, and all
variants divide their learning rate by its square root, as users should: sharing gains more so (see docs/benchmarks.md).

On two cores a step takes about 50 ms of one of them: with the default 256 steps a seed takes two minutes. What is
asked is asked with three seeds: ``--seeds 3 --text input.txt`` with the text of your choice; else it reads the standard
library's sources.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import torch
import torch.distributed as dist

import tesseract_async as ta
from tesseract_async.wire import messages
from tests.benchmarks.figures import emit
from tests.benchmarks.processes import _fork, child, wait_for_stop

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_lm.py"
TRAINERS, PAIRS = 4, 10
SIZES = {"layers": 1, "grid": 2, "k_best": 2, "width": 48, "length": 48, "batch_size": 8, "lr": 2e-3}
VARIANTS = ("reduce", "nothing 1", "alike 1", "share 1", "nothing 8", "share 8")


def load_example() -> Any:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("train_lm", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lm = load_example()


@dataclass(frozen=True)
class Plan:
    """One variant at one seed."""

    variant: str
    seed: int
    steps: int
    every: int
    text: str | None
    port: int
    """For gloo."""

    @property
    def kind(self) -> str:
        return self.variant.split()[0]

    @property
    def in_flight(self) -> int:
        return int((*self.variant.split(), "1")[1])

    @property
    def args(self) -> argparse.Namespace:
        return argparse.Namespace(**SIZES, seed=self.seed, out="", eval_batches=32)


def host(pipe: Connection, plan: Plan) -> None:
    """The process that hosts the experts."""

    async def main() -> None:
        torch.set_num_threads(1)
        async with ta.TesseractNode() as node:
            async with ta.TesseractServer(node, lm.hosted(node, plan.args).experts):
                pipe.send(("value", node.address))
                await asyncio.to_thread(wait_for_stop, pipe)

    asyncio.run(main())


def trainer(pipe: Connection, plan: Plan, number: int, address: str, barrier: Any) -> None:
    """One trainer's process. Sends what it measured."""
    torch.set_num_threads(1)
    if plan.kind == "reduce":
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{plan.port}", rank=number, world_size=TRAINERS)
    pipe.send(("value", asyncio.run(Trainer(plan, number, barrier).run(address))))


class Trainer:
    """One of the four."""

    def __init__(self, plan: Plan, number: int, barrier: Any) -> None:
        self.plan, self.number, self._barrier = plan, number, barrier
        tokens = lm.read_text(plan.text, 2_000_000)
        self.train_tokens, self.valid_tokens = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
        self.draw = torch.Generator().manual_seed(1000 * plan.seed + number)
        self.num_bytes = {"sharing": 0, "replication": 0}
        self.longest = self.busiest = 0.0
        self.shared: ta.SharedParameters[torch.nn.Module] | None = None

    async def together(self) -> None:
        """Returns once all trainers are here."""
        await asyncio.to_thread(self._barrier.wait, 600.0)

    def batches(self, num: int) -> Iterator[list[torch.Tensor]]:
        return (lm.sample(self.train_tokens, self.plan.args, self.draw) for _ in range(num))

    async def run(self, address: str) -> dict[str, Any]:
        plan, args = self.plan, self.plan.args
        async with contextlib.AsyncExitStack() as stack:
            node = await stack.enter_async_context(ta.TesseractNode(initial_peers=[address]))
            torch.manual_seed(plan.seed + 1 + (1000 * (1 + self.number) if plan.kind == "nothing" else 0))
            options = {"grid_size": (args.grid, args.grid), "in_features": args.width, "k_best": args.k_best}
            gates = [
                ta.GatingFunction(node, uid_prefix=f"layer{i}", route="token", **options) for i in range(args.layers)
            ]
            self.model = lm.Transformer(gates, args)
            self.optimizer = torch.optim.Adam(self.model.parameters(), args.lr / plan.in_flight**0.5)
            if plan.kind == "share":
                self.count(node)
                if self.number:
                    await self.together()  # the first one begins
                shared = ta.SharedParameters(node, self.model, run="bench", every=plan.every)
                self.shared = await stack.enter_async_context(shared)
                if not self.number:
                    await self.together()
            await self.together()
            before, began = dict(self.num_bytes), time.perf_counter()
            await self.train(plan.steps)
            found: dict[str, Any] = {"seconds": time.perf_counter() - began}
            found |= {name: (num - before[name]) / plan.steps for name, num in self.num_bytes.items()}
            await self.together()
            for _ in range(2 if self.shared is not None else 0):
                await self.shared.flush()
                await self.together()
            model = self.model if self.shared is None else self.shared.merged()
            found |= {"loss": await self.loss(model), "longest": self.longest, "busiest": self.busiest}
            found["numel"] = sum(one.numel() for one in model.parameters())
            await self.together()
            if plan.variant == "share 1":
                found["pairs"] = [await self.pair(shares_first=number % 2 == 1) for number in range(PAIRS)]
            await self.together()
        return found

    async def train(self, steps: int, *, shares: bool = True) -> None:
        async def loss_of(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
            loss: torch.Tensor = await lm.loss_of(model, batch)
            return loss

        if self.plan.in_flight > 1:
            ahead = ta.AsyncTrainer(self.model, self.optimizer, in_flight=self.plan.in_flight)
            async for _ in ahead.run(loss_of, self.batches(steps)):
                await self.share()
            return
        for batch in self.batches(steps):
            loss = await loss_of(self.model, batch)
            self.optimizer.zero_grad(set_to_none=False)
            await ta.backward(loss)
            if self.plan.kind == "reduce":
                await asyncio.to_thread(self.reduce)
            self.optimizer.step()
            if shares:
                await self.share()

    async def share(self) -> None:
        if self.shared is not None:
            began, worked = time.perf_counter(), time.thread_time()
            await self.shared.step()
            self.longest = max(self.longest, time.perf_counter() - began)
            self.busiest = max(self.busiest, time.thread_time() - worked)

    def reduce(self) -> None:
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self.model.parameters()]
        flat = torch.cat([one.reshape(-1) for one in gradients])
        dist.all_reduce(flat)
        parts = (flat / TRAINERS).split([one.numel() for one in gradients])
        for parameter, part in zip(self.model.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()

    async def pair(self, *, shares_first: bool) -> list[float]:
        """Return the processor time of equally many steps without sharing and with it."""
        times = {shares: await self.processor_time(shares) for shares in (shares_first, not shares_first)}
        return [times[False], times[True]]

    async def processor_time(self, shares: bool) -> float:
        await self.together()
        began = time.process_time()
        await self.train(2 * self.plan.every, shares=shares)  # each piece is pushed twice
        await self.together()  # others' pushes cost their host's time
        return time.process_time() - began

    async def loss(self, model: torch.nn.Module) -> float:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            batches = [lm.sample(self.valid_tokens, self.plan.args, draw) for _ in range(self.plan.args.eval_batches)]
            return statistics.mean([float(await lm.loss_of(model, batch)) for batch in batches])

    def count(self, node: ta.TesseractNode) -> None:
        """Count what pushes and their answers hold, heads and digests included; and what hosts say to one another."""
        call = node.call_expert

        async def counted(peer: Any, method: str, body: Any = None, buffers: Any = (), **options: Any) -> Any:
            reply = await call(peer, method, body, buffers, **options)
            is_replica = method == messages.STATE or (method == messages.PULL and len(body) > 3 and body[3])
            if method in (messages.PUSH, messages.PULL, messages.STATE):
                for one_body, some in ((body, buffers), (reply.body, reply.buffers)):
                    num = 64 + len(msgpack.packb(one_body)) + sum(len(one) for one in some)
                    self.num_bytes["replication" if is_replica else "sharing"] += num
            return reply

        node.call_expert = counted  # type: ignore[method-assign]


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Run one variant in processes of its own. Returns what each trainer measured."""
    barrier = _fork.Barrier(TRAINERS)
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(child(host, (plan,)))
        address = serving.receive(120)
        trainers = [stack.enter_context(child(trainer, (plan, number, address, barrier))) for number in range(TRAINERS)]
        return [one.receive(3600) for one in trainers]


def main(steps: int, seeds: int, every: int, text: str | None, variants: list[str]) -> None:
    losses: dict[str, list[float]] = {}
    for seed in range(seeds):
        for variant in variants:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            found = measure(Plan(variant, seed, steps, every, text, port))
            losses.setdefault(variant, []).append(statistics.mean(one["loss"] for one in found))
            name = f"shared parameters, {variant} in flight, seed {seed}"
            seconds = max(one["seconds"] for one in found)
            emit(f"{name}: loss", losses[variant][-1], "nats", None, steps=steps, seconds=round(seconds, 1))
            if variant == "share 1":
                tell(found)
    mean = {name: statistics.mean(some) for name, some in losses.items()}
    for one, other, asked in (
        ("share 1", "reduce", "<= 1.015"),
        ("share 1", "nothing 1", "<= 0.92"),
        ("share 1", "alike 1", None),
        ("share 8", "nothing 8", "<= 0.92"),
    ):
        if one in mean and other in mean:
            emit(f"shared parameters: loss, {one} / {other}", mean[one] / mean[other], "", asked, seeds=seeds)


def tell(found: list[dict[str, Any]]) -> None:
    full = 2 * 4 * found[0]["numel"] * (TRAINERS - 1) / TRAINERS  # sent in a ring
    for name, asked in (("sharing", "<= 0.00667"), ("replication", None)):
        share = statistics.mean(one[name] for one in found) / full
        emit(f"shared parameters: bytes of {name} / fp32 all-reduce, each trainer and step", share, "", asked)
    emit("shared parameters: longest pause in step()", 1000 * max(one["longest"] for one in found), "ms")
    emit("shared parameters: most processor time in step()", 1000 * max(one["busiest"] for one in found), "ms")
    pairs = zip(*(one["pairs"] for one in found), strict=True)
    ratios = [sum(one[1] for one in pair) / sum(one[0] for one in pair) for pair in pairs]
    emit("shared parameters: processor time with sharing / without", statistics.median(ratios), "", "<= 1.03")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256, help="of each trainer")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--every", type=int, default=32)
    parser.add_argument("--text", help="a text file")
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    given = parser.parse_args()
    main(given.steps, given.seeds, given.every, given.text, list(given.variants))
