"""A whole run stops, and days later some of its servers come back, and others are new: in virtual time."""

import hashlib

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tesseract_async.experts.grants import sign_appointment
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.tenure_words import State
from tesseract_async.experts.terms import TermKind
from tests.experts.tenure_world import RUN, UID, Server, World, identity

DAY = 86400.0


def stopped(seed: int, *, num_old: int = 3, num_new: int = 2) -> tuple[World, list[Server], list[Server]]:
    """A world days after all that ran in it stopped: the network has forgotten the expert."""
    world = World(seed, num_old + num_new)
    old, new = world.servers[:num_old], world.servers[num_old:]
    for server in old:
        server.start()
    assert world.run_until(lambda: any(server.leads for server in old), 300)
    world.run(world.random.uniform(200.0, 900.0))
    for server in old:  # not all at once
        server.kill()
        world.run(world.random.uniform(0.0, 100.0))
    forget(world)
    return world, old, new


def forget(world: World, days: int = 3) -> None:
    """All are dead for so long."""
    world.sleep(days * DAY)
    world.published.clear()
    world.authority.is_old = True


def newest_sealed(servers: list[Server]) -> tuple[int, ...]:
    """The steps in the newest sealed file that one of these has on its disk."""
    found = []
    for server in servers:
        tenure = server.machine
        if tenure.held is not None and tenure.held.root in server.files:
            found.append((tenure.held.age, server.files[tenure.held.root]))
    return max(found)[1]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(5)), st.integers(1, 5), st.floats(0.0, 20.0))
# the others had not seen the last Terms before the stop
@example(113, [3, 1, 4, 2, 0], 5, 5.0)
@example(163, [1, 0, 2, 3, 4], 4, 5.0)
@example(175, [4, 2, 0, 1, 3], 3, 0.0)
@example(212, [1, 4, 2, 0, 3], 3, 0.5)
def test_training_goes_on_from_the_newest_certified_state_that_came_back(
    seed: int, order: list[int], num: int, gap: float
) -> None:
    world, old, _ = stopped(seed)
    came = [world.servers[number] for number in order[:num]]
    for server in came:
        server.start()
        world.run(gap)
    back = [server for server in came if server in old]
    state = newest_sealed(back) if back else ()
    led = world.run_until(lambda: any(server.leads for server in came), 40 * world.authority.lease)
    assert led
    world.run(10 * world.authority.lease)
    (leader,) = (server for server in came if server.leads)
    if back:
        assert set(state) <= set(leader.steps), "nothing that was certified is lost"
        assert all(server.machine.primary == leader.peer for server in came)
    else:
        assert leader.machine.term is not None
        assert world.now - 3 * DAY > 10 * world.authority.lease, "servers that have a state were waited for"


def test_newcomers_wait_for_servers_that_have_a_state() -> None:
    world, (first, *_), (newcomer, _) = stopped(5)
    newcomer.start()
    world.run(9 * world.authority.lease)
    assert newcomer.machine.state is State.ABSENT and newcomer.machine.waits_for_state(world.now, newcomer.wall)
    first.start()
    assert world.run_until(lambda: first.leads, 4 * world.authority.lease)
    assert world.run_until(lambda: newcomer.machine.state is State.FOLLOWING, 4 * world.authority.lease)
    assert set(newcomer.steps) <= set(first.steps)
    assert not newcomer.machine.waits_for_state(world.now, newcomer.wall)


def test_a_young_run_waits_for_nobody() -> None:
    world = World(1, 1)
    world.servers[0].start()
    assert world.run_until(lambda: world.servers[0].leads, 2.0)


def test_where_the_run_does_not_let_experts_begin_anew_they_wait_for_their_state() -> None:
    world, (first, *_), (newcomer, other) = stopped(6)
    world.authority.may_restart = False
    newcomer.start()
    other.start()
    world.run(DAY / 24)
    assert not newcomer.leads and not other.leads
    first.start()
    assert world.run_until(lambda: first.leads, 4 * world.authority.lease)
    world.run(4 * world.authority.lease)
    assert first.leads and newcomer.machine.primary == other.machine.primary == first.peer


def test_one_that_comes_after_ten_leases_is_put_aside_and_keeps_its_steps() -> None:
    world, (first, *_), (newcomer, _) = stopped(7)
    newcomer.start()
    assert world.run_until(lambda: newcomer.leads, 12 * world.authority.lease)
    assert newcomer.machine.term is not None and newcomer.machine.term.kind is TermKind.GENESIS
    world.run(12 * world.authority.lease)
    steps = first.steps
    first.start()
    world.run(6 * world.authority.lease)
    assert newcomer.leads and not first.leads and set(first.steps) <= set(newcomer.steps)
    assert steps in first.aside or first.machine.held is not None


def test_a_dead_branch_that_looks_newer_wins_nothing_after_a_week() -> None:
    """Cut off, it went on alone for long; the others elected another one, then all stopped for a week."""
    world, (first, *others), _ = stopped(8, num_new=0)
    for server in (first, *others):
        server.start()
        world.run(1.0)
    assert world.run_until(lambda: any(server.leads for server in world.servers), 300)
    (leader,) = (server for server in world.servers if server.leads)
    others = [server for server in world.servers if server is not leader]
    world.run(300)
    world.partition({leader.number}, {server.number for server in others})
    assert world.run_until(lambda: any(server.leads for server in others), 300)
    epoch = max(server.machine.epoch for server in others)
    leader.kill()
    leader.steps += tuple(next(world.step_numbers) for _ in range(10**4))  # whatever it says of its version
    world.heal()
    world.run(100)
    for server in others:
        server.kill()
    forget(world, 7)
    for server in (leader, *others):
        server.start()
        world.run(1.0)
    world.run(6 * world.authority.lease)
    assert not leader.leads and leader.machine.epoch >= epoch
    assert max(map(len, leader.aside)) > 10**4, "what it had is kept"
    (winner,) = (server for server in world.servers if server.leads)
    assert set(leader.steps) <= set(winner.steps)


def test_the_owner_may_go_back_to_what_was_put_aside() -> None:
    world, (first, *_), (newcomer, other) = stopped(9)
    newcomer.start()
    other.start()
    assert world.run_until(lambda: any(server.leads for server in (newcomer, other)), 20 * world.authority.lease)
    world.run(12 * world.authority.lease)
    first.start()
    world.run(6 * world.authority.lease)
    assert not first.leads and first.aside
    kept = max(first.aside, key=len)
    root = hashlib.sha256(repr(kept).encode()).digest()
    for serial, peer in ((1, other.peer), (2, first.peer)):
        pattern = ExpertPattern.parse(UID)
        world.authority.appointed = sign_appointment(identity(77), RUN, pattern, serial=serial, peer=peer, root=root)
        for server in world.servers:
            if server.alive:
                server.machine.authority_changed(world.now, server.wall)
                server.settle()
        world.run(5.0)
        assert other.machine.term is None or not other.leads or other.machine.term.kind is not TermKind.APPOINTED
    assert first.machine.wanted_root == root and other.machine.wanted_root is None
    first.machine.restored(bytes(32), world.now, first.wall)
    assert not first.leads, "another state is not what the owner said"
    first.steps = kept
    first.machine.restored(root, world.now, first.wall)
    first.settle()
    assert world.run_until(lambda: first.leads, 4 * world.authority.lease)
    world.run(6 * world.authority.lease)
    assert first.machine.wanted_root is None, "it is done once"
    assert first.leads and first.machine.term is not None and first.machine.term.seal is None
    for server in (newcomer, other):
        assert server.machine.primary == first.peer and set(kept) <= set(server.steps)
