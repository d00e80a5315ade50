"""Deaths in the middle of handovers, transfers and adoptions, in virtual time: the lineage says what is left."""

import itertools
from collections.abc import Callable

import pytest

from tesseract_async.experts.lineage import Lineage
from tesseract_async.experts.tenure_words import State
from tesseract_async.experts.terms import Seal, TermKind
from tests.experts.tenure_world import CREATED, UID, Server, World

LEASE = 30.0
SIZE = 7


def later(world: World, one: Server, seconds: float, action: Callable[[], None]) -> None:
    """Do it then, if this process is still alive."""
    life = one.life
    world.after(seconds, lambda: (action(), one.settle()) if one.is_up and one.life == life else None)


def hand_over(world: World, leader: Server, heir: Server) -> None:
    """As servers' drivers do it: seal, show the Seal, sign when the heir has its file, have it taken."""
    if not leader.machine.leave():
        return
    leader.sync()
    seal = leader.machine.held
    assert seal is not None

    def show() -> None:
        heir.machine.sight(seal.blob, world.now, heir.wall)

    def sign() -> None:
        if not heir.is_up or heir.machine.held != seal or leader.machine.state is not State.YIELDING:
            leader.machine.keep(world.now)
            return
        signature = leader.machine.hand_over(heir.peer, world.now)
        later(world, heir, world.latency(), lambda: heir.machine.take(signature, world.now, heir.wall) and None)

    later(world, heir, world.latency(), show)
    later(world, leader, 1.0, sign)


def others(world: World, leader: Server, *states: State) -> list[Server]:
    return [one for one in world.up if one is not leader and one.machine.state in states]


class Deaths:
    """A world in which one is killed after the other; half of them never return, and others come instead."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed, SIZE)
        self.world.begin()
        self.random = self.world.random
        self.numbers = itertools.count(SIZE + 1)
        self.branch: dict[int, float] = {}
        """Steps of the branch that holds, and when they were acknowledged."""

    def begin(self, what: str) -> Server | None:
        """Have something begin, and return who is to die in it."""
        world = self.world
        (leader,) = world.leaders
        followers = others(world, leader, State.FOLLOWING)
        match what:
            case "handover":
                heir = self.random.choice(followers or others(world, leader, State.HOLDING))
                hand_over(world, leader, heir)
                return self.random.choice((leader, heir))
            case "transfer":
                newcomer = self.join()
                leader.sync()
                leader.settle()
                return self.random.choice((leader, newcomer))
            case "adoption":
                for one in followers:
                    self.kill(one)
                self.kill(leader)
                world.run_until(lambda: bool(self.adopters()) or world.has_primary(), 4 * LEASE)
                found = self.adopters()
                return self.random.choice(found) if found else None
        some = {"primary": [leader], "follower": followers, "holder": others(world, leader, State.HOLDING)}[what]
        return self.random.choice(some) if some else None

    def adopters(self) -> list[Server]:
        terms = [(one, one.machine.term) for one in self.world.up if one.machine.state is State.CANDIDATE]
        return [one for one, term in terms if term is not None and term.kind is TermKind.ADOPTION]

    def join(self) -> Server:
        one = Server(self.world, next(self.numbers))
        self.world.authority.granted.add(one.peer)
        self.world.servers.append(one)
        one.start()
        return one

    def kill(self, one: Server) -> None:
        one.kill()
        if self.random.random() < 0.5:
            self.world.servers.remove(one)
            self.world.after(self.random.uniform(1.0, 2 * LEASE), self.join)
        else:
            self.world.after(self.random.uniform(1.0, 4 * LEASE), one.start)

    def die(self, what: str) -> None:
        """One death, and what comes of it."""
        world = self.world
        began = world.now
        victim = self.begin(what)
        world.run(self.random.uniform(0.0, 1.5))
        if victim is not None and victim.alive:
            self.kill(victim)
        self.note()
        assert world.run_until(world.agree, 12 * LEASE), (what, world.describe())
        self.check(what, began)
        world.run(self.random.uniform(LEASE, 4 * LEASE))
        assert world.run_until(lambda: world.agree() and world.has_members(3), 12 * LEASE), (what, world.describe())
        self.branch = {}
        self.note()

    def note(self) -> None:
        at = {step: when for when, _, step in self.world.acknowledged}
        steps = {step for one in self.world.leaders for step in one.steps}
        self.branch |= {step: at[step] for step in steps if step in at}

    def check(self, what: str, began: float) -> None:
        world = self.world
        (leader,) = world.leaders
        lost = [at for step, at in self.branch.items() if step not in leader.steps]
        assert not lost or began - min(lost) <= world.sync_every + LEASE / 3, (what, lost)
        lineage = Lineage(UID, world.authority)
        records = [record for record in map(lineage.read, world.history) if record is not None]
        for record in records:
            lineage.add(record, now=CREATED + world.now + 60)
        assert leader.machine.term is not None
        line = [lineage.read(blob) for blob in leader.machine.lineage.line(leader.machine.term)]
        epochs = [term.epoch for term in line if term is not None and not isinstance(term, Seal)]
        assert epochs == sorted(set(epochs)), "one primary of each epoch"
        signed: dict[tuple[object, int, int], bytes] = {}
        for record in records:
            if isinstance(record, Seal):
                assert signed.setdefault((record.primary, *record.age), record.digest) == record.digest
        assert len(set(leader.steps)) == len(leader.steps)
        assert all(one.machine.epoch == leader.machine.epoch for one in world.up), "no ghost"


KINDS = ("handover", "transfer", "adoption", "primary", "follower", "holder")


@pytest.mark.parametrize("num_deaths", [12, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_deaths_in_the_middle_of_anything_leave_one_branch_and_lose_little(num_deaths: int) -> None:
    deaths = Deaths(0)
    for number in range(num_deaths):
        if number % 20 == 19:
            deaths = Deaths(number)
        deaths.die(KINDS[number % len(KINDS)])
