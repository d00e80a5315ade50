"""Hosts with a grant that lie, against `Tenure`, in virtual time: none of what they say stops an expert."""

import pytest

from tesseract_async.experts.tenure_words import Question, State
from tesseract_async.experts.terms import Seal, Term, TermKind, sign_handover, sign_seal, sign_term, sign_vote
from tests.experts.tenure_world import RUN, UID, Server, World, identity

LEASE = 30.0


def adoption(liar: Server, seal: Seal, epoch: int) -> Term:
    return sign_term(liar.identity, RUN, uid=UID, epoch=epoch, boot=bytes(8), kind=TermKind.ADOPTION, seal=seal)


def beginning(liar: Server, epoch: int, *, number: int = 7, root: bytes = bytes(32)) -> list[bytes]:
    """Another beginning of the expert, and a Seal there."""
    term = sign_term(liar.identity, RUN, uid=UID, epoch=epoch, boot=bytes(8), kind=TermKind.GENESIS)
    state = {"number": number, "version": 2**62, "root": root, "size": 1, "time": epoch, "successors": []}
    return [term.blob, sign_seal(liar.identity, RUN, term=term, **state).blob]


# -- one liar ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_one_host_that_is_no_member_cannot_seize_an_expert(seed: int) -> None:
    world = World(seed, 4)
    leader = world.begin()
    liar = next(one for one in world.up if one.peer not in (leader.peer, *leader.machine.members))
    liar.kill()
    seal = leader.machine.held
    assert seal is not None
    now = int(world.now)
    world.strangers = [
        sign_term(liar.identity, RUN, uid=UID, epoch=now, boot=bytes(8), kind=TermKind.ADOPTION, seal=seal).blob,
        (fresh := sign_term(liar.identity, RUN, uid=UID, epoch=now + 1, boot=bytes(8), kind=TermKind.GENESIS)).blob,
        sign_seal(
            liar.identity,
            RUN,
            term=fresh,
            number=999,
            version=2**62,
            root=bytes(32),
            size=1,
            time=now + 50,
            successors=[one.peer for one in world.up][:3],
        ).blob,
    ]
    world.ghosts[liar.peer] = now + 1
    world.run(4 * LEASE)
    assert world.leaders == [leader], world.describe()
    assert all(one.machine.primary == leader.peer for one in world.up)


def lie(world: World, liar: Server, leader: Server, how: str) -> None:
    """One granted host shows everybody what it has made up just now, and says that it follows that."""
    now, seal = int(world.now), leader.last_seal
    assert seal is not None
    if how == "an adoption":
        said = [sign_term(liar.identity, RUN, uid=UID, epoch=now, boot=bytes(8), kind=TermKind.ADOPTION, seal=seal)]
    elif how == "an adoption that is to come":
        said = [
            sign_term(liar.identity, RUN, uid=UID, epoch=now + 59, boot=bytes(8), kind=TermKind.ADOPTION, seal=seal)
        ]
    elif how == "a beginning":
        said = [sign_term(liar.identity, RUN, uid=UID, epoch=now + 59, boot=bytes(8), kind=TermKind.GENESIS)]
    else:  # with the epoch that honest hosts name in their manifests
        epoch, boot = seal.epoch, bytes(8)
        said = [sign_term(liar.identity, RUN, uid=UID, epoch=epoch, boot=boot, kind=TermKind.GENESIS)]
        own = {"number": 2**60, "version": 2**62, "root": bytes(32), "size": 1, "time": now, "successors": []}
        fresh = sign_seal(liar.identity, RUN, term=said[0], **own)
        said.append(
            sign_term(liar.identity, RUN, uid=UID, epoch=epoch + 1, boot=boot, kind=TermKind.TAKEOVER, seal=fresh)
        )
    world.ghosts[liar.peer] = said[-1].epoch
    blobs = [term.blob for term in said]
    world.strangers = [*world.strangers, *blobs][-20:]
    for one in world.up:
        for blob in blobs:
            one.machine.sight(blob, world.now, one.wall)
        one.settle()


LIES = ("an adoption", "an adoption that is to come", "a beginning", "a beginning of the same epoch")


def settled(num_servers: int, *, skew: float) -> tuple[World, Server, Server]:
    """A world whose expert has been led for long, its primary, and one with a grant that hosts nothing."""
    world = World(5, num_servers, skew=skew)
    if num_servers == 1:
        world.servers[0].start()
        assert world.run_until(world.has_primary, 10 * LEASE)
    else:
        world.begin()
    world.run(11 * LEASE)
    liar = Server(world, 50)
    world.authority.granted.add(liar.peer)
    (leader,) = world.leaders
    leader.last_seal = leader.machine.held
    return world, leader, liar


