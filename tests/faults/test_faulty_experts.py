"""Experts that raise, lie about their shapes, compute nonsense, run out of memory, or hang: only their callers know."""

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.errors import ExpertFailed, Overloaded
from tesseract_async.runtime.runtime import RuntimeSettings
from tesseract_async.server.server import ServerSettings

Fault = Callable[[torch.Tensor], torch.Tensor]


def raises(y: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("division by zero")


def exits(y: torch.Tensor) -> torch.Tensor:
    raise SystemExit("bye")


def runs_out_of_memory(y: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def runs_out_of_host_memory(y: torch.Tensor) -> torch.Tensor:
    return torch.empty(2**60)


class Faulty(nn.Module):
    """Does `fault` to its result wherever a row holds 666."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.fault = fault

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return self.fault(y) if bool((x == 666).any()) else y


def make_backend(module: nn.Module) -> ta.ExpertBackend:
    return ta.ExpertBackend(
        module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        args_schema=(ta.TensorSpec((4,)),),
        outputs_schema=ta.TensorSpec((4,)),
    )


async def step(expert: ta.RemoteExpert, value: float) -> None:
    x = torch.full((4, 4), value, requires_grad=True)
    await ta.backward((await expert(x)).sum())


@pytest.mark.parametrize(
    ("fault", "sentence", "at"),
    [
        pytest.param(raises, "ZeroDivisionError: division by zero", "forward", id="raises"),
        pytest.param(exits, "SystemExit: bye", "forward", id="exits"),
        pytest.param(lambda y: y[:, :3], r"float32\[rows, 4\].*float32\[4, 3\]", "forward", id="wrong width"),
        pytest.param(lambda y: y[:3], "3 rows for 4", "forward", id="too few rows"),
        pytest.param(lambda y: y.double(), "float64", "forward", id="wrong type"),
        pytest.param(lambda y: (y, y), "output", "forward", id="too many"),
        pytest.param(lambda y: None, "output", "forward", id="nothing"),
        pytest.param(runs_out_of_memory, "OutOfMemoryError", "forward", id="memory"),
        pytest.param(runs_out_of_host_memory, "memory", "forward", id="host memory"),
        pytest.param(lambda y: y * torch.nan, "not finite; no step was taken", "backward", id="NaN"),
        pytest.param(lambda y: y.detach(), "", "", id="no gradient"),
    ],
)
async def test_a_fault_stays_with_its_call(fault: Fault, sentence: str, at: str) -> None:
    module = Faulty(fault)
    backends = {"ffn.0": make_backend(module), "ffn.1": make_backend(nn.Linear(4, 4))}
    async with ta.TesseractNode() as node, ta.TesseractServer(node, backends) as server:
        experts = [await node.get_expert(uid) for uid in backends]
        good = [step(expert, float(number)) for number in range(3) for expert in experts]
        bad = [step(experts[0], 666.0) for _ in range(2)]
        results = await asyncio.gather(*good, *bad, return_exceptions=True)
        assert results[: len(good)] == [None] * len(good)
        if at:
            for error in results[len(good) :]:
                assert isinstance(error, ExpertFailed)
                with pytest.raises(ExpertFailed, match=sentence):
                    raise error
        assert len(server.experts["ffn.0"].applied) == 3 + 2 * (not at)
        assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
        for expert in experts:
            await step(expert, 1.0)
        await server.aclose(drain_timeout=0.0)  # nobody sends the backwards of the calls that failed


async def test_an_expert_that_hangs_is_said_to_and_holds_up_nobody_who_has_a_choice() -> None:
    release, entered = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hangs(y: torch.Tensor) -> torch.Tensor:
        loop.call_soon_threadsafe(entered.set)
        assert release.wait(timeout=30)
        return y

    backends = {"ffn.0": make_backend(Faulty(hangs)), "ffn.1": make_backend(nn.Linear(4, 4))}
    settings = ServerSettings(runtime=RuntimeSettings(stall_timeout=0.01), drain_timeout=0.0)
    async with ta.TesseractNode() as node, ta.TesseractServer(node, backends, settings=settings) as server:
        hung, other = [await node.get_expert(uid) for uid in backends]
        with torch.no_grad():
            waiting = asyncio.ensure_future(hung.with_options(timeout=1.5)(torch.full((1, 4), 666.0)))
            await entered.wait()
            # its own caller's deadline passes; another expert of the same device refuses, instead of waiting along
            with pytest.raises(TimeoutError):
                await waiting
            with pytest.raises(Overloaded, match="hangs; ask another replica"):
                await other.with_options(timeout=30.0)(torch.ones(1, 4))
            release.set()
            await server.runtimes[0].call(lambda: None)
            assert (await other(torch.ones(1, 4))).shape == (1, 4)
