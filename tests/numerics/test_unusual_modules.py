"""Modules that do what PyTorch lets them do: a remote one is still the function that it is locally."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

import tesseract_async as ta
from tesseract_async import errors
from tesseract_async.runtime.backend import BackendSettings
from tesseract_async.server.server import ServerSettings


@asynccontextmanager
async def hosted(backend: ta.ExpertBackend) -> AsyncIterator[ta.RemoteExpert]:
    """The backend as another node sees it."""
    async with (
        ta.TesseractNode() as host,
        ta.TesseractServer(host, {"e.0": backend}, settings=ServerSettings(drain_timeout=0.1)),
        ta.TesseractNode(initial_peers=[host.address]) as guest,
    ):
        yield await guest.get_expert("e.0")


class Speechless(nn.Module):
    """Raises errors that can hardly be told."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = int(x.abs().sum())
        if kind:
            raise (ValueError("\\ud800 is no text"), Mute(), ValueError("x" * 1_000_000))[kind - 1]
        return x


class Mute(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


async def test_an_exception_that_cannot_be_told_is_still_an_answer() -> None:
    backend = ta.ExpertBackend(Speechless(), args_schema=(ta.TensorSpec(()),))
    async with hosted(backend) as expert:
        for kind, name in ((1, "ValueError"), (2, "Mute"), (3, "ValueError")):
            with pytest.raises(errors.ExpertFailed, match=name) as caught:
                await expert(torch.full((1,), float(kind)))
            assert len(str(caught.value)) < 800


class Pair(NamedTuple):
    left: Any
    right: Any


class Swap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, pair: Pair) -> Pair:
        return Pair(self.linear(pair.right), pair.left * 2)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
async def test_named_tuples_are_tuples_that_keep_their_names(autocast: torch.dtype | None) -> None:
    module, spec = Swap(), ta.TensorSpec((3,))
    settings = BackendSettings(autocast=autocast)
    backend = ta.ExpertBackend(module, args_schema=(Pair(spec, spec),), settings=settings)
    values = Pair(torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True))
    async with hosted(backend) as expert:
        left, right = await expert(values)
        tolerance = 1e-5 if autocast is None else 0.05
        torch.testing.assert_close(left, module(values)[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(right, 2 * values.left)
        await ta.backward(left.sum() + right.sum())
    torch.testing.assert_close(values.left.grad, torch.full((2, 3), 2.0))


class DropPath(nn.Module):
    """Leaves whole rows out, as deep residual networks do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(0.5)
        return x * kept / 0.5


class Functional(nn.Module):
    """A random function that no part of the module tells of."""

    def __init__(self, function: Callable[[torch.Tensor, bool], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.training)


def attention(x: torch.Tensor, training: bool) -> torch.Tensor:
    return functional.scaled_dot_product_attention(x, x.detach(), x.detach(), dropout_p=0.5 if training else 0.0)


def late(x: torch.Tensor, training: bool) -> torch.Tensor:
    """Draws for some rows only: the first call, and a try, see nothing of it."""
    return functional.dropout(x, 0.5, training) if bool((x > 0.9).any()) else x


def forked(x: torch.Tensor) -> torch.Tensor:
    """Puts the generators back that it has drawn from."""
    with torch.random.fork_rng(devices=[]):
        return functional.dropout(x, 0.5)


RANDOM = {
    "dropout": lambda x, training: functional.dropout(x, 0.5, training),
    "always": lambda x, training: functional.dropout(x, 0.5),
    "noise": lambda x, training: x * torch.rand_like(x) if training else x,
    "attention": attention,
    "late": late,
    "default": lambda x, training: x * torch.rand(x.shape, generator=torch.default_generator) if training else x,
    "forked": lambda x, training: forked(x) if training else x,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", [*RANDOM, "path"])
async def test_backward_repeats_what_forward_drew_by_whatever_function(what: str, training: bool) -> None:
    module = DropPath() if what == "path" else Functional(RANDOM[what])
    backend = ta.ExpertBackend(module, args_schema=(ta.TensorSpec((8, 8)),))
    async with hosted(backend) as expert:
        expert.train(training)
        await expert(torch.zeros(1, 8, 8))
        xs = [(torch.rand(6, 8, 8) + 0.5).requires_grad_() for _ in range(6)]
        # each is linear in its input (attention is not: its gradient is compared where dropout shows)
        ys = await asyncio.gather(*(expert(x) for x in xs))
        for x, y in zip(xs, ys, strict=True):
            await ta.backward(y.sum())
            assert x.grad is not None
            if what != "attention":
                torch.testing.assert_close(x.grad * x.detach(), y.detach())
        if training and what != "attention":
            assert any(bool((y == 0).any()) for y in ys) or what in ("noise", "default")
            masks = torch.stack([y / x for x, y in zip(xs, ys, strict=True)])
            assert not torch.equal(masks, masks.roll(1, 0)), "each request draws its own"
        assert backend.is_stochastic(training) or not training


class Halve(nn.Module):
    """Writes its inputs in the way that `how` says, before a linear layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.ReLU(inplace=True)
        self.embedding, self.linear = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, ids: torch.Tensor, more: dict[str, torch.Tensor]) -> torch.Tensor:
        scale: Any = more["scale"]
        if self.how == "data":
            x.data.mul_(2)
        elif self.how == "relu":
            x = self.first(x)
        elif self.how == "ids":
            ids.add_(1)
        elif self.how == "nested":
            scale.mul_(2)
        elif self.how == "view":
            x[:, 1:].zero_()
        elif self.how == "numpy":
            ids.numpy()[...] += 1
        elif self.how == "training" and self.training:
            x.data.add_(1)
        elif self.how == "late" and bool((x > 50).any()):
            x.add_((x > 50).to(x.dtype))
        elif self.how == "out":
            torch.mul(x.detach(), 2, out=x.data)
        y: torch.Tensor = self.linear(x * scale) * self.embedding(ids % 8)
        return y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["data", "relu", "ids", "nested", "view", "numpy", "training", "late", "out"])
