"""A whole swarm in one process, on both loops: public nodes, and a server and a trainer that nobody can dial.

The kernels' NATs are `tests/nat`'s matter. Here nodes on loopback are told that they are clients. What is held is that
training takes the way it should and ends without a warning, a task or a socket left (see `conftest`).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import torch

import tesseract_async as ta
from tesseract_async.nat.reach import ReachSettings

pytestmark = pytest.mark.both_loops

HERE = ReachSettings(
    on_loopback=True,
    # one: a node that still looks for a third one dials the trainer as soon as others can, and needs no other way then
    num_rendezvous=1,
    watch_period=0.05,
    # on a busy machine aiortc alone takes seconds to import: which way comes first is not to be a race against that
    offer_timeout=30.0,
    head_start=60.0,
    dial_back_timeout=30.0,
)
BEHIND_NAT = replace(HERE, client=True, watch_period=ReachSettings().watch_period)


def make_expert() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))


@asynccontextmanager
async def public_nodes(count: int) -> AsyncIterator[list[ta.TesseractNode]]:
    """Nodes that find out by each other's dial-back that they are public; the first one says so itself."""
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(ta.TesseractNode(public=True, reach=HERE))]
        for _ in range(count - 1):
            node = ta.TesseractNode(initial_peers=[made[0].address], reach=HERE)
            made.append(await stack.enter_async_context(node))
        yield made


@asynccontextmanager
async def server(seed: ta.TesseractNode) -> AsyncIterator[ta.TesseractNode]:
    backend = ta.ExpertBackend(make_expert(), args_schema=(ta.TensorSpec((16,)),))
    async with ta.TesseractNode(initial_peers=[seed.address], reach=BEHIND_NAT) as node:
        assert await node.wait_reachable(40.0)
        async with ta.TesseractServer(node, {"e.0": backend}):
            yield node


async def train(trainer: ta.TesseractNode, host: ta.TesseractNode) -> set[str]:
    """A forward and a backward call, against the same module here: the kinds of ways that lead to `host` after it."""
    local = make_expert()
    x = torch.linspace(-1, 1, 64).reshape(4, 16)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expert = await trainer.get_expert("e.0")
    y = await expert(theirs)
    await ta.backward(y.square().sum())
    expected = local(mine)
    expected.square().sum().backward()
    assert torch.allclose(y, expected, atol=1e-6)
    assert theirs.grad is not None and mine.grad is not None
    assert torch.allclose(theirs.grad, mine.grad, atol=1e-6)
    ways = [info.path for info in trainer.endpoint.connections() if info.peer_id == host.peer_id]
    return {way.partition(" ")[0] for way in ways}


@pytest.mark.parametrize("way", ["reverse", "datachannel", "relay"])
async def test_a_swarm_trains_and_leaves_nothing(way: str) -> None:
    async with public_nodes(3) as (seed, *_), server(seed) as host:
        assert host.reach.reachability.role == "client" and host.peer_address.rendezvous
        settings = HERE if way == "reverse" else replace(BEHIND_NAT, punch_holes=way == "datachannel")
        async with ta.TesseractNode(initial_peers=[seed.address], reach=settings) as trainer:
            assert await trainer.wait_reachable(40.0)
            assert trainer.reach.reachability.role == ("public" if way == "reverse" else "client")
            assert await train(trainer, host) == {way}


async def test_nodes_that_others_can_dial_find_it_out() -> None:
    async with public_nodes(3) as nodes:
        async with asyncio.timeout(100):
            for node in nodes[1:]:
                assert await node.wait_reachable(40.0)
                assert node.reach.reachability.role == "public" and node.reach.reachability.tcp


async def test_who_knows_that_it_cannot_be_dialed_has_a_rendezvous_as_soon_as_it_knows_anybody() -> None:
    """It starts before it knows anybody: it may not wait for the next look."""
    settings = ReachSettings(on_loopback=True, client=True)
    async with public_nodes(1) as (seed,), ta.TesseractNode(initial_peers=[seed.address], reach=settings) as node:
        assert await node.wait_reachable(40.0)
        assert node.reach.rendezvous
