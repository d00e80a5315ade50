"""The thread: equal to a plain module, one wake-up per batch, isolated failures, no leftovers."""

import asyncio
import copy
import sys
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch
from torch import nn

from tesseract_async.errors import ExpertFailed, Overloaded
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.runtime import RuntimeSettings, TesseractRuntime
from tesseract_async.runtime.staging import HostStaging
from tesseract_async.runtime.wake_ups import Mailbox
from tesseract_async.runtime.work import Work
from tesseract_async.wire.tensors import TensorSpec
from tests.computed import computed
from tests.watching import Watch


class Gate(nn.Module):
    """Holds the runtime's thread until it is opened, and records the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.entered = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.sizes: list[int] = []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.loop.call_soon_threadsafe(self.entered.set)
        assert self.open.wait(timeout=60)
        self.sizes.append(len(x))
        if bool((x == 666).any()):
            raise ValueError("a bad row")
        return x * self.weight


def make_gate(max_batch_size: int = 64) -> tuple[Gate, ExpertBackend]:
    gate = Gate()
    backend = ExpertBackend(
        gate,
        optimizer=torch.optim.SGD(gate.parameters(), lr=0.0),
        args_schema=(TensorSpec((1,)),),
        outputs_schema=TensorSpec((1,)),
        max_batch_size=max_batch_size,
    )
    return gate, backend


def make_mlp(*, max_batch_size: int = 64, lr: float = 0.1, seed: int = 0) -> tuple[nn.Module, ExpertBackend]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    backend = ExpertBackend(
        module,
        optimizer=torch.optim.SGD(module.parameters(), lr=lr),
        args_schema=(TensorSpec((8,)),),
        max_batch_size=max_batch_size,
    )
    return module, backend


@pytest_asyncio.fixture
async def runtime() -> AsyncIterator[TesseractRuntime]:
    runtime = TesseractRuntime()
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.aclose()


class OverlappingStaging(HostStaging):
    overlaps = True


@pytest_asyncio.fixture(params=[False, True], ids=["plain", "overlap"])
async def any_runtime(request: pytest.FixtureRequest) -> AsyncIterator[TesseractRuntime]:
    """Also as for a device with copy engines, where a batch is staged while another one computes."""
    runtime = TesseractRuntime(make_staging=lambda _: OverlappingStaging() if request.param else HostStaging())
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.aclose()


def local_step(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor, lr: float = 0.1) -> torch.Tensor:
    """What a training loop without us would do. Returns the gradient of x."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    optimizer.zero_grad()
    module(x).backward(gradient)
    optimizer.step()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("num_rows", [1, 64, 200])
async def test_forward_and_backward_equal_the_module(any_runtime: TesseractRuntime, num_rows: int) -> None:
    module, backend = make_mlp()
    reference = copy.deepcopy(module)
    x, gradient = torch.randn(num_rows, 8), torch.randn(num_rows, 4)
    answer = await computed(any_runtime, backend, [x])
    torch.testing.assert_close(answer.tensors[0], reference(x).detach(), atol=1e-6, rtol=1e-6)
    assert answer.version == 0
    answer = await computed(any_runtime, backend, [x], [gradient], call_id=b"1" * 16)
    torch.testing.assert_close(answer.tensors[0], local_step(reference, x, gradient), atol=1e-6, rtol=1e-6)
    assert answer.version == backend.version == 1, "a request split over batches steps once"
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.both_loops
async def test_requests_that_gathered_while_busy_become_one_batch_and_one_step(any_runtime: TesseractRuntime) -> None:
    gate, gate_backend = make_gate()
    module, backend = make_mlp()
    reference = copy.deepcopy(module)
    blocker = any_runtime.submit(gate_backend, [torch.ones(1, 1)])
    await gate.entered.wait()
    xs = [torch.randn(size, 8) for size in (3, 5, 2)]
    gradients = [torch.randn(len(x), 4) for x in xs]
    works = [
        any_runtime.submit(backend, [x], [gradient], call_id=bytes([index]) * 16)
        for index, (x, gradient) in enumerate(zip(xs, gradients, strict=True))
    ]
    gate.open.set()
    answers = await asyncio.gather(*(work.answer for work in works), blocker.answer)
    assert backend.version == 1 and {answer.version for answer in answers[:3]} == {1}
    expected = local_step(reference, torch.cat(xs), torch.cat(gradients))
    torch.testing.assert_close(torch.cat([answer.tensors[0] for answer in answers[:3]]), expected)  # type: ignore[misc]
    torch.testing.assert_close(module.state_dict(), reference.state_dict())
    assert set(backend.applied) == {bytes([index]) * 16 for index in range(3)}


