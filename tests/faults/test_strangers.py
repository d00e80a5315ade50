"""Strangers in a closed swarm, by a list or by a run: what they say changes nothing, and they are sent nothing."""

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import NotAllowed, PeerUnreachable, RemoteError
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.claiming import claim_experts, claims_key, encode_reservation
from tesseract_async.experts.grants import GRANT_SECONDS, Grant, Role, grant_text, sign_grant, sign_revocations
from tesseract_async.experts.manifest import RunTag, encode_manifest, grid_key, shard_key, split_uid
from tesseract_async.experts.node_calls import EXPERT_METHODS
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.publisher import PublisherSettings
from tesseract_async.experts.run import RunManifest, sign_run
from tesseract_async.experts.run_directory import publish_grant
from tesseract_async.server.other_replicas import ReplicaSettings, adopt_states
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import apply, messages
from tesseract_async.wire import tensors as wire

UID, FREE = "ffn.0.0", "ffn.0.1"
SIZE = (1, 2)
PATTERN = ExpertPattern.parse("ffn.0.[0:2]")
BY_HAND = ReplicaSettings(check_every=1000.0, sync_every=1000.0, call_timeout=30.0)
PUBLISHER = PublisherSettings(declare_timeout=1.0)
SERVER, TRAINER, NEWCOMER, OWNER, STRANGER = (ta.Identity.from_seed(bytes([n]) * 32) for n in range(11, 16))
MEMBERS = [one.peer_id for one in (SERVER, TRAINER, NEWCOMER)]
X = torch.ones(2, 4)
RUN = sign_run(OWNER, RunManifest("digits", "ffn", SIZE, "ffn", created=1))
TAG = RunTag(OWNER.peer_id, "digits", "granted")
RUN_ID = TAG.run_id("ffn")


def make_backend(value: float = 0.1) -> ta.ExpertBackend:
    module = nn.Linear(4, 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return ta.ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.01), args_schema=(ta.TensorSpec((4,)),)
    )


def grant_of(
    identity: ta.Identity, *roles: Role, signer: ta.Identity = OWNER, run_id: bytes = RUN_ID, **values: Any
) -> Grant:
    now = int(time.time())
    fields = {"serial": now, "not_after": now + GRANT_SECONDS} | values
    return sign_grant(signer, run_id, identity.peer_id, roles or ("host", "train"), **fields)


@dataclass
class Stranger:
    """A node of nobody's, which answers whatever it is asked and counts it."""

    node: ta.TesseractNode
    asked: Counter[str] = field(default_factory=Counter)

    async def claim(self, tag: RunTag | None, grants: list[bytes]) -> None:
        """Calls itself the primary of everything, once with each grant."""
        for number, grant in enumerate(grants):
            ((part, _),) = encode_manifest(
                [self.node.address],
                {(0, 0): True, (0, 1): True},
                prefix="ffn",
                sequence=2**47 + number,
                tag=tag,
                grant=grant,
                epochs={(0, 0): 2**32 - 1},
            )
            for key in (grid_key("ffn", tag), shard_key(UID, tag), shard_key(FREE, tag)):
                assert await self.node.network.store(key, part, ttl=60.0, subkey=str(number)) >= 1
        (reserved,) = encode_reservation([(0, 1)])
        await self.node.network.store(claims_key("ffn", tag), reserved, ttl=60.0, subkey="0")

    async def answer(self, call: IncomingCall) -> Message:
        self.asked[call.method] += 1
        raise RemoteError("any answer would do")


@dataclass
class Swarm:
    server: ta.TesseractServer
    keeper: ReplicaKeeper
    trainer: ta.TesseractNode
    stranger: Stranger
    tag: RunTag | None

    @property
    def node(self) -> ta.TesseractNode:
        return self.server.node


@contextlib.asynccontextmanager
async def member(identity: ta.Identity, kind: str, seeds: list[str], *roles: Role) -> AsyncIterator[ta.TesseractNode]:
    policy = ta.Policy.only(MEMBERS) if kind == "list" else None
    async with ta.TesseractNode(initial_peers=seeds, identity=identity, policy=policy) as node:
        if kind == "run":
            await node.join_run(RUN, grant=grant_text(grant_of(identity, *roles)))
        yield node


