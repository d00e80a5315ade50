"""Runs found by name, and kept known, over a network in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tesseract_async.admission import Policy
from tesseract_async.errors import ConnectionLost
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import GRANT_SECONDS, Grant, Invite, grant_text, sign_grant, sign_revocations
from tesseract_async.experts.run import RunManifest, SignedRun, run_key, sign_run, split_run
from tesseract_async.experts.run_directory import (
    NUM_COPIES,
    RunKeeper,
    RunNotFound,
    enter_run,
    find_run,
    find_runs,
    kept_file,
    publish_run,
    records_key,
)
from tesseract_async.experts.trust import Trust
from tesseract_async.identity import Identity, PeerID
from tests.client.virtual_time import in_made_up_time
from tests.experts.fake_network import FakeNetwork, FakeSwarm, peer

ALICE = Identity.from_seed(bytes(32))
BOB = Identity.from_seed(b"b" * 32)


def a_run(signer: Identity = ALICE, created: int = 1, name: str = "digits") -> SignedRun:
    sizes = {f"size_{n}": "x" * 100 for n in range(20)}  # long enough for several parts
    return sign_run(signer, RunManifest(name, "ffn", (4,), "ffn", sizes=sizes, created=created))


async def test_a_run_is_found_by_its_name() -> None:
    swarm = FakeSwarm()
    run = a_run()
    assert await publish_run(FakeNetwork(swarm, ALICE.peer_id), run) == 3
    network = FakeNetwork(swarm, peer(1))
    assert await find_run(network, "digits", clock=swarm.clock) == run
    assert await find_run(network, f"digits@{ALICE.peer_id}", clock=swarm.clock) == run
    with pytest.raises(RunNotFound, match="right swarm"):
        await find_run(network, "letters", clock=swarm.clock)
    with pytest.raises(RunNotFound, match=f"signed by {BOB.peer_id}"):
        await find_run(network, f"digits@{BOB.peer_id}", clock=swarm.clock)
    swarm.clock.now += 3601
    with pytest.raises(RunNotFound):
        await find_run(network, "digits", clock=swarm.clock)


async def test_a_bare_name_that_two_signers_use_is_refused_with_both() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    await publish_run(network, a_run(ALICE))
    await publish_run(network, a_run(BOB))  # one node may keep both
    with pytest.raises(RunNotFound) as caught:
        await find_run(network, "digits", clock=swarm.clock)
    assert f"digits@{ALICE.peer_id}" in str(caught.value) and f"digits@{BOB.peer_id}" in str(caught.value)
    assert (await find_run(network, f"digits@{BOB.peer_id}", clock=swarm.clock)).signer == BOB.peer_id


async def test_strangers_can_neither_spoil_nor_forge() -> None:
    swarm = FakeSwarm()
    run = a_run()
    await publish_run(FakeNetwork(swarm, ALICE.peer_id), run)
    stranger = FakeNetwork(swarm, peer(66))
    parts = split_run(run.blob)
    await stranger.store(run_key("digits"), parts[0][:-1] + b"?", ttl=60.0, subkey="0")
    await stranger.store(run_key("digits"), b"", ttl=60.0, subkey="1")
    forged = run.blob[:-1] + bytes([run.blob[-1] ^ 1])
    for number, part in enumerate(split_run(forged)):
        await stranger.store(run_key("digits"), part, ttl=60.0, subkey=f"forged{number}")
    found = await find_runs(FakeNetwork(swarm, peer(1)), "digits", clock=swarm.clock)
    assert found == {ALICE.peer_id: (run, {ALICE.peer_id})}


async def test_a_later_manifest_of_the_same_signer_holds() -> None:
    swarm = FakeSwarm()
    await publish_run(FakeNetwork(swarm, peer(1)), a_run(created=1))
    await publish_run(FakeNetwork(swarm, peer(2)), a_run(created=2))
    assert (await find_run(FakeNetwork(swarm, peer(3)), "digits", clock=swarm.clock)).manifest.created == 2


async def test_servers_keep_the_run_known_without_its_signer_and_no_more_copies_than_needed() -> None:
    swarm = FakeSwarm()
    run = a_run()
    keepers = [RunKeeper(FakeNetwork(swarm, peer(n)), Authority(run), clock=swarm.clock) for n in range(NUM_COPIES + 2)]
    needed = [True] * NUM_COPIES + [False, False]
    assert [await keeper.keep_once() for keeper in keepers] == needed
    assert [keeper.num_copies for keeper in keepers] == [1, 2, 3, 4, 5, 5, 5]
    swarm.clock.now += 1800
    # these renew theirs; a keeper always renews while its own copy is needed
    assert [await keeper.keep_once() for keeper in keepers] == needed
    swarm.clock.now += 3601
    assert await keepers[-1].keep_once()


async def test_an_older_copy_does_not_count_and_a_newer_one_is_not_overwritten() -> None:
    swarm = FakeSwarm()
    for number in range(9, 9 + NUM_COPIES):
        await publish_run(FakeNetwork(swarm, peer(number)), a_run(created=1))
    new = RunKeeper(FakeNetwork(swarm, peer(1)), Authority(a_run(created=2)), clock=swarm.clock)
    assert await new.keep_once()
    old = RunKeeper(FakeNetwork(swarm, peer(9)), Authority(a_run(created=1)), clock=swarm.clock)
    assert not await old.keep_once()


@in_made_up_time
async def test_the_keeper_survives_a_network_that_fails() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    network.failure = ConnectionLost("nobody", "for the test")
    keeper = RunKeeper(network, Authority(a_run()), clock=swarm.clock)
    keeper.start()
    await swarm.until(lambda: swarm.reads[run_key("digits")] >= 2)
    network.failure = None
    await swarm.until(lambda: keeper.num_copies == 1 or bool(swarm.entries))
    await keeper.aclose()
    await keeper.aclose()
    assert dataclasses.is_dataclass(await find_run(network, "digits", clock=swarm.clock))


def members_of(run: SignedRun, *, signer: Identity = ALICE) -> list[Grant]:
    """Grants for peers 1 to 3, which end after 90, 59 and 0 days."""
    run_id = Authority(run).run_id
    return [
        sign_grant(signer, run_id, peer(number), ["train"], serial=1, not_after=NOW + days * 86400)
        for number, days in ((1, 90), (2, 59), (3, 0))
    ]


NOW = 1_800_000_000


def keeper_of(swarm: FakeSwarm, who: PeerID, run: SignedRun, **values: Any) -> RunKeeper:
    return RunKeeper(FakeNetwork(swarm, who), Authority(run), clock=swarm.clock, **values)


async def test_members_learn_and_spread_revocations_and_strangers_records_are_dropped() -> None:
    swarm, run = FakeSwarm(), a_run()
    first, second, third = (keeper_of(swarm, peer(number), run) for number in (1, 2, 3))
    assert first.authority is not None and second.authority is not None and third.authority is not None
    run_id = first.authority.run_id
    (part,) = sign_revocations(ALICE, run_id, number=0, since=NOW, peers=[peer(7)])
    (forged,) = sign_revocations(BOB, run_id, number=0, since=NOW, peers=[peer(1)])
    stranger = FakeNetwork(swarm, peer(9))
    for number, value in enumerate((b"r" + forged.blob, b"garbage", b"", "r", None, b"r" + part.blob[:-1])):
        await stranger.store(records_key(run_id), value, ttl=60.0, subkey=str(number))
    assert not await first.learn_once()
    first.authority.learn_revocations(part)
    assert await first.learn_once() is False and await second.learn_once() is True
    assert second.authority.is_revoked(peer(7)) and not second.authority.is_revoked(peer(1))
    # the one that told it first is gone, and its copy: the second one has its own
    for at in [at for at in swarm.entries if at[2] == peer(1)]:
        del swarm.entries[at]
    assert await third.learn_once() and third.authority.is_revoked(peer(7))


async def test_enough_copies_are_enough() -> None:
    swarm, run = FakeSwarm(), a_run()
    (part,) = sign_revocations(ALICE, Authority(run).run_id, number=0, since=NOW, peers=[peer(7)])
    for number in range(1, NUM_COPIES + 3):
        keeper = keeper_of(swarm, peer(number), run)
        assert keeper.authority is not None
        keeper.authority.learn_revocations(part)
        await keeper.learn_once()
    assert len(swarm.entries) == NUM_COPIES
    stores = swarm.stores.total()
    await keeper_of(swarm, peer(1), run).learn_once()
    assert swarm.stores.total() == stores, "its copy holds for long enough"
    swarm.clock.now += 2000
    await keeper_of(swarm, peer(1), run).learn_once()
    assert swarm.stores.total() == stores + 1


async def test_grants_are_renewed_by_who_may_grant_and_found_by_their_peers(caplog: pytest.LogCaptureFixture) -> None:
    swarm, run = FakeSwarm(), a_run()
    swarm.clock.now = NOW
    owner = keeper_of(swarm, ALICE.peer_id, run, identity=ALICE)
    member = keeper_of(swarm, peer(2), run, identity=BOB)
    assert owner.authority is not None and member.authority is not None
    for grant in members_of(run):
        owner.authority.learn_grant(grant.blob)
    invite = sign_grant(ALICE, owner.authority.run_id, BOB.peer_id, ["train", "admit"], serial=1, not_after=NOW + 86400)
    by_invite = sign_grant(BOB, owner.authority.run_id, peer(4), ["train"], serial=1, not_after=NOW + 86400, via=invite)
    owner.authority.learn_grant(by_invite.blob)
    (new,) = await owner.renew_grants()
    assert (new.peer, new.not_after, new.role_names) == (peer(2), NOW + GRANT_SECONDS, ["train"])
    assert await owner.renew_grants() == [] and await member.renew_grants() == []
    # so the owner may be away for 60 days from any moment on
    away = NOW + 60 * 86400 - 1
    assert all(owner.authority.may(peer(number), "train", now=away) for number in (1, 2))
    told = []
    late = RunKeeper(FakeNetwork(swarm, peer(2)), Authority(run), clock=swarm.clock)
    late.on_own_grant = lambda: told.append(True)
    assert await late.learn_once() and late.authority is not None
    assert late.authority.grant_of(peer(2)) == new and told == [True]
    await late.learn_once()
    assert told == [True]
    (part,) = sign_revocations(ALICE, owner.authority.run_id, number=0, since=NOW + 9, peers=[peer(2)])
    owner.authority.learn_revocations(part)
    await owner.learn_once()
    assert await late.learn_once() and told == [True, True] and "this node was revoked" in caplog.text


async def test_a_delegate_renews_within_what_it_has() -> None:
    swarm = FakeSwarm()
    swarm.clock.now = NOW
    bare = a_run()
    power = sign_grant(
        *(ALICE, Authority(bare).run_id, BOB.peer_id, ["train", "admit"]), serial=1, not_after=NOW + 80 * 86400
    )
    run = sign_run(ALICE, dataclasses.replace(bare.manifest, delegates=[power.blob]))
    keeper = keeper_of(swarm, BOB.peer_id, run, identity=BOB)
    assert keeper.authority is not None
    for grant in members_of(run):
        keeper.authority.learn_grant(grant.blob)
    (new,) = await keeper.renew_grants()
    assert (new.peer, new.signer, new.not_after) == (peer(2), BOB.peer_id, power.not_after)
    assert keeper.authority.grant_of(peer(2)) == new


async def test_what_is_known_of_a_run_survives_a_restart_and_another_programs_writing(tmp_path: Path) -> None:
    swarm, run = FakeSwarm(), a_run()
    await publish_run(FakeNetwork(swarm, ALICE.peer_id), run)
    file = tmp_path / "owner.pem"
    network = FakeNetwork(swarm, peer(1))

    async def enter(name: str = "digits", seen: FakeNetwork = network) -> RunKeeper:
        return await enter_run(seen, Trust(ALICE.peer_id), name, identity=ALICE, identity_file=file, clock=swarm.clock)

    one, other = await enter(), await enter()
    assert one.authority is not None and other.authority is not None
    (part,) = sign_revocations(ALICE, one.authority.run_id, number=0, since=NOW, peers=[peer(7)])
    one.authority.learn_revocations(part)
    one.save()
    other.authority.learn_grant(members_of(run)[0].blob)
    other.save()
    assert other.authority.is_revoked(peer(7)), "it took in what was there"
    nobody = FakeNetwork(FakeSwarm(), peer(1))
    again = await enter(f"digits@{ALICE.peer_id}", nobody)
    assert again.authority is not None and again.authority.is_revoked(peer(7))
    assert again.authority.grant_of(peer(1)) is not None and again.run == run
    with pytest.raises(RunNotFound):
        await enter(f"digits@{BOB.peer_id}", nobody)
    elsewhere = FakeSwarm()
    await publish_run(FakeNetwork(elsewhere, peer(9)), a_run(BOB))
    stays = await enter("digits", FakeNetwork(elsewhere, peer(1)))
    assert stays.run == run, "a stranger's run of that name is not taken for it"
    kept_file(file, "digits").write_bytes(b"garbage")
    with pytest.raises(RunNotFound):
        await enter("digits", nobody)
    await enter()


async def test_a_wrong_grant_and_a_run_of_before_are_sentences() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    run = a_run()

    async def enter(grant: str, signed: SignedRun = run) -> RunKeeper:
        return await enter_run(network, Trust(BOB.peer_id), signed, identity=BOB, grant=grant, clock=swarm.clock)

    run_id = Authority(run).run_id
    mine = sign_grant(ALICE, run_id, BOB.peer_id, ["host"], serial=1, not_after=NOW)
    for text, sentence in (
        ("nonsense", "neither a grant nor an invite"),
        (grant_text(mine)[:-4], "neither a grant nor an invite"),
        (grant_text(members_of(run)[0]), "is for .* but this node is"),
        (grant_text(sign_grant(BOB, run_id, BOB.peer_id, ["host"], serial=1, not_after=NOW)), "another run|revoked"),
        (grant_text(sign_grant(ALICE, bytes(16), BOB.peer_id, ["host"], serial=1, not_after=NOW)), "another run"),
    ):
        with pytest.raises(ValueError, match=sentence):
            await enter(text)
    keeper = await enter(f" {grant_text(mine)}\n")
    assert keeper.authority is not None and keeper.authority.grant_of(BOB.peer_id) == mine
    invite = Identity.from_seed(b"i" * 32)
    admit = sign_grant(ALICE, run_id, invite.peer_id, ["host", "admit"], serial=1, not_after=2**39)
    text = Invite(run.full_name, ("198.51.100.7:31337",), grant_text(admit, invite=invite)).text()
    assert Invite.parse(text).seeds == ("198.51.100.7:31337",) and Invite.parse(text).not_after == 2**39
    came = await enter(text)
    assert came.authority is not None and came.authority.may(BOB.peer_id, "host", "ffn.1", now=NOW)


async def test_copies_of_peers_that_the_policy_does_not_list_are_not_read() -> None:
    swarm, run = FakeSwarm(), a_run()
    await publish_run(FakeNetwork(swarm, peer(9)), a_run(BOB))
    await publish_run(FakeNetwork(swarm, peer(1)), run)
    network, listed = FakeNetwork(swarm, peer(2)), Trust(peer(2), Policy.only([peer(1)]))
    assert await find_run(network, "digits", trust=listed, clock=swarm.clock) == run
    with pytest.raises(RunNotFound, match="2 runs"):
        await find_run(network, "digits", clock=swarm.clock)
