"""The parts of a reply, against sums by hand: every expert in one, few of them, and nothing that is not finite."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import ExpertFailed, Overloaded
from tesseract_async.runtime.work import WorkResult
from tesseract_async.server.parts import FIRST_PAUSE, MAX_PARTS, Parts
from tesseract_async.wire.apply import ApplyPart, ApplyRequest
from tests.wire.test_apply import requests

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)


def answer(request: ApplyRequest, expert: int, dtype: torch.dtype, *, absent: bool = False) -> WorkResult:
    """Numbers of which no two experts have the same."""
    num_rows = int(request.offsets[expert + 1] - request.offsets[expert])
    generator = torch.Generator().manual_seed(expert)
    first = torch.randn(num_rows, 2, 3, generator=generator).to(dtype)
    second = None if request.backward and absent else torch.randn(num_rows, 4, generator=generator)
    weights = [torch.randn(num_rows, generator=generator)] if request.backward else []
    return WorkResult([first, second, *weights], version=100 + expert)


def by_hand(request: ApplyRequest, part: ApplyPart, results: dict[int, WorkResult], index: int) -> torch.Tensor | None:
    rows = request.rows_of(part.experts).tolist()
    total: torch.Tensor | None = None
    for expert in part.experts.tolist():
        x = results[expert].tensors[index]
        if x is None:
            continue
        if total is None:
            total = torch.zeros(len(rows), *x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
        first = int(request.offsets[expert])
        for at, one in enumerate(x):
            pair = first + at
            weight = 1.0 if request.backward else float(request.weights[pair])
            total[rows.index(int(request.rows[pair]))] += one.to(total.dtype) * torch.tensor(weight, dtype=total.dtype)
    return total


@given(st.data())
def test_parts_are_the_sums_of_what_was_answered(data: st.DataObject) -> None:
    request = data.draw(requests())
    num_experts = len(request.ids)
    dtype = data.draw(st.sampled_from(DTYPES))
    gathered = Parts(request, now=10.0)
    order = data.draw(st.permutations(range(num_experts)))
    fails = data.draw(st.sets(st.integers(0, num_experts - 1)))
    results = {e: answer(request, e, dtype, absent=data.draw(st.booleans())) for e in range(num_experts)}
    now, taken_at, named = 10.0, 10.0, []
    num_parts = 0
    left = list(order)
    while not gathered.is_over:
        due_at = gathered.due_at()
        assert (due_at == -math.inf) == (not left)
        if left and (due_at > now or data.draw(st.booleans())):
            expert = left.pop()
            if expert in fails:
                gathered.failed(expert, Overloaded("full", retry_after=1.0))
            else:
                gathered.answered(expert, results[expert], epoch=expert)
            now += data.draw(st.sampled_from((0.0, 0.001, 0.01, 1.0)))
            continue
        assert not left or now - taken_at >= FIRST_PAUSE - 1e-9
        now = taken_at = max(now, due_at)
        part, sums = gathered.take(now)
        num_parts += 1
        named += [*part.experts.tolist(), *(expert for expert, _ in part.failures)]
        assert part.experts.tolist() == sorted(part.experts.tolist())
        assert part.versions.tolist() == [100 + expert for expert in part.experts.tolist()]
        assert part.epochs.tolist() == part.experts.tolist()
        assert {expert for expert, _ in part.failures} <= fails
        if len(part.experts):
            expected = [by_hand(request, part, results, index) for index in range(2)]
            for one, other in zip(sums, expected, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert one.dtype == other.dtype and torch.equal(one, other)  # type: ignore[union-attr]
            pieces = [results[expert].tensors[-1] for expert in part.experts.tolist()] if request.backward else []
            assert part.weight_gradients.tolist() == [value for piece in pieces for value in piece.tolist()]  # type: ignore[union-attr]
        else:
            assert not sums and not len(part.weight_gradients)
    assert sorted(named) == list(range(num_experts)) and num_parts <= MAX_PARTS
    assert gathered.num_bytes == 0


@pytest.mark.parametrize("backward", [False, True])
def test_large_answers_are_added_one_by_one(backward: bool) -> None:
    request = sample(3, backward=backward)
    gathered = Parts(request, now=0.0)
    results = {
        e: WorkResult([torch.randn(1, 60_000) for _ in range(1 + backward)], version=e) for e in range(len(request.ids))
    }
    for e, result in results.items():
        gathered.answered(e, result, epoch=e)
    part, sums = gathered.take(gathered.due_at())
    assert part.experts.tolist() == [0, 1, 2]
    assert len(sums) and torch.equal(sums[0], by_hand(request, part, results, 0))  # type: ignore[arg-type]


def sample(num_experts: int, *, backward: bool = False) -> ApplyRequest:
    """Every expert sees the one row there is."""
    meta = ["float32", [1, 2], "none"]
    return ApplyRequest(
        "ffn",
        np.arange(num_experts, dtype=np.uint32)[:, None],
        [bytes(16)] * num_experts,
        np.zeros(num_experts, dtype=np.int64),
        np.arange(num_experts + 1),
        np.zeros(num_experts, dtype=np.int32),
        np.ones(num_experts, dtype=np.float32),
        [meta] * (1 + backward),
        1,
        backward,
        training=False,
        keep=False,
        seed=0,
        reply_codec="none",
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_is_a_failure_and_in_no_sum(backward: bool, bad: float) -> None:
    gathered = Parts(sample(3, backward=backward), now=0.0)
    for expert, value in enumerate((1.0, bad, 2.0)):
        gradients = [torch.ones(1)] if backward else []
        gathered.answered(expert, WorkResult([torch.full((1, 2), value), *gradients], 0), 0)
    part, (total,) = gathered.take(0.0)
    assert part.experts.tolist() == [0, 2] and total is not None and total.tolist() == [[3.0, 3.0]]
    ((expert, error),) = part.failures
    assert expert == 1 and isinstance(error, ExpertFailed) and gathered.is_over


def test_a_weight_of_zero_hides_nothing_and_neither_does_a_gradient_of_a_weight() -> None:
    forward = sample(1)._replace(weights=np.zeros(1, dtype=np.float32))
    gathered = Parts(forward, now=0.0)
    gathered.answered(0, WorkResult([torch.tensor([[math.inf, 1.0]])], 0), 0)
    part, sums = gathered.take(0.0)
    assert len(part.failures) == 1 and not sums
    gathered = Parts(sample(1, backward=True), now=0.0)
    gathered.answered(0, WorkResult([torch.ones(1, 2), torch.tensor([math.nan])], 0), 0)
    part, sums = gathered.take(0.0)
    assert len(part.failures) == 1 and not sums and not len(part.weight_gradients)


def test_finite_answers_may_overflow_together() -> None:
    gathered = Parts(sample(2), now=0.0)
    for expert in range(2):
        gathered.answered(expert, WorkResult([torch.full((1, 2), 3e38)], 0), 0)
    part, (total,) = gathered.take(0.0)
    assert part.experts.tolist() == [0, 1] and total is not None and total.isinf().all()


def test_what_is_ready_waits_little_and_a_slow_expert_holds_up_nothing_else() -> None:
    gathered, now, sent = Parts(sample(301), now=0.0), 0.0, []
    result = WorkResult([torch.zeros(1, 2)], 0)
    for expert in range(299):  # one each 15 ms, for 4.5 seconds
        now += 0.015
        gathered.answered(expert, result, 0)
        if gathered.due_at() <= now:
            sent.append((now, gathered.take(now)[0]))
    assert len(sent) == MAX_PARTS - 2 and gathered.due_at() < 6.0
    part, _ = gathered.take(gathered.due_at())
    assert sum(len(one.experts) for _, one in sent) + len(part.experts) == 299
    gathered.answered(299, result, 0)
    assert gathered.due_at() == math.inf, "the last part is all that is left"
    gathered.failed(300, Overloaded("full"))
    assert gathered.due_at() == -math.inf and not gathered.is_over
    gathered.take(60.0)
    assert gathered.is_over
