"""Experts of a run on real nodes: led by one, followed by others, taken over, handed over, picked up again."""

import asyncio
import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import Message
from tesseract_async.errors import NotAllowed, RemoteError, TesseractError
from tesseract_async.experts.claiming import GRANT_SUBKEY
from tesseract_async.experts.grants import GRANT_SECONDS, grant_text, sign_appointment, sign_grant
from tesseract_async.experts.manifest import RunTag
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.publisher import PublisherSettings
from tesseract_async.experts.run import RunManifest, sign_run
from tesseract_async.experts.tenure import Tenure
from tesseract_async.experts.tenure_words import State
from tesseract_async.experts.terms import EPOCH_ZERO, TermKind, sign_term
from tesseract_async.monitoring.status import StatusService
from tesseract_async.server.other_replicas import ReplicaSettings, record_subkey
from tesseract_async.server.state_files import read_sealed
from tesseract_async.server.succession import ReplicaKeeper, boottime
from tesseract_async.server.tenures import AUTHORITY_PERIOD, MAX_WAITING, RETRY_SECONDS
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire
from tests.disks import full_disk, syncing

UID = "ffn.0.0"
OWNER, *HOSTS = (ta.Identity.from_seed(bytes([n]) * 32) for n in range(21, 26))
LEASE = 4.0
RUN = sign_run(OWNER, RunManifest("digits", "ffn", (1, 2), "ffn", created=1, lease=LEASE, sync_every=0.5))
RUN_ID = RunTag(OWNER.peer_id, "digits", "granted").run_id("ffn")
SETTINGS = ReplicaSettings(check_every=1.0, call_timeout=15.0)
PUBLISHER = PublisherSettings(declare_timeout=1.0)
X = torch.ones(2, 4)


class Host:
    """A node that hosts the expert."""

    def __init__(self, server: ta.TesseractServer, keeper: ReplicaKeeper) -> None:
        self.server, self.keeper, self.node = server, keeper, server.node

    @property
    def tenure(self) -> Tenure:
        return self.keeper.tenures.tenure(UID)

    @property
    def leads(self) -> bool:
        return self.server.is_primary(UID) and self.server.succession.may_step(UID)

    @property
    def version(self) -> int:
        return self.server.experts[UID].version

    def weight(self) -> torch.Tensor:
        return self.server.experts[UID].module.weight.detach().clone()


@contextlib.asynccontextmanager
async def member(identity: ta.Identity, seeds: list[str]) -> AsyncIterator[ta.TesseractNode]:
    now = int(time.time())
    roles = ("host", "train")
    grant = sign_grant(OWNER, RUN_ID, identity.peer_id, roles, serial=now, not_after=now + GRANT_SECONDS)
    async with ta.TesseractNode(initial_peers=seeds, identity=identity) as node:
        await node.join_run(RUN, grant=grant_text(grant))
        yield node


@contextlib.asynccontextmanager
async def host(
    identity: ta.Identity,
    seeds: list[str],
    folder: Path | None = None,
    *,
    seed: int = 0,
    elapsed: Callable[[], float] = boottime,
) -> AsyncIterator[Host]:
    torch.manual_seed(seed)
    module = nn.Linear(4, 4)
    backend = ta.ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.01), args_schema=(ta.TensorSpec((4,)),)
    )
    async with member(identity, seeds) as node:
        if seeds:
            await node.network.wait_joined(30.0)
        server = ta.TesseractServer(
            node, {UID: backend}, followers=[UID], checkpoint_dir=folder, publisher_settings=PUBLISHER
        )
        async with server, ReplicaKeeper(server, settings=SETTINGS, elapsed=elapsed) as keeper:
            yield Host(server, keeper)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (nothing tells of it)
            await asyncio.sleep(0.02)


async def train(node: ta.TesseractNode, num_steps: int) -> None:
    expert = await node.get_expert(UID)
    for _ in range(num_steps):
        await ta.backward((await expert(X)).sum())


