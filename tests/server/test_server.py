"""TesseractServer against a node of three lines: every answer, every refusal, nothing applied twice, nothing lost."""

import asyncio
import contextlib
import copy
import os
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from torch import nn

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import (
    CheckpointError,
    ExpertFailed,
    InputsForgotten,
    NotPrimary,
    Overloaded,
    RemoteError,
    SchemaMismatch,
    UnknownMethod,
)
from tesseract_async.identity import PeerID
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.server import checkpoint
from tesseract_async.server.hosted import HostedState, Succession
from tesseract_async.server.memory import EXPECT_SECONDS, GONE_AFTER, KEEP_SECONDS, CallerMemory, alone
from tesseract_async.server.server import FAREWELL_TIMEOUT, ServerSettings, TesseractServer
from tesseract_async.server.state_files import CheckpointStore
from tesseract_async.wire import frames, messages
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.codecs import CodecPolicy
from tesseract_async.wire.tensors import TensorSpec
from tests.disks import full_disk, read_only_disk, slow_disk
from tests.faults.serving import let_pass
from tests.server.serving_node import PEER, ServingNode


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
def node() -> ServingNode:
    return ServingNode()


@pytest_asyncio.fixture
async def server(node: ServingNode) -> AsyncIterator[TesseractServer]:
    experts = {"ffn.0": make_backend(0), "ffn.1": make_backend(1)}
    async with TesseractServer(node, experts, settings=ServerSettings(drain_timeout=0.0)) as server:  # type: ignore[arg-type]
        yield server


async def test_it_declares_its_experts_and_withdraws_them(node: ServingNode) -> None:
    async with TesseractServer(node, {"ffn.0": make_backend()}):  # type: ignore[arg-type]
        assert node.declared == {"ffn.0": True} and list(node.table.uids) == ["ffn.0"]
        async with TesseractServer(node, {"ffn.1": make_backend()}):  # type: ignore[arg-type]
            assert sorted(node.table.uids) == ["ffn.0", "ffn.1"], "several servers share a node"
    assert not node.declared and not node.table.uids


async def test_info_tells_the_schemas(node: ServingNode, server: TesseractServer) -> None:
    reply = await node.call("ffn.0", messages.INFO, ["ffn.0"])
    info = messages.decode(messages.ExpertInfo, reply.body)
    assert wire.decode_schema(info.args_schema) == (TensorSpec((8,)),)
    assert wire.decode_schema(info.outputs_schema) == TensorSpec((4,))
    assert (info.max_batch_size, info.version) == (32, 0)


@pytest.mark.parametrize("num_rows", [1, 100])
async def test_a_remote_step_equals_a_local_one(node: ServingNode, server: TesseractServer, num_rows: int) -> None:
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


async def test_no_rows_are_answered_with_no_rows_and_no_step(node: ServingNode, server: TesseractServer) -> None:
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
    node: ServingNode, server: TesseractServer, inputs: tuple[torch.Tensor | None, ...]
) -> None:
    with pytest.raises(SchemaMismatch, match=r"ffn.0 takes \(\(float32\[rows, 8\]\), \{\}\); got"):
        await node.forward("ffn.0", *inputs)


async def test_inputs_of_different_numbers_of_rows_are_refused(node: ServingNode) -> None:
    backend = ExpertBackend(nn.Bilinear(8, 3, 4), args_schema=(TensorSpec((8,)), TensorSpec((3,))))
    async with TesseractServer(node, {"two.0": backend}):  # type: ignore[arg-type]
        assert (await node.forward("two.0", torch.zeros(2, 8), torch.zeros(2, 3)))[0][0].shape == (2, 4)
        with pytest.raises(SchemaMismatch, match="two.0 takes .* got"):
            await node.forward("two.0", torch.zeros(2, 8), torch.zeros(1, 3))


async def test_gradients_that_do_not_fit_are_refused(node: ServingNode, server: TesseractServer) -> None:
    for gradients in ([], [torch.zeros(3, 4)], [torch.zeros(2, 5)], [torch.zeros(2, 4, dtype=torch.float64)]):
        with pytest.raises(SchemaMismatch, match=r"backward of ffn.0, for 2 rows, takes float32\[rows, 4\]; got"):
            await node.backward("ffn.0", [torch.zeros(2, 8)], gradients)
    assert server.experts["ffn.0"].version == 0