@pytest.mark.parametrize("num_servers", [1, 2, 3, 4])
@pytest.mark.parametrize("how", LIES)
def test_no_lie_of_one_granted_host_stops_a_primary(how: str, num_servers: int) -> None:
    world, leader, liar = settled(num_servers, skew=20.0)
    for _ in range(30):
        lie(world, liar, leader, how)
        world.run(3.0)
        assert world.leaders == [leader], world.describe()
        leader.last_seal = leader.machine.held
    assert leader.machine.primary == leader.peer


@pytest.mark.parametrize("num_servers", [2, 3, 4])
@pytest.mark.parametrize("how", LIES)
def test_no_lie_of_one_granted_host_delays_a_takeover(how: str, num_servers: int) -> None:
    world, leader, liar = settled(num_servers, skew=0.0)
    leader.kill()
    for _ in range(15):
        lie(world, liar, leader, how)
        world.run(3.0)
    (new,) = world.leaders
    assert new is not leader and new.machine.lineage.best is new.machine.term
    assert new.machine.term is not None and new.machine.term.kind is TermKind.TAKEOVER


@pytest.mark.parametrize("kind", [TermKind.ADOPTION, TermKind.HANDOVER, TermKind.TAKEOVER])
def test_nobody_goes_on_from_a_seal_that_the_primary_did_not_sign(kind: TermKind) -> None:
    world, leader, liar = settled(4, skew=0.0)
    friends = [identity(90), identity(91)]
    liar.start()
    liar.machine.may.begin = False
    world.servers.append(liar)
    for _ in range(10):
        term, epoch = leader.machine.term, int(world.now) + 1
        assert term is not None
        state = {"number": 2**40, "version": 9, "root": bytes(32), "size": 1, "time": int(world.now)}
        forged = sign_seal(liar.identity, RUN, term=term, successors=[one.peer_id for one in friends], **state)
        vote = {"uid": UID, "epoch": epoch, "candidate": liar.peer, "seal": forged.age}
        votes = [sign_vote(friend, RUN, **vote) for friend in friends] if kind is TermKind.TAKEOVER else []
        handover = sign_handover(liar.identity, RUN, forged, liar.peer) if kind is TermKind.HANDOVER else b""
        more = {"seal": forged, "votes": votes, "handover": handover}
        lie = sign_term(liar.identity, RUN, uid=UID, epoch=epoch, boot=bytes(8), kind=kind, **more)
        world.strangers, world.ghosts[liar.peer], liar.files[bytes(32)] = [lie.blob], epoch, (-1,)
        for one in world.up:
            one.machine.sight(lie.blob, world.now, one.wall)
            one.settle()
        world.run(3.0)
        assert world.leaders == [leader] and all(one.machine.primary == leader.peer for one in world.up)
        assert not any(-1 in one.steps for one in world.up), "nor installs what is shown for it"


@pytest.mark.parametrize("knows_term", [True, False])
def test_votes_asked_for_with_a_made_up_seal_are_not_given_and_delay_no_takeover(knows_term: bool) -> None:
    world, leader, liar = settled(4, skew=0.0)
    led = leader.machine.term
    assert led is not None
    leader.kill()
    for _ in range(60):
        epoch = int(world.now) + 59
        made_up = sign_term(liar.identity, RUN, uid=UID, epoch=int(world.now), boot=bytes(8), kind=TermKind.GENESIS)
        peers = [one.peer for one in world.up]
        state = {"number": 2**40, "version": 9, "root": bytes(32), "size": 1, "time": int(world.now)}
        seal = sign_seal(liar.identity, RUN, term=led if knows_term else made_up, successors=peers, **state)
        for one in world.up:
            question = Question("vote", epoch, bytes(8), b"", seal.blob)
            assert not one.machine.ask(liar.peer, question, world.now, one.wall).vote
            one.settle()
        world.run(1.0)
    (new,) = world.leaders
    assert new.machine.term is not None and new.machine.term.kind is TermKind.TAKEOVER


