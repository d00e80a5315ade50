"""Experts whose sizes vary from call to call, and whose arguments may be absent: over real nodes."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.client.expert_rpc import ExpertSchema
from tesseract_async.errors import ProtocolError, RemoteError, SchemaMismatch
from tesseract_async.runtime.backend import BackendSettings
from tesseract_async.wire import messages
from tesseract_async.wire.tensors import decode_schema, describe_schema, encode_schema, pack_tensors

WIDTH = 4
SCHEMA: dict[str, Any] = {
    "args_schema": (ta.TensorSpec((None, WIDTH), max_size=20),),
    "kwargs_schema": {"mask": ta.TensorSpec((None,), torch.bool, optional=True, max_size=20)},
}


class Mixer(nn.Module):
    """Looks at all places of a sequence, but for those that are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.batches: list[tuple[torch.Size, bool]] = []

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.batches.append((x.shape, mask is not None))
        y: torch.Tensor = self.linear(x)
        if mask is not None:
            y = y * mask[..., None]
        return x + y.cumsum(1)


def make_backend(seed: int = 0, **more: Any) -> ta.ExpertBackend:
    torch.manual_seed(seed)
    module = Mixer()
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    return ta.ExpertBackend(module, optimizer=optimizer, max_batch_size=64, **{**SCHEMA, **more})


@pytest.fixture
async def backends() -> dict[str, ta.ExpertBackend]:
    masked = {f"seq.{number}": make_backend(number) for number in range(3)}
    return masked | {f"one.{number}": make_backend(number, kwargs_schema={}) for number in range(2)}


@pytest.fixture
async def node(backends: dict[str, ta.ExpertBackend]) -> AsyncIterator[ta.TesseractNode]:
    async with ta.TesseractNode() as host, ta.TesseractServer(host, backends):
        async with ta.TesseractNode(initial_peers=[host.address]) as node:
            yield node


def rows(num: int, length: int) -> torch.Tensor:
    return torch.randn(num, length, WIDTH, requires_grad=True)


async def test_sequences_of_any_length_and_absent_masks(
    node: ta.TesseractNode, backends: dict[str, ta.ExpertBackend]
) -> None:
    backend, expert = backends["seq.0"], ta.RemoteExpert(node, "seq.0", options=ta.CallOptions(codec="none"))
    assert str((await expert.info()).outputs) == str(ta.TensorSpec((None, WIDTH), max_size=20))
    for length, masked in [(3, False), (3, True), (7, False), (20, True), (1, False)]:
        x = rows(5, length)
        mask = torch.rand(5, length) < 0.5 if masked else None
        y = await expert(x, mask=mask)
        local = x.detach().requires_grad_()
        expected = backend.module(local, mask=mask)
        assert torch.equal(y, expected)
        expected.square().sum().backward()
        await ta.backward(y.square().sum())
        assert x.grad is not None and local.grad is not None and torch.allclose(x.grad, local.grad, atol=1e-6)
    assert backend.version == 5
    for wrong in (torch.randn(5, 21, WIDTH), torch.randn(5, WIDTH), torch.randn(5, 0, WIDTH), torch.randn(5, 3, 5)):
        with pytest.raises(
            SchemaMismatch, match=r"takes \(\(float32\[rows, any, 4\]\), {mask: bool\[rows, any\] or None}"
        ):
            await expert(wrong, mask=None)
    with pytest.raises(SchemaMismatch):
        await expert(torch.randn(5, 3, WIDTH), mask=torch.ones(5, 4, dtype=torch.bool))
    assert (await expert(torch.randn(0, 3, WIDTH), mask=None)).shape == (0, 3, WIDTH)


async def test_only_equal_sizes_share_a_batch(node: ta.TesseractNode, backends: dict[str, ta.ExpertBackend]) -> None:
    module, expert = backends["seq.1"].module, ta.RemoteExpert(node, "seq.1")
    assert isinstance(module, Mixer)
    await expert(torch.randn(1, 3, WIDTH), mask=None)
    module.batches.clear()
    lengths = [3, 5, 3, 5, 3, 3, 5, 5] * 3
    inputs = [torch.randn(2, length, WIDTH) for length in lengths]
    masks = [torch.ones(2, length, dtype=torch.bool) if n % 3 else None for n, length in enumerate(lengths)]
    with torch.no_grad():
        answers = await asyncio.gather(*(expert(x, mask=mask) for x, mask in zip(inputs, masks, strict=True)))
        seen, module.batches = module.batches, []
        for x, mask, y in zip(inputs, masks, answers, strict=True):
            torch.testing.assert_close(y, module(x, mask=mask), rtol=0, atol=1e-6)
    assert len(seen) < len(lengths) and {shape[1] for shape, _ in seen} == {3, 5}