@pytest.mark.parametrize("dtype, width, codec", [("float64", 8, "uint8"), ("float32", 9, "bf16"), ("float32", 8, "x")])
async def test_what_does_not_fit_is_not_unpacked_where_that_takes_more_memory(
    node: ServingNode, server: TesseractServer, dtype: str, width: int, codec: str
) -> None:
    meta = [dtype, [1000, width], codec]
    metas = [["float32", [1000, 8], codec], meta] if (dtype, width) == ("float32", 8) else [meta]
    with pytest.raises(SchemaMismatch, match="ffn.0 takes .*; got"):
        await node.forward("ffn.0", torch.zeros(1, 8), tensors=metas)
    deep: Any = []
    for _ in range(990):
        deep = [deep]
    with pytest.raises(SchemaMismatch, match="ffn.0 takes .*; got"):
        await node.forward("ffn.0", torch.zeros(1, 8), tensors=[[deep, 1, codec]])
    for num_inputs in (0, 1):
        with pytest.raises(SchemaMismatch, match="backward of ffn.0 takes .*; got"):
            metas = [["float32", [1000, 8], codec]] * num_inputs + [["float32", [1000, 4], codec], meta]
            await node.backward("ffn.0", [torch.zeros(1, 8)], [], num_inputs=num_inputs, tensors=metas)


async def test_malformed_calls_are_refused(node: ServingNode, server: TesseractServer) -> None:
    x = torch.zeros(2, 8)
    for changes in ({"tensors": 3}, {"tensors": [["float32", [2, 9], "none"]]}, {"training": 1}, {"seed": -1}):
        with pytest.raises(RemoteError):
            await node.forward("ffn.0", x, **changes)
    for changes in ({"num_inputs": 5}, {"num_inputs": 0}, {"call_id": b"short"}, {"version": None}):
        with pytest.raises(RemoteError):
            await node.backward("ffn.0", [x], [torch.zeros(2, 4)], **changes)
    with pytest.raises(SchemaMismatch, match="codec 'zip' is not known here; accepted: none"):
        await node.forward("ffn.0", x, reply_codec="zip")
    with pytest.raises(UnknownMethod):
        await node.call("ffn.0", "expert.dance", ["ffn.0"])
    await node.forward("ffn.0", x)


async def test_a_repeated_backward_is_applied_once(node: ServingNode, server: TesseractServer) -> None:
    module = server.experts["ffn.0"].module
    x, gradient, call_id = torch.randn(3, 8), torch.randn(3, 4), os.urandom(16)
    first = await node.backward("ffn.0", [x], [gradient], call_id=call_id)
    weights = copy.deepcopy(module.state_dict())
    second = await node.backward("ffn.0", [x], [gradient], call_id=call_id)
    torch.testing.assert_close(second, first)
    together = await asyncio.gather(*(node.backward("ffn.0", [x], [gradient], call_id=b"t" * 16) for _ in range(5)))
    assert {version for _, version in together} == {2} and server.experts["ffn.0"].version == 2
    server.free_memory()
    again, version = await node.backward("ffn.0", [x], [gradient], call_id=call_id)
    assert again[0].shape == (3, 8) and version == 1, "computed again, without a step"
    assert server.experts["ffn.0"].version == 2
    assert not all(torch.equal(weights[name], value) for name, value in module.state_dict().items())


async def test_small_tensors_are_not_remembered_without_end(node: ServingNode) -> None:
    settings = ServerSettings(max_answers_bytes=20_000, max_inputs_bytes=20_000, drain_timeout=0.0)
    async with TesseractServer(node, {"ffn.0": make_backend()}, settings=settings) as server:  # type: ignore[arg-type]
        for _ in range(100):
            await node.forward("ffn.0", torch.zeros(0, 8), keep_inputs=True)
            await node.backward("ffn.0", [torch.zeros(1, 8)], [torch.zeros(1, 4)], call_id=os.urandom(16))
        assert 20_000 < server.free_memory() <= 40_000, "of both kinds, by what they take with their objects"