def test_a_newcomer_that_was_shown_a_lie_first_comes_to_the_primarys_state() -> None:
    world, leader, liar = settled(4, skew=0.0)
    term, now = leader.machine.term, int(world.now)
    assert term is not None
    state = {"number": 2**40, "version": 9, "root": bytes(32), "size": 1, "time": now, "successors": []}
    lie = adoption(liar, sign_seal(liar.identity, RUN, term=term, **state), now)
    newcomer = Server(world, 60)
    world.authority.granted.add(newcomer.peer)
    world.servers += [liar, newcomer]
    liar.start()
    world.look_seconds = 5.0, 6.0
    newcomer.start()
    liar.machine.may.begin = newcomer.machine.may.begin = False
    liar.files[bytes(32)] = (-1,)
    newcomer.machine.ask(liar.peer, Question("probe", 0, bytes(8), lie.blob, b""), world.now, newcomer.wall)
    newcomer.settle()
    assert world.run_until(lambda: newcomer.steps == (-1,), 4.0), "it knows nothing else"
    world.look_seconds = 0.005, 0.1
    world.run(3 * LEASE)
    assert newcomer.machine.primary == leader.peer and newcomer.steps[:1] == leader.steps[:1], world.describe()


@pytest.mark.parametrize("num_servers", [1, 2, 4])
def test_a_primary_withstands_what_goes_on_from_an_adoption_of_its_expert(num_servers: int) -> None:
    """The adoption comes after what stands on it: a handover, which has the word of whom it is from."""
    world, leader, liar = settled(num_servers, skew=0.0)
    for _ in range(10):
        now, held = int(world.now), leader.machine.held
        assert held is not None
        took = adoption(liar, held, now)
        state = {"number": 1, "version": 9, "root": held.root, "size": 1, "time": now, "successors": []}
        seal = sign_seal(liar.identity, RUN, term=took, **state)
        signature = sign_handover(liar.identity, RUN, seal, liar.peer)
        more = {"seal": seal, "handover": signature}
        after = sign_term(liar.identity, RUN, uid=UID, epoch=now + 1, boot=bytes(8), kind=TermKind.HANDOVER, **more)
        for one in (*world.up, *world.up):
            one.machine.ask(liar.peer, Question("probe", 0, bytes(8), after.blob, took.blob), world.now, one.wall)
            one.settle()
        world.run(5.0)
        assert world.leaders == [leader] and leader.machine.primary == leader.peer, world.describe()


def test_members_whose_clocks_are_behind_keep_up_with_a_primary_that_withstands_adoptions() -> None:
    world, leader, liar = settled(4, skew=0.0)
    world.sync_every = 5.0
    others = [one for one in world.up if one is not leader]
    for one in others:
        one.skew = -28.0
    for _ in range(40):
        lie(world, liar, leader, "an adoption that is to come")
        world.run(3.0)
        leader.last_seal = leader.machine.held
    assert world.leaders == [leader] and world.has_members(3)
    assert all(len(one.steps) >= len(leader.steps) - 12.0 / world.step_period for one in others), world.describe()


def test_an_adoption_does_not_stop_the_only_member_that_is_left() -> None:
    world = World(2, 6)
    leader = world.begin()
    liar = Server(world, 50)
    world.authority.granted.add(liar.peer)
    world.run(2 * LEASE)
    for one in world.up:
        if one.peer in leader.machine.members:
            one.kill()
    world.run(LEASE)
    assert leader.machine.state is not State.PRIMARY and leader.machine.held is not None
    term = adoption(liar, leader.machine.held, int(world.now))
    world.strangers = [term.blob]
    leader.machine.sight(term.blob, world.now, leader.wall)
    assert leader.machine.state is State.ASIDE
    leader.settle()
    # neither the liar nor a member hands the file out, but this server and others have it
    assert world.run_until(world.agree, 6 * LEASE), world.describe()
    assert len(world.leaders[0].steps) >= len(leader.steps) - 1 or leader.aside


@pytest.mark.parametrize("period", [5.0, 20.0])
def test_adoptions_said_again_and_again_are_left_once_their_signer_was_silent_for_long(period: float) -> None:
    world, leader, liar = settled(6, skew=0.0)
    members = (leader.peer, *leader.machine.members)
    for one in world.up:
        if one.peer in members:
            one.kill()
    held = world.up[0].machine.held
    assert held is not None

    def lie_for(leases: int) -> None:
        for _ in range(int(leases * LEASE / period)):
            term = adoption(liar, held, int(world.now))
            world.strangers, world.ghosts[liar.peer] = [term.blob], term.epoch
            for one in world.up:
                one.machine.sight(term.blob, world.now, one.wall)
                one.settle()
            world.run(period)

    lie_for(10)
    leaders = world.leaders
    assert leaders, world.describe()
    lie_for(5)
    assert world.leaders == leaders and world.agree(), world.describe()


