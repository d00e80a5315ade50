"""Finite gradients that would ruin an expert: what counts as usual, and what becomes of the rest."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tesseract_async.errors import ExpertFailed
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.executor import Executor
from tesseract_async.runtime.gradients import norm_of
from tesseract_async.runtime.norms import NUM_FIRST, UsualNorms
from tesseract_async.runtime.work import WorkResult
from tesseract_async.wire.tensors import TensorSpec
from tests.runtime.test_executor import compute, whole, work_of

MakesOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakesOptimizer] = {
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
    "adam": lambda module: torch.optim.Adam(module.parameters(), lr=0.01),
}


def test_nothing_is_usual_until_enough_was_seen_and_one_account_alone_decides_nothing() -> None:
    norms = UsualNorms()
    assert norms.usual is None
    for _ in range(NUM_FIRST - 1):
        assert not norms.observe("honest", 1.0) and norms.usual == 1.0 and not norms.is_settled
    assert norms.observe("honest", 1.0) and norms.is_settled
    for exponent in range(1000):
        assert not norms.observe("liar", 10.0 ** min(exponent, 30))
    assert norms.usual == 1.0
    for useless in (0.0, float("inf"), float("nan"), -1.0):
        norms.observe("liar", useless)
    assert all(0 < norm < float("inf") for norm in norms.values())


def test_who_is_alone_may_change() -> None:
    norms = UsualNorms([1.0] * 16)
    for _ in range(16):
        norms.observe("only", 1000.0)
    assert norms.usual == 1000.0


@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(1e-6, 1e6)), max_size=300),
    st.lists(st.floats(0.5, 2), max_size=99),
)
def test_memory_is_bounded_and_the_usual_norm_is_one_that_was_seen(
    seen: list[tuple[int, float]], before: list[float]
) -> None:
    norms = UsualNorms(before)
    for account, norm in seen:
        norms.observe(account, norm)
    assert len(norms.values()) <= 16 * 18
    assert norms.usual is None or norms.usual in before + [norm for _, norm in seen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_the_norm_is_that_of_all_elements(dtype: torch.dtype) -> None:
    xs = [torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype), torch.randn(2, 3).to(dtype).T]
    expected = torch.cat([torch.view_as_real(x).reshape(-1) if x.is_complex() else x.reshape(-1) for x in xs]).double()
    assert norm_of([xs[0], None, *xs[1:]]) == pytest.approx(float(expected.norm()), rel=1e-2 if x16(dtype) else 1e-5)
    assert norm_of([]) == norm_of([None]) == 0.0
    if not dtype.is_complex:
        indices, values = torch.tensor([[1, 1]]), torch.ones(2, 3).to(dtype)
        sparse = torch.sparse_coo_tensor(indices, values, (4, 3), check_invariants=True)
        assert norm_of([sparse]) == pytest.approx(12**0.5, rel=1e-2)


def x16(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


class Swarm:
    """One linear expert that peers train towards the same target."""

    def __init__(self, makes: MakesOptimizer, **options: object) -> None:
        torch.manual_seed(0)
        module = nn.Linear(8, 8)
        self.backend = ExpertBackend(
            module,
            optimizer=makes(module),
            args_schema=(TensorSpec((8,)),),
            settings=BackendSettings(**options),  # type: ignore[arg-type]
        )
        self.executor = Executor()
        self.x = torch.randn(64, 8)
        self.target = self.x @ torch.randn(8, 8)
        self.number = 0

    def send(self, x: torch.Tensor, gradient: torch.Tensor, peer: str) -> BaseException | None:
        self.number += 1
        call_id = self.number.to_bytes(16, "big")
        work = work_of(self.backend, x, gradient, training=True, call_id=call_id, peer=peer)
        outcome = compute(self.executor, [whole(work)])[work]
        return None if isinstance(outcome, WorkResult) else outcome

    def train(self, num_steps: int) -> float:
        for _ in range(num_steps):
            error = (y := self.backend.forward([self.x])[0]) - self.target
            refusal = self.send(self.x, 2 * error / y.numel(), "honest")
            assert refusal is None, refusal
        return float((error**2).mean())

    def attack(self, size: float) -> BaseException | None:
        return self.send(torch.ones(1, 8), torch.full((1, 8), size), "liar")


@pytest.mark.parametrize("size", [10.0, 1e2, 1e4, 1e10, 1e20, 3e38])
@pytest.mark.parametrize("makes", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_gradient_ruins_nothing(makes: MakesOptimizer, size: float) -> None:
    plain, attacked = Swarm(makes), Swarm(makes)
    plain.train(60), attacked.train(60)
    refusal = attacked.attack(size)
    assert (refusal is None) == (size < 1e19)  # whose square overflows, no optimizer may see
    if refusal is not None:
        assert isinstance(refusal, ExpertFailed) and "norm" in str(refusal) and attacked.backend.version == 60
    assert attacked.train(150) < 1.3 * plain.train(150)


@pytest.mark.parametrize("makes", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nor_do_many_of_growing_size(makes: MakesOptimizer) -> None:
    plain, attacked = Swarm(makes), Swarm(makes)
    plain.train(100), attacked.train(100)
    for exponent in range(100):
        attacked.attack(1.5**exponent)
        plain.train(2), attacked.train(2)
    assert attacked.train(300) < 1.5 * plain.train(300) + 1e-3


def test_a_first_gradient_that_was_far_too_large_is_undone() -> None:
    attacked = Swarm(OPTIMIZERS["adam"])
    attacked.attack(1e6)
    attacked.train(NUM_FIRST - 2)
    y = attacked.backend.forward([attacked.x])[0]
    refusal = attacked.send(attacked.x, 2 * (y - attacked.target) / y.numel(), "honest")
    assert refusal is not None and "went back to version 0" in str(refusal)
    assert attacked.train(200) < 1.1 * Swarm(OPTIMIZERS["adam"]).train(200)


def test_a_first_step_that_throws_the_weights_away_is_undone_at_once() -> None:
    attacked = Swarm(OPTIMIZERS["sgd"])
    refusal = attacked.attack(1e4)
    assert refusal is not None and attacked.backend.version == 0
    assert attacked.train(200) < 1.1 * Swarm(OPTIMIZERS["sgd"]).train(200)


def test_one_that_comes_second_is_no_better_off() -> None:
    plain, attacked = Swarm(OPTIMIZERS["adam"]), Swarm(OPTIMIZERS["adam"])
    plain.train(1), attacked.train(1)
    assert attacked.attack(1e6) is None
    assert attacked.train(400) < 3 * plain.train(400)


def test_a_restart_remembers_what_was_usual() -> None:
    before, after = Swarm(OPTIMIZERS["sgd"]), Swarm(OPTIMIZERS["sgd"])
    before.train(30)
    after.backend.load_state(before.backend.state())
    after.attack(1e4)
    assert after.train(100) < 1.1 * before.train(100)


def test_gradients_that_grew_count_in_full_again_soon() -> None:
    swarm = Swarm(OPTIMIZERS["sgd"])
    swarm.train(40)
    usual = swarm.backend.norms.usual
    for _ in range(16):
        assert swarm.send(torch.ones(1, 8), torch.full((1, 8), 1e4), "honest") is None, "nothing healthy is refused"
    assert usual is not None and swarm.backend.norms.usual is not None and swarm.backend.norms.usual > 1e3 * usual


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_who_sends_far_larger_ones_all_the_time_counts_no_more_than_others(size: float) -> None:
    """Near the end of training, one trainer's gradients may be thousands of times another's: neither is refused."""
    swarm = Swarm(OPTIMIZERS["sgd"])
    swarm.train(40)
    for _ in range(20):
        usual, before = swarm.backend.norms.usual, [x.detach().clone() for x in swarm.backend.module.parameters()]
        assert usual is not None and swarm.attack(size) is None
    after = swarm.backend.module.parameters()
    moved = norm_of([a - b.detach() for a, b in zip(before, after, strict=True)])
    assert usual is not None and swarm.backend.optimizer is not None
    assert 0 < moved < 1.1 * usual * swarm.backend.optimizer.param_groups[0]["lr"]
    assert not any(swarm.attack(1e-3) for _ in range(3)), "what is ordinary is taken from anybody"


def test_without_a_limit_any_finite_gradient_is_taken() -> None:
    swarm = Swarm(OPTIMIZERS["sgd"], max_gradient_norm=None)
    swarm.train(20)
    assert swarm.attack(1e10) is None and swarm.backend.version == 21


class Overflows(torch.optim.SGD):
    """Its second step leaves a memory that is not finite."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", torch.zeros(1)) + 1
                if float(state["count"]) == 2:
                    state["count"] = torch.full((1,), float("inf"))


