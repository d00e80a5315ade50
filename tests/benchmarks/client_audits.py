"""Audits of experts' answers: how far honest answers are apart, how soon a liar is noticed, and what it costs.

Honest answers are computed with one and with two threads, alone and inside larger batches, and under autocast to bf16;
their deviations are compared with the tolerance that holds where nothing is known of the servers. The chance of a false
alarm is extrapolated from the tail: log-deviations are taken as normally distributed.
"""

import asyncio
import copy
import math
import statistics
from random import Random

import torch

import tesseract_async as ta
from tesseract_async.client.audits import deviation
from tests.benchmarks.figures import emit
from tests.benchmarks.modules import FeedForward
from tests.benchmarks.swarm import run_on

SHARE = 0.01
LIES = 0.05
ROWS, WIDTH = 16, 256
TOLERANCE = 0.03


def deviations(num: int) -> dict[str, list[float]]:
    """Of honest answers from one another, by how the second one was computed."""
    torch.manual_seed(0)
    module = FeedForward(WIDTH).eval()
    found: dict[str, list[float]] = {"threads": [], "batch": [], "autocast": []}
    with torch.no_grad():
        for number in range(num):
            x = torch.randn(1 + number % 64, WIDTH) * 10 ** (number % 5 - 2)
            torch.set_num_threads(1)
            plain = module(x)
            inside = module(torch.cat([torch.randn(40, WIDTH), x]))[40:]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = module(x).float()
            torch.set_num_threads(2)
            for name, other in (("threads", module(x)), ("batch", inside), ("autocast", half)):
                found[name].append(deviation([plain], [other]))
    return found


def false_alarms(some: list[float]) -> float:
    """The chance that one more exceeds the tolerance."""
    logs = [math.log(max(one, 1e-12)) for one in some]
    mean, spread = statistics.mean(logs), max(statistics.stdev(logs), 1e-6)
    return 0.5 * math.erfc((math.log(TOLERANCE) - mean) / spread / math.sqrt(2))


async def calls_until_noticed(seed: int) -> float:
    """Calls to two replicas, one of which adds a tenth to one answer in twenty, until it is caught."""
    random = Random(seed)

    class Liar(FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y * 1.1 if random.random() < LIES else y

    def backend(kind: type[FeedForward]) -> ta.ExpertBackend:
        torch.manual_seed(0)
        return ta.ExpertBackend(kind(16), args_schema=(ta.TensorSpec((16,)),))

    async with (
        ta.TesseractNode() as liar,
        ta.TesseractServer(liar, {"y.0": backend(Liar)}),
        ta.TesseractNode(initial_peers=[liar.address]) as honest,
        ta.TesseractServer(honest, {"y.0": backend(FeedForward)}, followers=["y.0"]),
        ta.TesseractNode(initial_peers=[liar.address]) as trainer,
    ):
        expert = (await trainer.get_expert("y.0")).with_options(audit_share=SHARE, max_staleness=0).eval()
        x, num_calls = torch.randn(1, 16), 0
        with torch.no_grad():
            while not trainer.trust.distrusted and num_calls < 20_000:
                await asyncio.gather(*(expert(x) for _ in range(20)))
                num_calls += 20
        assert set(trainer.trust.distrusted) <= {liar.peer_id}
        return num_calls


async def cost() -> list[float]:
    """Seconds for the same calls, audited / not audited, in pairs."""
    ratios = []
    torch.manual_seed(0)
    module = FeedForward(WIDTH)
    twins = [ta.ExpertBackend(copy.deepcopy(module), args_schema=(ta.TensorSpec((WIDTH,)),)) for _ in range(2)]
    async with (
        ta.TesseractNode() as first,
        ta.TesseractServer(first, {"y.0": twins[0]}),
        ta.TesseractNode(initial_peers=[first.address]) as second,
        ta.TesseractServer(second, {"y.0": twins[1]}, followers=["y.0"]),
        ta.TesseractNode(initial_peers=[first.address]) as trainer,
    ):
        plain = (await trainer.get_expert("y.0")).eval()
        audited = plain.with_options(audit_share=SHARE)
        x, loop = torch.randn(ROWS, WIDTH), asyncio.get_running_loop()
        with torch.no_grad():
            for _ in range(20):
                seconds = []
                for expert in (plain, audited):
                    begun = loop.time()
                    for _ in range(10):
                        await asyncio.gather(*(expert(x) for _ in range(20)))
                    await expert.audits.wait()
                    seconds.append(loop.time() - begun)
                ratios.append(seconds[1] / seconds[0])
    return ratios


async def measure() -> None:
    threads = torch.get_num_threads()
    for name, some in deviations(2000).items():
        emit(f"honest answers apart, {name}: largest", max(some), "", f"< {TOLERANCE}")
        emit(f"chance of a false alarm, {name}", false_alarms(some), "", "< 0.000001")
    torch.set_num_threads(threads)
    noticed = sorted([await calls_until_noticed(seed) for seed in range(20)])
    emit("calls until a liar of 5 % is noticed, worst of 20", noticed[-1], "calls", "<= 10000", all=noticed)
    emit("calls with 1 % audited / without, median of 20 pairs", statistics.median(await cost()), "", "<= 1.02")


def main() -> None:
    run_on("uvloop", measure())


if __name__ == "__main__":
    main()