async def test_what_is_kept_holds_no_more_than_it_counts() -> None:
    arena, memory = frames.Arena(), CallerMemory(max_inputs_bytes=1 << 28, max_answers_bytes=1 << 26)
    tracemalloc.start()
    try:
        for _ in range(300):  # small inputs whose block is filled with what is of no use any more
            (part,) = arena.allocate((64,), 64)
            [arena.allocate((8000,), 8000) for _ in range(7)]
            part[:] = bytes(64)
            inputs = torch.from_numpy(np.frombuffer(part, np.float32).reshape(2, 8))
            assert memory.keep_inputs(os.urandom(16), [inputs], PEER)
        del part, inputs
        arena.release()
        assert tracemalloc.get_traced_memory()[0] < 2**20
    finally:
        tracemalloc.stop()
        memory.close()
    batch = torch.zeros(4096, 64)
    (mine,) = alone([batch[:1]])
    assert mine.untyped_storage().nbytes() == 256
    large = torch.zeros(4096, 64)
    assert alone([large])[0] is large, "what stands alone already is not copied"


async def test_what_is_kept_ends(node: ServingNode) -> None:
    settings = ServerSettings(drain_timeout=0.0)
    async with TesseractServer(node, {"ffn.0": make_backend()}, settings=settings) as server:  # type: ignore[arg-type]
        x = torch.zeros(1, 8)
        await node.forward("ffn.0", x, keep_inputs=True)
        await node.backward("ffn.0", [x], [torch.zeros(1, 4)], call_id=os.urandom(16))
        let_pass(KEEP_SECONDS + 1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert server.free_memory() == 0, "both have ended by themselves"


async def test_a_caller_that_vanishes_and_asks_again_steps_once(node: ServingNode, server: TesseractServer) -> None:
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


async def test_one_of_two_callers_of_a_backward_may_leave(node: ServingNode, server: TesseractServer) -> None:
    x, gradient, call_id = torch.randn(3, 8), torch.randn(3, 4), os.urandom(16)
    released = threading.Event()
    holding = asyncio.create_task(server.runtimes[0].call(lambda: released.wait(60)))
    await asyncio.sleep(0)
    calls = [asyncio.create_task(node.backward("ffn.0", [x], [gradient], call_id=call_id)) for _ in range(2)]
    await asyncio.sleep(0)
    calls[0].cancel()
    await asyncio.gather(calls[0], return_exceptions=True)
    released.set()
    await holding
    _, version = await calls[1]
    assert version == 1


async def test_a_failed_backward_may_be_tried_again(node: ServingNode, server: TesseractServer) -> None:
    x, call_id = torch.randn(3, 8), os.urandom(16)
    with pytest.raises(ExpertFailed, match="not finite"):
        await node.backward("ffn.0", [x], [torch.full((3, 4), torch.nan)], call_id=call_id)
    _, version = await node.backward("ffn.0", [x], [torch.ones(3, 4)], call_id=call_id)
    assert version == 1


async def test_a_server_returns_with_its_weights_and_its_journal(node: ServingNode, tmp_path: Path) -> None:
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


async def test_backwards_gathered_for_a_step_are_saved_although_no_step_was_taken(
    node: ServingNode, tmp_path: Path
) -> None:
    x, gradient, call_id = torch.randn(3, 8), torch.randn(3, 4), os.urandom(16)

    def experts() -> dict[str, ExpertBackend]:
        module = nn.Linear(8, 4)
        settings = BackendSettings(step_every=2)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return {"ffn.0": ExpertBackend(module, optimizer=optimizer, args_schema=(TensorSpec((8,)),), settings=settings)}

    async with TesseractServer(node, experts(), checkpoint_dir=tmp_path) as server:  # type: ignore[arg-type]
        assert (await node.backward("ffn.0", [x], [gradient], call_id=call_id))[1] == 0
        weight = server.experts["ffn.0"].module.weight.detach().clone()  # type: ignore[operator, union-attr]
    async with TesseractServer(node, experts(), checkpoint_dir=tmp_path) as server:  # type: ignore[arg-type]
        assert (await node.backward("ffn.0", [x], [gradient]))[1] == 1
        stepped = server.experts["ffn.0"].module.weight.detach()  # type: ignore[operator, union-attr]
        torch.testing.assert_close(stepped, weight - 0.1 * 2 * gradient.T @ x)
        assert (await node.backward("ffn.0", [x], [gradient], call_id=call_id))[1] == 0, "it was applied before"
        assert server.experts["ffn.0"].progress == (1, 0)


async def test_checkpoints_are_written_on_a_timer(node: ServingNode, tmp_path: Path) -> None:
    written = asyncio.Event()

    class Watched(TesseractServer):
        async def save_checkpoints(self) -> int:
            num_saved = await super().save_checkpoints()
            if num_saved and self.experts["ffn.0"].version:
                written.set()
            return num_saved

    async with Watched(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path, checkpoint_period=0.01):  # type: ignore[arg-type]
        await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
        async with asyncio.timeout(30):
            await written.wait()
        assert (tmp_path / "ffn.0" / "000000000001.safetensors").exists()


async def test_a_checkpoint_of_another_module_is_refused_and_nothing_is_left_open(
    node: ServingNode, tmp_path: Path
) -> None:
    async with TesseractServer(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path):  # type: ignore[arg-type]
        await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
    other = ExpertBackend(nn.Linear(8, 8), args_schema=(TensorSpec((8,)),))
    with pytest.raises(CheckpointError, match="checkpoint of ffn.0 does not fit it"):
        async with TesseractServer(node, {"ffn.0": other}, checkpoint_dir=tmp_path):  # type: ignore[arg-type]
            pass
    assert not node.table.uids


async def test_the_first_checkpoint_is_written_before_anything_is_answered(node: ServingNode, tmp_path: Path) -> None:
    async with TesseractServer(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path):  # type: ignore[arg-type]
        assert (tmp_path / "ffn.0" / "000000000000.safetensors").exists()


@pytest.mark.parametrize(
    ("spoil", "sentence"), [(full_disk, "No space left"), (read_only_disk, "Read-only")], ids=["full", "read-only"]
)
async def test_a_disk_that_takes_nothing_stops_nothing(
    node: ServingNode,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[], contextlib.AbstractContextManager[None]],
    sentence: str,
) -> None:
    tried, resting = asyncio.Event(), asyncio.Event()

    class Watched(TesseractServer):
        async def save_checkpoints(self) -> int:
            resting.clear()
            try:
                return await super().save_checkpoints()
            except CheckpointError:
                tried.set()
                raise
            finally:
                resting.set()

    async with Watched(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path, checkpoint_period=0.01) as server:  # type: ignore[arg-type]
        with spoil():
            await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
            async with asyncio.timeout(30):
                await tried.wait()
            await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
            assert sentence in caplog.text
            await resting.wait()  # while it tries, an unfinished file may lie there
            assert [file.name for file in (tmp_path / "ffn.0").iterdir()] == ["000000000000.safetensors"]
        assert server.experts["ffn.0"].version == 2
    assert (tmp_path / "ffn.0" / "000000000002.safetensors").exists(), "it could be written again when it left"


