"""Primary and followers on real nodes: in step, taken over, handed over under load, never two for long."""

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.errors import NotAllowed, NotPrimary, Overloaded
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.publisher import PublisherSettings
from tesseract_async.server.other_replicas import ReplicaMismatch, ReplicaSettings, adopt_states, read_replicas
from tesseract_async.server.state_transfer import REUSE_SECONDS
from tesseract_async.server.succession import ReplicaKeeper, boottime
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire
from tests.scripted_node import ScriptedNode

UID = "ffn.0"
BY_HAND = ReplicaSettings(check_every=1000.0, sync_every=1000.0, call_timeout=30.0)
PUBLISHER = PublisherSettings(declare_timeout=2.0)
X = torch.ones(2, 4)


def make_backend(seed: int = 0, module: nn.Module | None = None) -> ta.ExpertBackend:
    torch.manual_seed(seed)
    module = nn.Linear(4, 4) if module is None else module
    return ta.ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.01), args_schema=(ta.TensorSpec((4,)),)
    )


class Volunteer:
    """A node with a server of one expert."""

    def __init__(self, node: ScriptedNode, server: ta.TesseractServer, settings: ReplicaSettings, reuse: float) -> None:
        self.node, self.server = node, server
        self.skipped = 0.0
        """Seconds by which its clock is ahead."""
        self.keeper = ReplicaKeeper(server, settings=settings, reuse=reuse, elapsed=lambda: boottime() + self.skipped)

    @property
    def version(self) -> int:
        return self.server.experts[UID].version

    @property
    def leads(self) -> bool:
        return self.server.is_primary(UID)


@contextlib.asynccontextmanager
async def volunteer(
    peers: Sequence[str] = (),
    *,
    seed: int = 0,
    follow: bool = False,
    settings: ReplicaSettings = BY_HAND,
    identity: ta.Identity | None = None,
    module: nn.Module | None = None,
    policy: ta.Policy | None = None,
    checkpoints: Path | None = None,
    reuse: float = 0.0,
    follows: Sequence[str] = (),
) -> AsyncIterator[Volunteer]:
    async with ScriptedNode(initial_peers=peers, identity=identity, policy=policy) as node:
        await node.network.wait_joined(30.0)
        backends = {UID: make_backend(seed, module)} | {uid: make_backend() for uid in follows}
        server = ta.TesseractServer(
            node,
            backends,
            followers=[UID, *follows] if follow else follows,
            publisher_settings=PUBLISHER,
            checkpoint_dir=checkpoints,
        )
        async with server:
            one = Volunteer(node, server, settings, reuse)
            async with one.keeper:
                yield one


async def forward(node: ta.TesseractNode, at: Volunteer) -> torch.Tensor:
    metas, buffers = wire.pack_tensors([X])
    request = messages.ForwardRequest(
        uid=UID, tensors=metas, training=False, seed=0, reply_codec="none", keep_inputs=False
    )
    reply = await node.call_expert(
        at.node.peer_address, messages.FORWARD, messages.encode(request), buffers, timeout=30.0
    )
    (y,) = wire.unpack_tensors(reply.body[0], reply.buffers)
    assert y is not None
    return y


async def backward(node: ta.TesseractNode, at: Volunteer, call_id: bytes | None = None, **more: Any) -> int:
    metas, buffers = wire.pack_tensors([X, torch.ones(2, 4)])
    request = messages.BackwardRequest(
        uid=UID,
        call_id=call_id or os.urandom(16),
        tensors=metas,
        num_inputs=1,
        training=False,
        seed=0,
        version=0,
        reply_codec="none",
    )
    body = messages.encode(request._replace(**more))
    reply = await node.call_expert(at.node.peer_address, messages.BACKWARD, body, buffers, timeout=30.0)
    return int(reply.body[1])


