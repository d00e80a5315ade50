"""Servers of a run that take, hold and give up experts by themselves, on real nodes."""

import contextlib
from typing import Any

import pytest
import torch

import tesseract_async as ta
from tesseract_async.errors import ExpertNotFound
from tesseract_async.experts.membership import Permissions
from tesseract_async.experts.placement import score
from tesseract_async.experts.places import MemberPart, MemberRole, Place, Survey, places_key
from tesseract_async.wire import messages
from tests.scripted_node import ScriptedNode
from tests.server.run_members import Member, identity_of, joined, make_run, member, say, standings, until

X = torch.ones(2, 4)


async def test_a_run_shares_itself_out_and_a_killed_server_is_made_up_for() -> None:
    run = make_run(4, num_replicas=2)
    async with contextlib.AsyncExitStack() as stack:
        seed = await stack.enter_async_context(ta.TesseractNode())
        members = [await stack.enter_async_context(member(run, n, [seed.address], room=3)) for n in range(1, 5)]
        await until(lambda: all(one.losses >= 2 and one.primary for one in standings(members, 4)))
        assert all(sum(one.leads(f"ffn.{n}") for one in members) == 1 for n in range(4))
        async with joined(run, 50, [seed.address]) as trainer:
            for n in range(4):
                expert = await trainer.get_expert(f"ffn.{n}")
                await ta.backward((await expert(X)).sum())
            await until(lambda: all(one.version(uid) >= 1 for one in members for uid in one.keeper.tenures.uids()))
            victim = next(one for one in members if any(one.leads(f"ffn.{n}") for n in range(4)))
            rest = [one for one in members if one is not victim]
            await victim.kill()
            await until(lambda: all(sum(one.leads(f"ffn.{n}") for one in rest) == 1 for n in range(4)))
            assert all(one.version(f"ffn.{n}") >= 1 for n in range(4) for one in rest if one.leads(f"ffn.{n}"))
            await until(lambda: all(one.losses >= 2 for one in standings(rest, 4)))


async def test_a_file_answers_until_its_expert_can_be_computed() -> None:
    done: list[str] = []

    class Node(ScriptedNode):
        def unhost_expert(self, uid: str) -> None:
            done.append("left")
            super().unhost_expert(uid)

    class Backend(ta.ExpertBackend):
        def prepare(self) -> None:
            done.append("prepared")
            super().prepare()

    def build(uid: str) -> ta.ExpertBackend:
        return Backend(torch.nn.Linear(4, 4), args_schema=(ta.TensorSpec((4,)),))

    async with member(make_run(1), 1, [], room=1, build=build, kind=Node) as one:
        await until(lambda: one.leads("ffn.0"))
        assert done == ["prepared", "left"]


async def test_a_member_goes_on_after_a_moment_without_an_address() -> None:
    looks = 0

    async def fails(read: Any, key: str) -> Any:
        nonlocal looks
        if key != places_key("ffn", one.authority.tag):
            return await read(key)
        looks += 1
        raise ValueError("no address")

    async with member(make_run(1), 1, [], room=0) as one:
        one.node.on_read = fails
        await until(lambda: looks >= 2)


@pytest.mark.slow
async def test_a_member_that_only_holds_has_the_state_and_is_nobodys_successor() -> None:
    run = make_run(1, num_replicas=2)
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(member(run, 1, [], room=1))
        seeds = [first.node.address]
        holder = await stack.enter_async_context(member(run, 2, seeds, room=0))
        trainer = await stack.enter_async_context(joined(run, 50, seeds))
        await until(lambda: first.leads("ffn.0"))
        for _ in range(3):
            await ta.backward((await (await trainer.get_expert("ffn.0"))(X)).sum())
        await until(lambda: "ffn.0" in holder.keeper.tenures.uids() and holder.version("ffn.0") == 3)
        assert not holder.server.experts and not first.keeper.tenures.tenure("ffn.0").members
        (standing,) = standings([first, holder], 1)
        assert (standing.losses, standing.word, standing.holders) == (1, "safe", (holder.node.peer_id,))

        async def nobody(read: Any, key: str) -> Any:
            return [] if key == places_key("ffn", first.authority.tag) else await read(key)

        first.node.on_read = nobody  # nor does it become one by a look that misses its place
        await first.placing.look()
        assert holder.node.peer_id in first.keeper.tenures.tenure("ffn.0").may.passive
        first.node.on_read = None
        # who comes next gets the state, be it from the holder alone
        await first.kill()
        heir = await stack.enter_async_context(member(run, 3, [holder.node.address], room=1))
        await until(lambda: heir.leads("ffn.0") and heir.version("ffn.0") == 3)