async def test_a_batch_never_exceeds_the_limit(runtime: TesseractRuntime) -> None:
    gate, backend = make_gate(max_batch_size=10)
    gate.open.set()
    sizes = [1, 9, 10, 11, 25, 3, 3, 3, 40, 1]
    answers = await asyncio.gather(
        *(computed(runtime, backend, [torch.full((size, 1), float(size))]) for size in sizes)
    )
    for size, answer in zip(sizes, answers, strict=True):
        torch.testing.assert_close(answer.tensors[0], torch.full((size, 1), float(size)))
    assert max(gate.sizes) <= 10 and sum(gate.sizes) == sum(sizes)


@pytest.mark.both_loops
async def test_a_batch_posts_to_the_loop_once(runtime: TesseractRuntime) -> None:
    gate, backend = make_gate()
    posts = Watch(Mailbox.post)
    await runtime.call(lambda: sys.setprofile(posts))  # on the device's thread
    posts.calls.clear()
    blocker = runtime.submit(backend, [torch.ones(1, 1)])
    await gate.entered.wait()
    works = [runtime.submit(backend, [torch.ones(1, 1)]) for _ in range(30)]
    gate.open.set()
    await asyncio.gather(blocker.answer, *(work.answer for work in works))
    assert gate.sizes == [1, 30] and len(posts.calls) == 2


@pytest.mark.parametrize("backward", [False, True])
async def test_only_the_request_at_fault_fails(any_runtime: TesseractRuntime, backward: bool) -> None:
    gate, backend = make_gate()
    blocker = any_runtime.submit(backend, [torch.ones(1, 1)])
    await gate.entered.wait()
    works: list[Work] = []
    for index in range(8):
        x = torch.full((2, 1), 666.0 if index == 5 else float(index))
        works.append(any_runtime.submit(backend, [x], [x] if backward else None, call_id=bytes(15) + bytes([index])))
    gate.open.set()
    answers = await asyncio.gather(*(work.answer for work in works), blocker.answer, return_exceptions=True)
    assert isinstance(answers[5], ExpertFailed) and "ValueError: a bad row" in str(answers[5])
    assert sum(isinstance(answer, BaseException) for answer in answers) == 1
    assert backend.version == int(backward)
    assert bytes(15) + bytes([5]) not in backend.applied and len(backend.applied) == 7 * backward


async def test_gradients_that_are_not_finite_reach_no_optimizer(runtime: TesseractRuntime) -> None:
    module, backend = make_mlp()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ExpertFailed, match="not finite"):
        await computed(runtime, backend, [torch.randn(2, 8)], [torch.full((2, 4), torch.nan)], call_id=b"1" * 16)
    with pytest.raises(ExpertFailed, match="not finite"):
        await computed(runtime, backend, [torch.full((2, 8), torch.inf)], [torch.ones(2, 4)], call_id=b"2" * 16)
    torch.testing.assert_close(module.state_dict(), before)
    assert backend.version == 0 and not backend.applied


async def test_backward_without_a_call_id_takes_no_step(runtime: TesseractRuntime) -> None:
    module, backend = make_mlp()
    before = copy.deepcopy(module.state_dict())
    answer = await computed(runtime, backend, [torch.randn(2, 8)], [torch.randn(2, 4)])
    assert answer.tensors[0] is not None and answer.version == 0
    torch.testing.assert_close(module.state_dict(), before)