async def test_a_slow_disk_holds_up_no_call(node: ServingNode, tmp_path: Path) -> None:
    async with TesseractServer(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path) as server:  # type: ignore[arg-type]
        await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
        with slow_disk() as disk:
            saving = asyncio.create_task(server.save_checkpoints())
            await asyncio.to_thread(disk.writing.wait, 60)
            for _ in range(3):
                await node.forward("ffn.0", torch.randn(3, 8))
                await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
            assert not saving.done()
            disk.release.set()
            assert await saving == 1
            saved = CheckpointStore(tmp_path).load("ffn.0")
            assert saved is not None and saved["version"] == 1, "as it was when saving began"


async def test_a_directory_that_cannot_be_written_is_an_error_at_start(node: ServingNode, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file cannot be written"):
        async with TesseractServer(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path / "file"):  # type: ignore[arg-type]
            pass
    assert not node.table.uids


async def test_what_could_not_be_saved_is_an_error_when_it_leaves(node: ServingNode, tmp_path: Path) -> None:
    server = TesseractServer(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path)  # type: ignore[arg-type]
    await server.start()
    await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
    with full_disk(), pytest.raises(CheckpointError, match="the last steps are not saved: .*No space left"):
        await server.aclose()
    assert not node.table.uids
    async with TesseractServer(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path) as other:  # type: ignore[arg-type]
        assert other.experts["ffn.0"].version == 0, "all was closed, the folder's lock too"


async def test_one_folder_is_one_servers(node: ServingNode, tmp_path: Path) -> None:
    async with TesseractServer(node, {"ffn.0": make_backend()}, checkpoint_dir=tmp_path):  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="is used by another server of this process"):
            async with TesseractServer(node, {"ffn.1": make_backend()}, checkpoint_dir=f"{tmp_path}/."):  # type: ignore[arg-type]
                pass
    async with TesseractServer(node, {"ffn.1": make_backend()}, checkpoint_dir=tmp_path):  # type: ignore[arg-type]
        assert list(node.table.uids) == ["ffn.1"], "what was refused left nothing behind"


