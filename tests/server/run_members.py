"""Members of a run on real nodes, which take their part in it by themselves."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import GRANT_SECONDS, grant_text, sign_grant
from tesseract_async.experts.places import Place, Standing, Survey, encode_place, places_key
from tesseract_async.experts.publisher import PublisherSettings
from tesseract_async.experts.run import RunManifest, SignedRun, sign_run
from tesseract_async.server.capacity import Capacity
from tesseract_async.server.other_replicas import ReplicaSettings
from tesseract_async.server.placing import Placing
from tesseract_async.server.succession import ReplicaKeeper
from tests.scripted_node import ScriptedNode

OWNER = ta.Identity.from_seed(bytes([99]) * 32)
LEASE = 2.0
SETTINGS = ReplicaSettings(check_every=1.0, call_timeout=5.0)
PUBLISHER = PublisherSettings(declare_timeout=1.0, ttl=10.0)

X = torch.ones(2, 4)


def make_run(num_experts: int, *, lease: float = LEASE, sync_every: float = 0.5, **more: Any) -> SignedRun:
    values = {"created": int(time.time() * 1000), "lease": lease, "sync_every": sync_every, **more}
    return sign_run(OWNER, RunManifest("placed", "ffn", (num_experts,), "ffn", **values))


def build(uid: str) -> ta.ExpertBackend:
    module = nn.Linear(4, 4)
    with torch.no_grad():
        module.weight.fill_(0.1)
        module.bias.zero_()
    return ta.ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.01), args_schema=(ta.TensorSpec((4,)),)
    )


class Member:
    """A node that takes part in a run, as many of its experts as fall to it."""

    def __init__(
        self,
        node: ScriptedNode,
        server: ta.TesseractServer,
        keeper: ReplicaKeeper,
        placing: Placing,
        authority: Authority,
    ) -> None:
        self.server, self.keeper, self.placing, self.node = server, keeper, placing, node
        self.authority = authority

    def leads(self, uid: str) -> bool:
        hosted = self.server.hosted.get(uid)
        return hosted is not None and hosted.is_primary and self.keeper.may_step(uid)

    def version(self, uid: str) -> int:
        """Steps in what it computes, or in the sealed file that it holds."""
        if uid in self.server.experts:
            return self.server.experts[uid].version
        held = self.keeper.tenures.tenure(uid).held
        return -1 if held is None else held.version

    async def kill(self) -> None:
        """As by SIGKILL: its sockets are gone, nothing is said, and no task goes on."""
        self.node.network.abort()
        for connection in self.node.endpoint.pool.connections():
            connection.abort("killed")
        await self.node.endpoint.aclose()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await self.placing.__aexit__()
        await self.keeper.tenures.aclose()
        await self.node.aclose()  # else its server would wait for answers to its farewell


def identity_of(number: int) -> ta.Identity:
    return ta.Identity.from_seed(number.to_bytes(32, "big"))


@contextlib.asynccontextmanager
async def joined(
    run: SignedRun, number: int, seeds: list[str], *, kind: type[ScriptedNode] = ScriptedNode
) -> AsyncIterator[ScriptedNode]:
    identity = identity_of(number)
    now = int(time.time())
    assert run.tag is not None
    run_id = run.tag.run_id("ffn")
    grant = sign_grant(OWNER, run_id, identity.peer_id, ("host", "train"), serial=now, not_after=now + GRANT_SECONDS)
    async with kind(initial_peers=seeds, identity=identity) as node:
        await node.join_run(run, grant=grant_text(grant))
        if seeds:
            await node.network.wait_joined(30.0)
        yield node


@contextlib.asynccontextmanager
async def member(
    run: SignedRun,
    number: int,
    seeds: list[str],
    *,
    room: int = 4,
    files: int = 16,
    folder: Path | None = None,
    build: Callable[[str], ta.ExpertBackend] = build,
    kind: type[ScriptedNode] = ScriptedNode,
) -> AsyncIterator[Member]:
    async with joined(run, number, seeds, kind=kind) as node:
        server = ta.TesseractServer(node, {}, checkpoint_dir=folder, publisher_settings=PUBLISHER)
        async with server, ReplicaKeeper(server, settings=SETTINGS) as keeper:
            authority = node.trust.authority("ffn")
            assert authority is not None
            placing = Placing(
                server, keeper, authority, Capacity(room, files, 1000.0), build=build, template=build("ffn.0")
            )
            async with placing:
                yield Member(node, server, keeper, placing, authority)


async def say(liar: ta.TesseractNode, place: Place) -> None:
    """Publish a place that is not so."""
    authority = liar.trust.authority("ffn")
    assert authority is not None
    grant = liar.trust.own_grant("ffn")
    parts = encode_place(place, prefix="ffn", tag=authority.tag, grant=grant, addresses=[liar.address])
    await liar.network.store(places_key("ffn", authority.tag), parts[0], ttl=60.0, subkey="0")


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (nothing tells of it)
            await asyncio.sleep(0.02)


def standings(members: list[Member], num_experts: int) -> list[Standing]:
    survey = Survey({one.node.peer_id: one.placing.place() for one in members})
    return [survey.standing(f"ffn.{n}") for n in range(num_experts)]
