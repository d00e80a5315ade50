"""ExpertBackend: schemas, gradients without side effects, and states that travel."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.errors import SchemaMismatch
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend, trained_norms, weights_norms
from tesseract_async.runtime.gradients import add_gradients
from tesseract_async.wire.tensors import TensorSpec


class Nested(nn.Module):
    """Positional and keyword inputs of several dtypes; nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.zeros(2))
        self.embedding = nn.Embedding(10, 3)

    def forward(self, x: torch.Tensor, *, index: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        y = self.linear(x) + self.embedding(index)
        return {"y": y, "rest": (y.sum(-1, keepdim=True), mask & (index > 3)[:, None])}


def nested() -> tuple[Nested, ExpertBackend]:
    module = Nested()
    backend = ExpertBackend(
        module,
        optimizer=torch.optim.Adam(module.parameters()),
        args_schema=(TensorSpec((4,)),),
        kwargs_schema={"index": TensorSpec((), torch.int64), "mask": TensorSpec((2,), torch.bool)},
    )
    return module, backend


def inputs(num_rows: int) -> list[torch.Tensor]:
    return [torch.randn(num_rows, 4), torch.randint(0, 10, (num_rows,)), torch.rand(num_rows, 2) > 0.5]


def test_the_outputs_schema_is_found_by_a_dry_run() -> None:
    module, backend = nested()
    assert backend.outputs_schema == {
        "y": TensorSpec((3,)),
        "rest": (TensorSpec((1,)), TensorSpec((2,), torch.bool)),
    }
    assert module.training, "the dry run leaves the mode as it was"


def test_nested_outputs_and_gradients_of_any_dtype() -> None:
    module, backend = nested()
    values = inputs(5)
    outputs = backend.forward(values)
    assert [tuple(output.shape) for output in outputs] == [(5, 3), (5, 1), (5, 2)]
    assert not any(output.requires_grad for output in outputs)
    of_inputs, of_parameters = backend.gradients(values, [torch.ones(5, 3), None, None])
    x = values[0].clone().requires_grad_()
    module(x, index=values[1], mask=values[2])["y"].sum().backward()
    torch.testing.assert_close(of_inputs[0], x.grad)
    assert of_inputs[1:] == [None, None], "integers have no gradient"
    for parameter, gradient in zip(module.parameters(), of_parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_gradients_leave_nothing_behind_and_a_step_raises_the_version() -> None:
    module, backend = nested()
    _, of_parameters = backend.gradients(inputs(5), [torch.ones(5, 3), None, None])
    assert all(parameter.grad is None for parameter in module.parameters())
    before = module.linear.weight.detach().clone()
    assert backend.step(of_parameters, [b"i" * 16]) == 1
    assert not torch.equal(before, module.linear.weight)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert backend.applied == {b"i" * 16: 1}


def test_no_gradient_at_all_is_no_error() -> None:
    _, backend = nested()
    of_inputs, of_parameters = backend.gradients(inputs(2), [None, None, None])
    assert not any(gradient is not None for gradient in [*of_inputs, *of_parameters])


def test_a_frozen_expert_passes_gradients_on_and_never_steps() -> None:
    module = nn.Linear(4, 3)
    backend = ExpertBackend(module, args_schema=(TensorSpec((4,)),))
    of_inputs, of_parameters = backend.gradients([torch.ones(2, 4)], [torch.ones(2, 3)])
    assert of_inputs[0] is not None and of_parameters == []
    assert backend.step([], [b"i" * 16]) == 0


def test_bare_ids_of_an_old_checkpoint_count_and_only_those() -> None:
    _, backend = nested()
    backend.step(backend.gradients(inputs(5), [torch.ones(5, 3), None, None])[1], [b"o" * 16])
    old = backend.state()
    del old["applied"]["num_bare"]
    _, other = nested()
    other.load_state(old)
    other.step(other.gradients(inputs(5), [torch.ones(5, 3), None, None])[1], [b"n" * 16])
    _, third = nested()
    third.load_state(other.state())
    for one in (other, third):
        assert one.led_to(b"k" * 16, b"o" * 16) == 1 and one.led_to(b"n" * 16, bytes(16)) == 2
        assert one.led_to(b"k" * 16, b"n" * 16) is None, "its id alone is nobody's"
        assert one.num_bare == 1


def test_a_state_continues_where_it_was_taken() -> None:
    module, backend = nested()
    for index in range(3):
        backend.step(backend.gradients(inputs(5), [torch.ones(5, 3), None, None])[1], [bytes([index]) * 16])
    state = backend.state()
    other_module, other = nested()
    other.load_state(state)
    assert other.version == 3 and other.applied == backend.applied
    values = inputs(4)
    for one in (backend, other):
        one.step(one.gradients(values, [torch.ones(4, 3), None, None])[1])
    torch.testing.assert_close(other_module.state_dict(), module.state_dict())
    assert state["version"] == 3, "a state is a copy"
    taught = copy.deepcopy(other.state())
    other.load_state(state)
    other.step(other.gradients(values, [torch.ones(4, 3), None, None])[1])
    torch.testing.assert_close(other.state(), taught, msg="and stays one when it was loaded")


def lazy(seed: int = 0) -> ExpertBackend:
    torch.manual_seed(seed)
    module = nn.Linear(4, 3)
    return ExpertBackend(
        module,
        optimizer=lambda: torch.optim.Adam(module.parameters(), lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5),
        args_schema=(TensorSpec((4,)),),
    )


def take_step(backend: ExpertBackend) -> int:
    _, of_parameters = backend.gradients([torch.ones(2, 4)], [torch.ones(2, 3)])
    return backend.step(of_parameters)


def test_an_optimizer_that_is_made_when_it_is_needed_equals_one_that_is_given() -> None:
    late = lazy()
    assert late.trains and late.optimizer is None and late.parameters == []
    module = copy.deepcopy(late.module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    early = ExpertBackend(module, optimizer=optimizer, scheduler=scheduler, args_schema=(TensorSpec((4,)),))
    for version in (1, 2):
        assert take_step(late) == take_step(early) == version
    torch.testing.assert_close(late.state(), early.state())
    with pytest.raises(ValueError, match="both"):
        ExpertBackend(module, optimizer=optimizer, scheduler=lambda _: scheduler, args_schema=(TensorSpec((4,)),))


def test_a_state_goes_on_in_an_expert_whose_optimizer_is_yet_to_be_made() -> None:
    fresh, trained = lazy().state(), lazy()
    assert fresh["optimizer"] is None
    take_step(trained)
    state = trained.state()
    passing = lazy(seed=1)
    passing.load_state(state)
    assert passing.optimizer is not None, "that it fits is known at once"
    torch.testing.assert_close(passing.state(), state)
    assert take_step(passing) == take_step(trained) == 2
    torch.testing.assert_close(passing.state(), trained.state())
    for backend in (passing, trained):
        backend.load_state(fresh)  # from before the first step
    assert take_step(passing) == take_step(trained) == 1
    torch.testing.assert_close(passing.state(), state)


def test_outputs_that_break_the_schema_are_an_error() -> None:
    class Liar(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if len(x) == 2 else x[:, :1]

    backend = ExpertBackend(Liar(), args_schema=(TensorSpec((3,)),))
    with pytest.raises(SchemaMismatch, match=r"float32\[rows, 3\].*float32\[5, 1\]"):
        backend.forward([torch.ones(5, 3)])


@pytest.mark.parametrize(
    "module", [nn.Flatten(start_dim=0), nn.LSTM(3, 3, batch_first=True)], ids=["joins rows", "returns a state"]
)
def test_a_module_that_does_not_keep_rows_is_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="as many rows"):
        ExpertBackend(module, args_schema=(TensorSpec((5, 3)),))


def test_an_expert_takes_at_least_one_tensor_and_one_row() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        ExpertBackend(nn.Identity(), args_schema=())
    with pytest.raises(ValueError, match="max_batch_size"):
        ExpertBackend(nn.Identity(), args_schema=(TensorSpec((1,)),), max_batch_size=0)


class Returning(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def deep(spec: Any, levels: int) -> Any:
    for _ in range(levels):
        spec = [spec]
    return spec


SPEC = TensorSpec((2,))


@pytest.mark.parametrize(
    ("function", "schema", "sentence"),
    [
        (lambda *x: x[0], (SPEC,) * 256, "at most 256 tensors together"),
        (lambda x: (x,) * 256, (SPEC,), "at most 256 tensors together"),
        (lambda *x: x[0], (SPEC,) * 300, "args_schema.*256"),
        (lambda x: deep(x, 9), (SPEC,), "module's output.*nested too deeply"),
        (lambda x: x, (deep(SPEC, 9),), "args_schema.*nested too deeply"),
        (lambda x: x[(slice(None), *[None] * 14)], (SPEC,), "up to 14 sizes"),
        (lambda x: x.to_sparse(), (SPEC,), "dense tensors; this one's are sparse or nested"),
        (lambda x: {1: x}, (SPEC,), "keys of a schema's dicts are printable strings"),
        (lambda x: x[1], ({1: SPEC},), "keys of a schema's dicts are printable strings"),
        (lambda x: {"a\ud800": x}, (SPEC,), "keys of a schema's dicts are printable strings"),
        (lambda x: x.to(torch.float8_e4m3fn), (SPEC,), "float8_e4m3fn cannot travel"),
        (lambda x: None, (SPEC,), "gave None"),
    ],
)
def test_what_callers_could_not_be_told_or_sent_is_refused_at_once(function: Any, schema: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        ExpertBackend(Returning(function), args_schema=schema)
    assert len(str(caught.value)) < 400


class Holding(nn.Module):
    def __init__(self, extra: Any = None, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(2, 2), extra
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


def inferred() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (inferred, "weight was made under torch.inference_mode"),
        (lambda: Holding(extra=object()), "_extra_state.*cannot hold a object"),
        (lambda: Holding(extra={"a": {1, 2}}), "_extra_state/a.*cannot hold a set"),
        (lambda: Holding(extra={(1, 2): 3}), "key of type tuple"),
        (lambda: Holding(scale=torch.zeros(2, dtype=torch.complex128)), "scale.*complex128"),
        (lambda: Holding(scale=torch.zeros(2).to(torch.float8_e5m2)), "scale.*float8_e5m2"),
        (lambda: Holding(scale=torch.zeros(2, 2).to_sparse()), "scale.*sparse"),
    ],
)
def test_what_no_checkpoint_could_hold_is_refused_at_once(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ExpertBackend(make(), args_schema=(SPEC,))


def test_odd_but_sound_modules_are_taken() -> None:
    held = Holding(extra={"a": [1, "b", None, {2: torch.ones(1)}]}, number=torch.zeros((), dtype=torch.int64))
    held.register_buffer("cache", torch.zeros(2, dtype=torch.complex128), persistent=False)
    ExpertBackend(held, args_schema=(SPEC,))
    ExpertBackend(Returning(lambda x: deep(x, 8)), args_schema=(SPEC,))
    with torch.inference_mode():
        backend = ExpertBackend(held, args_schema=(SPEC,))
    backend.forward([torch.ones(1, 2)])
    backend.gradients([torch.ones(1, 2)], [torch.ones(1, 2)], training=True)


def test_a_state_of_another_size_is_told_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"its weight has the shape \(3, 4\), this module's \(3, 5\)"):
        ExpertBackend(nn.Linear(5, 3), args_schema=(TensorSpec((5,)),)).load_state(lazy().state())


def test_an_expert_that_is_made_under_autocast_returns_what_its_module_returns_without() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backend = ExpertBackend(nn.Linear(4, 3), args_schema=(TensorSpec((4,)),))
    assert backend.outputs_schema == TensorSpec((3,))


def test_lazy_layers_are_made_by_the_dry_run() -> None:
    module = nn.Sequential(nn.LazyLinear(3), nn.LayerNorm(3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    backend = ExpertBackend(module, optimizer=optimizer, args_schema=(SPEC,))
    assert backend.step(backend.gradients([torch.ones(1, 2)], [torch.ones(1, 3)])[1]) == 1
    with pytest.raises(ValueError, match="has no shape yet"):
        ExpertBackend(nn.LazyLinear(3), args_schema=(SPEC,), outputs_schema=TensorSpec((3,)))
    with pytest.raises(TypeError, match=r"for a single one, \(spec,\)"):
        ExpertBackend(module, args_schema=SPEC)  # type: ignore[arg-type]


def test_dense_and_sparse_gradients_add_up_in_any_order() -> None:
    dense, sparse = torch.ones(3, 2), torch.eye(3, 2).to_sparse()
    for left, right in ((dense, sparse), (sparse, dense)):
        summed = add_gradients([left], [right])
        assert summed is not None and summed[0] is not None
        torch.testing.assert_close(summed[0].to_dense(), dense + torch.eye(3, 2))


def test_another_expert_of_its_kind_is_its_own_and_is_not_watched_again() -> None:
    num_watched = 0

    class Noting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal num_watched
            num_watched += torch._C._len_torch_dispatch_stack() > 0  # as the watch is one
            return super().forward(x)

    def make(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1)

    modules = [Noting(4, 4) for _ in range(3)]
    spec = TensorSpec((4,))
    settings = BackendSettings(step_every=2)
    first = ExpertBackend(
        modules[0], optimizer=make(modules[0]), args_schema=(spec,), outputs_schema=spec, settings=settings
    )
    second = first.another(modules[1], optimizer=lambda: make(modules[1]))
    frozen = first.another(modules[2])
    x = torch.randn(3, 4)
    for backend, module in zip((first, second, frozen), modules, strict=True):
        assert torch.equal(backend.forward([x])[0], module(x)) and backend.may_be_grouped(training=False)
    assert num_watched == 1 and (first.trains, second.trains, frozen.trains) == (True, True, False)
    for call_id in (b"a" * 16, b"b" * 16):
        _, gradients = second.gradients([x], [torch.ones(3, 4)])
        second.step(gradients, [call_id])
    assert second.progress == (1, 0) and first.progress == frozen.progress == (0, 0)
    assert len(second.applied) == 2 and not first.applied and not frozen.applied
    second.name = "second"
    assert first.name == "Noting"
    assert second.state()["module"].keys() == first.state()["module"].keys()
    with pytest.raises(ValueError, match="not parameters of the expert.s module"):
        first.another(modules[2], optimizer=make(modules[1]))


def test_norms_of_several_experts_are_those_of_each() -> None:
    pairs = [nested() for _ in range(5)]
    experts = [backend for _, backend in pairs]
    for backend in experts[1:]:
        _, of_parameters = backend.gradients(inputs(5), [torch.ones(5, 3), None, None])
        backend.step(of_parameters)
    with torch.no_grad():
        pairs[2][0].linear.weight.fill_(torch.nan)
        pairs[3][0].linear.weight.fill_(1e30)  # its square overflows
    experts[4].optimizer.state[pairs[4][0].linear.weight]["exp_avg"].fill_(torch.inf)  # type: ignore[union-attr]
    found = trained_norms(experts)
    assert [is_sound for _, is_sound in found] == [backend.is_sound() for backend in experts]
    assert [is_sound for _, is_sound in found] == [True, True, False, True, False]
    expected = [backend.weights_norm() for backend in experts]
    assert [norm for norm, _ in found] == pytest.approx(expected, nan_ok=True)
    assert weights_norms(experts) == pytest.approx(expected, nan_ok=True)
    assert trained_norms([]) == weights_norms([]) == []