# -- two liars --------------------------------------------------------------------------------------------------------


def outvoted(seed: int) -> tuple[World, Server, list[Server]]:
    """A world of one honest server, which has been the primary for long, and two liars."""
    world = World(seed, 1)
    leader = world.servers[0]
    leader.start()
    assert world.run_until(world.has_primary, LEASE)
    world.run(12 * LEASE)
    liars = [Server(world, number) for number in (50, 51)]
    world.authority.granted |= {liar.peer for liar in liars}
    return world, leader, liars


def claim(world: World, liars: list[Server], *, root: bytes = bytes(32)) -> None:
    """One of them begins the expert anew, and all say that they follow that."""
    epoch = int(world.now)
    world.strangers = [*world.strangers, *beginning(world.random.choice(liars), epoch, root=root)][-20:]
    world.ghosts |= {liar.peer: epoch for liar in liars}


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_whose_file_nobody_shows_is_left_after_two_leases_for_good(seed: int) -> None:
    world, leader, liars = outvoted(seed)
    steps = leader.steps
    claim(world, liars)
    assert world.run_until(lambda: leader.machine.state is State.ASIDE, LEASE)
    claimed = world.now
    assert world.run_until(lambda: leader.leads, 8 * LEASE), world.describe()
    assert world.now - claimed >= 2 * LEASE and leader.steps[: len(steps)] == steps
    for _ in range(30):  # whatever else these say
        claim(world, liars)
        world.run(LEASE / 3)
    for _ in range(30):
        claim(world, liars)
        world.run(LEASE / 3)
        assert leader.leads, world.describe()


def test_it_counts_again_once_its_file_is_shown() -> None:
    world, leader, liars = outvoted(4)
    claim(world, liars, root=b"a" * 32)
    assert not world.run_until(lambda: bool(leader.aside), 6 * LEASE)
    assert world.run_until(lambda: leader.leads, 4 * LEASE)
    steps = leader.steps
    late = liars[0]
    late.files[b"a" * 32] = (7, 7)
    late.start()
    world.servers.append(late)
    assert world.run_until(lambda: bool(leader.aside), 3 * LEASE), world.describe()
    assert leader.aside[-1][: len(steps)] == steps and leader.steps[:2] == (7, 7)


def test_hosts_of_a_line_count_for_its_tree_even_if_the_last_term_of_it_was_a_lie() -> None:
    world = World(3, 6)
    leader = world.begin()
    liars = [Server(world, number) for number in (50, 51)]
    world.authority.granted |= {liar.peer for liar in liars}
    world.run(11 * LEASE)
    members = (leader.peer, *leader.machine.members)
    for one in world.up:
        if one.peer in members:
            one.kill()
    held = next(one.machine.held for one in world.up)
    assert held is not None
    term = adoption(liars[0], held, int(world.now) + 1)
    world.strangers = [term.blob]
    claim(world, liars)
    # all follow the lie, and say so in their manifests, until one of them adopts the expert
    assert world.run_until(world.agree, 12 * LEASE), world.describe()
    for _ in range(20):
        claim(world, liars)
        world.run(LEASE / 2)
        assert world.agree(), world.describe()


def survive(seed: int, *, hours: float) -> None:
    """Of 20 servers 2 lie; one in ten goes or comes every 5 minutes. The expert has a primary at each of these."""
    world = World(seed, 20)
    liars = world.servers[-2:]
    world.servers = world.servers[:-2]
    world.sync_every = 60.0
    world.step_period = 10.0
    world.begin()
    for _ in range(int(hours * 12)):
        for one in world.random.sample(world.servers, 2):
            if one.alive and len(world.up) > 6:
                one.kill()
            elif not one.alive:
                one.start()
        for liar in liars:
            world.strangers += world.lies(liar)
        world.strangers = world.strangers[-40:]
        world.run(300.0)
        assert world.leaders, world.describe()
    assert world.run_until(world.agree, 10 * LEASE), world.describe()
    (leader,) = world.leaders
    assert leader in world.servers
    taken = sum(one.acknowledged[-1][0] > world.now - 600 for one in world.servers if one.acknowledged)
    assert taken and len(leader.steps) >= 0.9 * len(world.acknowledged)


@pytest.mark.slow
def test_lineage_survives_a_day_of_churn_with_liars() -> None:
    survive(19, hours=24)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [14, 17, 18, 27])
def test_lineage_survives_hours_of_churn_in_which_members_die_as_liars_adopt(seed: int) -> None:
    survive(seed, hours=2)
