import asyncio
import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import ConnectionLost, ExpertFailed, ExpertNotFound, ProtocolError, SchemaMismatch
from tesseract_async.wire import compression
from tesseract_async.wire.messages import BACKWARD, FORWARD, INFO
from tesseract_async.wire.tensors import TensorSpec
from tests.client.fake_node import FakeNode, FakeReplica, seeded, until
from tests.client.made import Made
from tests.client.virtual_time import in_made_up_time


async def test_remote_equals_local(node: FakeNode) -> None:
    local = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    hosted = node.host("ffn.0.0", copy.deepcopy(local), lr=0.1)
    expert = RemoteExpert(node, "ffn.0.0")
    x = torch.randn(5, 8, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, z = await expert(x), local(twin)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-6)
    await backward(y.square().sum())
    z.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-5)
    torch.optim.SGD(local.parameters(), 0.1).step()
    for theirs, ours in zip(hosted.module.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert [asked.method for asked in node.calls] == [INFO, FORWARD, BACKWARD]


async def test_inputs_without_grad_still_train_the_expert(node: FakeNode) -> None:
    hosted = node.host("ffn.0.0", nn.Linear(8, 8), lr=0.1)
    y = await RemoteExpert(node, "ffn.0.0")(torch.randn(3, 8))
    await backward(y.sum())
    assert hosted.version == 1


class Nested(nn.Module):
    def forward(self, a: Any, b: Any, *, scale: torch.Tensor, masks: list[torch.Tensor]) -> Any:
        return {"sum": (a + b["x"]) * scale, "pair": (a * masks[0], masks[1].long().sum(1, keepdim=True))}


async def test_positional_keyword_and_nested_arguments(node: FakeNode) -> None:
    vector, flags = TensorSpec((4,)), TensorSpec((4,), torch.bool)
    node.host(
        "nest.0",
        Nested(),
        vector,
        {"x": vector},
        kwargs_schema={"scale": TensorSpec((1,)), "masks": [flags, flags]},
        outputs_schema={"sum": vector, "pair": (vector, TensorSpec((1,), torch.int64))},
    )
    expert = RemoteExpert(node, "nest.0")
    a, b, scale = (torch.randn(3, n, requires_grad=True) for n in (4, 4, 1))
    masks = [torch.rand(3, 4) > 0.5, torch.rand(3, 4) > 0.5]
    out = await expert(a, {"x": b}, masks=masks, scale=scale)
    expected = Nested()(a, {"x": b}, scale=scale, masks=masks)
    torch.testing.assert_close(out["sum"], expected["sum"])
    torch.testing.assert_close(out["pair"], expected["pair"])
    assert not out["pair"][1].requires_grad
    await backward(out["pair"][0].sum())
    torch.testing.assert_close(a.grad, masks[0].float())
    assert scale.grad is None or not scale.grad.any()


@pytest.mark.parametrize(
    "args",
    [(torch.zeros(3, 7),), (torch.zeros(3, 8, dtype=torch.float64),), (torch.zeros(3, 8), torch.zeros(3, 8)), ()],
)
async def test_what_does_not_fit_is_refused_before_anything_is_sent(node: FakeNode, args: tuple[torch.Tensor]) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    with pytest.raises(SchemaMismatch, match=r"float32\[rows, 8\].*got"):
        await RemoteExpert(node, "ffn.0.0")(*args)
    assert node.count(FORWARD) == 0


async def test_not_a_tensor(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"float32\[rows, 8\].*str"):
        await RemoteExpert(node, "ffn.0.0")("x")


async def test_unknown_uid(node: FakeNode) -> None:
    with pytest.raises(ExpertNotFound, match="ffn.9.9"):
        await RemoteExpert(node, "ffn.9.9")(torch.zeros(1, 8))


async def test_grad_mode_is_read_at_the_call(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    expert = RemoteExpert(node, "ffn.0.0")
    with torch.no_grad():
        unawaited = expert(torch.ones(1, 8))
    assert not (await unawaited).requires_grad
    awaitable = expert(torch.ones(1, 8))
    with torch.no_grad():
        assert (await awaitable).requires_grad
    with torch.inference_mode():
        assert not (await expert(torch.ones(1, 8))).requires_grad


async def test_autocast_casts_inputs_to_the_schema(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    x = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = await RemoteExpert(node, "ffn.0.0")(x)
    assert y.dtype == torch.float32
    await backward(y.sum())
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


async def test_training_and_seed_make_backward_draw_the_same(node: FakeNode) -> None:
    node.host("drop.0", nn.Dropout(0.5))
    expert = RemoteExpert(node, "drop.0")
    x = torch.ones(4, 8, requires_grad=True)
    y = await expert(x)
    await backward(y.sum())
    torch.testing.assert_close(x.grad, y.detach())
    torch.testing.assert_close(await expert.eval()(x), x)


async def test_remote_dropout_follows_torchs_generator(node: FakeNode) -> None:
    """Whatever repeats or sets apart local dropout does so for remote one, of an expert and through a gate."""
    node.host("drop.0", nn.Dropout(0.5))
    expert, x = RemoteExpert(node, "drop.0"), torch.ones(8, 8)
    gate = GatingFunction(node, uid_prefix="drop", grid_size=(1,), in_features=8, k_best=1)

    async def draw() -> torch.Tensor:
        tasks = [asyncio.create_task(layer(x)) for layer in (expert, expert, gate)]
        return torch.stack([await task for task in tasks]).detach()

    with seeded(1):
        first = await draw()
        state = torch.get_rng_state()
        second = await draw()
        torch.set_rng_state(state)
        assert torch.equal(await draw(), second) and not torch.equal(first, second)
        torch.set_rng_state(state)
        with torch.random.fork_rng(devices=[]):
            assert torch.equal(await draw(), second)
        assert torch.equal(await draw(), second)
        assert not torch.equal(second[0], second[1])
    with seeded(1), torch.inference_mode(), torch.device("meta"):
        assert torch.equal(await draw(), first)
    with seeded(1):
        state = torch.get_rng_state()
        expert.eval(), gate.eval()
        await draw()
        assert torch.equal(torch.get_rng_state(), state)  # nothing random happens: nothing is drawn


async def test_a_failing_module(node: FakeNode) -> None:
    node.host("bad.0", nn.Linear(9, 8), TensorSpec((8,)))
    with pytest.raises(ExpertFailed, match="shape"):
        await RemoteExpert(node, "bad.0")(torch.zeros(1, 8))


@in_made_up_time
async def test_a_silent_server_fails_within_its_timeout_and_is_masked(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    expert = RemoteExpert(node, "ffn.0.0")
    await expert(torch.zeros(1, 8))
    node.delay = 60.0
    with pytest.raises(TimeoutError):
        await expert.with_options(timeout=0.1)(torch.zeros(1, 8))
    assert [replica.uid for replica in node.directory.failed] == ["ffn.0.0"]
    assert node.num_open == 0


@in_made_up_time
async def test_the_only_server_is_asked_again_after_it_stood_still(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    expert = RemoteExpert(node, "ffn.0.0")
    x = torch.ones(1, 8, requires_grad=True)
    y = await expert(x)
    node.delay = 60.0
    with pytest.raises(TimeoutError):
        await expert.with_options(timeout=0.1)(x)
    node.delay = 0.0
    torch.testing.assert_close(await expert(x), y)
    await backward(y.sum())
    assert x.grad is not None and node.directory.failed, "its next manifest has not come yet"


async def test_a_dead_only_server_is_not_asked_again_within_the_call(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    expert = RemoteExpert(node, "ffn.0.0")
    y = (await expert(torch.ones(1, 8))).sum()
    num_calls = 0

    async def fault(method: str, uid: str, number: int) -> None:
        nonlocal num_calls
        num_calls += 1
        raise ConnectionLost("peer", "test")

    node.fault = fault
    for call in (expert(torch.ones(1, 8)), backward(y)):
        with pytest.raises(ConnectionLost):
            await call
    assert num_calls == 2


async def test_a_server_that_was_out_of_reach_for_a_moment_is_not_taken_for_absent(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8), peers=("peer",))

    async def fault(method: str, uid: str, number: int) -> None:
        raise ConnectionLost("peer", "a gateway forgot")

    node.fault = fault
    expert = RemoteExpert(node, "ffn.0.0")
    for _ in range(2):  # the second call meets what the first one masked
        with pytest.raises(ConnectionLost):
            await expert(torch.randn(2, 8))
    assert node.directory.failed
    node.fault = None
    assert (await expert(torch.randn(2, 8))).shape == (2, 8), "back before its next manifest"


@in_made_up_time
async def test_while_a_server_that_failed_lately_is_dialed_others_are_looked_for(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8), peers=("dead",))
    expert, loop = RemoteExpert(node, "ffn.0.0"), asyncio.get_running_loop()
    await expert(torch.zeros(1, 8))

    async def fault(method: str, uid: str, number: int) -> None:
        if node.calls[-1].peer == "dead":
            await asyncio.sleep(20.0)

    node.fault = fault
    node.directory.report_failure(node.directory.replicas["ffn.0.0"][0])
    loop.call_later(3.5, node.directory.add, "ffn.0.0", "next")
    began = loop.time()
    await expert(torch.zeros(1, 8))
    assert loop.time() - began <= 4.1 and node.calls[-1].peer == "next" and node.num_open == 0


@in_made_up_time
async def test_an_answer_that_comes_while_others_are_looked_for_is_not_asked_for_again(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8), peers=("slow",))
    expert, find = RemoteExpert(node, "ffn.0.0"), node.directory.find
    await expert(torch.zeros(1, 8))

    async def fault(method: str, uid: str, number: int) -> None:
        await asyncio.sleep(1.5)

    async def late(uid: str, *, even_failed: bool = False) -> list[FakeReplica]:
        await asyncio.sleep(1.0)
        return await find(uid, even_failed=even_failed)

    node.fault = fault
    node.directory.find = late  # type: ignore[method-assign]
    node.directory.report_failure(node.directory.replicas["ffn.0.0"][0])
    asyncio.get_running_loop().call_later(3.2, node.directory.add, "ffn.0.0", "next")  # asked from 2.0 to 3.5
    num_calls = len(node.calls)
    await expert(torch.zeros(1, 8))
    assert len(node.calls) == num_calls + 1 and node.num_open == 0


async def test_another_replica_answers_for_a_dead_one(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8), peers=("dead", "alive"))
    dead = [0]

    async def fault(method: str, uid: str, number: int) -> None:
        if node.calls[-1].peer == "dead":
            dead[0] += 1
            raise TimeoutError

    node.fault = fault
    await RemoteExpert(node, "ffn.0.0")(torch.zeros(1, 8))
    assert dead[0] == 1


def change_meta(index: int, value: Any) -> Any:
    def tamper(method: str, body: Any, buffers: Any) -> Any:
        if hasattr(body, "tensors"):
            body.tensors[0][index] = value
        return body, buffers

    return tamper


def drop_tensor(method: str, body: Any, buffers: Any) -> Any:
    return (body._replace(tensors=[]), []) if hasattr(body, "tensors") else (body, buffers)


def cut_buffer(method: str, body: Any, buffers: Any) -> Any:
    return body, [buffer[:-1] for buffer in buffers]


def absent(method: str, body: Any, buffers: Any) -> Any:
    return (body._replace(tensors=[None]), []) if hasattr(body, "tensors") else (body, buffers)


TAMPERS = {
    "shape": change_meta(1, [4, 4]),
    "rows": change_meta(1, [1, 16]),
    "dtype": change_meta(0, "int32"),
    "huge": change_meta(1, [2**39, 2**39]),
    "negative": change_meta(1, [-1, 8]),
    "codec": change_meta(2, "rot13"),
    "none": drop_tensor,
    "cut": cut_buffer,
    "not a list": lambda method, body, buffers: ({}, buffers),
    "no version": lambda method, body, buffers: (list(body)[:1], buffers),
}


@pytest.mark.parametrize("kind", [*TAMPERS, "absent"])
async def test_nonsense_from_a_peer_is_a_protocol_error(node: FakeNode, kind: str) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    expert = RemoteExpert(node, "ffn.0.0")
    await expert.info()
    node.tamper = {**TAMPERS, "absent": absent}[kind]
    with pytest.raises(ProtocolError):
        await expert(torch.zeros(2, 8))
    assert node.directory.failed


@pytest.mark.parametrize("kind", TAMPERS)
async def test_nonsense_as_gradients_is_a_protocol_error_too(node: FakeNode, kind: str) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    x = torch.zeros(2, 8, requires_grad=True)
    y = await RemoteExpert(node, "ffn.0.0")(x)
    node.tamper = TAMPERS[kind]
    with pytest.raises(ProtocolError):
        await backward(y.sum())
    assert x.grad is None


@pytest.mark.parametrize(
    "meta", [["float64", [2, 8], "uint8"], ["float32", [4, 8], "bf16"], ["float32", [2, 9], "fp16"]]
)
async def test_nonsense_is_not_unpacked_where_that_takes_more_memory(node: FakeNode, meta: list[Any]) -> None:
    def bomb(method: str, body: Any, buffers: Any) -> Any:
        count = meta[1][0] * meta[1][1]
        buffer = memoryview(bytes(compression.encoded_bytes(count, torch.float64, "uint8")))
        return body._replace(tensors=[meta, meta]), [buffer, buffer]

    node.host("ffn.0.0", nn.Linear(8, 8))
    expert = RemoteExpert(node, "ffn.0.0")
    x = torch.zeros(2, 8, requires_grad=True)
    y = await expert(x)
    node.tamper = bomb
    with Made() as made:
        with pytest.raises(ProtocolError, match="answered .* where its schema says"):
            await backward(y.sum())
        with torch.no_grad(), pytest.raises(ProtocolError, match="answered .* where its schema says"):
            await expert(x)
    dtype, shape = getattr(torch, meta[0]), tuple(meta[1])
    assert made.kinds and not {(dtype, shape), (dtype, (math.prod(shape),))} & made.kinds


async def test_a_copy_shares_the_node(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    expert = copy.deepcopy(RemoteExpert(node, "ffn.0.0"))
    assert (await expert(torch.zeros(2, 8))).shape == (2, 8)
    assert "ffn.0.0" in repr(expert)


async def test_cancelling_a_call_cancels_it_at_the_node(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    expert = RemoteExpert(node, "ffn.0.0")
    await expert.info()
    node.delay = 60.0
    task = asyncio.create_task(expert(torch.zeros(1, 8)))
    await until(lambda: node.count(FORWARD) > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.num_open == 0 and node.num_cancelled == 1 and not node.directory.failed


async def test_a_twin_with_other_options_asks_no_second_time_what_the_expert_takes(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    expert = RemoteExpert(node, "ffn.0.0")
    for priority in (-1, 0, 1):
        await expert.with_options(priority=priority)(torch.zeros(1, 8))
    await expert(torch.zeros(1, 8))
    assert node.count(INFO) == 1