async def epoch_of_answer(node: ta.TesseractNode, server: Host) -> int:
    metas, buffers = wire.pack_tensors([X])
    request = messages.ForwardRequest(UID, metas, False, 0, "none", False)
    reply = await node.call_expert(
        server.node.peer_address, messages.FORWARD, messages.encode(request), buffers, timeout=30.0, idempotent=True
    )
    return messages.decode(messages.ForwardReply, reply.body).epoch


async def test_of_an_expert_that_is_not_loaded_yet_or_was_given_up_nobody_is_named() -> None:
    """A server answers from its start on, and looks up files for seconds before it knows its experts' lines."""
    async with member(HOSTS[0], []) as node:
        backend = ta.ExpertBackend(nn.Linear(4, 4), args_schema=(ta.TensorSpec((4,)),))
        keeper = ReplicaKeeper(ta.TesseractServer(node, {UID: backend}, followers=[UID]), settings=SETTINGS)
        assert await keeper.find_primary(UID) == (None, SETTINGS.check_every)


async def test_one_leads_and_another_follows_it_by_its_seals() -> None:
    async with host(HOSTS[0], []) as first:
        assert first.leads and first.tenure.term is not None and first.tenure.term.kind is TermKind.GENESIS
        async with (
            host(HOSTS[1], [first.node.address], seed=1) as second,
            member(HOSTS[2], [first.node.address]) as trainer,
        ):
            await until(lambda: second.tenure.state is State.FOLLOWING)
            assert torch.equal(first.weight(), second.weight()), "the one that came later took the first one's state"
            await train(trainer, 5)
            assert (first.version, first.leads, second.leads) == (5, True, False)
            await until(lambda: second.version == 5)
            assert torch.equal(first.weight(), second.weight())