@contextlib.asynccontextmanager
async def closed(kind: str) -> AsyncIterator[Swarm]:
    """A server, a trainer, and a stranger that claims their expert in every way."""
    async with member(SERVER, kind, []) as node:
        server = ta.TesseractServer(node, {UID: make_backend()}, publisher_settings=PUBLISHER)
        async with (
            server,
            ReplicaKeeper(server, settings=BY_HAND) as keeper,
            member(TRAINER, kind, [node.address]) as trainer,
            ta.TesseractNode(initial_peers=[node.address], identity=STRANGER) as evil,
        ):
            stranger = Stranger(evil)
            for uid in (UID, FREE):
                evil.host_expert(uid, dict.fromkeys(EXPERT_METHODS, stranger.answer))
            tag = TAG if kind == "run" else None
            other_run = Authority(sign_run(OWNER, RunManifest("letters", "ffn", SIZE, "ffn"))).run_id
            forged = [
                b"",
                grant_of(STRANGER, signer=STRANGER).blob,
                grant_of(STRANGER, run_id=other_run).blob,
                grant_of(STRANGER, "train").blob,
                grant_of(SERVER, "host", serial=1).blob,
            ]
            await stranger.claim(None, [b""])
            if tag is not None:
                await stranger.claim(tag, forged)
            yield Swarm(server, keeper, trainer, stranger, tag)


def forward_request() -> tuple[Any, Any]:
    metas, buffers = wire.pack_tensors([X])
    request = messages.ForwardRequest(
        uid=UID, tensors=metas, training=False, seed=0, reply_codec="none", keep_inputs=False
    )
    return messages.encode(request), buffers


@pytest.mark.parametrize("kind", ["list", "run"])
async def test_a_strangers_claims_change_no_role_file_mask_or_route_of_members(kind: str) -> None:
    async with closed(kind) as swarm:
        before = swarm.server.experts[UID].version, swarm.server.experts[UID].module.state_dict()["weight"].clone()
        await swarm.keeper.look()
        assert swarm.server.is_primary(UID) and swarm.keeper.primary(UID) is None
        for node in (swarm.trainer, swarm.node):
            assert [one.peer.peer_id for one in await node.directory.find(UID)] == [SERVER.peer_id]
            assert await node.directory.find(FREE, even_failed=True) == []
            if kind == "list":  # nor does anything else that reads the network hear it
                assert {one.owner for one in await node.network.get_entries(grid_key("ffn"))} == {SERVER.peer_id}
        swarm.trainer.directory.watch("ffn", SIZE)
        await swarm.trainer.directory.wait_warm("ffn")
        view = swarm.trainer.directory.live("ffn")
        assert view is not None and list(view.replicas) == [(0, 0)]
        expert = await swarm.trainer.get_expert(UID)
        y = await expert(X)
        assert torch.allclose(y, torch.full((2, 4), 0.5))
        assert torch.equal(swarm.server.experts[UID].module.state_dict()["weight"], before[1])
        await ta.backward(y.sum())
        assert swarm.server.experts[UID].version == before[0] + 1
        assert not swarm.stranger.asked, "neither a probe nor a row"
        assert not swarm.trainer.metrics.total("replicas_masked") and not swarm.node.metrics.total("replicas_masked")


@pytest.mark.parametrize("kind", ["list", "run"])
async def test_members_send_a_stranger_nothing_though_they_know_its_address(kind: str) -> None:
    async with closed(kind) as swarm:
        body, buffers = forward_request()
        address = swarm.stranger.node.peer_address
        anybody = PeerAddress(None, address.addresses)
        for node in (swarm.trainer, swarm.node):
            for peer in (address, anybody):
                with pytest.raises(PeerUnreachable, match="may not host ffn.0.0"):
                    await node.call_expert(peer, messages.FORWARD, body, buffers, timeout=10.0)
        assert not swarm.stranger.asked
        assert swarm.trainer.metrics.total("expert_calls_held_back") == 2


async def ask_many(
    endpoint: Any, peer: PeerAddress, *, backward: bool
) -> tuple[RemoteError | None, dict[int, RemoteError]]:
    """The error of an ``expert.apply`` as a whole, if it has one, and else of each expert in it."""
    x = torch.ones(2, 4)
    metas, buffers = wire.pack_tensors([x] * (1 + backward))
    numbers = np.array([0])
    request = apply.ApplyRequest(
        "ffn",
        np.array([split_uid(UID)[1]], dtype=np.uint32),
        [bytes(16)],
        numbers,
        np.array([0, 2]),
        np.array([0, 1], dtype=np.int32),
        np.ones(2, dtype=np.float32),
        metas,
        1,
        backward,
        training=True,
        keep=False,
        seed=0,
        reply_codec="none",
    )
    body, first = apply.encode_request(request)
    try:
        parts = endpoint.call_parts(peer, apply.APPLY, body, [*first, *buffers], timeout=10.0)
        decoded = [apply.decode_part(*part, request)[0] async for part in parts]
    except RemoteError as error:
        return error, {}
    return None, {expert: error for part in decoded for expert, error in part.failures}


