"""Strangers who claim an expert with a bare name: what a running server, its followers and its checkpoints make of it.

On loopback, where states may be taken from others, and with lists of who may.
"""

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import ConnectionInfo, IncomingCall, Message
from tesseract_async.errors import NotAllowed
from tesseract_async.experts.node_calls import EXPERT_METHODS
from tesseract_async.experts.publisher import ExpertPublisher, PublisherSettings
from tesseract_async.server import checkpoint
from tesseract_async.server.other_replicas import ReplicaSettings, adopt_states
from tesseract_async.server.state_transfer import StateSource
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire
from tests.scripted_node import Instead

UID = "ffn.0.0"
SETTINGS = ReplicaSettings(check_every=0.1, sync_every=0.2, lease=1.0, call_timeout=2.5)
PUBLISHER = PublisherSettings(ttl=9.0, declare_timeout=2.0)
X = torch.ones(2, 4)


def make_backend(fill: float | None = None) -> ta.ExpertBackend:
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    if fill is not None:
        for parameter in module.parameters():
            parameter.data.fill_(fill)
    return ta.ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.01), args_schema=(ta.TensorSpec((4,)),)
    )


class Stranger:
    """Claims the expert, tells of as many steps as it likes, serves a state of its own, and says yes to everything."""

    def __init__(self, node: ta.TesseractNode, version: int) -> None:
        self.node = node
        self.asked: Counter[str] = Counter()
        self.backend = make_backend(fill=7.0)
        self.backend.version = version
        self.silent = False
        state = self.backend.state()

        async def snapshot() -> dict[str, Any]:
            return state

        async def aside(work: Callable[[], bytes]) -> bytes:
            return work()

        self._source = StateSource(aside)
        self._hosted: Any = SimpleNamespace(uid=UID, version=version, snapshot=snapshot)
        node.host_expert(UID, dict.fromkeys(EXPERT_METHODS, self._answer))
        self._publisher = ExpertPublisher(node.network, addresses=[node.address], settings=PUBLISHER)

    async def claim(self, *, primary: bool) -> None:
        await self._publisher.declare({UID: primary})

    async def aclose(self) -> None:
        self._source.close()
        await self._publisher.aclose()

    async def _answer(self, call: IncomingCall) -> Message:
        self.asked[call.method] += 1
        if self.silent:
            await asyncio.Event().wait()
        if call.method == messages.STATE:
            return await self._source.answer(self._hosted, call)
        if call.method == messages.TAKE_OVER:
            return Message(messages.encode(messages.TakeOverReply(50, os.urandom(16))))
        schemas = (self.backend.args_schema, self.backend.kwargs_schema, self.backend.outputs_schema)
        encoded = [wire.encode_schema(one) for one in schemas]
        codecs = self.backend.settings.codecs.encode()
        return Message(messages.encode(messages.ExpertInfo(UID, *encoded, 4096, self.backend.version, codecs)))


@contextlib.asynccontextmanager
async def stranger(peers: list[str], version: int = 2**40) -> AsyncIterator[Stranger]:
    async with ta.TesseractNode(initial_peers=peers) as node:
        await node.network.wait_joined(30.0)
        one = Stranger(node, version)
        try:
            yield one
        finally:
            await one.aclose()


@contextlib.asynccontextmanager
async def server(
    peers: list[str],
    *,
    follow: bool = False,
    checkpoints: Path | None = None,
    identity: ta.Identity | None = None,
    policy: ta.Policy | None = None,
    settings: ReplicaSettings = SETTINGS,
) -> AsyncIterator[tuple[ta.TesseractServer, ReplicaKeeper]]:
    async with ta.TesseractNode(initial_peers=peers, identity=identity, policy=policy) as node:
        if peers:
            await node.network.wait_joined(30.0)
        hosting = ta.TesseractServer(
            node,
            {UID: make_backend()},
            checkpoint_dir=checkpoints,
            followers=[UID] if follow else [],
            publisher_settings=PUBLISHER,
        )
        async with hosting, ReplicaKeeper(hosting, settings=settings, reuse=0.0) as keeper:
            yield hosting, keeper


