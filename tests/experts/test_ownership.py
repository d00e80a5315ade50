"""What a run's owner and its delegates may sign, over a network in memory."""

import pytest

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import read_grant_text
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.ownership import RunOwner, adopt_servers, with_delegates
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RunManifest, SignedRun, sign_run
from tesseract_async.experts.run_directory import RunKeeper, grant_key
from tesseract_async.identity import Identity, PeerID
from tesseract_async.transport.base import PeerAddress
from tests.experts.fake_network import FakeNetwork, FakeSwarm, peer

OWNER = Identity.from_seed(bytes(32))
DELEGATE = Identity.from_seed(b"d" * 32)
STRANGER = Identity.from_seed(b"s" * 32)
DAY = 86400.0


def a_run(*delegates: PeerID) -> SignedRun:
    return sign_run(OWNER, with_delegates(RunManifest("digits", "ffn", (4, 4), "ffn", created=1), OWNER, delegates))


def acting(identity: Identity, run: SignedRun, swarm: FakeSwarm) -> RunOwner:
    network = FakeNetwork(swarm, identity.peer_id)
    keeper = RunKeeper(network, Authority(run), identity=identity, clock=swarm.clock)
    return RunOwner(network, identity, keeper, clock=swarm.clock)


async def test_an_owner_lets_peers_in_and_out() -> None:
    swarm, run = FakeSwarm(), a_run()
    owner = acting(OWNER, run, swarm)
    me, now = peer(1), swarm.clock()
    (grant,) = await owner.grant([me], ["host"], seconds=DAY, pattern=ExpertPattern.parse("ffn.[0:2].0"))
    assert grant.not_after == int(now + DAY)
    (waiting,) = await FakeNetwork(swarm, me).get_entries(grant_key(owner.authority.run_id, me))
    assert waiting.value == grant.blob, "it waits where its peer looks"
    may = owner.authority.may
    assert may(me, "host", "ffn.1.0", now=now) and not may(me, "host", "ffn.3.0", now=now)
    await owner.revoke([me])
    assert not may(me, "host", now=None) and owner.authority.is_revoked(me)
    await owner.grant([me], ["host"], seconds=DAY)
    assert may(me, "host", now=now), "a later grant lets in again"
    with pytest.raises(ValueError, match="nobody revokes the owner"):
        await owner.revoke([OWNER.peer_id])


async def test_who_came_by_an_invite_goes_with_it() -> None:
    swarm, run = FakeSwarm(), a_run()
    owner = acting(OWNER, run, swarm)
    made, text = owner.invite(["train"], seconds=DAY)
    came = read_grant_text(text, STRANGER.peer_id, now=swarm.clock())
    assert came.signer == made.peer and set(made.role_names) == {"train", "admit"}
    await owner.revoke([], [made.peer])
    assert made.peer in owner.authority.revoked()


async def test_a_delegate_grants_no_more_than_it_has() -> None:
    swarm, run = FakeSwarm(), a_run(DELEGATE.peer_id)
    delegate = acting(DELEGATE, run, swarm)
    (grant,) = await delegate.grant([peer(1)], ["host"], seconds=1000 * 365 * DAY)
    assert grant.not_after == delegate.authority.delegates[DELEGATE.peer_id].not_after
    with pytest.raises(ValueError, match="only the run's owner makes invites"):
        delegate.invite(["host"], seconds=DAY)
    with pytest.raises(ValueError, match="only the owner revokes delegates"):
        await delegate.revoke([DELEGATE.peer_id])
    with pytest.raises(ValueError, match="has no say in digits@"):
        acting(STRANGER, run, swarm)


async def test_the_latest_appointment_holds() -> None:
    swarm, run = FakeSwarm(), a_run()
    owner = acting(OWNER, run, swarm)
    pattern = ExpertPattern.parse("ffn.0.[0:4]")
    for peer_id in (peer(1), peer(2), None):
        signed = await owner.appoint(pattern, peer_id)
        assert owner.authority.appointment("ffn.0.3") == signed and signed.peer == peer_id


async def test_servers_outside_of_runs_are_adopted() -> None:
    swarm, run = FakeSwarm(), a_run()
    authority = Authority(run)

    def replica(uid: str, number: int, *, primary: bool) -> ExpertReplica:
        address = PeerAddress(peer(number), (f"192.0.2.{number}:1",))
        return ExpertReplica(uid, address, 1, swarm.clock() + 60, primary)

    hosting = {
        "ffn.0.0": [replica("ffn.0.0", 1, primary=True)],
        "ffn.0.1": [replica("ffn.0.1", 2, primary=True), replica("ffn.0.1", 1, primary=False)],
    }
    network = FakeNetwork(swarm, OWNER.peer_id)
    assert await adopt_servers(network, OWNER, authority, hosting) == sorted([peer(1), peer(2)])
    assert all(authority.may(peer(number), "host", now=None) for number in (1, 2))
    kept = authority.appointment("ffn.0.1")
    assert kept is not None and kept.peer == peer(2), "the primary stays"
    assert authority.appointment("ffn.0.0") is None, "one server needs no appointment"