async def test_a_server_is_started_once_and_on_a_running_node(
    node: ServingNode, server: TesseractServer, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="started before; make a new one"):
        await server.start()
    other = TesseractServer(node, {"ffn.5": make_backend()})  # type: ignore[arg-type]
    await other.start()
    node.is_closed = True
    await other.aclose()
    assert "the node was closed before its server" in caplog.text
    with pytest.raises(RuntimeError, match="this node is closed"):
        await TesseractServer(node, {"ffn.6": make_backend()}).start()  # type: ignore[arg-type]
    node.is_closed = False
    with pytest.raises(TypeError, match="needs a TesseractNode, not a object; with a BackgroundNode"):
        TesseractServer(object(), {})  # type: ignore[arg-type]
    for experts, period, error in (
        ([make_backend()], 60.0, "experts maps uids to ExpertBackends"),
        ({5: make_backend()}, 60.0, "experts maps uids to ExpertBackends"),
        ({"ffn.7": make_backend()}, float("nan"), "checkpoint_period is a number of seconds above 0, not nan"),
        ({"ffn.7": make_backend()}, -1.0, "above 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            TesseractServer(node, experts, checkpoint_period=period)  # type: ignore[arg-type]


async def test_any_uid_has_a_folder(node: ServingNode, tmp_path: Path) -> None:
    uid = "größe/a+b.0"
    async with TesseractServer(node, {uid: make_backend()}, checkpoint_dir=tmp_path):  # type: ignore[arg-type]
        await node.backward(uid, [torch.randn(3, 8)], [torch.randn(3, 4)])
    async with TesseractServer(node, {uid: make_backend()}, checkpoint_dir=tmp_path) as server:  # type: ignore[arg-type]
        assert server.experts[uid].version == 1
    assert sorted(os.listdir(tmp_path)) == [".lock", "gr%C3%B6%C3%9Fe%2Fa%2Bb.0"]


async def test_a_uid_that_is_hosted_already_is_an_error_at_start(node: ServingNode, server: TesseractServer) -> None:
    with pytest.raises(ValueError, match="hosts ffn.0 already"):
        async with TesseractServer(node, {"ffn.7": make_backend(), "ffn.0": make_backend()}):  # type: ignore[arg-type]
            pass
    assert sorted(node.table.uids) == ["ffn.0", "ffn.1"]


async def test_kept_inputs_need_not_be_sent_again(node: ServingNode, server: TesseractServer) -> None:
    x, gradient = torch.randn(3, 8), torch.randn(3, 4)
    metas, _ = wire.pack_tensors([x])
    request = messages.ForwardRequest(
        uid="ffn.0", tensors=metas, training=False, seed=0, reply_codec="none", keep_inputs=True
    )
    names = []
    for _ in range(2):
        reply = await node.call("ffn.0", messages.FORWARD, messages.encode(request), [x])
        name = messages.decode(messages.ForwardReply, reply.body).inputs_cached
        assert name is not None
        names.append(name)
    expected, _ = await node.backward("ffn.0", [x], [gradient], call_id=b"1" * 16)
    server.experts["ffn.0"].load_state(make_backend(0).state())
    found, _ = await node.backward("ffn.0", [], [gradient], inputs_cached=names[0])
    torch.testing.assert_close(found, expected)
    with pytest.raises(InputsForgotten):
        await node.backward("ffn.0", [], [gradient], inputs_cached=names[0])
    with pytest.raises(SchemaMismatch):
        await node.backward("ffn.0", [], [torch.randn(2, 4)], inputs_cached=names[1])
    reply = await node.call("ffn.0", messages.FORWARD, messages.encode(request._replace(keep_inputs=False)), [x])
    assert messages.decode(messages.ForwardReply, reply.body).inputs_cached is None


async def test_memory_that_is_needed_is_given_up_and_callers_send_again(
    node: ServingNode, server: TesseractServer
) -> None:
    x, gradient = torch.randn(3, 8), torch.randn(3, 4)
    name = await keep_inputs(node)
    first = await node.backward("ffn.1", [x], [gradient], call_id=b"1" * 16)
    assert server.free_memory() >= x.nbytes + first[0][0].nbytes and server.free_memory() == 0
    with pytest.raises(InputsForgotten):
        await node.backward("ffn.0", [], [gradient], inputs_cached=name)
    await node.backward("ffn.0", [x], [gradient])
    _, version = await node.backward("ffn.1", [x], [gradient], call_id=b"1" * 16)
    assert version == server.experts["ffn.1"].version == 1, "computed again, not applied again"


async def keep_inputs(node: ServingNode, uid: str = "ffn.0") -> bytes:
    """A forward that a backward will follow."""
    x = torch.randn(3, 8)
    metas, _ = wire.pack_tensors([x])
    request = messages.ForwardRequest(
        uid=uid, tensors=metas, training=True, seed=0, reply_codec="none", keep_inputs=True
    )
    reply = await node.call(uid, messages.FORWARD, messages.encode(request), [x])
    name = messages.decode(messages.ForwardReply, reply.body).inputs_cached
    assert name is not None
    return name


async def test_draining_refuses_forwards_and_waits_for_backwards(node: ServingNode, server: TesseractServer) -> None:
    name = await keep_inputs(node)
    draining = asyncio.create_task(server.drain(timeout=10))
    await node.network.swarm.until(lambda: not node.declared)
    with pytest.raises(Overloaded, match="leaving"):
        await node.forward("ffn.0", torch.randn(3, 8))
    assert not draining.done()
    await node.backward("ffn.0", [], [torch.randn(3, 4)], inputs_cached=name)
    assert await draining
    assert server.experts["ffn.0"].version == 1


async def test_draining_does_not_wait_for_what_never_comes(node: ServingNode) -> None:
    settings = ServerSettings(drain_timeout=1000.0)
    async with TesseractServer(node, {"ffn.0": make_backend()}, settings=settings) as server:  # type: ignore[arg-type]
        await keep_inputs(node)
        draining = asyncio.create_task(server.drain(timeout=1000.0))
        await asyncio.sleep(0)
        assert not draining.done()
        let_pass(EXPECT_SECONDS)
        assert await draining, "its backward is no longer expected"
    async with TesseractServer(node, {"ffn.0": make_backend()}) as server:  # type: ignore[arg-type]
        await keep_inputs(node)
        assert not await server.drain(timeout=0.05)
        await server.aclose(drain_timeout=0.0)


async def test_a_network_that_does_not_answer_keeps_nobody_from_leaving(node: ServingNode) -> None:
    settings = ServerSettings(drain_timeout=30.0)
    async with TesseractServer(node, {"ffn.0": make_backend()}, settings=settings) as server:  # type: ignore[arg-type]
        name = await keep_inputs(node)
        node.network.silent = True
        leaving = asyncio.create_task(server.aclose())
        await asyncio.sleep(0)
        await node.backward("ffn.0", [], [torch.randn(3, 4)], inputs_cached=name)
        assert not leaving.done()
        num_unanswered = node.network.num_unanswered
        let_pass(settings.drain_timeout)
        await node.network.swarm.until(lambda: node.network.num_unanswered > num_unanswered)  # once more, for good
        let_pass(FAREWELL_TIMEOUT)
        await leaving
        assert server.experts["ffn.0"].version == 1, "backwards are applied meanwhile"


async def test_draining_does_not_wait_long_for_a_trainer_that_vanished(node: ServingNode) -> None:
    async with TesseractServer(node, {"ffn.0": make_backend()}) as server:  # type: ignore[arg-type]
        await keep_inputs(node)
        draining = asyncio.create_task(server.drain(timeout=30))
        await asyncio.sleep(0)
        assert not draining.done()
        node.connected = False
        await node.asked_for_connection.wait()
        let_pass(GONE_AFTER)
        assert await draining


async def test_pausing_keeps_the_weights_and_applies_backwards(node: ServingNode, server: TesseractServer) -> None:
    name = await keep_inputs(node)
    await server.pause("its owner is at the keyboard", retry_after=7.0)
    assert not node.declared
    with pytest.raises(Overloaded, match="keyboard") as caught:
        await node.forward("ffn.0", torch.randn(3, 8))
    assert caught.value.retry_after == 7.0
    await node.backward("ffn.0", [], [torch.randn(3, 4)], inputs_cached=name)
    await server.set_primary("ffn.1", False)
    assert not node.declared
    await server.resume()
    assert node.declared == {"ffn.0": True, "ffn.1": False}
    await node.forward("ffn.0", torch.randn(3, 8))


async def test_a_bare_module_is_no_expert(node: ServingNode) -> None:
    with pytest.raises(TypeError, match="ffn.0 takes an ExpertBackend, .* got Linear"):
        TesseractServer(node, {"ffn.0": torch.nn.Linear(4, 4)})  # type: ignore[arg-type, dict-item]


async def test_a_follower_answers_forwards_and_names_the_primary(node: ServingNode) -> None:
    with pytest.raises(ValueError, match="these are not: ffn.9"):
        TesseractServer(node, {"ffn.0": make_backend()}, followers=["ffn.9"])  # type: ignore[arg-type]
    async with TesseractServer(node, {"ffn.0": make_backend()}, followers=["ffn.0"]) as server:  # type: ignore[arg-type]
        assert node.declared == {"ffn.0": False} and not server.is_primary("ffn.0")
        await node.forward("ffn.0", torch.randn(3, 8))
        with pytest.raises(NotPrimary, match="only follows ffn.0") as caught:
            await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
        assert caught.value.primary is None and caught.value.retry_after > 0

        class Elsewhere(Succession):
            async def find_primary(self, uid: str) -> tuple[PeerID | None, float]:
                return PeerID(bytes(32)), 0.0

        server.succession = Elsewhere()
        with pytest.raises(NotPrimary) as caught:
            await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
        assert caught.value.primary == bytes(32)
        await server.set_primary("ffn.0", True)
        assert node.declared == {"ffn.0": True}
        _, version = await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
        assert version == 1


async def test_a_state_can_be_taken_and_installed_while_it_serves(node: ServingNode, server: TesseractServer) -> None:
    await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])
    state = await server.hosted["ffn.0"].snapshot()
    await server.hosted["ffn.1"].install(checkpoint.decode_state(b"".join(checkpoint.encode_state(state))))
    modules = [server.experts[uid].module.state_dict() for uid in ("ffn.0", "ffn.1")]
    torch.testing.assert_close(*modules)
    assert server.experts["ffn.1"].version == 1
    for wrong in ({}, {"module": {}}, make_other().state()):
        with pytest.raises(CheckpointError, match="does not fit ffn.1"):
            await server.hosted["ffn.1"].install(wrong)
    torch.testing.assert_close(server.experts["ffn.1"].module.state_dict(), modules[0])