async def test_a_backward_that_is_computed_again_costs_no_other_its_step(any_runtime: TesseractRuntime) -> None:
    gate, gate_backend = make_gate()
    module, backend = make_mlp()
    reference = copy.deepcopy(module)
    blocker = any_runtime.submit(gate_backend, [torch.ones(1, 1)])
    await gate.entered.wait()
    x, gradient = torch.randn(3, 8), torch.randn(3, 4)
    ids = (None, b"1" * 16, None)  # without one, no step is taken
    works = [any_runtime.submit(backend, [x], [gradient], call_id=call_id) for call_id in ids]
    gate.open.set()
    await asyncio.gather(*(work.answer for work in works), blocker.answer)
    local_step(reference, x, gradient)
    torch.testing.assert_close(module.state_dict(), reference.state_dict())
    assert dict(backend.applied) == {b"1" * 16: 1} and backend.version == 1


@pytest.mark.both_loops
async def test_cancelling_withdraws_what_waits_and_lets_run_what_runs(any_runtime: TesseractRuntime) -> None:
    gate, backend = make_gate()
    running = asyncio.create_task(
        computed(any_runtime, backend, [torch.ones(1, 1)], [torch.ones(1, 1)], call_id=b"1" * 16)
    )
    await asyncio.sleep(0)
    await gate.entered.wait()
    waiting = asyncio.create_task(computed(any_runtime, backend, [torch.ones(1, 1)]))
    await asyncio.sleep(0)
    assert any_runtime.statistics().num_waiting == 1
    for task in (running, waiting):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert any_runtime.statistics().num_waiting == 0
    gate.open.set()
    await any_runtime.call(lambda: None)
    assert gate.sizes == [1] and backend.version == 1, "its step stands"


async def test_expired_work_is_not_computed(runtime: TesseractRuntime) -> None:
    gate, backend = make_gate()
    blocker = runtime.submit(backend, [torch.ones(1, 1)])
    await gate.entered.wait()
    with pytest.raises(TimeoutError, match="deadline"):
        late = runtime.submit(backend, [torch.ones(1, 1)], deadline=asyncio.get_running_loop().time() - 0.1)
        gate.open.set()
        await late.answer
    await blocker.answer
    assert gate.sizes == [1]


async def test_a_full_queue_refuses_at_once() -> None:
    runtime = TesseractRuntime(settings=RuntimeSettings(max_queue_bytes=100))
    await runtime.start()
    gate, backend = make_gate()
    blocker = runtime.submit(backend, [torch.ones(1, 1)])
    await gate.entered.wait()
    with pytest.raises(Overloaded) as caught:
        await computed(runtime, backend, [torch.ones(64, 1)])
    assert caught.value.retry_after > 0
    gate.open.set()
    await blocker.answer
    await runtime.aclose()


@pytest.mark.both_loops
async def test_closing_ends_every_call() -> None:
    runtime = TesseractRuntime()
    await runtime.start()
    gate, backend = make_gate()
    running = runtime.submit(backend, [torch.ones(1, 1)])
    await gate.entered.wait()
    waiting = runtime.submit(backend, [torch.ones(1, 1)])
    closing = asyncio.create_task(runtime.aclose())
    with pytest.raises(Overloaded):
        await waiting.answer
    gate.open.set()
    await closing
    assert (await running.answer).version == 0
    with pytest.raises(Overloaded):
        await computed(runtime, backend, [torch.ones(1, 1)])
    await runtime.aclose()


@pytest.mark.parametrize("ask", ["call", "call_aside"])
async def test_what_still_asks_a_closed_runtime_hears_that_it_leaves(ask: str) -> None:
    """A peer's request may be under way when its server closes: it hears what others hear then, and tries elsewhere."""
    runtime = TesseractRuntime()
    await runtime.start()
    await runtime.call_aside(lambda: None)
    await runtime.aclose()
    with pytest.raises(Overloaded, match="is leaving"):
        await getattr(runtime, ask)(lambda: None)
    with pytest.raises(Overloaded, match="is leaving"):
        await runtime.snapshot(make_mlp()[1])


