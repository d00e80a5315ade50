"""Steps by the kernel alone are PyTorch's, also of many at once, and follow whatever changes between them."""

import inspect
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tesseract_async.runtime import stepping
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.executor import Executor
from tesseract_async.runtime.stepping import rule_of
from tesseract_async.runtime.work import WorkResult
from tesseract_async.wire.tensors import TensorSpec
from tests.runtime.test_executor import compute, whole, work_of
from tests.runtime.test_optimizers import Words, adam, backend_of, sgd, step, through_a_file
from tests.watching import calls_of


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("clips", [0.5, 1e9])
def test_limits_of_norms_take_sparse_gradients_and_none_at_all(frozen: bool, clips: float) -> None:
    torch.manual_seed(0)
    ours, theirs = Words(), Words()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (ours, theirs)]
    if frozen:
        ours.requires_grad_(False)
    backend = ExpertBackend(
        ours,
        optimizer=optimizers[0],
        args_schema=(TensorSpec((3,), torch.int64),),
        settings=BackendSettings(clip_gradient_norm=clips, max_gradient_norm=1e4, step_every=2),
    )
    ids = torch.tensor([[1, 1, 2], [3, 1, 9]])
    for index in range(4):
        (outcome,) = compute(
            Executor(), [whole(work_of(backend, ids, torch.ones(2, 2), call_id=bytes([index]) * 16))]
        ).values()
        assert isinstance(outcome, WorkResult), outcome
        backend.load_state(through_a_file(backend))
    if frozen:
        return
    for _ in range(2):
        (2 * theirs(ids).sum()).backward()
        dense = [one.grad.to_dense() for one in theirs.parameters() if one.grad is not None]
        scale = min(1.0, clips / (float(torch.nn.utils.get_total_norm(dense)) + 1e-6))
        for one in theirs.linear.parameters():
            one.grad = None if one.grad is None else one.grad * scale
        assert theirs.sparse.weight.grad is not None
        theirs.sparse.weight.grad = theirs.sparse.weight.grad * scale
        optimizers[1].step()
        optimizers[1].zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_of_parameters_run_once_for_each_step() -> None:
    backend = backend_of(sgd(1.0), step_every=2)
    assert isinstance(backend.module, nn.Linear)
    bias, seen = backend.module.bias, []
    before = bias.detach().clone()

    def limit(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        seen.append(parameter.grad.clone())
        parameter.grad.clamp_(max=0.5)

    bias.register_post_accumulate_grad_hook(limit)
    step(backend, 2)
    assert len(seen) == 1 and torch.equal(seen[0], torch.full((3,), 4.0))
    torch.testing.assert_close(bias.detach(), before - 0.5)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_adam_that_is_stepped_by_its_kernel_alone_is_pytorchs(
    kind: type[torch.optim.Adam],
) -> None:
    torch.manual_seed(0)
    mine, theirs = (nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    options = {"lr": 0.1, "betas": (0.8, 0.99), "weight_decay": 0.3, "maximize": True}
    own, other = kind(mine.parameters(), **options), kind(theirs.parameters(), **options, fused=True)
    stepping.fuse(own)
    schedules = [lr_scheduler.ExponentialLR(one, 0.5) for one in (own, other)]
    by_pytorch: list[int] = []
    for number in range(4):
        gradients = [None if number == 2 and x.dim() == 1 else torch.randn_like(x) for x in mine.parameters()]
        for x, gradient in zip(theirs.parameters(), gradients, strict=True):
            x.grad = gradient
        other.step()
        with calls_of(inspect.unwrap(kind.step)) as steps:
            stepping.take_step(own, list(mine.parameters()), gradients, None)
        by_pytorch.extend([number] if steps else [])
        for schedule in schedules:
            schedule.step()
        for x, y in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(x, y) and x.grad is None and own.state[x]["step"] == other.state[y]["step"]
    assert by_pytorch == [0], "which makes the moments"


def test_a_state_that_is_loaded_between_steps_is_what_the_kernel_goes_on_from() -> None:
    """The kernel's lists of moments and counts are kept from step to step."""

    def step_some(backend: ExpertBackend, count: int, size: float) -> None:
        for number in range(count):
            backend.step([torch.full_like(x, size + number) for x in backend.parameters])

    mine, other = (backend_of(adam(0.1)) for _ in range(2))
    step_some(mine, 3, 1.0)
    state = mine.state()
    step_some(mine, 2, 9.0)
    assert mine.optimizer is not None
    replaced = weakref.ref(next(iter(mine.optimizer.state.values()))["exp_avg"])
    for one in (mine, other):
        one.load_state(state)
        assert replaced() is None, "a follower may hold it for long, and steps no more"
        step_some(one, 3, -2.0)
    left, right = mine.state(), other.state()
    assert left["version"] == 6
    torch.testing.assert_close(left["module"], right["module"], rtol=0, atol=0)
    torch.testing.assert_close(left["optimizer"]["state"], right["optimizer"]["state"], rtol=0, atol=0)
    assert {float(memory["step"]) for memory in left["optimizer"]["state"].values()} == {6.0}
    assert {float(memory["step"]) for memory in state["optimizer"]["state"].values()} == {3.0}, "a copy"


def test_lists_in_a_state_from_elsewhere_make_no_other_rule() -> None:
    ours, theirs = (torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]) for _ in range(2))
    theirs.param_groups[0]["betas"] = [*theirs.param_groups[0]["betas"]]
    assert rule_of(ours) is not None and rule_of(theirs) == rule_of(ours)


def test_a_rule_follows_options_that_change() -> None:
    module = nn.Linear(4, 3)
    one, other = torch.optim.Adam(module.parameters()), torch.optim.Adam(module.parameters())
    before = rule_of(one)
    assert before is not None and rule_of(one) == rule_of(other) == before
    one.param_groups[0]["lr"] = 0.5
    assert rule_of(one) is not None and rule_of(one) != before
    one.load_state_dict(other.state_dict())
    assert rule_of(one) == before
    one.param_groups[0]["betas"] = [0.5, 0.9]
    changed = rule_of(one)
    one.param_groups[0]["betas"][0] = 0.9  # in place
    assert rule_of(one) not in (changed, None)
    one.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert rule_of(one) is not None and rule_of(one) != before
    one.param_groups[0]["lr"] = torch.tensor(0.001)
    assert rule_of(one) is None
    handle = other.register_step_post_hook(lambda *_: None)
    assert rule_of(other) is None
    handle.remove()
    assert rule_of(other) == before