def make_other() -> ExpertBackend:
    return ExpertBackend(nn.Linear(8, 8), args_schema=(TensorSpec((8,)),))


async def test_further_methods_can_be_answered(node: ServingNode, server: TesseractServer) -> None:
    async def handler(hosted: HostedState, call: IncomingCall) -> Message:
        return Message([hosted.uid, hosted.backend.version])

    server.handle("expert.age", handler)
    assert (await node.call("ffn.0", "expert.age", ["ffn.0"])).body == ["ffn.0", 0]


async def test_work_whose_deadline_passed_is_refused_unseen(node: ServingNode, server: TesseractServer) -> None:
    with pytest.raises(Overloaded, match="deadline"):
        await node.call("ffn.0", messages.FORWARD, messages.encode(_forward_request()), [torch.randn(3, 8)], timeout=-1)


def _forward_request() -> messages.ForwardRequest:
    metas, _ = wire.pack_tensors([torch.randn(3, 8)])
    return messages.ForwardRequest(uid="ffn.0", tensors=metas, training=False, seed=0, reply_codec="none")


async def test_staleness_is_measured(node: ServingNode, server: TesseractServer) -> None:
    for _ in range(3):
        await node.backward("ffn.0", [torch.randn(3, 8)], [torch.randn(3, 4)])  # all say that they saw version 0
    snapshot = node.metrics.snapshot()
    assert snapshot["expert_staleness_steps_count"] == 3 and snapshot["expert_staleness_steps_sum"] == 0 + 1 + 2


