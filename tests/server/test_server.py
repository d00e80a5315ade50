"""TesseractServer against a node of three lines: every answer, every refusal, nothing applied twice, nothing lost."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import nn

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import (
    CheckpointError,
    ExpertFailed,
    RemoteError,
    SchemaMismatch,
    UnknownMethod,
)
from tesseract_async.identity import Identity
from tesseract_async.metrics import Metrics
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.server import server as server_module
from tesseract_async.server.memory import Memory
from tesseract_async.server.server import TesseractServer
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.tensors import TensorSpec

PEER = Identity.from_seed(bytes(32)).peer_id


class FakePublisher:
    """Records what was declared, in place of the network."""

    declared: dict[str, bool] = {}

    def __init__(self, network: Any, *, addresses: Any, settings: Any, metrics: Any) -> None: ...

    async def declare(self, uids: Mapping[str, bool]) -> int:
        FakePublisher.declared = dict(uids)
        return 1

    async def withdraw(self) -> None:
        FakePublisher.declared = {}

    async def aclose(self) -> None:
        FakePublisher.declared = {}


class FakeNode:
    """What a server needs of a node; `call` is what the endpoint would do."""

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[IncomingCall], Awaitable[Message]]] = {}
        self.metrics = Metrics()
        self.network = None
        self.peer_address = SimpleNamespace(addresses=("127.0.0.1:1",), rendezvous=())

    async def wait_reachable(self) -> bool:
        return True

    def watch_address(self, watcher: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def host_expert(self, uid: str, handler: Callable[[IncomingCall], Awaitable[Message]]) -> None:
        if uid in self.handlers:
            raise ValueError(f"{uid} is hosted already")
        self.handlers[uid] = handler

    def unhost_expert(self, uid: str) -> None:
        self.handlers.pop(uid, None)

    async def call(self, uid: str, method: str, body: Any, tensors: Any = (), *, timeout: float = 10.0) -> Message:
        _, buffers = wire.pack_tensors(tensors)
        now = asyncio.get_running_loop().time()
        received = tuple(memoryview(bytearray(buffer)) for buffer in buffers)
        call = IncomingCall(
            peer_id=PEER,
            method=method,
            body=body,
            buffers=received,
            call_id=os.urandom(16),
            deadline=now + timeout,
            priority=0,
        )
        return await self.handlers[uid](call)

    async def forward(self, uid: str, *inputs: torch.Tensor | None, **changes: Any) -> tuple[list[Any], int]:
        metas, _ = wire.pack_tensors(inputs)
        request = messages.ForwardRequest(uid=uid, tensors=metas, training=False, seed=0, reply_codec="none")
        reply = await self.call(uid, messages.FORWARD, messages.encode(request) | changes, inputs)
        body = messages.decode(messages.ForwardReply, reply.body)
        return wire.unpack_tensors(body.tensors, reply.buffers), body.version

    async def backward(
        self, uid: str, inputs: list[torch.Tensor | None], gradients: list[torch.Tensor | None], **changes: Any
    ) -> tuple[list[Any], int]:
        together = [*inputs, *gradients]
        metas, _ = wire.pack_tensors(together)
        request = messages.BackwardRequest(
            uid=uid,
            call_id=os.urandom(16),
            tensors=metas,
            num_inputs=len(inputs),
            training=False,
            seed=0,
            version=0,
            reply_codec="none",
        )
        reply = await self.call(uid, messages.BACKWARD, messages.encode(request) | changes, together)
        body = messages.decode(messages.BackwardReply, reply.body)
        return wire.unpack_tensors(body.tensors, reply.buffers), body.version


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ExpertPublisher", FakePublisher)


def make_backend(seed: int = 0, *, lr: float = 0.01) -> ExpertBackend:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return ExpertBackend(
        module,
        optimizer=torch.optim.Adam(module.parameters(), lr=lr),
        args_schema=(TensorSpec((8,)),),
        max_batch_size=32,
    )


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest_asyncio.fixture
async def server(node: FakeNode) -> AsyncIterator[TesseractServer]:
    async with TesseractServer(node, {"ffn.0": make_backend(0), "ffn.1": make_backend(1)}) as server:  # type: ignore[arg-type]
        yield server


async def test_it_declares_its_experts_and_withdraws_them(node: FakeNode) -> None:
    async with TesseractServer(node, {"ffn.0": make_backend()}):  # type: ignore[arg-type]
        assert FakePublisher.declared == {"ffn.0": True} and list(node.handlers) == ["ffn.0"]
        async with TesseractServer(node, {"ffn.1": make_backend()}):  # type: ignore[arg-type]
            assert sorted(node.handlers) == ["ffn.0", "ffn.1"], "several servers share a node"
    assert not FakePublisher.declared and not node.handlers


async def test_info_tells_the_schemas(node: FakeNode, server: TesseractServer) -> None:
    reply = await node.call("ffn.0", messages.INFO, {"uid": "ffn.0"})
    info = messages.decode(messages.ExpertInfo, reply.body)
    assert wire.decode_schema(info.args_schema) == (TensorSpec((8,)),)
    assert wire.decode_schema(info.outputs_schema) == TensorSpec((4,))
    assert (info.max_batch_size, info.version) == (32, 0)


@pytest.mark.parametrize("num_rows", [1, 100])
async def test_a_remote_step_equals_a_local_one(node: FakeNode, server: TesseractServer, num_rows: int) -> None:
    module = server.experts["ffn.0"].module
    reference = copy.deepcopy(module)
    optimizer = torch.optim.Adam(reference.parameters(), lr=0.01)
    x, gradient = torch.randn(num_rows, 8), torch.randn(num_rows, 4)
    for step in range(3):
        local = x.clone().requires_grad_()
        (y,), version = await node.forward("ffn.0", x)
        expected = reference(local)
        torch.testing.assert_close(y, expected.detach(), atol=1e-6, rtol=1e-6)
        assert version == step
        (x_gradient,), version = await node.backward("ffn.0", [x], [gradient])
        optimizer.zero_grad()
        expected.backward(gradient)
        optimizer.step()
        torch.testing.assert_close(x_gradient, local.grad, atol=1e-6, rtol=1e-6)
        assert version == step + 1
        torch.testing.assert_close(module.state_dict(), reference.state_dict(), atol=1e-6, rtol=1e-6)


async def test_no_rows_are_answered_with_no_rows_and_no_step(node: FakeNode, server: TesseractServer) -> None:
    (y,), _ = await node.forward("ffn.0", torch.zeros(0, 8))
    assert y.shape == (0, 4)
    (x_gradient,), version = await node.backward("ffn.0", [torch.zeros(0, 8)], [torch.zeros(0, 4)])
    assert x_gradient.shape == (0, 8) and version == 0


@pytest.mark.parametrize(
    "inputs",
    [
        (),
        (torch.zeros(2, 7),),
        (torch.zeros(2, 8, 1),),
        (torch.zeros(()),),
        (torch.zeros(2, 8, dtype=torch.float64),),
        (torch.zeros(2, 8), torch.zeros(2, 8)),
        (None,),
    ],
    ids=["none", "width", "dims", "0-d", "dtype", "too many", "absent"],
)
async def test_inputs_that_do_not_fit_are_refused_with_both_schemas(
    node: FakeNode, server: TesseractServer, inputs: tuple[torch.Tensor | None, ...]
) -> None:
    with pytest.raises(SchemaMismatch, match=r"ffn.0 takes \(\(float32\[rows, 8\]\), \{\}\); got"):
        await node.forward("ffn.0", *inputs)


async def test_gradients_that_do_not_fit_are_refused(node: FakeNode, server: TesseractServer) -> None:
    for gradients in ([], [torch.zeros(3, 4)], [torch.zeros(2, 5)], [torch.zeros(2, 4, dtype=torch.float64)]):
        with pytest.raises(SchemaMismatch, match=r"backward of ffn.0, for 2 rows, takes float32\[rows, 4\]; got"):
            await node.backward("ffn.0", [torch.zeros(2, 8)], gradients)
    assert server.experts["ffn.0"].version == 0


async def test_malformed_calls_are_refused(node: FakeNode, server: TesseractServer) -> None:
    x = torch.zeros(2, 8)
    for changes in ({"tensors": 3}, {"tensors": [["float32", [2, 9], "none"]]}, {"training": 1}, {"seed": -1}):
        with pytest.raises(RemoteError):
            await node.forward("ffn.0", x, **changes)
    for changes in ({"num_inputs": 5}, {"num_inputs": 0}, {"call_id": b"short"}, {"version": None}):
        with pytest.raises(RemoteError):
            await node.backward("ffn.0", [x], [torch.zeros(2, 4)], **changes)
    with pytest.raises(SchemaMismatch, match="codec 'zip' is not known"):
        await node.forward("ffn.0", x, reply_codec="zip")
    with pytest.raises(UnknownMethod):
        await node.call("ffn.0", "expert.dance", {"uid": "ffn.0"})
    await node.forward("ffn.0", x)


async def test_a_repeated_backward_is_applied_once(node: FakeNode, server: TesseractServer) -> None:
    module = server.experts["ffn.0"].module
    x, gradient, call_id = torch.randn(3, 8), torch.randn(3, 4), os.urandom(16)
    first = await node.backward("ffn.0", [x], [gradient], call_id=call_id)
    weights = copy.deepcopy(module.state_dict())
    second = await node.backward("ffn.0", [x], [gradient], call_id=call_id)
    torch.testing.assert_close(second, first)
    together = await asyncio.gather(*(node.backward("ffn.0", [x], [gradient], call_id=b"t" * 16) for _ in range(5)))
    assert {version for _, version in together} == {2} and server.experts["ffn.0"].version == 2
    server._calls._answers = Memory(0, len)
    again, version = await node.backward("ffn.0", [x], [gradient], call_id=call_id)
    assert again[0].shape == (3, 8) and version == 1, "computed again, without a step"
    assert server.experts["ffn.0"].version == 2
    assert not all(torch.equal(weights[name], value) for name, value in module.state_dict().items())


async def test_a_caller_that_vanishes_and_asks_again_steps_once(node: FakeNode, server: TesseractServer) -> None:
    x, gradient = torch.randn(3, 8), torch.randn(3, 4)
    for index in range(20):
        call_id = bytes([index]) * 16
        lost = asyncio.create_task(node.backward("ffn.0", [x], [gradient], call_id=call_id))
        for _ in range(index % 4):
            await asyncio.sleep(0)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        _, version = await node.backward("ffn.0", [x], [gradient], call_id=call_id)
        assert version == index + 1
    assert server.experts["ffn.0"].version == 20


async def test_a_failed_backward_may_be_tried_again(node: FakeNode, server: TesseractServer) -> None:
    x, call_id = torch.randn(3, 8), os.urandom(16)
    with pytest.raises(ExpertFailed, match="not finite"):
        await node.backward("ffn.0", [x], [torch.full((3, 4), torch.nan)], call_id=call_id)
    _, version = await node.backward("ffn.0", [x], [torch.ones(3, 4)], call_id=call_id)
    assert version == 1


async def test_a_server_returns_with_its_weights_and_its_journal(node: FakeNode, tmp_path: Path) -> None:
    x, gradient, call_id = torch.randn(3, 8), torch.randn(3, 4), os.urandom(16)
    async with TesseractServer(node, {"ffn.0": make_backend(0)}, checkpoint_dir=tmp_path) as server:  # type: ignore[arg-type]
        await node.backward("ffn.0", [x], [gradient])
        _, version = await node.backward("ffn.0", [x], [gradient], call_id=call_id)
        expected = copy.deepcopy(server.experts["ffn.0"].module.state_dict())
    async with TesseractServer(node, {"ffn.0": make_backend(5)}, checkpoint_dir=tmp_path) as server:  # type: ignore[arg-type]
        backend = server.experts["ffn.0"]
        torch.testing.assert_close(backend.module.state_dict(), expected)
        assert backend.version == 2 and backend.optimizer is not None
        assert await node.backward("ffn.0", [x], [gradient], call_id=call_id) is not None and backend.version == version
        assert {int(entry["step"]) for entry in backend.optimizer.state.values()} == {2}
        await node.backward("ffn.0", [x], [gradient])
        assert await server.save_checkpoints() == 1 and await server.save_checkpoints() == 0


async def test_checkpoints_are_written_on_a_timer(node: FakeNode, tmp_path: Path) -> None:
    written = asyncio.Event()

    class Watched(TesseractServer):
        async def save_checkpoints(self) -> int:
            num_saved = await super().save_checkpoints()
            if num_saved and self.experts["ffn.0"].version:
                written.set()
            return num_saved

    async with Watched(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path, checkpoint_period=0.01):  # type: ignore[arg-type]
        await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
        async with asyncio.timeout(10):
            await written.wait()
        assert (tmp_path / "ffn.0" / "000000000001.safetensors").exists()


async def test_a_checkpoint_of_another_module_is_refused_and_nothing_is_left_open(
    node: FakeNode, tmp_path: Path
) -> None:
    async with TesseractServer(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path):  # type: ignore[arg-type]
        await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
    other = ExpertBackend(nn.Linear(8, 8), args_schema=(TensorSpec((8,)),))
    with pytest.raises(CheckpointError, match="ffn.0 does not fit its module"):
        async with TesseractServer(node, {"ffn.0": other}, checkpoint_dir=tmp_path):  # type: ignore[arg-type]
            pass
    assert not node.handlers