async def test_mixtures_of_sequences(node: ta.TesseractNode, backends: dict[str, ta.ExpertBackend]) -> None:
    torch.manual_seed(5)
    options = ta.CallOptions(codec="none")
    settings = ta.MixtureSettings(calls=options)
    gate = ta.GatingFunction(node, uid_prefix="seq", grid_size=(3,), in_features=WIDTH, k_best=2, settings=settings)
    pool = ta.ExpertPool(node, "one", num_experts=2, options=options)
    for length in (4, 9):
        x, mask = rows(6, length), torch.rand(6, length) < 0.5
        y = await gate(x, mask=mask if length == 4 else None)
        await ta.backward(y.square().sum())
        assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
        x = rows(6, length)
        y = await pool(x, torch.tensor([[0, 1]] * 6), torch.tensor([[0.25, 0.75]] * 6))
        experts = [backends[f"one.{number}"].module for number in range(2)]
        local = x.detach().requires_grad_()
        expected = 0.25 * experts[0](local) + 0.75 * experts[1](local)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
        expected.square().sum().backward()
        await ta.backward(y.square().sum())
        torch.testing.assert_close(x.grad, local.grad, rtol=0, atol=1e-4)
    assert sum(backend.version for uid, backend in backends.items() if uid[:3] == "seq") >= 2


async def test_a_strangers_sizes_cost_nothing(node: ta.TesseractNode, backends: dict[str, ta.ExpertBackend]) -> None:
    expert = ta.RemoteExpert(node, "seq.0")
    with torch.no_grad():
        for length in range(1, 21):
            await expert(torch.randn(1, length, WIDTH), mask=None)
    (peer,) = [replica.peer for replica in await expert.find()]
    host = backends["seq.0"].host
    assert isinstance(host, ta.TesseractServer)
    (runtime,) = host.runtimes
    assert runtime.rows_of(backends["seq.0"]) == (20, 0)

    async def send(shape: list[Any], given: torch.Tensor, codec: str = "none") -> None:
        metas, buffers = pack_tensors([given], codec)
        meta: Any = metas[0]
        meta[1] = shape
        body = messages.encode(messages.ForwardRequest("seq.0", [meta, None], False, 0, "none", False))
        await node.call_expert(peer, messages.FORWARD, body, buffers, timeout=10.0, idempotent=True)

    small = torch.randn(1, 2, WIDTH)
    await send([1, 2, WIDTH], small)
    for shape in ([1, 2**30, WIDTH], [1, None, WIDTH], [1, "2", WIDTH], [1], [], [1, 0, WIDTH], [1, 2.0, WIDTH]):
        for codec in ("none", "uint8_blockwise"):
            with pytest.raises(RemoteError):
                await send(shape, small, codec)


def test_schemas_travel_and_those_that_lie_are_refused() -> None:
    schema = (SCHEMA["args_schema"], SCHEMA["kwargs_schema"])
    assert decode_schema(encode_schema(schema)) == schema
    assert encode_schema(ta.TensorSpec((3,))) == ["s", "float32", [3]]  # as ever
    assert describe_schema(schema) == "((float32[rows, any, 4]), {mask: bool[rows, any] or None})"
    good: list[Any] = ["v", "float32", [None, 4], False, 20]
    for place, value in [(1, "float"), (2, None), (2, ["x"]), (2, [-1]), (3, 1), (4, 0), (4, 2**40), (4, 2.5)]:
        with pytest.raises(ProtocolError):
            decode_schema([*good[:place], value, *good[place + 1 :]])
    for length in (3, 4, 6):
        with pytest.raises(ProtocolError):
            decode_schema((good + [0])[:length])

    def info(args: Any, outputs: Any) -> messages.ExpertInfo:
        return messages.ExpertInfo(
            "x.0",
            *map(encode_schema, (args, {}, outputs)),
            4,
            0,
            BackendSettings().codecs.encode(),  # type: ignore[arg-type]
        )

    plain, absent, varying = ta.TensorSpec((3,)), ta.TensorSpec((3,), optional=True), ta.TensorSpec((None,))
    for args, outputs in [((absent,), plain), ((plain,), absent), ((plain,), varying)]:
        with pytest.raises(ProtocolError, match="optional tensor|size varies"):
            ExpertSchema.decode(info(args, outputs))


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], 1)


def test_what_an_expert_cannot_be_is_said_at_once() -> None:
    varying = ta.TensorSpec((None,))
    with pytest.raises(ValueError, match="an output's size that varies is the one that varies in the inputs"):
        ta.ExpertBackend(Doubled(), args_schema=(varying,))
    with pytest.raises(ValueError, match="is not optional"):
        ta.ExpertBackend(nn.Identity(), args_schema=(ta.TensorSpec((3,), optional=True),))
    with pytest.raises(TypeError, match="NoneType"):  # it needs what it says is optional
        ta.ExpertBackend(nn.Bilinear(2, 2, 2), args_schema=(ta.TensorSpec((2,)), ta.TensorSpec((2,), optional=True)))
    with pytest.raises(ValueError, match="same max_size"):
        ta.ExpertBackend(nn.Identity(), args_schema=(varying, ta.TensorSpec((None,), max_size=3)))
    with pytest.raises(ValueError, match="CUDA graphs"):
        ta.ExpertBackend(nn.Identity(), args_schema=(varying,), settings=BackendSettings(cuda_graphs=True))