@pytest.mark.parametrize("kind", ["list", "run"])
async def test_a_stranger_may_ask_nothing_of_members(kind: str) -> None:
    async with closed(kind) as swarm:
        body, buffers = forward_request()
        state = messages.StateRequest(UID, True, 0, bytes(16), 0)
        asks: list[tuple[str, Any, Any]] = [
            (messages.INFO, messages.encode(messages.InfoRequest(UID)), ()),
            (messages.FORWARD, body, buffers),
            (messages.BACKWARD, body, buffers),
            (messages.STATE, messages.encode(state), ()),
            (messages.STATE, messages.encode(state._replace(weights_only=False)), ()),
            (messages.TAKE_OVER, messages.encode(messages.TakeOverRequest(UID)), ()),
        ]
        for method, request, some in asks:
            with pytest.raises(NotAllowed):
                await swarm.stranger.node.call_expert(swarm.node.peer_address, method, request, some, timeout=10.0)
        for backward in (False, True):
            whole, failures = await ask_many(swarm.stranger.node.endpoint, swarm.node.peer_address, backward=backward)
            # a list refuses the call, a run the expert
            assert isinstance(whole if kind == "list" else failures[0], NotAllowed)
        assert swarm.server.experts[UID].version == 0


@pytest.mark.parametrize("kind", ["list", "run"])
async def test_a_newcomer_chooses_and_adopts_as_if_there_were_no_strangers(kind: str) -> None:
    async with closed(kind) as swarm, member(NEWCOMER, kind, [swarm.node.address]) as newcomer:
        claim = await claim_experts(
            *(newcomer.network, PATTERN, 1),
            random=Random(1),
            trust=newcomer.trust,
        )
        assert claim.uids == {FREE: True}, "the stranger's reservation and its claim to host it count for nothing"
        backends = {UID: make_backend(0.7), FREE: make_backend(0.7)}
        # in a run both are followed, by the records of who leads them
        assert set(await adopt_states(newcomer, backends, settings=BY_HAND)) == (
            {UID} if kind == "list" else {UID, FREE}
        )
        if kind == "run":
            server = ta.TesseractServer(newcomer, {UID: backends[UID]}, followers=[UID], publisher_settings=PUBLISHER)
            async with server, ReplicaKeeper(server, settings=BY_HAND):
                assert not server.is_primary(UID)
        assert float(backends[UID].module.state_dict()["weight"][0, 0]) == pytest.approx(0.1)
        assert not swarm.stranger.asked


async def test_a_servers_memory_is_its_members() -> None:
    """A large request of a stranger's is refused before it is sent."""
    async with closed("run") as swarm:
        swarm.stranger.node.trust.policy = ta.Policy()
        before = swarm.node.metrics.total("transport_bytes_received")
        body, _ = forward_request()
        with pytest.raises(NotAllowed, match="does not let"):
            await swarm.stranger.node.call_expert(
                swarm.node.peer_address, messages.FORWARD, body, [bytes(8 << 20)], timeout=30.0
            )
        assert swarm.node.metrics.total("transport_bytes_received") - before < 1 << 20
        expert = await swarm.trainer.get_expert(UID)
        with torch.no_grad():
            assert (await expert(torch.ones(1 << 17, 4))).shape == (1 << 17, 4), "members may"


async def test_holders_refuse_what_a_stranger_says_about_a_run() -> None:
    """Any node does, whether it takes part in the run or not: readers do not pay for floods."""
    async with closed("run") as swarm, ta.TesseractNode(initial_peers=[swarm.node.address]) as bystander:
        await bystander.network.wait_joined(30.0)
        entries = await bystander.network.get_entries(grid_key("ffn", TAG))
        assert {entry.owner for entry in entries if entry.owner != STRANGER.peer_id} == {SERVER.peer_id}
        for node in (swarm.node, swarm.trainer):
            protocol: Any = node.network._protocol
            storage = protocol.storage
            held = {record.owner for record in storage}
            assert SERVER.peer_id in held
            manifests = [one for one in storage if one.owner == STRANGER.peer_id and TAG.owner in one.value]
            assert not manifests


async def test_a_revoked_peer_is_out_within_a_refresh() -> None:
    async with closed("run") as swarm, member(NEWCOMER, "run", [swarm.node.address]) as peer:
        second = ta.TesseractServer(peer, {UID: make_backend()}, followers=[UID], publisher_settings=PUBLISHER)
        async with second:
            trainer = swarm.trainer
            trainer.directory.watch("ffn", SIZE)
            await trainer.directory.wait_warm("ffn")
            await trainer.directory.refresh("ffn")
            found = [one.peer.peer_id for one in await trainer.directory.find(UID)]
            assert found == [SERVER.peer_id, NEWCOMER.peer_id]
            for part in sign_revocations(OWNER, RUN_ID, number=0, since=int(time.time()) + 5, peers=[NEWCOMER.peer_id]):
                for node in (trainer, swarm.node):
                    view = node.trust.authority("ffn")
                    assert view is not None and view.learn_revocations(part)
            body, buffers = forward_request()
            assert SERVER.peer_id in [one.peer.peer_id for one in await peer.directory.find(UID)]
            # at once, though the directory has it still
            with pytest.raises(PeerUnreachable, match="may not host"):
                await trainer.call_expert(peer.peer_address, messages.FORWARD, body, buffers, timeout=10.0)
            with pytest.raises(NotAllowed):
                await peer.call_expert(swarm.node.peer_address, messages.FORWARD, body, buffers, timeout=10.0)
            await trainer.directory.refresh("ffn")
            assert [one.peer.peer_id for one in await trainer.directory.find(UID)] == [SERVER.peer_id]


