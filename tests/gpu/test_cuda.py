"""The runtime on a CUDA device: the same results as on the CPU, copies during computing, graphs, halving."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import nn

from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.runtime import RuntimeSettings, TesseractRuntime
from tesseract_async.runtime.staging import CudaStaging, staging_for
from tesseract_async.wire.tensors import TensorSpec
from tests.computed import computed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")

CUDA = torch.device("cuda")


def make_backend(*, max_batch_size: int = 64, dropout: float = 0.0, **settings: Any) -> ExpertBackend:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
    return ExpertBackend(
        module,
        optimizer=torch.optim.Adam(module.parameters(), lr=0.01),
        args_schema=(TensorSpec((8,)),),
        max_batch_size=max_batch_size,
        settings=BackendSettings(**settings),
    )


@pytest_asyncio.fixture
async def runtime() -> AsyncIterator[TesseractRuntime]:
    runtime = TesseractRuntime(device=CUDA)
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.aclose()


@pytest.mark.parametrize("num_rows", [1, 64, 200])
async def test_a_step_on_the_gpu_equals_one_on_the_cpu(runtime: TesseractRuntime, num_rows: int) -> None:
    backend, reference = make_backend(), make_backend()
    await runtime.call(lambda: backend.to(CUDA))
    on_cpu = TesseractRuntime()
    await on_cpu.start()
    for step in range(3):
        x, gradient, call_id = torch.randn(num_rows, 8), torch.randn(num_rows, 4), bytes([step]) * 16
        ours, theirs = await computed(runtime, backend, [x]), await computed(on_cpu, reference, [x])
        torch.testing.assert_close(ours.tensors[0], theirs.tensors[0], atol=1e-5, rtol=1e-5)
        ours = await computed(runtime, backend, [x], [gradient], call_id=call_id)
        theirs = await computed(on_cpu, reference, [x], [gradient], call_id=call_id)
        torch.testing.assert_close(ours.tensors[0], theirs.tensors[0], atol=1e-5, rtol=1e-5)
        assert ours.tensors[0] is not None and ours.tensors[0].device.type == "cpu"
    await on_cpu.aclose()
    state = await runtime.snapshot(backend)
    torch.testing.assert_close(state["module"], reference.state()["module"], atol=1e-4, rtol=1e-4)


async def test_many_requests_in_flight_do_not_mix(runtime: TesseractRuntime) -> None:
    backend = ExpertBackend(nn.Identity(), args_schema=(TensorSpec((1000,)),), max_batch_size=100)
    xs = [torch.full((1 + index % 70, 1000), float(index)) for index in range(300)]
    answers = await asyncio.gather(*(computed(runtime, backend, [x]) for x in xs))
    for x, answer in zip(xs, answers, strict=True):
        torch.testing.assert_close(answer.tensors[0], x)


async def test_dropout_is_the_same_in_forward_and_backward(runtime: TesseractRuntime) -> None:
    torch.manual_seed(0)
    module = nn.Dropout(0.5)
    backend = ExpertBackend(module, args_schema=(TensorSpec((1000,)),), max_batch_size=8)
    x = torch.ones(20, 1000)
    y = (await computed(runtime, backend, [x], training=True, seed=5)).tensors[0]
    gradient = (await computed(runtime, backend, [x], [x], training=True, seed=5)).tensors[0]
    torch.testing.assert_close(gradient, y)


async def test_graphs_follow_the_optimizer(runtime: TesseractRuntime) -> None:
    plain = make_backend()
    graphed = make_backend(preferred_sizes=(8, 32), cuda_graphs=True)
    for backend in (plain, graphed):
        await runtime.call(lambda backend=backend: backend.to(CUDA))  # type: ignore[misc]
    for step, num_rows in enumerate((3, 8, 20, 40)):
        x, gradient = torch.randn(num_rows, 8), torch.randn(num_rows, 4)
        for _ in range(2):
            ours, theirs = await computed(runtime, graphed, [x]), await computed(runtime, plain, [x])
            torch.testing.assert_close(ours.tensors[0], theirs.tensors[0], atol=1e-5, rtol=1e-5)
        for backend in (plain, graphed):
            await computed(runtime, backend, [x], [gradient], call_id=bytes([step]) * 16)


async def test_autocast(runtime: TesseractRuntime) -> None:
    backend = make_backend(autocast=torch.bfloat16)
    await runtime.call(lambda: backend.to(CUDA))
    answer = await computed(runtime, backend, [torch.randn(8, 8)])
    assert answer.tensors[0] is not None and answer.tensors[0].dtype == torch.float32


async def test_running_out_of_memory_halves_the_batch(runtime: TesseractRuntime) -> None:
    free, _ = torch.cuda.mem_get_info()

    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # a whole batch takes 1.2 x what is free, half of one 0.6 x
            hog = torch.empty(int(free * 1.2 / 10) * len(x), dtype=torch.uint8, device=x.device)
            return x + hog[:1].float() * 0

    backend = ExpertBackend(Greedy(), args_schema=(TensorSpec((1,)),), outputs_schema=TensorSpec((1,)))
    x = torch.arange(10.0).view(10, 1)
    answer = await computed(runtime, backend, [x])
    torch.testing.assert_close(answer.tensors[0], x)


def test_copies_and_computing_overlap() -> None:
    """Traced: some copy to the device runs while a kernel of the batch before does."""
    from torch.profiler import ProfilerActivity, profile

    staging = staging_for(CUDA)
    assert isinstance(staging, CudaStaging) and staging.overlaps
    weight = torch.randn(4096, 4096, device=CUDA)
    rows = [torch.randn(2048, 4096)]
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as traced:
        (x,) = staging.upload([rows]).wait()
        for _ in range(4):
            y: Any = x
            for _ in range(20):
                y = y @ weight
            coming = staging.upload([rows])
            leaving = staging.download([y])
            (x,) = coming.wait()
        leaving.wait()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in traced.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    copies = [(start, end) for name, start, end in spans if "Memcpy HtoD" in name]
    kernels = [(start, end) for name, start, end in spans if "gemm" in name.lower() or "cutlass" in name.lower()]
    assert any(a < d and c < b for a, b in copies for c, d in kernels), "no copy ran during a kernel"


async def test_experts_in_one_pass_on_the_gpu_equal_those_one_by_one() -> None:
    answers = []
    for groups in (True, False):
        runtime = TesseractRuntime(device="cuda", settings=RuntimeSettings(groups_experts=groups))
        await runtime.start()
        try:
            torch.manual_seed(0)
            modules = [nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).cuda() for _ in range(8)]
            experts = [
                ExpertBackend(
                    module,
                    optimizer=torch.optim.Adam(module.parameters(), lr=1e-3, eps=1e-4),
                    args_schema=(TensorSpec((16,)),),
                )
                for module in modules
            ]
            found = []
            for number in range(20):
                x = torch.randn(1 + number % 4, 16)
                with runtime.gathering():
                    works = [
                        runtime.submit(one, [x], [x], call_id=bytes([number, index]) * 8)
                        for index, one in enumerate(experts)
                    ]
                found += [(await work.answer).tensors[0] for work in works]
        finally:
            await runtime.aclose()
        assert (runtime.metrics.total("runtime_grouped_batches") > 0) is groups
        answers.append([*found, *(x.cpu() for module in modules for x in module.parameters())])
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)