async def test_a_module_that_writes_its_inputs_computes_what_it_computes_here(how: str, training: bool) -> None:
    torch.manual_seed(1)
    module = Halve(how).double()  # rounding must not be taken for writing: the inputs are large, and sums cancel
    backend = ta.ExpertBackend(
        copy.deepcopy(module),
        args_schema=(ta.TensorSpec((4,), torch.float64),),
        kwargs_schema={"ids": ta.TensorSpec((), torch.int64), "more": {"scale": ta.TensorSpec((4,), torch.float64)}},
    )
    module.train(training)

    def values(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        x, ids = torch.randn(2, 4) * (90 if seed == 5 else 1), torch.randint(0, 7, (2,))
        return x.double(), ids, torch.rand(2, 4).double()

    async with hosted(backend) as expert:
        expert.train(training)
        for many in (1, 4):  # alone, and merged with others
            sent = [values(seed + 5) for seed in range(many)]
            leaves = [[x.clone().requires_grad_(x.is_floating_point()) for x in one] for one in sent]
            ys = await asyncio.gather(*(expert(x, ids=ids, more={"scale": scale}) for x, ids, scale in leaves))
            await ta.backward(torch.stack([y.square().sum() for y in ys]).sum())
            for one, mine, y in zip(sent, leaves, ys, strict=True):
                here = [x.clone().requires_grad_(x.is_floating_point()) for x in one]
                x, ids, scale = (x * 1 for x in here)
                there = module(x, ids=ids, more={"scale": scale})
                torch.testing.assert_close(y, there)
                there.square().sum().backward()
                for left, right in zip(mine, here, strict=True):
                    torch.testing.assert_close(left.grad, right.grad)
                assert torch.equal(mine[0], one[0]) and torch.equal(mine[1], one[1]), "the caller's own are its own"


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square() if x.requires_grad else x.exp()


@pytest.mark.parametrize("training", [True, False])
async def test_a_module_that_looks_whether_gradients_are_wanted_does_the_same_again(training: bool) -> None:
    async with hosted(ta.ExpertBackend(Branching(), args_schema=(ta.TensorSpec((4,)),))) as expert:
        expert.train(training)
        x = torch.randn(3, 4, requires_grad=True)
        y = await expert(x)
        await ta.backward(y.sum())
        assert torch.equal(y, x.square())
        torch.testing.assert_close(x.grad, 2 * x.detach())


class Turned(nn.Module):
    """Outputs and gradients that are views of unusual kinds."""

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x[:, 0], z.conj(), z.conj().imag[:, 1], (x * 2)[:, 1:], x.new_ones(1, 3).expand(len(x), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
async def test_columns_of_one_row_and_conjugates_travel(dtype: torch.dtype) -> None:
    schema = (ta.TensorSpec((4,), dtype), ta.TensorSpec((3,), torch.complex64))
    async with hosted(ta.ExpertBackend(Turned(), args_schema=schema)) as expert:
        x = torch.randn(1, 4).to(dtype).requires_grad_()
        z = torch.randn(1, 3, dtype=torch.complex64, requires_grad=True)
        other = z[:, ::2].repeat(1, 2)[:, :3]
        for left, right in ((x, z), (x.T.contiguous().T, z.conj()), (x[:, :1].expand(1, 4), other)):
            ys, here = await expert(left, right), Turned()(left, right)
            for there, y in zip(ys, here, strict=True):
                assert torch.equal(there, y)
            loss, mine = (sum(y.abs().square().sum() for y in some) for some in (ys, here))
            x.grad = z.grad = None
            await ta.backward(loss)
            gradients = x.grad, z.grad
            x.grad = z.grad = None
            mine.backward()
            for found, expected in zip(gradients, (x.grad, z.grad), strict=True):
                torch.testing.assert_close(found, expected)


async def test_named_tuples_pass_a_gate_that_routes_by_token() -> None:
    spec = ta.TensorSpec((3,))
    experts = {f"g.{index}": ta.ExpertBackend(Weighing(), args_schema=(spec, Pair(spec, spec))) for index in range(2)}
    async with (
        ta.TesseractNode() as host,
        ta.TesseractServer(host, experts, settings=ServerSettings(drain_timeout=0.1)),
        ta.TesseractNode(initial_peers=[host.address]) as guest,
    ):
        await guest.get_expert("g.1")
        gate = ta.GatingFunction(guest, uid_prefix="g", grid_size=(2,), in_features=3, k_best=1, route="token")
        x = torch.randn(2, 5, 3)
        y = await gate(x, Pair(x * 2, x * 3))
        torch.testing.assert_close(y, x * 6)


class Weighing(nn.Module):
    def forward(self, x: torch.Tensor, pair: Pair) -> torch.Tensor:
        y: torch.Tensor = x + pair.left + pair.right
        return y