async def test_a_revocation_reaches_every_member_through_the_network() -> None:
    async with closed("run") as swarm:
        first = swarm.node.run_keepers[0]
        assert first.authority is not None
        (part,) = sign_revocations(OWNER, RUN_ID, number=0, since=int(time.time()) + 5, peers=[STRANGER.peer_id])
        first.authority.learn_revocations(part)
        await first.learn_once()  # spreads it
        assert await swarm.trainer.run_keepers[0].learn_once()
        view = swarm.trainer.trust.authority("ffn")
        assert view is not None and view.is_revoked(STRANGER.peer_id)


async def test_an_expired_grant_gives_nothing_new_but_what_goes_on_goes_on() -> None:
    async with closed("run") as swarm:
        expert = await swarm.trainer.get_expert(UID)
        y = await expert(X)
        later = time.time() + 2 * GRANT_SECONDS
        for node in (swarm.node, swarm.trainer):
            node.trust.clock = lambda: later
        # its manifest is believed and renewed, and it is called
        assert [one.peer.peer_id for one in await swarm.trainer.directory.find(UID)] == [SERVER.peer_id]
        assert swarm.trainer.trust.may_host(SERVER.peer_id, UID)
        view = swarm.node.trust.authority("ffn")
        assert view is not None and not view.may(SERVER.peer_id, "host", UID, now=later), "no claim, no Term"
        assert not swarm.node.trust.may_host(TRAINER.peer_id, UID, anew=True)
        await expert(X)
        with pytest.raises(NotAllowed, match="may not train"):
            await ta.backward(y.sum())
        _, failures = await ask_many(swarm.trainer.endpoint, swarm.node.peer_address, backward=True)
        assert isinstance(failures[0], NotAllowed) and "may not train" in str(failures[0])
        assert await ask_many(swarm.trainer.endpoint, swarm.node.peer_address, backward=False) == (None, {})


async def test_a_grant_for_some_experts_is_believed_for_those_only() -> None:
    async with closed("run") as swarm, ta.TesseractNode(initial_peers=[swarm.node.address], identity=NEWCOMER) as node:
        await node.join_run(RUN, grant=grant_text(grant_of(NEWCOMER, "host", pattern=ExpertPattern.parse(FREE))))
        both = {UID: make_backend(), FREE: make_backend()}
        async with ta.TesseractServer(node, both, publisher_settings=PUBLISHER):
            assert [one.peer.peer_id for one in await swarm.trainer.directory.find(UID)] == [SERVER.peer_id]
            assert [one.peer.peer_id for one in await swarm.trainer.directory.find(FREE)] == [NEWCOMER.peer_id]
            body, buffers = forward_request()
            with pytest.raises(PeerUnreachable, match="may not host ffn.0.0"):
                await swarm.trainer.call_expert(node.peer_address, messages.FORWARD, body, buffers, timeout=10.0)


async def test_a_grant_that_comes_late_lets_its_peer_in_over_a_new_connection() -> None:
    async with closed("run") as swarm, ta.TesseractNode(initial_peers=[swarm.node.address], identity=NEWCOMER) as node:
        await node.join_run(RUN)
        expert = await node.get_expert(UID) if await node.directory.find(UID) else None
        assert expert is not None, "a host's grant is shown by its manifest"
        with pytest.raises(NotAllowed, match="no member"):
            await expert(X)
        await publish_grant(swarm.trainer.network, grant_of(NEWCOMER, "train"))
        await node.run_keepers[0].learn_once()
        await ta.backward((await expert(X)).sum())
        assert swarm.server.experts[UID].version == 1


async def test_a_node_takes_part_in_a_run_once_however_often_it_says_so() -> None:
    async with ta.TesseractNode(identity=SERVER) as node:
        first = await node.join_run(RUN, grant=grant_text(grant_of(SERVER)))
        assert await node.join_run(RUN) is first and first.may(SERVER.peer_id, "host", UID, now=None)
        with pytest.raises(ValueError, match="are those of the run digits"):
            await node.join_run(sign_run(OWNER, RunManifest("letters", "ffn", SIZE, "ffn")))
        assert len(node.run_keepers) == 1
