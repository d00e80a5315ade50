"""The invariants of `Tenure`, in virtual time: machines alone, over a network and a directory that are made up."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.tenure_words import Fetch, Question, Response, Send, State
from tesseract_async.experts.terms import Seal, TermKind, read_seal, sign_seal, sign_term
from tesseract_async.identity import verify
from tests.experts.tenure_world import CREATED, RUN, UID, Server, World, appoint, identity
from tests.watching import calls_of

LEASE = 30.0


def seals_of(world: World) -> list[Seal]:
    found = []
    for record in world.history:
        try:
            found.append(read_seal(record, RUN))
        except ProtocolError:
            continue
    return found


def spans(world: World) -> list[tuple[float, float, Server]]:
    """From when to when each server gave answers to steps, without the pauses in between."""
    found: list[tuple[float, float, Server]] = []
    for server in world.servers:
        times = [at for at, _, _ in server.acknowledged]
        for at in times:
            if found and found[-1][2] is server and at - found[-1][1] <= 2 * world.step_period:
                found[-1] = (found[-1][0], at, server)
            else:
                found.append((at, at, server))
    return sorted(found, key=lambda span: span[:2])


def overlaps(world: World) -> list[tuple[float, float]]:
    ordered = spans(world)
    return [
        (late[0], early[1])
        for early, late in itertools.combinations(ordered, 2)
        if early[2] is not late[2] and late[0] <= early[1]
    ]


def check_nothing_is_gone(world: World) -> None:
    """Each answered step is in the branch that holds, or in a file that was set aside, or still where it was taken."""
    kept = {step for server in world.servers for steps in (server.steps, *server.aside) for step in steps}
    lost = {step for _, server, step in world.acknowledged if step not in kept}
    assert not lost or world.killed, sorted(lost)


# -- 1. one branch, whatever happened ---------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(3, 7))
@example(40070834, 4)
@example(1207730538, 5)
@example(15, 3)
@example(40, 3)
@example(224, 4)
@example(39, 7)
@example(113, 6)
@example(188, 6)
@example(20653, 6)
@example(6579, 7)
@example(50611, 4)
@example(900503, 6)  # half of a pair that slept takes over without a look, from somebody that trained on for long
def test_all_agree_soon_after_any_faults(seed: int, num_servers: int) -> None:
    agree_after(World(seed, num_servers), "split", 2 * LEASE)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(5, 7))
@example(48, 5)
@example(50141, 7)
def test_all_agree_soon_after_faults_in_which_only_one_part_has_the_network(seed: int, num_servers: int) -> None:
    agree_after(World(seed, num_servers), "split, and the network with one part", 5 * LEASE)


def agree_after(world: World, split: str, seconds: float) -> None:
    world.begin()
    world.fault(8, (split, "heal", "kill", "restart", "stall"))
    world.end_faults()
    assert world.run_until(lambda: len(world.views()) == 1, seconds), world.describe()
    assert world.run_until(world.agree, 10 * LEASE), world.describe()
    world.run(4 * LEASE)
    assert world.agree(), world.describe()
    check_nothing_is_gone(world)
    ages = defaultdict(set)
    for seal in seals_of(world):
        ages[(seal.primary, seal.epoch, seal.number)].add(seal.digest)
    assert all(len(digests) == 1 for digests in ages.values()), "9: two Seals of one number"


# -- 2. no two at once ------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(3, 6))
@example(127023494, 3)
@example(5188, 3)
@example(5548, 3)
@example(7895, 6)
@example(2000503, 6)  # one that was cut off gets the newest file, and adopts from members that it never asked
def test_of_three_members_no_two_answer_at_once_while_one_is_at_fault(seed: int, num_servers: int) -> None:
    answer_one_at_a_time(World(seed, num_servers), ("kill", "stall", "cut off"))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(3, 6))
@example(3, 6)
@example(6, 5)
@example(20, 3)
@example(21, 4)
@example(10504, 3)
def test_no_two_answer_at_once_while_one_reaches_the_network_but_not_all_others(seed: int, num_servers: int) -> None:
    answer_one_at_a_time(World(seed, num_servers), ("cut off, but for the network", "cut off from one", "disk full"))


def answer_one_at_a_time(world: World, faults: Sequence[str]) -> None:
    world.begin()
    for _ in range(4):
        (leader,) = world.leaders
        members = [one for one in world.servers if one.peer in (leader.peer, *leader.machine.members)]
        one = world.random.choice(members)
        everybody = {server.number for server in world.servers}
        match world.random.choice(faults):
            case "kill":
                one.kill()
            case "stall":
                world.stall(one, world.random.choice((0.1, 0.7, 1.0, 1.5, 10.0)) * LEASE)
            case "cut off":
                world.partition({one.number}, everybody - {one.number})
            case "cut off, but for the network":
                world.partition({one.number}, everybody - {one.number}, directory=everybody)
            case "cut off from one":
                other = world.random.choice([server for server in world.servers if server is not one])
                world.partition(everybody - {one.number}, everybody - {other.number}, directory=everybody)
            case _:
                one.machine.may.write = False
        world.run(world.random.uniform(0.0, 4 * LEASE))
        world.end_faults()
        one.machine.may.write = True
        assert world.run_until(lambda: world.agree() and world.has_members(3), 20 * LEASE), world.describe()
    assert not overlaps(world), overlaps(world)


def test_who_agreed_with_one_primary_agrees_with_no_late_one_for_a_lease() -> None:
    world = World(5, 4)
    leader = world.begin()
    world.run(world.sync_every)
    late = next(one for one in world.up if one.machine.state is State.HOLDING)
    assert leader.machine.leave() and leader.sync()
    leader.settle()
    seal, signature = leader.machine.held, leader.machine.hand_over(late.peer, world.now)
    assert seal is not None and signature is not None
    leader.kill()
    late.kill()
    assert world.run_until(world.has_primary, 2 * LEASE)
    world.run(LEASE)
    (elected,) = world.leaders
    member = next(one for one in world.up if one is not elected)
    epoch = int(world.now) + 20
    term = sign_term(
        late.identity, RUN, uid=UID, epoch=epoch, boot=bytes(8), kind=TermKind.HANDOVER, seal=seal, handover=signature
    )
    beat = Question("beat", epoch, bytes(8), term.blob, b"")
    assert not member.machine.ask(late.peer, beat, world.now, member.wall).agrees, "the other counts on its word"
    assert member.machine.primary == late.peer
    assert member.machine.ask(late.peer, beat, world.now + LEASE, member.wall).agrees


def test_stopped_for_ten_leases_and_resumed_it_answers_nothing() -> None:
    world = World(5, 3)
    leader = world.begin()
    world.stall(leader, 10 * LEASE)
    world.run(9 * LEASE)
    (other,) = world.leaders
    before = len(leader.acknowledged)
    world.run(4 * LEASE)
    assert len(leader.acknowledged) == before and leader.machine.state in (State.FOLLOWING, State.HOLDING)
    assert world.agree() and other.leads and leader.aside, "its steps since its last Seal are kept"


def test_a_lone_primary_goes_on_while_the_network_takes_its_word() -> None:
    world = World(6, 1)
    leader = world.begin()
    world.partition({1}, directory=())
    world.run(2 * LEASE)
    assert leader.machine.state is State.FENCED
    world.heal()
    world.run(LEASE)
    assert leader.leads


def test_one_killed_before_its_first_seal_begins_again() -> None:
    world = World(6, 1)
    (server,) = world.servers
    server.start()
    while server.disk is None:
        world.run(0.001)
    before = server.machine.epoch
    assert before and server.machine.held is None
    server.kill()
    server.start()
    server.declared = server.machine.epoch
    assert world.run_until(lambda: server.leads, 4 * LEASE), world.describe()
    assert server.machine.epoch > before


# -- 3. deaths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_kills", [1, 2])
def test_deaths_cost_what_was_not_sealed_and_no_more(num_kills: int) -> None:
    for seed in range(5):
        world = World(seed, 4)
        leader = world.begin()
        world.run(world.random.uniform(0.0, 3 * LEASE))
        died = world.now
        others = [one for one in world.servers if one.peer in leader.machine.members]
        for one in [leader, *others][:num_kills]:
            one.kill()
        assert world.run_until(world.has_primary, 5 * LEASE if num_kills > 1 else LEASE + 10), world.describe()
        (heir,) = world.leaders
        lost = [at for at, server, step in world.acknowledged if server is leader and step not in heir.steps]
        assert not lost or died - min(lost) <= world.sync_every + LEASE / 3


@pytest.mark.parametrize("num_servers", [2, 3])
def test_a_primary_whose_disk_takes_nothing_is_followed_by_another_and_does_not_lead_beside_it(
    num_servers: int,
) -> None:
    world = World(5, num_servers, skew=0.0)
    leader = world.begin()
    leader.machine.may.write = False
    assert world.run_until(lambda: world.leaders not in ([], [leader]), 3 * LEASE), world.describe()
    world.run(4 * LEASE)
    assert len(world.leaders) == 1 and leader not in world.leaders and not overlaps(world)
    leader.machine.may.write = True
    assert world.run_until(world.agree, 2 * LEASE) and leader.aside, "its own steps are kept"


# -- 4. handing over --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", ["keep", "seal", "signature", "all"])
def test_a_handover_loses_and_doubles_nothing_wherever_it_ends(until: str) -> None:
    world = World(7, 3)
    leader = world.begin()
    machine = leader.machine
    epoch = machine.epoch
    before = [step for _, server, step in world.acknowledged if server is leader]
    assert machine.leave() and not machine.is_primary(world.now) and not machine.leave()
    heir = next(one for one in world.servers if one.peer == machine.heirs(world.now)[0])
    if until == "keep":
        machine.keep(world.now)
        leader.settle()
        world.run(LEASE / 2)
        assert leader.leads and machine.epoch == epoch
        return
    assert leader.sync() and machine.held is not None
    leader.settle()
    heir.machine.sight(machine.held.blob, world.now, heir.wall)  # as the call that asks it to lead shows it
    heir.settle()
    world.run(2.0)
    assert heir.steps == leader.steps
    if until == "seal":
        machine.keep(world.now)
        leader.settle()
        world.run(LEASE)
        assert leader.leads
        return
    signature = machine.hand_over(heir.peer, world.now)
    leader.settle()
    if until == "all":
        assert not heir.machine.take(bytes(64), world.now, heir.wall)
        assert heir.machine.take(signature, world.now, heir.wall)
        heir.settle()
        world.run(2.0)
        assert heir.leads and heir.machine.term is not None and heir.machine.term.kind is TermKind.HANDOVER
    world.run(6 * LEASE)
    (now_leads,) = world.leaders
    assert now_leads.machine.epoch > epoch, "the old one never goes on in that epoch"
    assert set(before) <= set(now_leads.steps) and len(set(now_leads.steps)) == len(now_leads.steps)
    assert not overlaps(world)


def test_while_the_heir_fetches_the_state_nobody_else_takes_over() -> None:
    world = World(7, 4)
    leader = world.begin()
    machine = leader.machine
    assert machine.leave() and leader.sync()
    world.run(3 * LEASE)
    assert machine.state is State.YIELDING and not world.leaders and machine.primary == leader.peer
    world.partition({leader.number}, {one.number for one in world.servers} - {leader.number})
    world.run(0.7 * LEASE)
    assert machine.hand_over(machine.heirs(world.now)[0], world.now) is None, "others may have elected one"
    machine.keep(world.now)
    leader.settle()
    assert world.run_until(world.has_primary, 2 * LEASE) and leader not in world.leaders
    world.heal()
    assert world.run_until(world.agree, 2 * LEASE) and not overlaps(world)


def test_a_signature_that_the_heir_gets_late_is_worth_nothing() -> None:
    world = World(7, 3)
    leader = world.begin()
    machine = leader.machine
    heir = world.of(machine.heirs(world.now)[0])[0]
    assert machine.leave() and leader.sync()
    leader.settle()
    world.run(2.0)
    signature = machine.hand_over(heir.peer, world.now)
    assert signature is not None
    world.stall(heir, 2 * LEASE)
    leader.settle()
    world.run(1.5 * LEASE)
    assert not heir.machine.take(signature, world.now, heir.wall)


def test_who_handed_over_and_starts_again_does_not_lead_in_that_epoch() -> None:
    world = World(8, 2)
    leader = world.begin()
    epoch = leader.machine.epoch
    leader.machine.leave()
    leader.sync()
    leader.machine.hand_over(world.servers[0].peer, world.now)
    leader.settle()
    leader.kill()
    leader.start()
    for _ in range(40):
        world.run(LEASE / 4)
        assert not (leader.leads and leader.machine.epoch == epoch)


# -- 5. strangers -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.binary(max_size=600), st.integers(0, 2**63 - 1), st.integers(1, 2**63 - 1))
def test_strangers_change_nothing(noise: bytes, epoch: int, version: int) -> None:
    world = World(9, 2)
    leader = world.begin()
    stranger = identity(99)
    term = sign_term(stranger, RUN, uid=UID, epoch=min(epoch, 2**62), boot=bytes(8), kind=TermKind.GENESIS)
    seal = sign_seal(
        stranger,
        RUN,
        term=term,
        number=version,
        version=version,
        root=noise[:32].ljust(32),
        size=1,
        time=epoch,
        successors=[leader.peer],
    )
    for server in world.servers:
        machine = server.machine
        before = (machine.state, machine.epoch, machine.primary, machine.timer_at(), machine.held)
        for blob in (noise, term.blob, seal.blob, None, 5, [term.blob]):
            assert not machine.sight(blob, world.now, server.wall)
        for kind in ("beat", "rise", "probe", "vote", "nonsense"):
            ask = Question(kind, epoch, noise[:8], term.blob, seal.blob)
            answer = machine.ask(stranger.peer_id, ask, world.now, server.wall)
            assert not answer.agrees and not answer.vote and not answer.term
        machine.set_hosts(world.hosts() | {stranger.peer_id: min(epoch, 2**32 - 1)}, world.now, server.wall)
        assert not machine.commands()
        assert before == (machine.state, machine.epoch, machine.primary, machine.timer_at(), machine.held)


def test_silent_hosts_delay_a_takeover_by_no_more_than_one_time_out() -> None:
    took = []
    for num_ghosts in (0, 8):
        world = World(10, 3)
        leader = world.begin()
        for number in range(50, 50 + num_ghosts):  # they are hosts of the run, and never answer
            world.authority.granted.add(identity(number).peer_id)
            world.ghosts[identity(number).peer_id] = leader.machine.epoch
        world.run(LEASE)
        leader.kill()
        died = world.now
        assert world.run_until(world.has_primary, 2 * LEASE)
        took.append(world.now - died)
    assert max(took) <= LEASE + 6.0 and took[1] - took[0] <= 3.0


# -- 6. replays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_replays_change_nothing(seed: int) -> None:
    world = World(seed, 5)
    world.begin()
    world.fault(6, ("split", "heal", "kill", "restart", "stall"))
    world.end_faults()
    assert world.run_until(world.agree, 10 * LEASE)
    world.run(4 * LEASE)
    random, history = Random(seed), world.history
    (leader,) = world.leaders
    for server in world.up:
        epoch = server.machine.epoch
        for record in random.sample(history, len(history)) + random.choices(history, k=len(history)):
            server.machine.sight(record, world.now, server.wall)
        server.settle()
        assert server.machine.epoch == epoch
    assert world.leaders == [leader]


# -- restarts, clones, liars ------------------------------------------------------------------------------------------


def test_a_member_votes_once_an_epoch_after_a_lease_of_silence_and_for_no_older_seal() -> None:
    world = World(24, 3)
    leader = world.begin()
    world.run(2 * world.sync_every)
    voter, candidate = (one for one in world.up if one is not leader)
    machine, held = voter.machine, voter.machine.held
    assert held is not None
    first = next(seal for seal in seals_of(world) if seal.age < held.age and candidate.peer in seal.members)

    def vote(epoch: int, *, seal: Seal = held, asker: Server = candidate, at: float = 0.0) -> bool:
        ask = Question("vote", epoch, bytes(8), b"", seal.blob)
        return bool(machine.ask(asker.peer, ask, world.now + at, voter.wall).vote)

    epoch, later = int(voter.wall - CREATED) + 30, LEASE + 1.0
    assert not vote(epoch), "it has just heard its primary"
    assert not vote(machine.epoch, at=later) and not vote(epoch, seal=first, at=later)
    assert not vote(epoch + 86400, at=later), "that would bind it for a day"
    assert vote(epoch, at=later) and vote(epoch, at=later)
    assert not vote(epoch, asker=leader, at=later) and not vote(epoch - 1, at=later)
    assert leader.machine.term is not None
    beat = Question("beat", machine.epoch, leader.machine.term.boot, b"", b"")
    assert not machine.ask(leader.peer, beat, world.now + later, voter.wall).agrees, "bound by its vote"
    assert machine.ask(leader.peer, beat, world.now + later + LEASE, voter.wall).agrees


def test_one_that_starts_again_waits_a_lease_and_takes_a_new_term() -> None:
    world = World(11, 3)
    leader = world.begin()
    epoch, steps = leader.machine.epoch, leader.steps
    leader.kill()
    leader.start()
    started = world.now
    assert world.run_until(world.agree, 4 * LEASE)
    assert world.now - started >= LEASE * 0.9 and world.leaders[0].machine.epoch > epoch
    assert not overlaps(world) and steps[0] in world.leaders[0].steps


def test_alone_it_goes_on_at_once() -> None:
    world = World(12, 1)
    leader = world.begin()
    world.run(LEASE)
    steps = leader.steps
    leader.kill()
    leader.start()
    assert world.run_until(world.agree, 5.0) and leader.steps[: len(steps)] == steps


def test_one_that_ended_before_its_first_seal_begins_again() -> None:
    world = World(21, 1)
    server = world.servers[0]
    server.start()
    assert world.run_until(lambda: bool(server.machine.term), 5.0)
    server.kill()
    server.start()
    assert world.run_until(world.agree, LEASE)


def test_two_processes_with_one_key_both_stop() -> None:
    world = World(13, 1)
    leader = world.begin()
    clone = Server(world, 2, owner=1)
    clone.disk, clone.files, clone.steps = leader.disk, dict(leader.files), leader.steps
    world.servers.append(clone)
    clone.start()
    assert world.run_until(lambda: leader.machine.is_twin and clone.machine.is_twin, 3 * LEASE)
    assert not world.leaders


def test_a_primary_with_two_tongues_is_left_by_everybody() -> None:
    world = World(14, 3)
    leader = world.begin()
    term = leader.machine.term
    assert term is not None and leader.machine.held is not None
    number, members = leader.machine.held.number, leader.machine.members
    lies = [
        sign_seal(
            leader.identity,
            RUN,
            term=term,
            number=number + 5,
            version=1,
            root=bytes([n]) * 32,
            size=1,
            time=int(leader.wall - CREATED),
            successors=members,
        ).blob
        for n in (1, 2)
    ]
    world.strangers += lies
    assert world.run_until(lambda: any(s.machine.lineage.is_exposed(term) for s in world.up), 3 * LEASE)
    assert world.run_until(lambda: world.leaders not in ([], [leader]), 6 * LEASE), world.describe()


# -- 10. adopters, and everybody's return -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_of_two_adopters_one_answers_and_all_who_return_stand_aside(seed: int) -> None:
    world = World(seed, 5)
    leader = world.begin()
    world.run(3 * LEASE)  # the others hold a file, too
    members = [one for one in world.up if one.peer in (leader.peer, *leader.machine.members)]
    for one in members:
        one.kill()
    assert world.run_until(world.agree, 6 * LEASE), world.describe()
    world.run(2 * LEASE)
    assert world.agree()
    adopter = world.leaders[0]
    assert adopter.machine.term is not None and adopter.machine.term.kind is TermKind.ADOPTION
    everybody = list(world.servers)
    for one in everybody:
        one.kill()
    world.random.shuffle(everybody)
    for one in everybody:
        world.after(world.random.uniform(0.0, 3 * LEASE), one.start)
    world.run(3 * LEASE)
    assert world.run_until(world.agree, 10 * LEASE), world.describe()
    world.run(2 * LEASE)
    assert world.agree() and not overlaps(world)


def adoption(seed: int, lease: float, *, left: int) -> float:
    """Seconds without a primary after this one and its members, but for `left` of them, died within half a lease."""
    world = World(seed, 6, lease=lease, skew=0.0)
    leader = world.begin()
    world.run(world.random.uniform(2, 4) * lease)
    members = [one for one in world.up if one.peer in leader.machine.members]
    for one in members[: len(members) - left]:
        one.kill()
    world.run(world.random.uniform(0, lease / 2))
    leader.kill()
    died = world.now
    assert world.run_until(world.has_primary, 10 * lease), world.describe()
    return world.now - died


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("lease", [LEASE, 5.0])
@pytest.mark.parametrize("seeds", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_an_orphan_is_led_again_two_leases_after_its_primary_died(lease: float, left: int, seeds: int) -> None:
    took = sorted(adoption(seed, lease, left=left) for seed in range(seeds))
    assert took[int(0.99 * seeds)] <= 2 * lease + 1e-6, took  # looked at twice a second
    assert took[0] >= 1.5 * lease, "its members come first, and those that stood still for a moment"


def seconds_until_led(world: World) -> float:
    since = world.now
    while not world.has_primary():
        assert world.now < since + 10 * world.authority.lease, world.describe()
        world.run(0.05)
    return world.now - since


@pytest.mark.parametrize("seed", range(6))
def test_members_elect_the_next_primary_as_soon_as_its_lease_is_over(seed: int) -> None:
    """They ask whether it is there before that: a dead machine says nothing for a second and a half."""
    world = World(seed, 6, lease=5.0, skew=0.0)
    leader = world.begin()
    world.slowness, world.patience = 0.2, 1.5
    world.run(world.random.uniform(10, 20))
    leader.kill()
    assert seconds_until_led(world) <= 6.6


@pytest.mark.parametrize("seed", range(12))
def test_of_two_that_stand_at_once_one_gives_way_and_votes(seed: int) -> None:
    world = World(seed, 3, lease=5.0, skew=0.0)
    world.patience = 1.5
    leader = world.begin()
    world.run(10.0)
    leader.kill()
    for one in world.up:
        world.stall(one, 10.0)
    world.run(10.0)
    assert seconds_until_led(world) <= 2.0, "one time-out for the dead one, and an election"


@pytest.mark.parametrize("seed", range(3))
def test_where_the_network_answers_late_members_elect_the_next_primary_in_time(seed: int) -> None:
    """A server dies for good every half a minute, another comes, and a look at the network takes up to 17 s."""
    lease, kill_every = 5.0, 30.0
    world = World(seed, 4, lease=lease)
    world.sync_every = 2.0
    world.begin()
    world.look_seconds = 1.0, 17.0
    led_at, longest = world.now, 0.0
    for number in range(5, 11):
        victim = world.random.choice(world.up) if number % 2 else world.leaders[0]
        victim.kill()
        world.servers.remove(victim)
        newcomer = Server(world, number)
        world.authority.granted.add(newcomer.peer)
        world.servers.append(newcomer)
        newcomer.start()
        newcomer.machine.may.begin = False
        until = world.now + kill_every
        while world.now < until:
            world.run(0.1)
            assert len(world.leaders) < 2
            if world.leaders:
                led_at, longest = world.now, max(longest, world.now - led_at)
    assert max(longest, world.now - led_at) <= 2 * lease


@pytest.mark.parametrize("seed", range(4, 8))
def test_a_second_death_soon_after_a_takeover_does_not_end_the_lease(seed: int) -> None:
    """States take as long to arrive as the primary takes to make the next one."""
    lease = 5.0
    world = World(seed, 6, lease=lease)
    world.sync_every, world.step_period, world.slowness = 2.0, 0.5, 0.2
    first = world.begin()
    world.run(4 * lease)
    first.kill()
    world.servers.remove(first)
    assert world.run_until(world.has_primary, 2 * lease)
    (second,) = world.leaders
    world.run(2.0)
    other = next(one for one in world.up if one.peer in second.machine.members)
    other.kill()
    world.servers.remove(other)
    for _ in range(80):
        world.run(0.1)
        assert world.leaders == [second], "the members that it named since go on with it"
    second.kill()
    world.servers.remove(second)
    assert world.run_until(world.has_primary, 2 * lease)
    term = world.leaders[0].machine.term
    assert term is not None and term.kind is TermKind.TAKEOVER, "by vote: nobody had to wait for two leases"


def test_a_primary_whose_members_all_died_leads_again_two_leases_after_they_fell_silent() -> None:
    world = World(3, 6)
    leader = world.begin()
    world.run(2 * LEASE)
    for one in world.of(leader.machine.members[0]) + world.of(leader.machine.members[1]):
        one.kill()
    died = world.now
    assert world.run_until(lambda: not world.has_primary(), LEASE), "without them it is fenced"
    assert world.run_until(world.has_primary, 3 * LEASE), world.describe()
    assert world.now - died <= 2 * LEASE + 1.0 and world.leaders == [leader]


def test_members_whose_expert_was_adopted_by_somebody_who_is_gone_do_not_wait_for_each_other() -> None:
    world = World(3, 4)
    leader = world.begin()
    members = [one for one in world.up if one.peer in leader.machine.members]
    adopter = next(one for one in world.up if one is not leader and one not in members)
    for one in (leader, *members):
        one.kill()
    assert world.run_until(world.has_primary, 3 * LEASE)
    world.run(700.0)  # until its own state is sealed in the network; nobody else has that
    for one in (leader, adopter):
        one.kill()
        world.servers.remove(one)
    for one in members:
        one.start()
    assert world.run_until(world.agree, 6 * LEASE), world.describe()


@pytest.mark.parametrize("lacks", ["primary", "write"])
def test_a_member_that_could_not_lead_keeps_nobody_from_adopting_the_expert(lacks: str) -> None:
    world = World(3, 6)
    leader = world.begin()
    world.run(2 * LEASE)
    first, second = (one for one in world.up if one.peer in leader.machine.members)
    setattr(second.machine.may, lacks, False)
    first.kill()
    leader.kill()
    assert world.run_until(world.has_primary, 3 * LEASE), world.describe()
    assert second not in world.leaders and world.run_until(world.agree, 3 * LEASE)


# -- 11, 12. the owner, and signatures --------------------------------------------------------------------------------


def test_appointed_by_the_owner() -> None:
    world = World(15, 3)
    leader = world.begin()
    chosen = next(one for one in world.up if one is not leader)
    world.authority.appointed = appoint(1, chosen.peer)
    for one in world.up:
        one.machine.authority_changed(world.now, one.wall)
        one.settle()
    assert world.run_until(lambda: world.leaders == [chosen], 3 * LEASE), world.describe()
    assert world.run_until(world.agree, 3 * LEASE)


def test_where_a_founder_is_named_nobody_else_begins() -> None:
    world = World(22, 3)
    world.authority.founder = world.servers[1].peer
    assert world.begin() is world.servers[1]
    other = World(23, 2)
    other.authority.founder = identity(60).peer_id
    for server in other.servers:
        server.start()
    other.run(6 * LEASE)
    assert not other.leaders


def test_grants_that_expire_end_no_term_but_nobody_begins_another() -> None:
    world = World(16, 2)
    leader = world.begin()
    world.authority.expires = world.now + CREATED + 50.0
    world.run(10 * LEASE)
    assert world.leaders == [leader] and leader.acknowledged[-1][0] > world.now - LEASE
    leader.kill()
    world.run(6 * LEASE)
    assert not world.leaders


def test_a_primary_is_content_once_its_successors_are_named() -> None:
    world = World(25, 3)
    leader = world.begin()
    assert leader.machine.is_content
    alone = World(26, 1)
    assert alone.begin().machine.is_content
    newcomer = Server(alone, 2)
    alone.authority.granted.add(newcomer.peer)
    alone.servers.append(newcomer)
    newcomer.start()
    assert alone.run_until(lambda: not alone.servers[0].machine.is_content, 2 * LEASE), "somebody to name came"
    assert alone.run_until(lambda: alone.servers[0].machine.members == (newcomer.peer,), 4 * LEASE)


def test_signatures_are_checked_once() -> None:
    world = World(17, 3)
    world.begin()
    world.run(LEASE)
    world.sync_every = 1e9
    with calls_of(verify) as checked:
        world.run(10 * LEASE)
    assert not checked


# -- every order of three peers, to a depth ---------------------------------------------------------------------------


def every_order(depth: int) -> None:
    """The primary dies; each of the next messages is quick, late, or lost, in every combination."""
    for choices in itertools.product((0.01, 0.9, None), repeat=depth):
        world = World(18, 3)
        leader = world.begin()
        leader.kill()
        world.fates = list(choices)
        assert world.run_until(world.agree, 6 * LEASE), (choices, world.describe())
        world.run(LEASE)
        assert world.agree() and not overlaps(world), choices
        leader.start()
        assert world.run_until(world.agree, 4 * LEASE), (choices, world.describe())


def test_every_order_of_a_few_messages_ends_in_one_primary() -> None:
    every_order(4)


@pytest.mark.slow
def test_every_order_of_more_messages_ends_in_one_primary() -> None:
    every_order(7)


def test_commands_come_in_the_order_in_which_they_must_be_done() -> None:
    world = World(20, 3)
    leader = world.begin()
    server = next(one for one in world.up if one is not leader)
    machine = server.machine
    leader.kill()
    later = world.now + 3 * LEASE
    machine.handle_timer(later, server.wall)
    (probe,) = [command for command in machine.commands() if isinstance(command, Send)]
    machine.answered(probe.peer, probe.question, None, later, later, server.wall)
    asked = [command for command in machine.commands() if isinstance(command, Send)]
    voter = next(one for one in world.up if one is not server)
    question = next(one.question for one in asked if one.peer == voter.peer)
    vote = voter.machine.ask(server.peer, question, later, voter.wall)
    assert vote.vote and [type(one).__name__ for one in voter.machine.commands()][-1] == "Persist"
    machine.answered(voter.peer, question, vote, later, later, server.wall)
    commands = machine.commands()
    kinds = [type(command).__name__ for command in commands]
    assert kinds.index("Persist") < min(kinds.index("Send"), kinds.index("Publish")) and "Fetch" not in kinds


def test_who_stood_still_itself_asks_again_before_it_takes_others_for_dead() -> None:
    world = World(20, 3)
    leader = world.begin()
    machine = next(one.machine for one in world.up if one is not leader)
    wall = CREATED + world.now
    asked = world.now + 3 * LEASE
    machine.handle_timer(asked, wall)
    (probe,) = [command for command in machine.commands() if isinstance(command, Send)]
    woke = asked + LEASE
    machine.answered(probe.peer, probe.question, None, asked, woke, wall)
    machine.handle_timer(woke, wall)
    again = [command for command in machine.commands() if isinstance(command, Send)]
    assert again == [probe]
    machine.handle_timer(woke + LEASE, wall)
    assert [one.question.kind for one in machine.commands() if isinstance(one, Send)] == ["vote"] * 2, "once"


def test_members_that_fall_silent_are_replaced_before_the_next_state_is_due() -> None:
    world = World(3, 6)
    world.sync_every = 1e9  # one state is sealed, and none after it
    for server in world.servers:
        server.start()

    def is_settled() -> bool:
        own = [one.machine for one in world.leaders]
        live = {one.peer for one in world.up}
        return bool(own) and own[0].is_content and len(own[0].members) == 2 and set(own[0].members) <= live

    assert world.run_until(is_settled, 20 * LEASE)
    (leader,) = world.leaders
    for _ in range(3):
        victim = world.of(leader.machine.members[0])[0]
        victim.kill()
        assert world.run_until(is_settled, 1.6 * LEASE), "a dead member still counts in every majority"
        assert world.leaders == [leader]
    assert len({seal.root for seal in seals_of(world)}) == 1, "naming others takes no new state"


def test_a_successor_replaces_the_dead_primary_among_its_members_at_once() -> None:
    world = World(3, 6)
    for server in world.servers:
        server.start()
    assert world.run_until(lambda: any(len(one.machine.members) == 2 for one in world.leaders), 20 * LEASE)
    for _ in range(3):  # each one's death follows that of the one before by little more than a lease
        (leader,) = world.leaders
        leader.kill()
        assert world.run_until(world.has_primary, 1.3 * LEASE)
        world.run(LEASE / 3)


def test_a_newcomer_is_told_of_the_newest_seal_by_a_holder_of_its_file() -> None:
    world = World(3, 3)
    first, second, newcomer = world.servers
    first.start()
    second.start()
    assert world.run_until(lambda: second.machine.state is State.FOLLOWING, 20 * LEASE)
    (leader,) = world.leaders
    follower = second if leader is first else first
    assert follower.machine.held is not None
    question = Question("probe", 0, bytes(8), b"", b"")
    answer = follower.machine.ask(newcomer.peer, question, world.now, follower.wall)
    assert answer.vote == follower.machine.held.blob
    assert not follower.machine.ask(identity(50).peer_id, question, world.now, follower.wall).vote


def left_behind(*ages: float) -> tuple[World, list[Server], Server]:
    """A run whose last server left with the newest state, holders that went so many seconds before it and came back,
    and a newcomer."""
    world = World(1, 1 + len(ages), lease=5.0, skew=0.0)
    world.sync_every = 2.0
    leader = world.begin()
    holders = [one for one in world.servers if one is not leader]
    for holder, age in zip(holders, ages, strict=True):
        world.after(max(ages) - age + 20.0, holder.kill)
    world.run(max(ages) + 20.0)
    leader.kill()
    world.run(60.0)
    for holder in holders:
        holder.start()
        holder.machine.may.primary = False
    newcomer = Server(world, 9)
    world.authority.granted.add(newcomer.peer)
    world.servers.append(newcomer)
    newcomer.start()
    newcomer.machine.may.begin = False
    return world, [leader, *holders], newcomer


def ask_for_states(world: World, one: Server, others: list[Server]) -> bool:
    """Ask as its driver does, where somebody says that it has a newer state. Whether `one` leads."""
    held = one.machine.held
    for other in others:
        question = Question("probe", one.machine.epoch, bytes(8), b"", b"" if held is None else held.blob)
        world.send(one, other.peer, question)
    return world.leaders == [one]


def test_where_nobody_shows_the_newest_state_a_newcomer_goes_on_from_the_one_that_a_holder_has() -> None:
    world, (leader, holder), newcomer = left_behind(30.0)
    assert world.run_until(lambda: ask_for_states(world, newcomer, [holder]), 40.0), world.describe()
    assert newcomer.machine.term is not None and newcomer.machine.term.kind is TermKind.ADOPTION
    mine = leader.steps
    leader.start()
    world.run(40.0)
    assert world.leaders == [newcomer] and world.agree(), world.describe()
    assert mine in leader.aside, "what the first one had is kept, and wins nothing"
    assert not overlaps(world)


def test_a_newcomer_takes_the_newer_one_of_two_older_states() -> None:
    world, (_, older, newer), newcomer = left_behind(60.0, 30.0)
    assert older.machine.held is not None and newer.machine.held is not None
    assert older.machine.held.age < newer.machine.held.age
    assert world.run_until(
        lambda: ask_for_states(world, newcomer, [older]) or newcomer.machine.held is not None, 40.0
    ), "at first one of them answers"
    assert world.run_until(lambda: ask_for_states(world, newcomer, [older, newer]), 40.0), world.describe()
    assert set(newer.steps) <= set(newcomer.steps)


def test_a_state_that_its_primary_did_not_sign_is_not_taken() -> None:
    world, (_, holder), newcomer = left_behind(30.0)
    machine, taken = newcomer.machine, []
    carry_out = newcomer.carry_out

    def note(command: object) -> None:
        taken.append(command)
        carry_out(command)

    newcomer.carry_out = note  # type: ignore[method-assign]
    question = Question("probe", 0, bytes(8), b"", b"")
    more = {"version": 1, "root": bytes(32), "size": 1, "time": 1, "successors": ()}
    for _ in range(100):
        world.run(0.2)
        if (best := machine.lineage.best) is not None:
            forged = sign_seal(holder.identity, RUN, term=best, number=9, **more)  # type: ignore[arg-type]
            answer = Response(False, forged.age, b"", forged.blob)
            machine.answered(holder.peer, question, answer, world.now, world.now, newcomer.wall)
            newcomer.settle()
    assert machine.lineage.best is not None and machine.lineage.is_unshown(machine.lineage.best)
    roots = {command.seal.root for command in taken if isinstance(command, Fetch)}
    assert roots and bytes(32) not in roots


def test_a_copy_that_has_more_than_the_line_is_kept_by_whom_it_comes_back_with() -> None:
    world, (leader, older, newer), newcomer = left_behind(60.0, 4.0)
    newer.kill()
    more = newer.steps
    assert world.run_until(lambda: ask_for_states(world, newcomer, [older]), 60.0), world.describe()
    assert not set(more) <= set(newcomer.steps)
    newer.start()
    newer.machine.may.primary = False
    assert world.run_until(lambda: set(newer.steps) <= set(newcomer.steps), 10.0), world.describe()
    assert newer.aside == [more] and not older.aside, "nobody else has those steps: the first primary may never return"
    world.run(20.0)
    assert newer.aside == [more] and world.leaders == [newcomer]


def test_a_successor_counts_while_a_state_is_long_on_its_way_and_is_replaced_where_none_comes() -> None:
    world = World(4, 5)
    leader = world.begin()
    world.run(world.sync_every)
    slow = next(one for one in world.up if one.peer in leader.machine.members)
    slow.fetch = lambda command, life: None  # type: ignore[method-assign]
    world.run(2.5 * world.sync_every)
    assert slow.peer in leader.machine.members
    world.run(5 * world.sync_every)
    assert slow.peer not in leader.machine.members and world.leaders == [leader]
    assert world.has_members(3)


# -- clocks that jump --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [86400.0, -86400.0])
@pytest.mark.parametrize("whose", ["primary", "successor", "holder"])
def test_a_clock_that_jumps_by_a_day_stops_nothing(whose: str, seconds: float) -> None:
    world = World(4, 5)
    leader = world.begin()
    world.run(2 * LEASE)
    successors = [one for one in world.up if one.peer in leader.machine.members]
    holders = [one for one in world.up if one is not leader and one not in successors]
    {"primary": leader, "successor": successors[0], "holder": holders[0]}[whose].skew += seconds
    world.run(20 * LEASE)
    assert world.leaders == [leader] and len(world.acknowledged) > 15 * LEASE / world.step_period, world.describe()
    right = [one for one in world.up if one.skew == leader.skew or abs(one.skew) < 60]
    died = world.now
    leader.kill()
    assert world.run_until(world.has_primary, 2 * LEASE), world.describe()
    (heir,) = world.leaders
    newest = max(at for at, _, step in world.acknowledged if step in heir.steps and at < died)
    assert heir in right and died - newest <= world.sync_every + LEASE, "its state was followed all the time"
    world.run(LEASE)
    assert all(one.machine.epoch == heir.machine.epoch for one in right if one is not leader)


@pytest.mark.parametrize("seconds", [30000.0, -30000.0])
def test_one_alone_whose_clock_is_wrong_for_a_while_goes_on_after_a_restart(seconds: float) -> None:
    """It was ahead, and is set right; or it is behind after a start, until the time is asked for."""
    world = World(3, 1, skew=0.0)
    (server,) = world.servers
    world.now += 40000.0
    server.skew = max(0.0, seconds)
    server.start()
    world.run(4 * LEASE)
    steps = server.steps
    server.kill()
    server.skew = min(0.0, seconds)
    server.start()
    assert world.run_until(lambda: server.leads, 4 * LEASE), world.describe()
    server.skew = 0.0
    world.run(4 * LEASE)
    assert world.leaders == [server] and server.steps[: len(steps)] == steps


def test_a_member_that_was_killed_while_its_clock_was_years_ahead_votes_again() -> None:
    world = World(4, 3)
    leader = world.begin()
    world.run(2 * LEASE)
    one, other = (server for server in world.up if server is not leader)
    leader.kill()
    world.stall(other, 10 * LEASE)
    one.skew += 3e8
    assert world.run_until(lambda: one.machine.state is State.CANDIDATE, 2 * LEASE)
    one.kill()
    one.skew -= 3e8
    one.start()
    world.stall(other, 0.0)
    assert world.run_until(world.has_primary, 4 * LEASE), world.describe()
