"""Servers that host something else under the same uids, by mistake or on purpose: callers of the right ones go on."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import SchemaMismatch
from tesseract_async.wire import messages
from tesseract_async.wire.tensors import TensorSpec
from tests.client.fake_node import Asked, FakeNode, Hosted, gate_with
from tests.client.virtual_time import in_made_up_time

WRONG = "wrong"


class TwoModels(FakeNode):
    """Peers called `WRONG` host experts of another size under the same uids."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong = Hosted(nn.Linear(32, 32), (TensorSpec((32,)),), {}, TensorSpec((32,)))
        self.wrong_says: Callable[[], Awaitable[None]] | None = None
        self.num_wrong = 0

    async def serve(self, asked: Asked, answer: Callable[[Hosted], Any]) -> Any:
        if asked.peer != WRONG:
            return await super().serve(asked, answer)
        if asked.method == messages.INFO:
            return await super().serve(asked, lambda hosted: answer(self.wrong))
        self.num_wrong += 1
        await asyncio.sleep(0)
        raise SchemaMismatch(f"expert {asked.uid} takes (float32[rows, 32]); got something else")


def host(node: TwoModels, uid: str, order: tuple[tuple[str, bool], ...], lr: float | None = 0.1) -> Hosted:
    hosted = node.host(uid, nn.Linear(16, 16), TensorSpec((16,)), lr=lr, peers=())
    for peer, primary in sorted(order, key=lambda item: not item[1]):
        node.directory.add(uid, peer, primary=primary)
    return hosted


# who else claims the expert, before or after the right one, as follower or as primary
ORDERS = [
    (("right", True), (WRONG, False)),
    (("right", True), (WRONG, True)),
    ((WRONG, True), ("right", True)),
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@in_made_up_time
async def test_an_expert_is_called_where_its_inputs_fit(
    order: tuple[tuple[str, bool], ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    node = TwoModels()
    node.delay = 0.01  # the wrong ones answer first
    hosted = host(node, "f.0", order)
    expert, x = RemoteExpert(node, "f.0"), torch.ones(2, 16)
    for _ in range(20):
        y = await expert(x)
        await backward(y.sum())
    assert hosted.version == hosted.num_backwards == 20
    assert node.num_wrong <= 3, "it is asked once in each way, then it is ignored"
    assert {replica.peer for _, replica in node.directory.masked} <= {WRONG}
    lines = [record.getMessage() for record in caplog.records if "ignoring" in record.getMessage()]
    assert len(lines) == any(reason == "schema" for reason, _ in node.directory.masked), "once"
    assert all("f.0 at wrong" in line and "float32[rows, 32]" in line and "\n" not in line for line in lines)


@pytest.mark.parametrize("order", [*ORDERS, ((WRONG, True), ("right", False))], ids=str)
@in_made_up_time
async def test_an_established_caller_keeps_to_what_it_knows(order: tuple[tuple[str, bool], ...]) -> None:
    """The wrong server comes while a trainer is at work, and may even say that it leads."""
    node = TwoModels()
    hosted = host(node, "f.0", (("right", True),))
    expert, x = RemoteExpert(node, "f.0"), torch.ones(2, 16)
    await backward((await expert(x)).sum())
    node.directory.replicas.clear()
    for peer, primary in order:
        node.directory.add("f.0", peer, primary=primary)
    for _ in range(10):
        await backward((await expert(x)).sum())
    assert hosted.version == 11
    assert {replica.peer for _, replica in node.directory.masked} <= {WRONG}


@pytest.mark.parametrize("order", ORDERS, ids=str)
@in_made_up_time
async def test_a_gate_finds_the_experts_that_its_inputs_fit(order: tuple[tuple[str, bool], ...]) -> None:
    """The wrong server claims all the experts, and half of the cells that nobody else hosts."""
    torch.manual_seed(0)
    node = TwoModels()
    node.delay = 0.01
    for i, j in itertools.product(range(2), range(2)):
        host(node, f"ffn.{i}.{j}", order)
    for i in range(2):
        host(node, f"ffn.{i}.2", ((WRONG, True),))
    gate = gate_with(node, "ffn", grid_size=(2, 3), in_features=16, k_best=4, backward_k_min=1)
    for _ in range(5):
        mixed = await gate.mix(torch.randn(8, 16))
        assert mixed.num_answers.min() >= 1
        await backward(mixed.output.sum())
    mixed = await gate.mix(torch.randn(8, 16))
    assert mixed.num_answers.tolist() == [4] * 8 and not mixed.errors
    masked = {(replica.uid, replica.peer) for _, replica in node.directory.masked}
    assert {peer for _, peer in masked} == {WRONG} and {"ffn.0.2", "ffn.1.2"} <= {uid for uid, _ in masked}


@in_made_up_time
async def test_what_fits_nobody_is_the_callers_mistake_and_masks_nobody() -> None:
    node = TwoModels()
    host(node, "f.0", ORDERS[1])
    host(node, "ffn.0", ORDERS[1])
    gate = GatingFunction(node, uid_prefix="ffn", grid_size=(1,), in_features=7, k_best=1)
    for _ in range(2):
        with pytest.raises(SchemaMismatch, match=r"the grid ffn takes .*got .*1, 7"):
            await gate(torch.ones(1, 7))
        with pytest.raises(SchemaMismatch, match=r"expert f.0 takes .*rows, 16.*got.*1, 7"):
            await RemoteExpert(node, "f.0")(torch.ones(1, 7))
    assert not node.directory.masked and node.num_wrong == 0


@in_made_up_time
async def test_a_primary_of_another_schema_is_not_replaced_by_a_follower_that_fits() -> None:
    node = TwoModels()
    host(node, "f.0", ((WRONG, True), ("right", False)))
    with pytest.raises(SchemaMismatch, match="rows, 32"):
        await RemoteExpert(node, "f.0")(torch.ones(1, 16))


@in_made_up_time
async def test_an_expert_that_was_made_anew_with_another_size_is_learned_anew() -> None:
    node = FakeNode()
    node.host("f.0", nn.Linear(16, 16), TensorSpec((16,)))
    expert = RemoteExpert(node, "f.0")
    await expert(torch.ones(1, 16))
    node.directory.replicas.clear()
    node.host("f.0", nn.Linear(4, 4), TensorSpec((4,)))
    assert (await expert(torch.ones(1, 4))).shape == (1, 4)
    assert not node.directory.masked
