"""Replies carry the epoch of their server's lineage: older ones don't count, newer ones make directories read again."""

from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import TooStale
from tests.client.fake_node import FakeNode

UID = "ffn.0.0"


def hosting(*epochs: int) -> FakeNode:
    """A node whose peers "0", "1" and so on claim to be the primary, at these epochs."""
    node = FakeNode()
    node.host(UID, nn.Linear(8, 8), lr=0.1, peers=())
    for number, epoch in enumerate(epochs):
        node.directory.add(UID, str(number), epoch=epoch)
    return node


def answer_at(node: FakeNode, epoch: int, version: int | None = None, *, to: str | None = None) -> None:
    """From now on replies (only those to `to`, if given) say that they are from this epoch."""

    def tamper(method: str, body: Any, buffers: Any) -> Any:
        if hasattr(body, "epoch") and (to is None or method == to):
            body = body._replace(epoch=epoch, version=body.version if version is None else version)
        return body, buffers

    node.tamper = tamper


async def test_an_answer_of_an_older_epoch_than_its_server_published_does_not_count() -> None:
    node = hosting(5)
    answer_at(node, 4)
    with pytest.raises(TooStale, match="epoch 4.* says 5"), torch.no_grad():
        await RemoteExpert(node, UID)(torch.ones(1, 8))
    answer_at(node, 5)
    with torch.no_grad():
        await RemoteExpert(node, UID)(torch.ones(1, 8))


async def test_gradients_of_an_older_epoch_are_asked_again_of_another_server_under_the_same_call_id() -> None:
    node = hosting(5, 5)
    expert, x = RemoteExpert(node, UID), torch.ones(1, 8, requires_grad=True)
    answer_at(node, 5)
    y = await expert(x)
    peers: list[Any] = []

    def tamper(method: str, body: Any, buffers: Any) -> Any:
        if method == "expert.backward":
            peers.append(node.calls[-1].peer)
            body = body._replace(epoch=4 if len(peers) == 1 else 5)
        return body, buffers

    node.tamper = tamper
    await backward(y.sum())
    asked = [one.body.call_id for one in node.calls if one.method == "expert.backward"]
    assert x.grad is not None and len(asked) == 2 and len(set(asked)) == 1


async def test_a_newer_epoch_makes_the_directory_read_again_once_per_manifest() -> None:
    node = hosting(5)
    expert = RemoteExpert(node, UID)
    answer_at(node, 6)
    with torch.no_grad():
        for _ in range(3):
            await expert(torch.ones(1, 8))
    assert node.directory.outdated == [UID]


async def test_steps_that_a_new_primary_lacks_are_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    node = hosting(0)
    expert = RemoteExpert(node, UID)
    with torch.no_grad():
        for epoch, version in ((5, 10), (5, 9), (6, 12), (7, 8), (7, 9), (6, 2)):
            answer_at(node, epoch, version)
            await expert(torch.ones(1, 8))
    assert node.metrics.total("steps_lost") == 1
    assert "continues from version 8; this node had seen version 12" in caplog.text


async def test_outside_of_runs_versions_may_fall() -> None:
    node = hosting(0)
    with torch.no_grad():
        for version in (10, 2):
            answer_at(node, 0, version)
            await RemoteExpert(node, UID)(torch.ones(1, 8))
    assert node.metrics.total("steps_lost") == 0 and not node.directory.outdated
