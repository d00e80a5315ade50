"""Which optimizers and schedules an expert can have, and how they go on from a checkpoint that had others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.executor import Executor
from tesseract_async.runtime.work import WorkResult
from tesseract_async.server import checkpoint
from tesseract_async.wire.tensors import TensorSpec
from tests.runtime.test_executor import compute, whole, work_of

Optimizer = torch.optim.Optimizer
X, G = torch.ones(2, 4), [torch.ones(2, 3)]


def backend_of(
    make: Callable[[Any], Optimizer],
    schedule: Callable[[Optimizer], lr_scheduler.LRScheduler] | None = None,
    *,
    late: bool = False,
    **settings: Any,
) -> ExpertBackend:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    optimizer: Any = (lambda: make(module.parameters())) if late else make(module.parameters())
    scheduler: Any = None if schedule is None else schedule if late else schedule(optimizer)
    return ExpertBackend(
        module,
        optimizer=optimizer,
        scheduler=scheduler,
        args_schema=(TensorSpec((4,)),),
        settings=BackendSettings(**settings),
    )


def step(backend: ExpertBackend, times: int = 1) -> None:
    for _ in range(times):
        backend.step(backend.gradients([X], G)[1])


def through_a_file(backend: ExpertBackend) -> dict[str, Any]:
    return checkpoint.decode_state(b"".join(bytes(piece) for piece in checkpoint.encode_state(backend.state())))


def sgd(lr: float, **options: Any) -> Callable[[Any], Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **options)


def adam(lr: float, **options: Any) -> Callable[[Any], Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, **options)


def adamw(lr: float) -> Callable[[Any], Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def group_of(backend: ExpertBackend) -> dict[str, Any]:
    assert backend.optimizer is not None
    group: dict[str, Any] = backend.optimizer.param_groups[0]
    return group


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("before", "after"), [(sgd(0.1), adam(0.01)), (adam(0.1), sgd(0.2)), (adam(0.1), adamw(0.01))])
def test_another_class_keeps_the_weights_and_begins_anew(
    before: Any, after: Any, late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = backend_of(before), backend_of(after, late=late)
    step(first, 3)
    second.load_state(through_a_file(first))
    second.prepare()
    assert second.version == 3 and torch.equal(second.forward([X])[0], first.forward([X])[0])
    names = [type(one.optimizer).__name__ for one in (first, second)]
    assert f"its checkpoint was trained with {names[0]}; {names[1]} begins" in caplog.text
    assert group_of(second)["lr"] != 0.1, "its own rate"
    step(second)
    assert second.version == 4
    third = backend_of(after)
    third.load_state(through_a_file(second))
    torch.testing.assert_close(third.forward([X]), second.forward([X]))


@pytest.mark.parametrize("late", [False, True])
def test_of_the_same_class_the_checkpoints_options_hold_unless_own_ones_are_named(
    late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first = backend_of(sgd(0.1, momentum=0.9))
    step(first, 3)
    second = backend_of(sgd(0.01, momentum=0.5), late=late)
    for _ in range(2):
        second.load_state(through_a_file(first))
        second.prepare()
    assert (group_of(second)["lr"], group_of(second)["momentum"]) == (0.1, 0.9)
    assert caplog.text.count("lr=0.1 holds, as its checkpoint has it, not 0.01") == 1, "said, and once"
    assert "momentum=0.9 holds, as its checkpoint has it, not 0.5" in caplog.text
    third = backend_of(sgd(0.01, momentum=0.5), late=late, own_options=("lr",))
    third.load_state(through_a_file(first))
    third.prepare()
    assert (group_of(third)["lr"], group_of(third)["momentum"]) == (0.01, 0.9)
    assert "lr=0.01 holds, as it was given, not 0.1, which its checkpoint has" in caplog.text
    caplog.clear()
    fourth = backend_of(sgd(0.1, momentum=0.9), late=late)
    fourth.load_state(through_a_file(first))
    fourth.prepare()
    assert not caplog.text, "nothing differs"


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "exponential": lambda one: lr_scheduler.ExponentialLR(one, 0.5),
    "lambda": lambda one: lr_scheduler.LambdaLR(one, lambda step: 0.5**step),
    "steps": lambda one: lr_scheduler.MultiStepLR(one, [1, 2, 3, 4, 5, 6], gamma=0.5),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_also_from_another_rate(name: str, late: bool, caplog: pytest.LogCaptureFixture) -> None:
    first = backend_of(sgd(0.8), SCHEDULES[name])
    step(first, 2)
    for own, base in (((), 0.8), (("lr",), 8.0)):
        second = backend_of(sgd(8.0), SCHEDULES[name], late=late, own_options=own)
        second.load_state(through_a_file(first))
        second.prepare()
        assert group_of(second)["lr"] == pytest.approx(base / 4)
        assert f"lr={base:g} holds" in caplog.text
        step(second)
        assert group_of(second)["lr"] == pytest.approx(base / 8)


def test_another_schedule_begins_and_one_less_ends_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    first = backend_of(sgd(0.8), SCHEDULES["exponential"])
    step(first, 2)
    second = backend_of(sgd(0.8), lambda one: lr_scheduler.StepLR(one, 1, 0.1))
    second.load_state(through_a_file(first))
    assert group_of(second)["lr"] == 0.8
    assert "StepLR begins at its first step: its checkpoint had ExponentialLR" in caplog.text
    step(second)
    assert group_of(second)["lr"] == pytest.approx(0.08)
    third = backend_of(sgd(0.8))
    third.load_state(through_a_file(first))
    assert group_of(third)["lr"] == 0.2 and "ExponentialLR, ends here: the rate stays" in caplog.text
    fourth = backend_of(sgd(0.8), lambda one: lr_scheduler.ExponentialLR(one, 0.25))
    fourth.load_state(through_a_file(first))
    assert "ExponentialLR's gamma=0.5 holds, as its checkpoint has it, not 0.25" in caplog.text


def test_an_exhausted_schedule_costs_no_step(caplog: pytest.LogCaptureFixture) -> None:
    backend = backend_of(sgd(0.1), lambda one: lr_scheduler.OneCycleLR(one, max_lr=1.0, total_steps=3))
    executor = Executor()
    for index in range(6):
        (outcome,) = compute(executor, [whole(work_of(backend, X, G[0], call_id=bytes([index]) * 16))]).values()
        assert isinstance(outcome, WorkResult) and outcome.version == index + 1
    assert len(backend.applied) == 6
    assert caplog.text.count("the rate stays as it is from now on: OneCycleLR raised") == 1
    again = backend_of(sgd(0.1), lambda one: lr_scheduler.OneCycleLR(one, max_lr=1.0, total_steps=3))
    again.load_state(through_a_file(backend))
    assert again.version == 6 and group_of(again)["lr"] == group_of(backend)["lr"]


def in_groups(make: Any, *, turned: bool) -> Callable[[Any], Optimizer]:
    """An optimizer with a group for each parameter, in their order or turned round."""
    return lambda own: make([{"params": [one]} for one in (reversed(list(own)) if turned else own)], lr=0.1)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_moments_of_other_parameters_are_refused_when_they_are_loaded(make: Any, late: bool) -> None:
    first = backend_of(in_groups(make, turned=False))
    step(first)
    same = backend_of(in_groups(make, turned=False), late=late)
    same.load_state(through_a_file(first))
    turned = backend_of(in_groups(make, turned=True), late=late)
    with pytest.raises(ValueError, match="another order|has the shape"):
        turned.load_state(through_a_file(first))
    with pytest.raises(ValueError, match=r"groups of \[1, 1\] parameters, this one has \[2\]"):
        backend_of(lambda own: make(own, lr=0.1), late=late).load_state(through_a_file(first))


@pytest.mark.parametrize("name", ["exp_avg", "step"])
def test_kernels_get_no_moments_of_another_shape(name: str) -> None:
    first, second = backend_of(adam(0.1)), backend_of(adam(0.1))
    step(first)
    state = through_a_file(first)
    state["optimizer"]["state"][0][name] = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=name):
        second.load_state(state)


def test_moments_lie_in_memory_as_their_parameters_do() -> None:
    backends = []
    for _ in range(2):
        torch.manual_seed(0)
        module = nn.Linear(4, 3)
        module.weight = nn.Parameter(torch.randn(4, 3).t())
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1, fused=True)
        backends.append(ExpertBackend(module, optimizer=optimizer, args_schema=(TensorSpec((4,)),)))
    first, second = backends
    x, g = torch.randn(2, 4), [torch.randn(2, 3)]
    first.step(first.gradients([x], g)[1])
    second.load_state(through_a_file(first))
    for one in backends:
        one.step(one.gradients([X], G)[1])
    torch.testing.assert_close(second.module.state_dict(), first.module.state_dict())


OTHER = nn.Linear(4, 3)


class Sharp(torch.optim.SGD):
    """Wants its closure only when it steps."""

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise RuntimeError("Sharp requires a closure")
        return super().step(closure)


class Trusting(torch.optim.SGD):
    """Calls its closure without a look."""

    def step(self, closure: Any = None) -> Any:
        return closure()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "schedule", "sentence"),
    [
        (lambda _: torch.optim.SGD(OTHER.parameters(), lr=0.1), None, "not parameters of the expert's module"),
        (lambda own: torch.optim.SGD([*own, *OTHER.parameters()], lr=0.1), None, "2 tensor"),
        (lambda own: torch.optim.LBFGS(own), None, "LBFGS calls the module again"),
        (lambda own: Sharp(own, lr=0.1), SCHEDULES["steps"], "Sharp cannot step this module.*closure"),
        (lambda own: Trusting(own, lr=0.1), None, "Trusting cannot step this module"),
        (lambda own: torch.optim.SparseAdam(own), None, "SparseAdam cannot step this module.*dense"),
        (sgd(0.1), lambda one: lr_scheduler.ReduceLROnPlateau(one), "ReduceLROnPlateau needs a figure"),
        (sgd(0.1), lambda _: lr_scheduler.StepLR(torch.optim.SGD(OTHER.parameters()), 1), "of another optimizer"),
    ],
)
def test_what_cannot_train_the_module_by_gradients_alone_is_refused(
    optimizer: Any, schedule: Any, sentence: str, late: bool
) -> None:
    with pytest.raises(ValueError, match=sentence):
        backend_of(optimizer, schedule, late=late).prepare()


def test_parameters_that_are_frozen_or_added_later_are_seen() -> None:
    backend = backend_of(sgd(0.1), step_every=2)
    module, executor = backend.module, Executor()
    assert isinstance(module, nn.Linear) and backend.optimizer is not None
    before = module.weight.detach().clone()
    step(backend)
    module.bias.requires_grad_(False)
    step(backend)
    assert backend.version == 1 and not torch.equal(module.weight, before)
    kept = module.bias.detach().clone()
    step(backend)
    module.scale = nn.Parameter(torch.ones(3))
    module.forward = lambda x: nn.functional.linear(x, module.weight, module.bias) * module.scale  # type: ignore[method-assign]
    backend.optimizer.add_param_group({"params": [module.scale]})
    step(backend)
    assert torch.equal(module.bias, kept) and not torch.equal(module.scale, torch.ones(3))
    for one in module.parameters():
        one.requires_grad_(False)
    (outcome,) = compute(executor, [whole(work_of(backend, X, G[0]))]).values()
    assert isinstance(outcome, WorkResult), outcome


def test_a_module_that_freezes_its_own_parameters_in_a_forward_pass_goes_on() -> None:
    backend = backend_of(sgd(0.1))
    module = backend.module
    assert isinstance(module, nn.Linear)

    def thaw(x: torch.Tensor) -> torch.Tensor:
        module.weight.requires_grad_(False)
        return nn.functional.linear(x, module.weight, module.bias)

    module.forward = thaw  # type: ignore[method-assign]
    of_inputs, (of_weight, of_bias) = backend.gradients([X], G)
    assert of_inputs[0] is not None and of_weight is None and of_bias is not None


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse, self.linear = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.sparse(ids).sum(1))
        return y


def test_a_frozen_expert_has_no_norm_to_exceed() -> None:
    backend = ExpertBackend(
        nn.Linear(4, 3), args_schema=(TensorSpec((4,)),), settings=BackendSettings(max_gradient_norm=1.0)
    )
    (outcome,) = compute(Executor(), [whole(work_of(backend, X, G[0]))]).values()
    assert isinstance(outcome, WorkResult), outcome


def test_a_module_with_sparse_gradients_takes_optimizers_that_take_them() -> None:
    module = Words()
    with pytest.raises(ValueError, match="Adam cannot step this module.*sparse"):
        ExpertBackend(
            module, optimizer=torch.optim.Adam(module.parameters()), args_schema=(TensorSpec((3,), torch.int64),)
        )
    optimizer = torch.optim.SparseAdam(module.sparse.parameters())
    ExpertBackend(module, optimizer=optimizer, args_schema=(TensorSpec((3,), torch.int64),))
    assert not optimizer.state, "the try was made by a copy"
