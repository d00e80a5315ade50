"""A run's experts outlive their volunteers: placement and tenures together, over a fake directory, in virtual time."""

from collections import defaultdict
from dataclasses import dataclass
from random import Random

import pytest

from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.placement import Placement, assign
from tesseract_async.experts.places import MemberPart, MemberRole, Place, Survey
from tesseract_async.experts.tenure_words import State
from tesseract_async.identity import PeerID
from tests.experts.tenure_world import Server, World, identity

LEASE = 30.0
LOOK_EVERY = 5.0
DECIDE_EVERY = 30.0
"""Seconds after which members decide although nothing that they say has changed."""
ROOM, FILES = 8, 40


@dataclass
class Volunteer:
    """A computer that stays for a while, and then is gone for good."""

    number: int
    peer: PeerID
    leaves_at: float
    machine: Placement


class Run:
    """Each expert is a world of its own, with the same volunteers and the same clock."""

    def __init__(self, seed: int, *, num_servers: int, num_experts: int, session: float, step_every: float) -> None:
        self.random, self.now, self.session = Random(seed), 0.0, session
        self.pattern = ExpertPattern.parse(f"ffn.[0:{num_experts}]")
        self.worlds: dict[str, World] = {}
        for number, uid in enumerate(self.pattern):
            world = self.worlds[uid] = World(seed * 1000 + number, 0, lease=LEASE, skew=0.0)
            world.now, world.step_period = 0.0, step_every
        self.parts: dict[tuple[int, str], Server] = {}
        self.volunteers: dict[PeerID, Volunteer] = {}
        self.num_ever = 0
        self.lost: set[str] = set()
        self.unled: defaultdict[str, float] = defaultdict(float)
        self.gaps: list[float] = []
        """Seconds, rounded up to a look, for which an expert was led by nobody."""
        self.doubles = 0
        self.survey: Survey | None = None
        self.said: object = None
        self.decided_at = -DECIDE_EVERY
        for _ in range(num_servers):
            self.join()

    def join(self) -> None:
        self.num_ever += 1
        peer = identity(self.num_ever).peer_id
        leaves_at = self.now + self.random.expovariate(0.693 / self.session)  # half leave within `session`
        machine = Placement(
            peer, self.pattern, num_copies=3, lease=LEASE, created=0.0, may_restart=False, may=lambda peer, uid: True
        )
        self.volunteers[peer] = Volunteer(self.num_ever, peer, leaves_at, machine)
        for world in self.worlds.values():
            world.authority.granted.add(peer)

    def leave(self, volunteer: Volunteer) -> None:
        """Without a farewell."""
        del self.volunteers[volunteer.peer]
        for uid, world in self.worlds.items():
            if (part := self.parts.pop((volunteer.number, uid), None)) is not None:
                part.kill()
                world.servers.remove(part)

    def place(self, volunteer: Volunteer) -> Place:
        parts = dict.fromkeys(volunteer.machine.announced, MemberPart(MemberRole.HOLDER))
        for uid in self.pattern:
            if (part := self.parts.get((volunteer.number, uid))) is None or part.tenure is None:
                continue
            tenure, held = part.machine, part.machine.held
            leads = tenure.state in (State.PRIMARY, State.FENCED)
            age = (tenure.epoch, 0) if held is None else held.age
            if leads:
                age = tenure.epoch, age[1] if age[0] == tenure.epoch else 0
            parts[uid] = MemberPart(MemberRole.PRIMARY if leads else MemberRole.HOLDER, *age)
        return Place(volunteer.peer, ROOM, FILES, uptime=self.now, parts=parts)

    def take(self, volunteer: Volunteer, kind: str, uid: str) -> None:
        key = volunteer.number, uid
        if kind == "drop":
            part, world = self.parts[key], self.worlds[uid]
            if not part.leads:
                part.kill()
                world.servers.remove(part)
                del self.parts[key]
        elif key not in self.parts:
            world = self.worlds[uid]
            part = self.parts[key] = Server(world, volunteer.number)
            world.servers.append(part)
            part.start()
            part.machine.may.begin = kind == "begin"

    def tick(self) -> None:
        for volunteer in [one for one in self.volunteers.values() if one.leaves_at <= self.now]:
            self.leave(volunteer)
            self.join()
        places = {peer: self.place(one) for peer, one in self.volunteers.items()}
        said = {
            peer: {uid: (part.role, part.epoch, part.has_file) for uid, part in place.parts.items()}
            for peer, place in places.items()
        }
        is_waiting = any(volunteer.machine.announced for volunteer in self.volunteers.values())
        if self.survey is None or is_waiting or said != self.said or self.now - self.decided_at >= DECIDE_EVERY:
            self.said, self.decided_at = said, self.now
            self.decide(places)
        for world in self.worlds.values():
            world.run(LOOK_EVERY)
        self.now += LOOK_EVERY
        self.check()

    def decide(self, places: dict[PeerID, Place]) -> None:
        self.survey = next(iter(self.volunteers.values())).machine.survey(places, self.now)
        steps = assign(self.survey, num_copies=3, pattern=self.pattern, may=lambda peer, uid: True)
        for peer, volunteer in self.volunteers.items():
            for step in volunteer.machine.choose(self.survey, steps.get(peer, []), self.now, self.now):
                self.take(volunteer, step.kind, step.uid)

    def check(self) -> None:
        assert self.survey is not None
        alive = self.survey.alive
        for uid, world in self.worlds.items():
            if uid in alive and not any(one.files for one in world.servers):
                self.lost.add(uid)
            leaders = len(world.leaders)
            self.doubles += leaders > 1
            if leaders and self.unled[uid]:
                self.gaps.append(self.unled.pop(uid))
            elif not leaders and uid in alive:
                self.unled[uid] += LOOK_EVERY


@pytest.mark.parametrize(
    ("num_servers", "num_experts", "hours", "session"),
    [
        (8, 2, 0.25, 900.0),
        pytest.param(200, 12, 24.0, 3600.0, marks=[pytest.mark.slow, pytest.mark.timeout(6 * 3600)]),
    ],
)
def test_no_expert_is_lost(num_servers: int, num_experts: int, hours: float, session: float) -> None:
    run = Run(1, num_servers=num_servers, num_experts=num_experts, session=session, step_every=30.0)
    while run.now < hours * 3600:
        run.tick()
    assert run.num_ever > num_servers * (1 + 0.5 * hours * 3600 / session)
    assert not run.lost, f"of {num_experts} experts and {run.num_ever} volunteers"
    assert not run.doubles
    gaps = sorted(run.gaps)
    assert not gaps or gaps[int(0.99 * len(gaps))] <= 2 * LEASE, ("from the death on", gaps[-10:])
    survey = Survey({peer: run.place(one) for peer, one in run.volunteers.items()})
    assert all(survey.standing(uid).losses >= 1 for uid in run.pattern)