def kept_in(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*.aside")]


def equal(left: Volunteer, right: Volunteer) -> bool:
    a, b = (one.server.experts[UID].module.state_dict() for one in (left, right))
    return all(torch.equal(a[name], b[name]) for name in a)


async def test_a_follower_keeps_up_answers_forwards_and_names_the_primary() -> None:
    async with volunteer() as first, volunteer([first.node.address], seed=1, follow=True) as second:
        assert equal(first, second) and not second.leads
        assert torch.equal(await forward(first.node, second), await forward(first.node, first))
        with pytest.raises(NotPrimary) as caught:
            await backward(first.node, second)
        assert caught.value.primary == first.node.peer_id
        async with ta.TesseractNode(initial_peers=[first.node.address]) as trainer:
            expert = await trainer.get_expert(UID)
            others = [one for one in await trainer.directory.find(UID) if one.peer.peer_id == second.node.peer_id]
            trainer.directory.known = lambda uid: [*others, *first_of(first)]  # type: ignore[method-assign]
            await ta.backward((await expert(X)).sum())
        assert (first.version, second.version) == (1, 0), "nothing was relayed, and the trainer went on to the primary"
        await second.keeper.look()
        assert second.version == 0, "not due before sync_every"
        second.keeper.bare.forget(UID)
        await second.keeper.look()
        assert second.version == 1 and equal(first, second)
        assert second.node.metrics.total("states_pulled") == 2


def first_of(one: Volunteer) -> list[ExpertReplica]:
    return [ExpertReplica(UID, one.node.peer_address, 1, time.time() + 60, primary=True)]


async def test_the_newest_follower_takes_over_when_the_primary_is_gone() -> None:
    async with contextlib.AsyncExitStack() as stack:
        seed = await stack.enter_async_context(ta.TesseractNode())
        primary = contextlib.AsyncExitStack()
        first = await primary.enter_async_context(volunteer([seed.address]))
        second = await stack.enter_async_context(volunteer([seed.address], follow=True))
        third = await stack.enter_async_context(volunteer([seed.address], follow=True))
        await backward(seed, first)
        third.keeper.bare.forget(UID)
        await third.keeper.look()  # it has one step more than second
        assert (second.version, third.version) == (0, 1)
        await primary.aclose()
        await second.keeper.look()
        assert not second.leads and second.version == 0, "third is newer, and is about to take over"
        for follower in (third, second):
            await follower.keeper.look()
        leader, other = third, second
        assert leader.leads and not other.leads and equal(leader, other)
        assert leader.node.metrics.total("experts_taken_over") == 1
        assert await backward(seed, leader) == 2
        (found, *others) = (await read_replicas(seed, [UID]))[UID]
        assert found.primary and found.peer.peer_id == leader.node.peer_id and not others[0].primary


@pytest.mark.parametrize("listed", [True, False])
async def test_two_running_primaries_settle_where_they_list_each_other_and_are_told_of_elsewhere(
    listed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [ta.Identity.from_seed(bytes([n]) * 32) for n in (1, 2)]
    policy = ta.Policy.only([one.peer_id for one in ids]) if listed else None
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(volunteer(identity=ids[0], policy=policy, checkpoints=tmp_path))
        peers = [first.node.address]
        second = await stack.enter_async_context(volunteer(peers, seed=1, follow=True, identity=ids[1], policy=policy))
        await backward(second.node, first)
        await second.server.set_primary(UID, True)  # as after a partition
        for _ in range(2):
            await backward(first.node, second)
        second.skipped += 100.0  # longer than a lease
        await first.keeper.look()
        await second.keeper.look()
        if listed:
            assert second.leads and not first.leads
            assert first.version == 2 and equal(first, second)
            assert first.node.metrics.total("experts_given_up") == 1
            assert kept_in(tmp_path) == ["000000000001.aside"], "its step is kept"
        else:
            assert second.leads and first.leads and not kept_in(tmp_path)
            assert first.node.metrics.total("primaries_disputed") == 1
            assert "--allow-file" in caplog.text


async def test_one_that_stood_still_follows_who_took_over_and_keeps_its_own_steps(tmp_path: Path) -> None:
    async with (
        volunteer(checkpoints=tmp_path) as first,
        volunteer([first.node.address], seed=1, follow=True) as second,
    ):
        await backward(second.node, first)
        await second.server.set_primary(UID, True)
        first.skipped += 2000.0  # what a clock that runs through suspend shows
        await first.keeper.look()
        assert not first.leads and equal(first, second)
        assert kept_in(tmp_path) == ["000000000001.aside"]


@pytest.mark.parametrize("is_cut_off", [False, True])
async def test_pulling_a_state_for_longer_than_a_lease_is_not_standing_still(
    is_cut_off: bool,
) -> None:
    """A primary that follows others for another expert stays primary, unless it was cut off meanwhile."""
    quick = dataclasses.replace(BY_HAND, check_every=0.01)
    async with (
        volunteer(settings=quick, follows=["ffn.1"]) as one,
        volunteer([one.node.address], follow=True, follows=["ffn.1"]) as rival,
    ):
        await backward(rival.node, one)
        for uid in (UID, "ffn.1"):
            await rival.server.set_primary(uid, True)
        has_read = asyncio.Event()

        async def reading(read: Any, key: Any) -> Any:
            found = await read(key)
            has_read.set()
            return found

        async def slow(call: Any, peer: Any, method: str, *rest: Any, **more: Any) -> Any:
            for _ in range(5 if method == messages.STATE else 0):
                one.skipped += 300.0 if is_cut_off else 20.0
                for _ in range(2):  # the second one has begun after the clock went on
                    has_read.clear()
                    await has_read.wait()
            return await call(peer, method, *rest, **more)

        one.node.on_read, one.node.on_call = reading, slow
        one.keeper.bare.forget("ffn.1")
        async with asyncio.timeout(30):
            await one.keeper.look()
            await one.keeper.look()
        assert one.leads is not is_cut_off and one.node.metrics.total("states_pulled") > 0


async def test_waiting_for_the_state_of_one_that_is_gone_puts_off_no_takeover() -> None:
    async with volunteer() as first, volunteer([first.node.address], follow=True) as second:

        async def gone(call: Any, peer: Any, method: str, *rest: Any, **more: Any) -> Any:
            if method == messages.STATE:
                second.skipped += 2000.0  # as many experts' time-outs would take: as if it had stood still
            raise TimeoutError

        second.node.on_call = gone
        second.keeper.bare.forget(UID)
        await second.keeper.look()
        assert not second.leads, "it may be busy"
        second.skipped += 100.0  # longer than a lease
        await second.keeper.look()
        assert second.leads


async def test_who_gives_an_expert_back_goes_on_from_its_primarys_state_though_that_has_fewer_steps(
    tmp_path: Path,
) -> None:
    async with (
        volunteer() as first,
        volunteer([first.node.address], follow=True, checkpoints=tmp_path) as second,
    ):

        async def cut_off(*_: Any, **__: Any) -> Any:
            raise TimeoutError

        second.node.on_call = cut_off
        await second.keeper.look()
        second.skipped += 100.0  # longer than a lease
        await second.keeper.look()
        second.node.on_call = None
        assert second.leads
        await backward(first.node, second)
        await second.keeper.look()
        assert not second.leads and second.version == 0 and equal(first, second)
        assert kept_in(tmp_path) == ["000000000001.aside"]


async def test_a_slow_state_puts_off_no_takeover() -> None:
    quick = dataclasses.replace(BY_HAND, check_every=0.01)
    async with (
        volunteer(follows=["ffn.1"]) as first,
        volunteer([first.node.address], follow=True, follows=["ffn.1"], settings=quick) as second,
    ):
        waits, has_read = asyncio.Event(), asyncio.Event()

        async def slow(call: Any, peer: Any, method: str, *rest: Any, **more: Any) -> Any:
            if method == messages.STATE:
                waits.set()
                await asyncio.Event().wait()
            if waits.is_set():
                raise TimeoutError
            return await call(peer, method, *rest, **more)

        async def reading(read: Any, key: Any) -> Any:
            found = await read(key)
            has_read.set()
            return found

        second.node.on_call, second.node.on_read = slow, reading
        second.keeper.bare.forget("ffn.1")
        async with asyncio.timeout(30):
            await waits.wait()
            while not second.leads:
                second.skipped += 10.0  # less than a lease: it does not stand still
                has_read.clear()
                await has_read.wait()


async def test_it_looks_by_itself() -> None:
    quick = ReplicaSettings(check_every=0.05, sync_every=0.05)
    async with volunteer() as first, volunteer([first.node.address], follow=True, settings=quick) as second:
        async with asyncio.timeout(30):
            while not second.node.metrics.total("states_pulled"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await backward(first.node, first)
            while not second.version:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert equal(first, second)


async def test_a_primary_that_leaves_hands_over_under_load_and_nothing_is_lost_or_applied_twice() -> None:
    async with contextlib.AsyncExitStack() as stack:
        trainer = await stack.enter_async_context(ta.TesseractNode())
        primary = contextlib.AsyncExitStack()
        first = await primary.enter_async_context(volunteer([trainer.address], reuse=REUSE_SECONDS))
        second = await stack.enter_async_context(volunteer([trainer.address], follow=True))
        async with primary:
            versions: list[int] = []
            under_way = asyncio.Event()
            handed_over = asyncio.Event()

            async def train() -> None:
                while not handed_over.is_set() or len(versions) < 40:
                    at = second if handed_over.is_set() else first
                    try:
                        versions.append(await backward(trainer, at, call_id := os.urandom(16)))
                    except NotPrimary as error:
                        assert error.primary == second.node.peer_id
                        versions.append(await backward(trainer, second, call_id))
                    if len(versions) >= 10:
                        under_way.set()

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(train()) for _ in range(4)]
                await under_way.wait()
                assert await first.keeper.hand_over() == 1
                handed_over.set()
            assert len(tasks) == 4 and second.leads and not first.leads
            # merged backwards share a step, so versions repeat; but all were journalled, each once
            applied = second.server.experts[UID].applied
            assert len(applied) == len(versions)
            assert second.version == max(versions)
        assert await backward(trainer, second) == max(versions) + 1


async def test_after_a_handover_an_old_manifest_of_the_one_before_starts_no_quarrel() -> None:
    low, high = sorted((ta.Identity.from_seed(bytes([n]) * 32) for n in (1, 2)), key=lambda one: one.peer_id)
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(volunteer(identity=low))
        second = await stack.enter_async_context(volunteer([first.node.address], follow=True, identity=high))
        stale = await second.node.network.get_entries(second.node.trust.shard_key(UID))
        assert (await read_replicas(second.node, [UID]))[UID][0].primary
        assert await first.keeper.hand_over() == 1

        async def read_stale(read: Any, key: str) -> Any:
            return stale

        # equal steps and the lower id: without the handover, the second one would give way
        second.node.on_read = read_stale
        await second.keeper.look()
        second.node.on_read = None
        await first.keeper.look()
        assert second.leads and not first.leads
        (found,) = (await read_replicas(second.node, [UID]))[UID]
        assert not found.primary


class Slow(nn.Linear):
    """Says when it computes a backward, and takes its time."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.begun = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.loop.call_soon_threadsafe(self.begun.set)
            time.sleep(0.2)
        return super().forward(x)


async def test_what_is_being_applied_when_it_hands_over_goes_along() -> None:
    slow = Slow()
    async with volunteer(module=slow) as first, volunteer([first.node.address], follow=True) as second:
        task = asyncio.create_task(backward(first.node, first))
        await slow.begun.wait()
        assert await first.keeper.hand_over() == 1
        assert await task == 1
        assert second.leads and second.version == 1 and len(second.server.experts[UID].applied) == 1


async def test_who_pauses_hands_over_and_comes_back_as_a_follower() -> None:
    async with volunteer() as first, volunteer([first.node.address], follow=True) as second:
        await backward(first.node, first)
        await first.keeper.hand_over()
        await first.server.pause("its owner uses the machine", retry_after=1.0)
        assert (second.leads, second.version) == (True, 1)
        await backward(first.node, second)
        await first.keeper.look()
        assert first.version == 1, "it rests"
        await first.keeper.look(even_paused=True)
        await first.server.resume()
        assert not first.leads and first.version == 2 and equal(first, second)
        (found,) = (await read_replicas(second.node, [UID]))[UID]
        assert not found.primary


async def test_without_a_follower_it_stays_primary() -> None:
    async with volunteer() as only:
        assert await only.keeper.hand_over() == 0
        assert only.leads and await backward(only.node, only) == 1


async def test_a_network_that_does_not_answer_delays_nobody_for_long() -> None:
    settings = dataclasses.replace(BY_HAND, call_timeout=0.05)
    async with ta.TesseractNode() as other, volunteer([other.address], settings=settings) as first:

        async def hang(read: Any, key: str) -> Any:
            await asyncio.Event().wait()

        first.node.on_read = hang
        for asked in (first.keeper.look, first.keeper.hand_over):
            with pytest.raises(TimeoutError):
                await asked()
        first.node.is_cut_off = True
        assert await first.keeper.hand_over() == 0


async def test_a_follower_that_cannot_take_over_leaves_the_expert_where_it_is() -> None:
    async with volunteer() as first, volunteer([first.node.address], follow=True) as second:

        async def refuse(*_: Any) -> Any:
            raise NotAllowed("not today")

        second.server.handle(messages.TAKE_OVER, refuse)
        waiting = asyncio.create_task(first.keeper.hand_over())
        assert await waiting == 0
        assert first.leads and await backward(first.node, first) == 1


async def test_only_the_primary_may_hand_over() -> None:
    async with volunteer() as first, volunteer([first.node.address], follow=True) as second:
        async with ta.TesseractNode(initial_peers=[first.node.address]) as stranger:
            body = messages.encode(messages.TakeOverRequest(UID))
            for victim in (first, second):
                with pytest.raises(NotAllowed, match="is not the primary"):
                    await stranger.call_expert(victim.node.peer_address, messages.TAKE_OVER, body, timeout=30.0)
        assert first.leads and not second.leads


async def test_a_server_that_leaves_takes_nothing_over() -> None:
    async with volunteer() as first, volunteer([first.node.address], follow=True) as second:
        await second.server.drain(timeout=30.0)
        body = messages.encode(messages.TakeOverRequest(UID))
        with pytest.raises(Overloaded, match="this server is leaving"):
            await first.node.call_expert(second.node.peer_address, messages.TAKE_OVER, body, timeout=30.0)
        assert first.leads and not second.leads


async def test_a_newcomer_adopts_what_others_trained() -> None:
    async with volunteer(seed=5) as first:
        await backward(first.node, first)
        async with ta.TesseractNode(initial_peers=[first.node.address]) as node:
            await node.network.wait_joined(30.0)
            backends = {UID: make_backend(1), "ffn.1": make_backend(2)}
            assert set(await adopt_states(node, backends, settings=BY_HAND)) == {UID}
            theirs = first.server.experts[UID].module.state_dict()
            assert all(torch.equal(theirs[name], value) for name, value in backends[UID].module.state_dict().items())
            assert backends[UID].version == 1 and backends["ffn.1"].version == 0


async def test_a_state_that_was_adopted_is_not_fetched_again_and_no_step_of_its_own_is_kept(tmp_path: Path) -> None:
    async with volunteer(seed=5) as first:
        await backward(first.node, first)
        async with ta.TesseractNode(initial_peers=[first.node.address]) as node:
            await node.network.wait_joined(30.0)
            backends = {UID: make_backend(1)}
            adopted = await adopt_states(node, backends, settings=BY_HAND)
            assert adopted == {UID: first.node.peer_id}
            server = ta.TesseractServer(
                node, backends, followers=adopted, publisher_settings=PUBLISHER, checkpoint_dir=tmp_path
            )
            async with server, ReplicaKeeper(server, settings=BY_HAND, adopted=adopted) as keeper:
                assert keeper.primary(UID) == first.node.peer_id and not node.metrics.total("states_pulled")
                await backward(first.node, first)
                keeper.bare.forget(UID)  # as if it were due
                await keeper.look()
                assert server.experts[UID].version == 2 and node.metrics.total("states_pulled") == 1
            assert not kept_in(tmp_path), "its steps are all the primary's"
        async with ta.TesseractNode(initial_peers=[first.node.address]) as node:
            await node.network.wait_joined(30.0)
            backends = {UID: make_backend(1)}
            adopted = await adopt_states(node, backends, settings=BY_HAND)
            server = ta.TesseractServer(
                node, backends, followers=adopted, publisher_settings=PUBLISHER, checkpoint_dir=tmp_path
            )
            async with server, ReplicaKeeper(server, settings=BY_HAND, adopted=adopted):
                assert node.metrics.total("states_pulled") == 1, "it began from a checkpoint of its own"


async def test_a_server_that_would_host_something_else_does_not_start() -> None:
    async with volunteer(seed=5) as first:
        async with ta.TesseractNode(initial_peers=[first.node.address]) as node:
            await node.network.wait_joined(30.0)
            wider = nn.Linear(8, 4)
            other = ta.ExpertBackend(wider, args_schema=(ta.TensorSpec((8,)),))
            with pytest.raises(ReplicaMismatch, match=r"ffn.0 is .*4.* which trains it, and .*8.* here: start this"):
                await adopt_states(node, {UID: other}, settings=BY_HAND)
            deeper = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
            other = ta.ExpertBackend(deeper, args_schema=(ta.TensorSpec((4,)),))
            with pytest.raises(
                ReplicaMismatch, match="its weight 0.bias has none there and shape \\[6\\] here"
            ) as caught:
                await adopt_states(node, {UID: other}, settings=BY_HAND)
            assert len(str(caught.value)) < 300
