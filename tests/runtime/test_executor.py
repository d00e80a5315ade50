"""Faults stay with their request, and what a backend's settings promise: steps, seeds, staleness, halving."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.errors import ExpertFailed
from tesseract_async.runtime.attempts import Outcomes
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.batcher import Batcher, BatchQueue, RowSlice
from tesseract_async.runtime.executor import Executor
from tesseract_async.runtime.gradients import are_finite
from tesseract_async.runtime.work import Work, WorkResult
from tesseract_async.wire.tensors import TensorSpec

QUEUE: BatchQueue = Batcher().add_queue("test", max_batch_size=64)


def make_backend(module: nn.Module | None = None, *, lr: float = 0.1, **rest: Any) -> ExpertBackend:
    torch.manual_seed(0)
    module = module or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return ExpertBackend(
        module,
        optimizer=torch.optim.SGD(module.parameters(), lr=lr),
        args_schema=(TensorSpec((4,)),),
        settings=BackendSettings(**rest),
    )


def work_of(
    backend: ExpertBackend,
    x: torch.Tensor,
    gradient: torch.Tensor | None = None,
    *,
    call_id: bytes | None = b"c" * 16,
    training: bool = False,
    seed: int = 0,
    forward_version: int | None = None,
    peer: object = None,
    rows: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Work:
    return Work(
        QUEUE,
        len(x) if rows is None else len(rows),
        0,
        peer,
        backend=backend,
        inputs=[x],
        rows=None if rows is None else torch.tensor(rows),
        output_gradients=None if gradient is None else [gradient],
        weights=None if weights is None else torch.tensor(weights),
        training=training,
        seed=seed,
        call_id=call_id,
        forward_version=forward_version,
        answer=None,  # type: ignore[arg-type]
    )


def whole(work: Work) -> RowSlice:
    return RowSlice(work, 0, work.num_rows)


def compute(executor: Executor, slices: Sequence[RowSlice]) -> Outcomes:
    attempt = executor.stage(slices)
    executor.launch(attempt)
    executor.complete(attempt)
    return executor.outcomes(attempt)


def answer_of(outcomes: Outcomes, work: Work) -> WorkResult:
    outcome = outcomes[work]
    assert isinstance(outcome, WorkResult), outcome
    return outcome


def error_of(outcomes: Outcomes, work: Work) -> BaseException:
    outcome = outcomes[work]
    assert isinstance(outcome, BaseException), outcome
    return outcome


class Fragile(nn.Module):
    """Raises what `raises` holds wherever a row is 666; counts its calls."""

    def __init__(self, error: BaseException, *, above: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.error = error
        self.above = above
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if bool((x == 666).any()) or (self.above and len(x) > self.above):
            raise self.error
        result: torch.Tensor = self.linear(x)
        return result


def test_outputs_of_a_batch_are_encoded_as_one_array_for_all_who_asked() -> None:
    backend = make_backend()
    works = [work_of(backend, torch.randn(count, 4), None) for count in (1, 3, 2)]
    outcomes = compute(Executor(), [whole(work) for work in works])
    arrays = []
    for work in works:
        answer = answer_of(outcomes, work)
        (x,) = answer.tensors
        assert x is not None and answer.encoded is not None
        (buffer,) = answer.encoded
        arrays.append(buffer.obj)
        assert bytes(buffer) == x.numpy().tobytes() and len(x) == work.num_rows
    assert arrays[0] is arrays[1] is arrays[2]
    for slices in (
        [whole(works[0])],
        [whole(work_of(backend, torch.randn(1, 4), torch.randn(1, 3), call_id=bytes([one]) * 16)) for one in (1, 2)],
        [whole(work_of(backend, torch.randn(count, 4), None)) for count in (6000, 1)],
    ):
        for outcome in compute(Executor(), slices).values():
            assert isinstance(outcome, WorkResult) and outcome.encoded is None, "alone, a backward, or large"


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_rows_of_a_block_and_their_weights_equal_requests_of_their_own(damping: float) -> None:
    backend, plain = (make_backend(staleness_damping=damping) for _ in range(2))
    backend.version = plain.version = 3
    block, gradient = torch.randn(6, 4), torch.randn(6, 3)
    rows, weights = [5, 1, 1, 2], [0.5, -2.0, 0.0, 1.0]
    work = work_of(backend, block, gradient, rows=rows, weights=weights, forward_version=2)
    # a slice that ends early and another request of the same block: summed, and stepped once
    other = work_of(backend, block, gradient, rows=[0], weights=[3.0], forward_version=2, call_id=b"d" * 16)
    weighted = gradient[rows] * torch.tensor(weights)[:, None]
    one = work_of(plain, block[rows], weighted, forward_version=2)
    two = work_of(plain, block[:1], gradient[:1] * 3.0, forward_version=2, call_id=b"d" * 16)
    found = compute(Executor(), [whole(work), whole(other)])
    asked = compute(Executor(), [whole(one), whole(two)])
    outputs = compute(Executor(), [whole(work_of(make_backend(), block, rows=rows))])
    (output,) = outputs.values()
    assert isinstance(output, WorkResult) and output.tensors[0] is not None
    for mine, theirs in ((work, one), (other, two)):
        of_inputs, of_weights = answer_of(found, mine).tensors
        torch.testing.assert_close(of_inputs, answer_of(asked, theirs).tensors[0])
        assert of_weights is not None and len(of_weights) == mine.num_rows
        if mine is work:
            torch.testing.assert_close(of_weights, (output.tensors[0] * gradient[rows]).sum(1))
    torch.testing.assert_close(backend.module.state_dict(), plain.module.state_dict())
    assert list(backend.applied) == list(plain.applied)


def test_a_bad_request_is_found_by_halving_and_the_others_share_one_step() -> None:
    module = Fragile(ValueError("a bad row"))
    backend = make_backend(module)
    reference = copy.deepcopy(module.linear)
    xs = [torch.randn(2, 4) for _ in range(8)]
    xs[3][1, 2] = 666.0
    works = [work_of(backend, x, torch.ones(2, 3), call_id=bytes([i]) * 16) for i, x in enumerate(xs)]
    outcomes = compute(Executor(), [whole(work) for work in works])
    assert "a bad row" in str(error_of(outcomes, works[3]))
    assert {answer_of(outcomes, work).version for work in works if work is not works[3]} == {1}
    assert list(backend.applied) == [bytes([i]) * 16 for i in range(8) if i != 3]
    good = torch.cat([x for i, x in enumerate(xs) if i != 3])
    reference(good).sum().backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(module.linear.state_dict(), reference.state_dict())


def test_a_chunked_request_steps_once_and_a_failed_chunk_leaves_nothing() -> None:
    backend = make_backend()
    reference = copy.deepcopy(backend.module)
    x, gradient = torch.randn(10, 4), torch.randn(10, 3)
    work = work_of(backend, x, gradient)
    executor = Executor()
    assert not compute(executor, [RowSlice(work, 0, 4)])
    assert not compute(executor, [RowSlice(work, 4, 8)])
    assert backend.version == 0
    answer = answer_of(compute(executor, [RowSlice(work, 8, 10)]), work)
    assert backend.version == 1
    local = x.clone().requires_grad_()
    reference(local).backward(gradient)
    torch.testing.assert_close(answer.tensors[0], local.grad, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        for ours, theirs in zip(backend.module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, atol=1e-6, rtol=1e-6)  # type: ignore[operator]

    bad = x.clone()
    bad[9] = torch.nan
    before = copy.deepcopy(backend.module.state_dict())
    work = work_of(backend, bad, gradient, call_id=b"d" * 16)
    compute(executor, [RowSlice(work, 0, 8)])
    assert "not finite" in str(error_of(compute(executor, [RowSlice(work, 8, 10)]), work))
    torch.testing.assert_close(backend.module.state_dict(), before)
    assert backend.version == 1 and len(backend.applied) == 1


@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_halves_once_by_rows(backward: bool) -> None:
    module = Fragile(torch.cuda.OutOfMemoryError("CUDA out of memory"), above=5)
    backend = make_backend(module)
    module.sizes.clear()
    x = torch.randn(10, 4)
    work = work_of(backend, x, torch.ones(10, 3) if backward else None)
    answer = answer_of(compute(Executor(), [whole(work)]), work)
    assert module.sizes == [10, 5, 5] and answer.tensors[0] is not None and len(answer.tensors[0]) == 10
    assert backend.version == int(backward)
    if not backward:
        torch.testing.assert_close(answer.tensors[0], module.linear(x).detach())
    too_large = work_of(backend, torch.randn(11, 4), torch.ones(11, 3) if backward else None, call_id=b"d" * 16)
    assert "OutOfMemoryError" in str(error_of(compute(Executor(), [whole(too_large)]), too_large))
    assert backend.version == int(backward), "the half that worked is not applied"


def test_a_failed_step_returns_to_the_last_good_state_with_its_journal() -> None:
    backend = make_backend()
    executor = Executor()
    x, gradient = torch.randn(2, 4), torch.randn(2, 3)
    compute(executor, [whole(work_of(backend, x, gradient, call_id=b"1" * 16))])
    executor.steps.keep_good_state(backend)
    good = copy.deepcopy(backend.module.state_dict())
    compute(executor, [whole(work_of(backend, x, gradient, call_id=b"2" * 16))])
    assert backend.optimizer is not None
    step = backend.optimizer.step

    def half_done(*_: Any) -> None:
        with torch.no_grad():
            backend.parameters[0].fill_(torch.nan)
        raise RuntimeError("the disk of the optimizer fell off")

    backend.optimizer.step = half_done  # type: ignore[assignment, method-assign]
    work = work_of(backend, x, gradient, call_id=b"3" * 16)
    error = error_of(compute(executor, [whole(work)]), work)
    assert "fell off" in str(error) and "back to version 1" in str(error)
    torch.testing.assert_close(backend.module.state_dict(), good)
    assert backend.version == 1 and list(backend.applied) == [b"1" * 16]
    backend.optimizer.step = step  # type: ignore[method-assign]
    answer_of(compute(executor, [whole(work)]), work)
    assert backend.version == 2


def test_an_expert_that_cannot_return_answers_no_more() -> None:
    backend = make_backend()
    executor = Executor()

    def broken(*_: Any) -> None:
        raise RuntimeError("no")

    backend.optimizer.step = broken  # type: ignore[union-attr, assignment, method-assign]
    backend.load_state = broken  # type: ignore[assignment, method-assign]
    for _ in range(2):
        work = work_of(backend, torch.randn(2, 4), torch.randn(2, 3))
        assert "broken" in str(error_of(compute(executor, [whole(work)]), work))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_gradients_that_are_not_finite_are_refused_one_by_one(bad: float) -> None:
    backend = make_backend()
    works = [work_of(backend, torch.randn(2, 4), torch.randn(2, 3), call_id=bytes([i]) * 16) for i in range(4)]
    works[1].output_gradients = [torch.full((2, 3), bad)]
    outcomes = compute(Executor(), [whole(work) for work in works])
    assert "not finite" in str(error_of(outcomes, works[1])) and len(backend.applied) == 3


def test_large_finite_numbers_are_not_mistaken_for_infinite() -> None:
    tensors = [torch.full((4,), 3e38), torch.full((4,), 6e4, dtype=torch.float16), torch.full((2,), 1 + 1j), None]
    assert are_finite(tensors)
    assert not are_finite([*tensors, torch.tensor([complex(0, torch.inf)])])


def test_too_large_gradients_are_refused_and_others_are_clipped() -> None:
    backend = make_backend(nn.Linear(4, 3), max_gradient_norm=10.0, clip_gradient_norm=0.5, lr=1.0)
    before = [parameter.detach().clone() for parameter in backend.parameters]
    small = work_of(backend, torch.ones(1, 4), torch.ones(1, 3), call_id=b"1" * 16)
    large = work_of(backend, torch.ones(1, 4), torch.full((1, 3), 100.0), call_id=b"2" * 16)
    outcomes = compute(Executor(), [whole(small), whole(large)])
    assert "norm" in str(error_of(outcomes, large)) and answer_of(outcomes, small).version == 1
    moved = torch.cat([(new.detach() - old).flatten() for new, old in zip(backend.parameters, before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-3)


def test_step_every_sums_batches_and_its_sum_survives_a_restart() -> None:
    backend, reference = make_backend(step_every=3), make_backend()
    executor = Executor()
    xs, gradients = torch.randn(3, 2, 4), torch.randn(3, 2, 3)
    for index in range(2):
        work = work_of(backend, xs[index], gradients[index], call_id=bytes([index]) * 16)
        assert answer_of(compute(executor, [whole(work)]), work).version == 0
    again = make_backend(step_every=3)
    again.load_state(backend.state())
    work = work_of(again, xs[2], gradients[2])
    assert answer_of(compute(executor, [whole(work)]), work).version == 1
    one = work_of(reference, xs.flatten(0, 1), gradients.flatten(0, 1))
    compute(executor, [whole(one)])
    torch.testing.assert_close(again.module.state_dict(), reference.module.state_dict(), atol=1e-6, rtol=1e-6)
    assert len(again.applied) == 3


def test_the_scheduler_steps_with_the_optimizer_and_is_saved() -> None:
    module = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    backend = ExpertBackend(module, optimizer=optimizer, scheduler=scheduler, args_schema=(TensorSpec((4,)),))
    for index in range(2):
        compute(Executor(), [whole(work_of(backend, torch.ones(1, 4), torch.ones(1, 3), call_id=bytes([index]) * 16))])
    assert optimizer.param_groups[0]["lr"] == 0.25
    state = backend.state()
    other = torch.optim.SGD(module.parameters(), lr=1.0)
    restored = ExpertBackend(
        module,
        optimizer=other,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(other, gamma=0.5),
        args_schema=(TensorSpec((4,)),),
    )
    restored.load_state(state)
    assert other.param_groups[0]["lr"] == 0.25 and restored.scheduler is not None
    assert restored.scheduler.last_epoch == 2


def test_dropout_is_the_same_in_forward_and_backward_also_in_chunks() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    backend = make_backend(module, lr=0.0)
    assert backend.is_stochastic(training=True) and not backend.is_stochastic(training=False)
    executor = Executor()
    x = torch.randn(20, 4)
    state = torch.random.get_rng_state()
    forward = work_of(backend, x, training=True, seed=7)
    backward = work_of(backend, x, torch.ones(20, 3), training=True, seed=7)
    outputs, masks = [], []
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        outputs.append(compute(executor, [RowSlice(forward, start, stop)]))
        masks.append(compute(executor, [RowSlice(backward, start, stop)]))
    y = answer_of(outputs[-1], forward).tensors[0]
    x_gradient = answer_of(masks[-1], backward).tensors[0]
    assert y is not None and x_gradient is not None
    kept = (y != 0).float() * 2
    torch.testing.assert_close(x_gradient, kept @ module[0].weight.detach())  # type: ignore[operator]
    assert 0 < int((y == 0).sum()) < 60 and not torch.equal(y[:4] == 0, y[8:12] == 0)
    assert torch.equal(torch.random.get_rng_state(), state), "the program's own random numbers are left alone"
    again = work_of(backend, x[:8], training=True, seed=8)
    other = answer_of(compute(executor, [whole(again)]), again).tensors[0]
    assert other is not None and not torch.equal(other == 0, y[:8] == 0)


def test_stale_gradients_are_refused_or_damped() -> None:
    x, gradient = torch.ones(1, 4), torch.ones(1, 3)
    refusing = make_backend(max_staleness=2)
    refusing.version = 5
    works = [work_of(refusing, x, gradient, call_id=bytes([v]) * 16, forward_version=v) for v in (2, 3, 5)]
    outcomes = compute(Executor(), [whole(work) for work in works])
    assert "3 steps ago; at most 2" in str(error_of(outcomes, works[0]))
    assert answer_of(outcomes, works[1]).version == answer_of(outcomes, works[2]).version == 6

    damping, plain = make_backend(nn.Linear(4, 3), staleness_damping=1.0), make_backend(nn.Linear(4, 3))
    plain.load_state(damping.state())
    damping.version = 3
    stale = work_of(damping, x, gradient, call_id=b"s" * 16, forward_version=0)
    fresh = work_of(damping, x, gradient, call_id=b"f" * 16, forward_version=3)
    outcomes = compute(Executor(), [whole(stale), whole(fresh)])
    (step,) = compute(Executor(), [whole(work_of(plain, x, gradient * 1.25))]).values()
    assert isinstance(step, WorkResult)
    torch.testing.assert_close(damping.module.state_dict(), plain.module.state_dict())
    ours = answer_of(outcomes, stale).tensors[0], answer_of(outcomes, fresh).tensors[0]
    torch.testing.assert_close(ours[0], ours[1], msg="the caller's gradient is not damped")


def test_absent_gradients_count_as_zeros_beside_present_ones() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(x), x * 2

    backend = make_backend(Two(), lr=0.0)
    works = [work_of(backend, torch.randn(2, 4), torch.ones(2, 3), call_id=bytes([i]) * 16) for i in range(3)]
    works[0].output_gradients = [torch.ones(2, 3), None]
    works[1].output_gradients = [None, torch.ones(2, 4)]
    works[2].output_gradients = [None, None]
    together = compute(Executor(), [whole(work) for work in works])
    for work in works:
        alone = compute(Executor(), [whole(work)])
        ours, theirs = answer_of(together, work).tensors[0], answer_of(alone, work).tensors[0]
        torch.testing.assert_close(ours, torch.zeros(2, 4) if theirs is None else theirs)


def test_batch_norm_in_a_trained_expert_is_refused_unless_allowed() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="BatchNorm"):
        make_backend(module)
    make_backend(module, allow_batch_statistics=True)
    ExpertBackend(module, args_schema=(TensorSpec((4,)),))


def test_autocast_computes_in_its_dtype_and_answers_in_the_schemas() -> None:
    module = nn.Linear(4, 3)
    backend = make_backend(module, autocast=torch.bfloat16)
    x = torch.randn(5, 4)
    (y,) = backend.forward([x])
    assert y.dtype == torch.float32
    torch.testing.assert_close(
        y, (x.bfloat16() @ module.weight.bfloat16().T + module.bias.bfloat16()).float(), atol=0.02, rtol=0.02
    )
    assert not torch.equal(y, module(x).detach())
    of_inputs, of_parameters = backend.gradients([x], [torch.ones(5, 3)])
    assert {gradient.dtype for gradient in [*of_inputs, *of_parameters] if gradient is not None} == {torch.float32}


def test_settings_that_make_no_sense_are_refused() -> None:
    for bad in ({"step_every": 0}, {"clip_gradient_norm": 0.0}, {"max_gradient_norm": -1.0}):
        with pytest.raises(ValueError, match="is"):
            BackendSettings(**bad)  # type: ignore[arg-type]


def test_a_lost_device_fails_its_batch_and_nothing_else() -> None:
    backend = make_backend()
    executor = Executor()

    def lost(*_: Any) -> Any:
        raise RuntimeError("CUDA error: the GPU has fallen off the bus")

    download = executor.staging.download
    executor.staging.download = lost  # type: ignore[method-assign]
    work = work_of(backend, torch.randn(2, 4))
    error = error_of(compute(executor, [whole(work)]), work)
    assert isinstance(error, ExpertFailed) and "fallen off the bus" in str(error)
    executor.staging.download = download  # type: ignore[method-assign]
    answer_of(compute(executor, [whole(work)]), work)