@pytest.mark.slow
@pytest.mark.parametrize("is_known", [True, False])
async def test_who_leaves_gives_its_last_state_to_a_holder_and_not_the_expert(
    is_known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not is_known:
        monkeypatch.setattr(Survey, "unfit", lambda self, uid: frozenset())
    run = make_run(1, num_replicas=1, sync_every=60.0)
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(member(run, 1, [], room=1))
        seeds = [first.node.address]
        holder = await stack.enter_async_context(member(run, 2, seeds, room=0))
        trainer = await stack.enter_async_context(joined(run, 50, seeds))
        await until(lambda: first.leads("ffn.0"))

        def is_seen() -> bool:
            place = first.placing.places.get(holder.node.peer_id)
            return place is not None and "ffn.0" in place.parts and place.parts["ffn.0"].has_file

        await until(is_seen)
        for _ in range(3):
            await ta.backward((await (await trainer.get_expert("ffn.0"))(X)).sum())
        epoch = first.keeper.tenures.tenure("ffn.0").epoch
        assert holder.version("ffn.0") == 0 and await first.keeper.hand_over() == 0
        assert holder.version("ffn.0") == 3
        said = f"ffn.0 could not be handed over to {holder.node.peer_id.short}: it cannot lead it now" in caplog.text
        assert said is not is_known
        await until(lambda: first.leads("ffn.0"), 10.0)
        assert first.keeper.tenures.tenure("ffn.0").epoch == epoch, "it signed nothing away"


async def test_who_leaves_answers_nothing_about_files_any_more() -> None:
    run = make_run(1, num_replicas=1)
    async with member(run, 1, [], room=1) as first, member(run, 2, [first.node.address], room=0) as holder:
        await until(lambda: standings([first, holder], 1)[0].losses == 1)
        await holder.keeper.aclose()
        question = messages.encode(messages.TenureRequest("ffn.0", "probe", 0, [b"", b"", b""]))
        with pytest.raises(ExpertNotFound):
            await first.node.call_expert(holder.node.peer_address, messages.TENURE, question, timeout=5.0)


async def test_who_only_says_that_it_leads_in_the_newest_epoch_makes_no_copy_look_old() -> None:
    run = make_run(1, num_replicas=1)
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(member(run, 1, [], room=1))
        second = await stack.enter_async_context(member(run, 2, [first.node.address], room=1))
        await until(lambda: standings([first, second], 1)[0].losses == 1)
        leader, follower = (first, second) if first.leads("ffn.0") else (second, first)
        liar = await stack.enter_async_context(joined(run, 66, [first.node.address]))
        epoch = leader.keeper.tenures.tenure("ffn.0").epoch
        await say(liar, Place(liar.peer_id, 4, 16, parts={"ffn.0": MemberPart(MemberRole.PRIMARY, epoch + 50, 2**31)}))

        def is_right(one: Member) -> bool:
            standing = Survey(one.placing.places).standing("ffn.0")
            return liar.peer_id in one.placing.places and standing[::4] == (leader.node.peer_id, 1)

        await until(lambda: is_right(leader) and is_right(follower), 20)


async def test_a_run_with_too_few_members_says_so_and_holds_what_it_can(caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(1, num_replicas=2)
    async with member(run, 1, [], room=1) as first, member(run, 2, [first.node.address], room=1) as second:
        await until(lambda: ": 2, too few for 2 copies besides each primary" in caplog.text)
        await until(lambda: standings([first, second], 1)[0].losses == 1)


@pytest.mark.slow
async def test_nobody_gives_a_copy_up_for_those_who_only_say_that_they_have_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tesseract_async.experts.placement.DROP_AFTER", 1.0)
    caplog.set_level("INFO")
    run, uid = make_run(1, num_replicas=1), "ffn.0"
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(member(run, 1, [], room=1))
        seeds = [first.node.address]
        second = await stack.enter_async_context(member(run, 2, seeds, room=1))
        await until(lambda: standings([first, second], 1)[0].losses == 1)
        leader, holder = (first, second) if first.leads(uid) else (second, first)
        numbers = [n for n in range(60, 90) if score(identity_of(n).peer_id, uid) < score(holder.node.peer_id, uid)]
        liars = [await stack.enter_async_context(joined(run, number, seeds)) for number in numbers[:3]]
        epoch = leader.keeper.tenures.tenure(uid).epoch
        for liar in liars:
            place = Place(
                liar.peer_id, 4, 16, parts={uid: MemberPart(MemberRole.FOLLOWER, epoch, 2**20)}
            )  # never far behind
            await say(liar, place)
        await until(lambda: f"does not show the state of {uid}" in caplog.text)
        rounds: list[str] = []
        keeps = holder.placing.placement.keeps
        holder.placing.placement.keeps = lambda uid, now: (rounds.append(uid), keeps(uid, now))[1]  # type: ignore
        await until(lambda: len(rounds) == 2)  # it had them show it once more, and waits again
        assert uid in holder.keeper.tenures.uids()
        third = await stack.enter_async_context(member(run, 3, seeds, room=1))
        await third.keeper.tenures.add(uid, third.node.trust.authority("ffn"), Permissions())
        await until(lambda: sum(uid in one.keeper.tenures.uids() for one in (leader, holder, third)) == 3)
        # one of the two is one too many, and that the other has it is shown
        await until(lambda: sum(uid in one.keeper.tenures.uids() for one in (leader, holder, third)) == 2)


@pytest.mark.slow
async def test_a_copy_that_is_said_but_not_shown_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tesseract_async.experts.placement.CHECK_EVERY", 1.0)
    monkeypatch.setattr("tesseract_async.server.placing.STUCK_AFTER", 0.5)
    run, uid = make_run(1, num_replicas=1), "ffn.0"
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(member(run, 1, [], room=1))
        await until(lambda: first.leads(uid) and first.keeper.tenures.tenure(uid).held is not None)
        liar = await stack.enter_async_context(joined(run, 60, [first.node.address]))
        age = first.keeper.tenures.tenure(uid).held.age
        await say(liar, Place(liar.peer_id, 4, 16, parts={uid: MemberPart(MemberRole.FOLLOWER, *age)}))
        await until(lambda: liar.peer_id in first.placing.places)
        second = await stack.enter_async_context(member(run, 2, [first.node.address], room=1))
        await until(lambda: liar.peer_id in second.placing.places and uid not in second.keeper.tenures.uids())
        await until(lambda: uid in second.keeper.tenures.uids() and second.version(uid) >= 0)


@pytest.mark.slow
async def test_a_newcomer_gets_the_state_although_the_seal_in_the_network_is_an_old_one() -> None:
    run = make_run(1, num_replicas=2, sync_every=0.2)
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(member(run, 1, [], room=1))
        seeds = [first.node.address]
        second = await stack.enter_async_context(member(run, 2, seeds, room=1))
        trainer = await stack.enter_async_context(joined(run, 50, seeds))
        await until(lambda: standings([first, second], 1)[0].losses == 1)
        for _ in range(4):  # steps, of which the two newest are kept, and none is published
            await ta.backward((await (await trainer.get_expert("ffn.0"))(X)).sum())
            await until(lambda: first.version("ffn.0") == second.version("ffn.0"))
        third = await stack.enter_async_context(member(run, 3, seeds, room=1))
        await until(lambda: "ffn.0" in third.keeper.tenures.uids() and third.version("ffn.0") == 4, 15)