async def train(node: ta.TesseractNode, num_steps: int) -> None:
    expert = await node.get_expert(UID)
    for _ in range(num_steps):
        await ta.backward((await expert(X)).sum())


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (nothing tells of it)
            await asyncio.sleep(0.02)


def newest_weight(directory: Path) -> float:
    path = sorted(directory.rglob("*.safetensors"))[-1]
    return float(checkpoint.decode_state(path.read_bytes())["module"]["weight"].flatten()[0])


@pytest.mark.parametrize("version", [2**40, 2**63 - 1])
async def test_a_running_primary_keeps_its_expert_whatever_version_is_claimed(version: int, tmp_path: Path) -> None:
    async with server([], checkpoints=tmp_path) as (honest, keeper):
        await train(honest.node, 3)
        async with stranger([honest.node.address], version) as evil:
            await evil.claim(primary=True)
            await until(lambda: honest.node.metrics.total("primaries_disputed") > 0)
            await keeper.look()
            assert honest.is_primary(UID) and honest.experts[UID].version == 3
            assert evil.asked[messages.STATE] == 0
            await honest.save_checkpoints()
            assert newest_weight(tmp_path) != 7.0


async def test_where_members_are_listed_a_strangers_claims_change_nothing(tmp_path: Path) -> None:
    ids = [ta.Identity.from_seed(bytes([n]) * 32) for n in (1, 2)]
    policy = ta.Policy.only([one.peer_id for one in ids])
    async with server([], checkpoints=tmp_path, identity=ids[0], policy=policy) as (honest, keeper):
        async with (
            ta.TesseractNode(initial_peers=[honest.node.address], identity=ids[1], policy=policy) as trainer,
            stranger([honest.node.address]) as evil,
        ):
            await evil.claim(primary=True)
            await train(trainer, 3)
            await keeper.look()
            assert honest.is_primary(UID) and honest.experts[UID].version == 3
            assert not await adopt_states(honest.node, {UID: make_backend()}, settings=SETTINGS)
            assert not evil.asked and not honest.node.metrics.total("primaries_disputed")


@pytest.mark.parametrize("path", ["tcp 8.8.8.8:4000", "tcp 203.0.113.9:4000", "relay 10.0.0.9:4000", "tcp"])
async def test_one_that_names_a_near_address_and_comes_from_elsewhere_is_not_followed(path: str) -> None:
    async with ta.TesseractNode() as honest, stranger([honest.address], 5) as evil:
        await evil.claim(primary=True)

        connections = [ConnectionInfo(evil.node.peer_id, path, False, None, 0.0, 0)]
        node: Any = Instead(honest, endpoint=Instead(honest.endpoint, connections=lambda: connections))
        assert not await adopt_states(node, {UID: make_backend()}, settings=SETTINGS)
        assert evil.asked[messages.INFO] == 1 and evil.asked[messages.STATE] == 0
        assert set(await adopt_states(honest, {UID: make_backend()}, settings=SETTINGS)) == {UID}


async def test_a_follower_keeps_to_the_primary_that_it_knows() -> None:
    async with server([]) as (honest, _), server([honest.node.address], follow=True) as (follower, keeper):
        await train(honest.node, 2)
        async with stranger([honest.node.address]) as evil:
            await evil.claim(primary=True)
            keeper.bare.forget(UID)
            await keeper.look()
            assert keeper.primary(UID) == honest.node.peer_id and follower.experts[UID].version == 2
            assert evil.asked[messages.STATE] == 0