async def test_a_killed_primary_is_replaced_within_a_lease_and_stays_aside_when_it_returns(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        seed = await stack.enter_async_context(ta.TesseractNode())
        killed = contextlib.AsyncExitStack()
        first = await killed.enter_async_context(host(HOSTS[0], [seed.address], tmp_path / "a"))
        await until(lambda: first.leads)
        second = await stack.enter_async_context(host(HOSTS[1], [seed.address], tmp_path / "b"))
        trainer = await stack.enter_async_context(member(HOSTS[2], [seed.address]))
        await until(lambda: second.tenure.state is State.FOLLOWING)
        await train(trainer, 3)
        await until(lambda: second.version == 3)
        epoch = first.tenure.epoch
        # as by SIGKILL: nothing is handed over, nothing is said
        await first.keeper.tenures.aclose()
        await first.node.endpoint.aclose()
        died = time.monotonic()
        await until(lambda: second.tenure.misses_primary(boottime()))
        for _ in range(12):  # a backward that comes now is held for a moment, and taken as soon as this server leads
            if second.leads:
                break
            await second.keeper.find_primary(UID)
        assert second.leads
        took = time.monotonic() - died
        assert second.tenure.epoch > epoch and second.version == 3
        assert took > LEASE * 0.5
        with contextlib.suppress(Exception):
            await killed.aclose()
        await train(trainer, 2)
        assert second.version == 5
        assert await epoch_of_answer(trainer, second) == second.tenure.epoch
        again = await stack.enter_async_context(host(HOSTS[0], [seed.address], tmp_path / "a"))
        await until(lambda: again.tenure.state in (State.FOLLOWING, State.HOLDING))
        await until(lambda: again.version == 5)
        assert second.leads and not again.leads and torch.equal(second.weight(), again.weight())


@pytest.mark.slow
async def test_a_member_whose_disk_is_full_does_not_lead_until_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = 0.0
    async with contextlib.AsyncExitStack() as stack:
        seed = await stack.enter_async_context(ta.TesseractNode())
        killed = contextlib.AsyncExitStack()
        first = await killed.enter_async_context(host(HOSTS[0], [seed.address], tmp_path / "a"))
        clock = lambda: boottime() + ahead  # noqa: E731
        second = await stack.enter_async_context(host(HOSTS[1], [seed.address], tmp_path / "b", elapsed=clock))
        await until(lambda: second.tenure.state is State.FOLLOWING and bool(first.tenure.members))
        await first.keeper.tenures.aclose()
        await first.node.endpoint.aclose()
        with full_disk(tmp_path / "b", "tenure.unfinished") as refused:
            ahead = 2 * LEASE
            await until(lambda: "says nothing until its disk takes it" in caplog.text)
            await until(lambda: second.tenure.state is State.FOLLOWING)
            for seconds in (2 * LEASE, AUTHORITY_PERIOD):  # whatever was due by the first is done by the second
                ahead, seen = ahead + seconds, len(refused)
                await until(lambda seen=seen: len(refused) > seen)  # type: ignore[misc]
                assert not second.leads
        await until(lambda: second.leads)
        with contextlib.suppress(Exception):
            await killed.aclose()


SEALING = "*.sealed.unfinished"
"""The files in which a host seals a state."""


def is_unsealed(one: Host) -> bool:
    return one.node.metrics.snapshot().get("experts_unsealed") == 1


@pytest.mark.slow
async def test_a_primary_that_cannot_seal_leaves_the_expert_to_its_successor(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        seed = await stack.enter_async_context(ta.TesseractNode())
        first = await stack.enter_async_context(host(HOSTS[0], [seed.address], tmp_path))
        second = await stack.enter_async_context(host(HOSTS[1], [seed.address]))
        trainer = await stack.enter_async_context(member(HOSTS[2], [seed.address]))
        await train(trainer, 3)
        await until(lambda: bool(first.tenure.members) and second.version == 3)
        with full_disk(tmp_path, SEALING):
            await train(trainer, 1)
            await until(lambda: is_unsealed(first))
            assert not first.leads, "what it trained now would be in nobody's file"
            assert not second.leads
            await until(lambda: second.leads)
            assert second.version == 3, "nobody else had the fourth step"
            await until(lambda: first.tenure.primary == second.node.peer_id)
            await train(trainer, 2)
        await until(lambda: first.version == second.version == 5)
        await until(lambda: not is_unsealed(first))


async def test_one_alone_that_cannot_seal_trains_on_and_seals_as_soon_as_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with host(HOSTS[0], [], tmp_path) as first:
        with full_disk(tmp_path, SEALING):
            await train(first.node, 1)
            await until(lambda: is_unsealed(first))
            assert "trains on: what it trains now is lost if it dies" in caplog.text
            await train(first.node, 1)
            assert first.leads and await first.keeper.hand_over() == 0
        await until(lambda: first.tenure.held is not None and first.tenure.held.version == 2)
        await until(lambda: not is_unsealed(first))


async def test_a_state_that_was_written_as_the_lease_ended_is_sealed_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with host(HOSTS[0], [], tmp_path) as first:
        written = threading.Event()

        def fenced_meanwhile() -> None:
            first.tenure.state = State.FENCED
            written.set()

        with full_disk(tmp_path, SEALING):
            await train(first.node, 1)
            await until(lambda: "could not be sealed" in caplog.text)
        with syncing(fenced_meanwhile, tmp_path, SEALING):
            await until(written.is_set)
        await until(lambda: first.tenure.held is not None and first.tenure.held.version == 1)


async def test_a_handover_loses_and_doubles_no_step() -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(host(HOSTS[0], []))
        peers = [first.node.address]
        second = await stack.enter_async_context(host(HOSTS[1], peers))
        trainer = await stack.enter_async_context(member(HOSTS[2], peers))
        await until(lambda: second.tenure.state is State.FOLLOWING)
        await train(trainer, 2)
        handed, num_steps = asyncio.Event(), 2

        async def keep_training() -> None:
            nonlocal num_steps
            expert = await trainer.get_expert(UID)
            after = 0
            while after < 5:
                after += handed.is_set()
                await ta.backward((await expert(X)).sum())
                num_steps += 1

        task = asyncio.create_task(keep_training())
        await until(lambda: num_steps > 5)
        assert await first.keeper.hand_over() == 1
        handed.set()
        await task
        assert second.leads and not first.leads and second.version == num_steps
        assert second.tenure.term is not None and second.tenure.term.kind is TermKind.HANDOVER
        assert len(second.server.experts[UID].applied) == num_steps


async def test_an_heir_that_is_dead_is_not_said_to_lack_the_state(caplog: pytest.LogCaptureFixture) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(host(HOSTS[0], []))
        second = await stack.enter_async_context(host(HOSTS[1], [first.node.address]))
        await until(lambda: bool(first.tenure.members) and second.tenure.state is State.FOLLOWING)
        await second.keeper.tenures.aclose()
        await second.node.endpoint.aclose()
        assert not await first.keeper.hand_over_one(UID, to=second.node.peer_id)
        assert f"could not be handed over to {second.node.peer_id.short}: it does not answer" in caplog.text


async def test_not_all_backwards_wait_for_the_next_primary() -> None:
    stands_at: float | None = None
    async with contextlib.AsyncExitStack() as stack:
        primary = await stack.enter_async_context(host(HOSTS[0], []))
        clock = lambda: boottime() if stands_at is None else stands_at  # noqa: E731
        first = await stack.enter_async_context(host(HOSTS[1], [primary.node.address], elapsed=clock))
        await until(lambda: first.tenure.state is State.FOLLOWING)
        await primary.keeper.tenures.aclose()
        stands_at = boottime() + 0.75 * LEASE  # it misses its primary, whose lease has not ended
        asked = [asyncio.create_task(first.keeper.find_primary(UID)) for _ in range(MAX_WAITING + 10)]
        done, pending = await asyncio.wait(asked, timeout=0.5)
        assert {one.result()[1] for one in done} == {RETRY_SECONDS} and len(pending) == MAX_WAITING
        assert {after for _, after in await asyncio.gather(*pending)} == {0.0}
        assert (await first.keeper.find_primary(UID))[1] == 0.0, "the others have ended"


async def test_a_server_says_how_often_it_seals_where_its_upload_is_short() -> None:
    async with host(HOSTS[0], []) as first, StatusService(first.node, first.server) as service:
        await until(lambda: first.tenure.held is not None)
        assert first.tenure.held is not None
        assert service.status().sync_seconds == 1, "the run's half a second"
        first.keeper.tenures.upload_rate = first.tenure.held.size / 10
        assert service.status().sync_seconds >= 20


async def test_an_expert_that_another_has_meanwhile_is_not_handed_over() -> None:
    async with host(HOSTS[0], []) as first, host(HOSTS[1], [first.node.address]) as second:
        await until(lambda: second.tenure.state is State.FOLLOWING)
        call = first.node.call_expert

        async def and_another_leads(peer: PeerAddress, method: str, body: Any, **more: Any) -> Message:
            reply = await call(peer, method, body, **more)
            if body[1] == "prepare":
                first.tenure.state = State.ASIDE
            return reply

        first.node.call_expert = and_another_leads  # type: ignore[method-assign, assignment]
        assert await first.keeper.hand_over() == 0
        assert not first.leads and second.tenure.term is None


async def test_one_alone_that_was_killed_goes_on_from_its_newest_sealed_file(tmp_path: Path) -> None:
    async with host(HOSTS[0], [], tmp_path / "a") as first:
        await train(first.node, 3)
        await until(lambda: first.tenure.held is not None and first.tenure.held.version == 3)
        await first.keeper.tenures.aclose()
        epoch, before = first.tenure.epoch, first.weight()
        # what a kill leaves: the checkpoint is of the start
        await asyncio.to_thread(shutil.copytree, tmp_path / "a", tmp_path / "b")
    (checkpoint,) = (tmp_path / "b").rglob("*.safetensors")  # noqa: ASYNC240  (once)
    assert int(checkpoint.stem) == 0
    async with host(HOSTS[0], [], tmp_path / "b", seed=9) as again:
        await until(lambda: again.leads)
        assert again.tenure.epoch > epoch and torch.equal(before, again.weight())
        assert not list((tmp_path / "b").rglob("*.aside"))  # noqa: ASYNC240  (once)
        await train(again.node, 1)
        assert again.version == 4


async def test_the_owner_goes_back_to_an_older_state_and_to_what_was_put_aside(tmp_path: Path) -> None:
    serials = itertools.count(int(time.time()))

    async def go_back(one: Host, root: bytes) -> int:
        """Appoint it, and return the version from which it begins."""
        authority = one.node.trust.authority("ffn")
        assert authority is not None
        pattern, serial = ExpertPattern.parse(UID), next(serials)
        signed = sign_appointment(OWNER, RUN_ID, pattern, serial=serial, peer=one.node.peer_id, root=root)
        assert authority.learn_appointment(signed)
        await until(lambda: one.leads and one.tenure.term is not None and one.tenure.term.serial == serial)
        assert one.tenure.term is not None and one.tenure.term.kind is TermKind.APPOINTED
        return one.version

    async with host(HOSTS[0], [], tmp_path) as first, member(HOSTS[2], [first.node.address]) as trainer:
        await train(trainer, 3)
        await until(lambda: first.tenure.held is not None and first.tenure.held.version == 3)
        assert first.tenure.held is not None
        old, weight_then = first.tenure.held.root, first.weight()
        await train(trainer, 1)  # two might be sealed one by one, and only the last two files are kept
        newest = first.weight()
        assert await go_back(first, old) == 3 and torch.equal(first.weight(), weight_then)
        (aside,) = tmp_path.rglob("*.aside")  # noqa: ASYNC240  (once)
        assert await go_back(first, read_sealed(aside).root) == 4 and torch.equal(first.weight(), newest)
        await train(trainer, 1)
        assert first.version == 5


async def test_put_aside_by_a_silent_adopter_it_goes_on_from_its_own_sealed_file(tmp_path: Path) -> None:
    liar, now = HOSTS[3], int(time.time())
    grant = sign_grant(OWNER, RUN_ID, liar.peer_id, ("host",), serial=now, not_after=now + GRANT_SECONDS)
    async with host(HOSTS[0], [], tmp_path) as first, member(HOSTS[2], [first.node.address]) as trainer:
        await train(trainer, 3)
        await until(lambda: first.tenure.held is not None and first.tenure.held.version == 3)
        tenure, seal = first.tenure, first.tenure.held
        first.node.trust.introduced(liar.peer_id, [grant.blob])
        assert tenure.leave()  # that a lease ended would take longer
        at = now + 30
        term = sign_term(liar, RUN_ID, uid=UID, epoch=at - EPOCH_ZERO, boot=bytes(8), kind=TermKind.ADOPTION, seal=seal)
        assert tenure.sight(term.blob, time.monotonic(), time.time())
        assert tenure.state is State.ASIDE and tenure.primary == liar.peer_id
        await until(lambda: first.leads)
        assert first.version == 3 and list(tmp_path.rglob("*.aside"))  # noqa: ASYNC240  (once)


@pytest.mark.slow
async def test_nobody_begins_anew_what_a_host_that_is_away_has_sealed(tmp_path: Path) -> None:
    async with ta.TesseractNode() as seed:
        peers = [seed.address]
        async with host(HOSTS[0], peers, tmp_path) as first:
            await train(first.node, 3)
            await until(lambda: first.tenure.held is not None and first.tenure.held.version == 3)
            async with asyncio.timeout(60):
                key, stored = first.node.trust.shard_key(UID), set[str | None]()
                while not stored >= {GRANT_SUBKEY, record_subkey(UID, 0), record_subkey(UID, 1)}:
                    stored = {entry.subkey for entry in await seed.network.get_entries(key)}
        # its manifest is gone with it, and with that its grant
        async with host(HOSTS[1], peers, seed=1) as newcomer:
            assert newcomer.tenure.state is State.ABSENT and not newcomer.leads
            async with host(HOSTS[0], peers, tmp_path) as again:
                await until(lambda: again.leads and newcomer.version == 3)
                assert torch.equal(again.weight(), newcomer.weight())


async def test_a_stranger_cannot_ask_who_leads_nor_take_part() -> None:
    async with host(HOSTS[0], []) as first, ta.TesseractNode(initial_peers=[first.node.address]) as stranger:
        state = first.tenure.state, first.tenure.epoch
        for kind in ("beat", "vote", "prepare", "take_over", "x" * 200):
            body = [UID, kind, 2**40, [b"", b"", b""]]
            try:
                await stranger.call_expert(first.node.peer_address, "expert.tenure", body, timeout=10.0)
            except (NotAllowed, RemoteError):
                continue
            raise AssertionError(kind)
        assert state == (first.tenure.state, first.tenure.epoch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_ten_minutes_of_churn_lose_no_line(tmp_path: Path) -> None:
    """Three hosts of which one after the other dies, returns or leaves, while a trainer goes on."""
    until_when = time.monotonic() + 600.0
    random = Random(1)
    acknowledged = 0
    async with contextlib.AsyncExitStack() as stack:
        seed = await stack.enter_async_context(ta.TesseractNode())
        trainer = await stack.enter_async_context(member(HOSTS[3], [seed.address]))
        running: dict[int, tuple[Host, contextlib.AsyncExitStack]] = {}

        async def start(number: int) -> None:
            life = contextlib.AsyncExitStack()
            one = await life.enter_async_context(host(HOSTS[number], [seed.address], tmp_path / str(number)))
            running[number] = one, life

        async def stop(number: int, *, cleanly: bool) -> None:
            one, life = running.pop(number)
            if cleanly:
                await one.keeper.hand_over()
            else:
                await one.keeper.tenures.aclose()
                await one.node.endpoint.aclose()
            with contextlib.suppress(Exception):
                await life.aclose()

        async def keep_training() -> None:
            nonlocal acknowledged
            while time.monotonic() < until_when:
                try:
                    expert = (await trainer.get_expert(UID)).with_options(timeout=5.0)
                    await ta.backward((await expert(X)).sum())
                    acknowledged += 1
                except (TesseractError, TimeoutError):
                    await asyncio.sleep(0.2)
                await asyncio.sleep(0.02)

        for number in range(3):
            await start(number)
        task = asyncio.create_task(keep_training())
        while time.monotonic() < until_when:
            await until(lambda: sum(one.leads for one, _ in running.values()) == 1, 120.0)
            await asyncio.sleep(random.uniform(1.0, 3 * LEASE))
            number = random.choice(list(running))
            await stop(number, cleanly=random.random() < 0.5)
            await asyncio.sleep(random.uniform(0.0, 2 * LEASE))
            await start(number)
        await task
        await until(lambda: sum(one.leads for one, _ in running.values()) == 1, 120.0)
        (leader,) = [one for one, _ in running.values() if one.leads]
        await until(lambda: {one.tenure.epoch for one, _ in running.values()} == {leader.tenure.epoch}, 120.0)
        print(f"{acknowledged} steps were answered; the line has {leader.version}, after {leader.tenure.epoch} epochs")
        assert leader.version >= 0.8 * acknowledged and len(leader.server.experts[UID].applied) <= acknowledged * 1.2
        for number in list(running):
            await stop(number, cleanly=False)