async def test_functions_run_on_the_thread_between_batches(any_runtime: TesseractRuntime) -> None:
    assert (await any_runtime.call(threading.current_thread)).name == "tesseract-runtime-cpu"
    assert (await any_runtime.call_aside(threading.current_thread)).name.startswith("tesseract-files")
    with pytest.raises(ZeroDivisionError):
        await any_runtime.call(lambda: 1 // 0)


async def test_a_module_may_raise_anything(runtime: TesseractRuntime) -> None:
    class Quits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise SystemExit("bye")

    backend = ExpertBackend(Quits(), args_schema=(TensorSpec((1,)),), outputs_schema=TensorSpec((1,)))
    with pytest.raises(ExpertFailed, match="SystemExit: bye"):
        await computed(runtime, backend, [torch.ones(1, 1)])
    module, mlp = make_mlp()
    await computed(runtime, mlp, [torch.ones(1, 8)])


async def test_stochastic_requests_and_unmerged_backwards_are_computed_alone(runtime: TesseractRuntime) -> None:
    gate, gate_backend = make_gate()
    for settings, backward in (
        (BackendSettings(stochastic=True), False),
        (BackendSettings(merge_backward=False), True),
    ):
        gate.entered.clear()
        gate.open.clear()
        module = nn.Linear(1, 1)
        backend = ExpertBackend(
            module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            args_schema=(TensorSpec((1,)),),
            settings=settings,
        )
        blocker = runtime.submit(gate_backend, [torch.ones(1, 1)])
        await gate.entered.wait()
        num_batches = runtime.statistics().num_batches
        x = torch.ones(1, 1)
        works = [runtime.submit(backend, [x], [x] if backward else None, call_id=bytes([i]) * 16) for i in range(5)]
        gate.open.set()
        await asyncio.gather(blocker.answer, *(work.answer for work in works))
        assert runtime.statistics().num_batches == num_batches + 5
        assert backend.version == 5 * backward, "one step each"


async def test_a_hung_module_makes_the_device_refuse_and_never_blocks_closing() -> None:
    runtime = TesseractRuntime(settings=RuntimeSettings(stall_timeout=0.0, close_timeout=0.05))
    await runtime.start()
    gate, backend = make_gate()
    hung = runtime.submit(backend, [torch.ones(1, 1)])
    await gate.entered.wait()
    with pytest.raises(Overloaded, match="hangs"):
        await computed(runtime, backend, [torch.ones(1, 1)])
    await runtime.aclose()
    assert not hung.answer.done()
    gate.open.set()  # what never happens outside of tests
    await hung.answer
    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), asyncio.get_running_loop()))


async def test_a_device_that_does_not_exist_is_an_error_at_start() -> None:
    runtime = TesseractRuntime(device="cuda:99")
    with pytest.raises(ValueError, match=r"no device cuda:99 here: PyTorch sees \d+ CUDA"):
        await runtime.start()
    with pytest.raises(ValueError, match="not a device, such as 'cpu'"):
        TesseractRuntime(device="nonsense")


async def test_figures_reach_the_metrics(runtime: TesseractRuntime) -> None:
    _, backend = make_mlp()
    await computed(runtime, backend, [torch.randn(3, 8)])
    with pytest.raises(ExpertFailed):
        await computed(runtime, backend, [torch.randn(2, 8)], [torch.full((2, 4), torch.nan)], call_id=b"1" * 16)
    snapshot = runtime.metrics.snapshot()
    assert snapshot["runtime_batch_rows_sum{direction=forward}"] == 3
    assert snapshot["runtime_failures{direction=backward}"] == 1
    assert runtime.busy_seconds > 0