async def test_an_expert_is_given_to_nobody_who_did_not_fetch_it() -> None:
    lazy = ReplicaSettings(check_every=1000.0, sync_every=1000.0, call_timeout=50.0)
    async with server([], settings=lazy) as (honest, keeper):
        peers = [honest.node.address]
        async with server(peers, follow=True, settings=lazy) as (follower, _), stranger(peers, 50) as evil:
            await train(follower.node, 5)
            await evil.claim(primary=False)  # the newest manifest: the leaving primary asks it first
            assert await keeper.hand_over() == 1
            assert evil.asked[messages.TAKE_OVER] == 1 and follower.is_primary(UID)
            assert follower.experts[UID].version == 5, "no step was lost"


@pytest.mark.parametrize("primary", [True, False])
async def test_claims_that_nobody_stands_behind_delay_no_takeover(primary: bool) -> None:
    async with contextlib.AsyncExitStack() as stack:
        seed = await stack.enter_async_context(ta.TesseractNode())
        first = contextlib.AsyncExitStack()
        honest, _ = await first.enter_async_context(server([seed.address]))
        follower, keeper = await stack.enter_async_context(server([seed.address], follow=True))
        for _ in range(8):
            ghost = await stack.enter_async_context(stranger([seed.address]))
            ghost.silent = True
            await ghost.claim(primary=primary)
        await until(lambda: keeper.primary(UID) is not None)
        # as after a crash: nothing is withdrawn
        await honest.node.endpoint.aclose()
        began = time.monotonic()
        await until(lambda: follower.is_primary(UID))
        took = time.monotonic() - began
        await first.aclose()
        assert took < 30.0, "one time-out, not one for each"


async def test_a_lease_ends_also_where_each_look_takes_longer() -> None:
    hasty = ReplicaSettings(check_every=0.1, sync_every=0.2, lease=0.3, call_timeout=2.5)
    async with (
        server([]) as (honest, _),
        server([honest.node.address], follow=True, settings=hasty) as (follower, keeper),
    ):
        async with stranger([honest.node.address]) as ghost:
            ghost.silent = True
            await ghost.claim(primary=True)
            for _ in range(3):
                await keeper.look()
            assert keeper.primary(UID) == honest.node.peer_id
            await honest.node.endpoint.aclose()
            await until(lambda: follower.is_primary(UID))


async def test_asking_a_server_to_lead_costs_it_no_look_at_the_network() -> None:
    lazy = ReplicaSettings(check_every=1000.0, sync_every=1000.0)
    async with (
        server([], settings=lazy) as (honest, _),
        server([honest.node.address], follow=True, settings=lazy) as (follower, _),
    ):
        async with ta.TesseractNode(initial_peers=[honest.node.address]) as evil:
            body = messages.encode(messages.TakeOverRequest(UID, bytes(16)))
            for victim in (honest, follower):
                before = victim.node.metrics.total("network_lookups")
                for _ in range(5):
                    with pytest.raises(NotAllowed):
                        await evil.call_expert(victim.node.peer_address, messages.TAKE_OVER, body, timeout=10.0)
                assert victim.node.metrics.total("network_lookups") == before


async def test_nobody_uses_up_another_trainers_call_id() -> None:
    async with server([]) as (honest, _):
        peers = [honest.node.address]
        async with ta.TesseractNode(initial_peers=peers) as evil, ta.TesseractNode(initial_peers=peers) as trainer:
            call_id = os.urandom(16)

            async def backward(node: ta.TesseractNode, gradient: float) -> int:
                metas, buffers = wire.pack_tensors([X, torch.full((2, 4), gradient)])
                request = messages.BackwardRequest(UID, call_id, metas, 1, True, 0, 0, "none")
                body = messages.encode(request)
                peer = honest.node.peer_address
                reply = await node.call_expert(peer, messages.BACKWARD, body, buffers, timeout=10.0)
                return messages.decode(messages.BackwardReply, reply.body).version

            assert await backward(evil, 0.0) == 1
            before = honest.experts[UID].module.weight.detach().clone()
            assert await backward(trainer, 5.0) == 2 and await backward(trainer, 5.0) == 2
            assert not torch.equal(before, honest.experts[UID].module.weight)