def test_a_step_that_breaks_the_optimizers_memory_is_undone_and_its_sender_told() -> None:
    swarm = Swarm(lambda module: Overflows(module.parameters(), lr=0.1))
    swarm.train(1)
    before = swarm.backend.module.weight.clone()  # type: ignore[operator]
    refusal = swarm.attack(1.0)
    assert refusal is not None and "overflow" in str(refusal)
    assert swarm.backend.version == 0 and swarm.backend.is_sound()
    assert not torch.equal(swarm.backend.module.weight, before)  # type: ignore[arg-type]


def test_requests_computed_together_are_judged_alone() -> None:
    """Scaled down together with a huge one, the others would count for nothing in this step."""
    plain, attacked = Swarm(OPTIMIZERS["sgd"]), Swarm(OPTIMIZERS["sgd"])
    for swarm, sizes in ((plain, (1e-3, 1e-3)), (attacked, (1e-3, 1e4, 1e-3))):
        swarm.train(20)
        parts = []
        for number, size in enumerate(sizes):
            x, gradient = torch.eye(8)[:2], torch.full((2, 8), size)
            if size > 1:
                x = torch.eye(8)[2:4]
            call_id = bytes([number]) * 16
            parts.append(whole(work_of(swarm.backend, x, gradient, training=True, call_id=call_id, peer=number)))
        outcomes = compute(swarm.executor, parts)
        assert all(isinstance(one, WorkResult) for one in outcomes.values()) and swarm.backend.version == 21
    ours, theirs = (swarm.backend.module.weight for swarm in (plain, attacked))
    torch.testing.assert_close(ours[:, :2], theirs[:, :2])  # type: ignore[index]


@pytest.mark.parametrize("bad", ["always", 0, -1.0, float("nan")])
def test_a_limit_is_a_positive_number(bad: object) -> None:
    with pytest.raises(ValueError, match="max_gradient_norm"):
        BackendSettings(max_gradient_norm=bad)  # type: ignore[arg-type]