def test_no_clock_that_can_jump_is_read() -> None:
    package = Path(checkpoint.__file__).parent.parent
    for path in [*(package / "runtime").glob("*.py"), *(package / "server").glob("*.py")]:
        assert "time.time(" not in path.read_text() or path.name in ALLOWED_WALL_CLOCKS, path


ALLOWED_WALL_CLOCKS: set[str] = set()


async def test_an_expert_says_which_codecs_it_takes_and_refuses_others(node: ServingNode) -> None:
    codecs = CodecPolicy(inputs=("bf16",), outputs=("fp16", "none"), gradients=("none",))
    backend = ExpertBackend(
        nn.Linear(8, 4), args_schema=(TensorSpec((8,)),), settings=BackendSettings(codecs=codecs), max_batch_size=16
    )
    async with TesseractServer(node, {"ffn.0": backend}):  # type: ignore[arg-type]
        info = messages.decode(messages.ExpertInfo, (await node.call("ffn.0", messages.INFO, ["ffn.0"])).body)
        assert CodecPolicy.decode(info.codecs) == codecs
        x, gradient = torch.zeros(2, 8), torch.zeros(2, 4)
        half, _ = wire.pack_tensors([x], "bf16")

        async def forward(metas: list[Any], reply_codec: str) -> Message:
            _, buffers = wire.pack_tensors([x], metas[0][2])
            request = messages.ForwardRequest("ffn.0", metas, False, 0, reply_codec)
            now = asyncio.get_running_loop().time()
            call = IncomingCall(PEER, messages.FORWARD, messages.encode(request), tuple(buffers), now + 9, 0)
            return await node.table.find(call)(call)

        reply = messages.decode(messages.ForwardReply, (await forward(half, "fp16")).body)
        assert reply.tensors[0][2] == "fp16"
        with pytest.raises(SchemaMismatch, match="'bf16' is not for its outputs; accepted: fp16, none"):
            await forward(half, "bf16")
        with pytest.raises(SchemaMismatch, match="'none' is not for its inputs; accepted: bf16"):
            await forward(wire.pack_tensors([x])[0], "none")
        with pytest.raises(SchemaMismatch, match="gradients"):
            await node.backward("ffn.0", [x], [gradient], reply_codec="bf16")
        with pytest.raises(SchemaMismatch, match="inputs"):
            await node.backward("ffn.0", [x], [gradient])
        assert backend.version == 0


async def test_a_backend_stands_for_one_expert_of_one_server(node: ServingNode) -> None:
    backend, other = make_backend(), make_backend()
    with pytest.raises(ValueError, match=r"ffn\.0 and ffn\.1 train the same weights"):
        TesseractServer(node, {"ffn.0": backend, "ffn.1": backend})  # type: ignore[arg-type]
    shared = ExpertBackend(backend.module, args_schema=backend.args_schema)
    with pytest.raises(ValueError, match="train the same weights"):
        TesseractServer(node, {"ffn.0": shared, "ffn.1": backend})  # type: ignore[arg-type]
    again = ExpertBackend(backend.module, args_schema=backend.args_schema)
    TesseractServer(node, {"ffn.0": shared, "ffn.1": again})  # type: ignore[arg-type]  # nobody trains them
    early = TesseractServer(node, {"ffn.2": backend})  # type: ignore[arg-type]
    async with TesseractServer(node, {"ffn.0": backend, "ffn.1": other}):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"ffn\.2: another server hosts this ExpertBackend"):
            TesseractServer(node, {"ffn.2": backend})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="another server hosts this ExpertBackend"):
            await early.start()
    async with TesseractServer(node, {"ffn.2": backend}):  # type: ignore[arg-type]
        pass
