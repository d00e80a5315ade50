"""Servers of one expert, their network and its directory, in virtual time: what `Tenure` is tested in."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tesseract_async.experts.grants import Appointment, sign_appointment
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.tenure import Tenure
from tesseract_async.experts.tenure_words import Fetch, Look, Persist, Publish, Question, RoleChanged, Send, State
from tesseract_async.experts.terms import EPOCH_ZERO, Seal, TermKind, sign_seal, sign_term
from tesseract_async.identity import Identity, PeerID
from tesseract_async.server.state_files import NUM_SEALED

UID = "ffn.0.0"
RUN = b"r" * 16
CREATED = float(EPOCH_ZERO)


def appoint(serial: int, peer: PeerID | None) -> Appointment:
    """The owner's word. Nobody looks at its signature here."""
    return sign_appointment(identity(77), RUN, ExpertPattern.parse(UID), serial=serial, peer=peer)


@dataclass
class FakeAuthority:
    """Grants for those listed."""

    granted: set[PeerID] = field(default_factory=set)
    lease: float = 30.0
    appointed: Appointment | None = None
    run_id: bytes = RUN
    expires: float = float("inf")
    founder: PeerID | None = None
    may_restart: bool = True
    is_old: bool = False

    def may_be_forgotten(self, now: float) -> bool:
        return self.is_old

    def may(self, peer_id: PeerID, role: str, uid: str | None = None, *, now: float | None) -> bool:
        return peer_id in self.granted and (now is None or now < self.expires)

    def is_member(self, peer_id: PeerID) -> bool:
        return peer_id in self.granted

    def appointment(self, uid: str) -> Appointment | None:
        return self.appointed


def identity(number: int) -> Identity:
    return Identity.from_seed(number.to_bytes(32, "big"))


class Server:
    """One process: its `Tenure`, its disk, the steps in its state."""

    def __init__(self, world: World, number: int, *, skew: float = 0.0, owner: int | None = None) -> None:
        self.world, self.number, self.skew = world, number, skew
        self.identity = identity(number if owner is None else owner)
        self.peer = self.identity.peer_id
        self.disk: bytes | None = None
        self.aside: list[tuple[int, ...]] = []
        self.steps: tuple[int, ...] = ()
        self.files: dict[bytes, tuple[int, ...]] = {}
        self.tenure: Tenure | None = None
        self.alive = False
        self.stalled_until = 0.0
        self.declared: int | None = None
        self.kept: list[tuple[Any, ...]] = []  # what came while it stood still
        self.timer = 0
        self.life = 0
        self.acknowledged: list[tuple[float, int, bytes]] = []
        self.last_seal: Seal | None = None

    def start(self) -> None:
        self.alive, self.life = True, self.life + 1
        self.tenure = Tenure(
            self.identity,
            UID,
            self.world.authority,
            boot=self.world.random.randbytes(8),
            now=self.world.now,
            wall=self.wall,
            stored=self.disk,
            has_file=bool(self.files),
            random=Random(self.world.random.random()),
        )
        self.settle()
        self.world.after(0.1, self.live, self.life)

    def kill(self) -> None:
        self.world.killed = True
        self.alive, self.tenure, self.declared = False, None, None

    def live(self, life: int) -> None:
        """Steps, syncs, and manifests, as a server's driver does them."""
        if not self.alive or self.life != life:
            return
        if self.stalled_until > self.world.now:
            self.world.after(self.stalled_until - self.world.now, self.live, life)
            return
        tenure = self.machine
        if tenure.is_primary(self.world.now):
            self.steps = (*self.steps, next(self.world.step_numbers))
            if tenure.is_primary(self.world.now):
                assert tenure.term is not None
                self.acknowledged.append((self.world.now, self.steps[-1], tenure.term.digest))
                self.world.acknowledged.append((self.world.now, self, self.steps[-1]))
            held = tenure.held
            if held is None or held.term != tenure.term.digest or self.world.now >= self.world.next_sync(self):
                self.sync()
        self.declared = tenure.epoch
        self.settle()
        self.world.after(self.world.step_period, self.live, life)

    def sync(self) -> bool:
        root = hashlib.sha256(repr(self.steps).encode()).digest()
        seal = self.machine.seal(root, 1, len(self.steps), self.world.now, self.wall)
        if seal is not None:
            self.keep(root)
            self.world.synced[self.number] = self.world.now
        return seal is not None

    def keep(self, root: bytes) -> None:
        """Write the state to a file; the two newest are kept, as a server's driver does."""
        self.files.pop(root, None)
        self.files[root] = self.steps
        for old in list(self.files)[:-NUM_SEALED]:
            del self.files[old]

    @property
    def machine(self) -> Tenure:
        assert self.tenure is not None
        return self.tenure

    @property
    def wall(self) -> float:
        return CREATED + self.world.now + self.skew

    @property
    def is_up(self) -> bool:
        return self.alive and self.stalled_until <= self.world.now

    @property
    def leads(self) -> bool:
        return self.is_up and self.machine.is_primary(self.world.now)

    def settle(self) -> None:
        """Carries out the commands, and sets the timer."""
        if not self.is_up:
            return
        tenure = self.machine
        if self.world.now >= tenure.timer_at():
            tenure.handle_timer(self.world.now, self.wall)
        for command in tenure.commands():
            self.carry_out(command)
        self.timer += 1
        at = max(tenure.timer_at(), self.world.now + 0.01)
        self.world.after(at - self.world.now, self.wake, self.timer, self.life)

    def wake(self, timer: int, life: int) -> None:
        if self.alive and self.timer == timer and self.life == life:
            self.settle()

    def carry_out(self, command: Any) -> None:
        world, life = self.world, self.life
        if isinstance(command, Persist):
            self.disk = command.stored
        elif isinstance(command, Publish | Send) and not self.machine.may.write:
            pass
        elif isinstance(command, Publish) and world.reaches_directory(self):
            for number, record in (*enumerate(command.records), *enumerate(command.past, 2)):
                world.published[(self.peer, number)] = record
            world.history += command.records
        elif isinstance(command, Send):
            world.send(self, command.peer, command.question)
        elif isinstance(command, Look):
            world.after(world.random.uniform(*world.look_seconds), self.look, life)
        elif isinstance(command, Fetch):
            world.after(world.latency() * 4, self.fetch, command, life)
        else:
            assert isinstance(command, Publish | RoleChanged)

    def receive(self, life: int, action: Callable[..., None], *args: Any) -> None:
        """Runs when it may, which is later while it stands still."""
        if not self.alive or self.life != life:
            return
        if self.stalled_until > self.world.now:
            self.world.after(self.stalled_until - self.world.now, self.receive, life, action, *args)
            return
        action(*args)
        self.settle()

    def look(self, life: int) -> None:
        def read() -> None:
            if self.world.reaches_directory(self):
                for record in self.world.records():
                    self.machine.sight(record, self.world.now, self.wall)
                self.machine.set_hosts(self.world.hosts(), self.world.now, self.wall)
                self.machine.looked(self.world.now, self.wall)

        self.receive(life, read)

    def fetch(self, command: Fetch, life: int) -> None:
        def get() -> None:
            others = [other for source in command.sources for other in self.world.of(source)]
            near = [other for other in others if other.is_up and self.world.linked(self, other)]
            found = [files for one in (self, *near) if (files := one.files.get(command.seal.root)) is not None]
            if found and not command.check:
                if command.aside and self.steps:
                    self.aside.append(self.steps)
                self.steps = found[0]
                self.keep(command.seal.root)
            self.machine.fetched(command, bool(found), self.world.now, self.wall)

        self.receive(life, get)


class World:
    """Everything else. Deterministic for a seed."""

    def __init__(self, seed: int, num_servers: int, *, lease: float = 30.0, skew: float = 30.0) -> None:
        self.random = Random(seed)
        self.now = 100.0
        self.authority = FakeAuthority(lease=lease)
        self.step_period = lease / 10
        self.sync_every = lease * 2
        self.step_numbers = itertools.count(1)
        self.acknowledged: list[tuple[float, Server, int]] = []
        self.synced: dict[int, float] = {}
        self.look_seconds = 0.005, 0.1
        """How long it takes to read all that the network holds, at least and at most."""
        self.slowness = 0.0
        """Seconds that a message takes more, at most: machines that do much else."""
        self.patience = 1.0
        """Seconds after which a question without an answer counts as such."""
        self.groups: list[set[int]] | None = None
        self.has_directory: set[int] | None = None
        self.strangers: list[bytes] = []
        self.published: dict[tuple[PeerID, int], bytes] = {}
        self.history: list[bytes] = []
        self.ghosts: dict[PeerID, int] = {}
        """Whose manifests say that they host the expert, and who never answer."""
        self.fates: list[float | None] = []
        """How long the next messages take; None: lost."""
        self.killed = False
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self.servers = [Server(self, n, skew=self.random.uniform(-skew, skew) / 2) for n in range(1, num_servers + 1)]
        self.authority.granted = {server.peer for server in self.servers}

    def after(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), action, args))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action, args = heapq.heappop(self._queue)
            action(*args)
        self.now = until

    def sleep(self, seconds: float) -> None:
        """Let time pass in which nobody is alive."""
        assert not any(server.alive for server in self.servers)
        self._queue.clear()
        self.now += seconds

    def run_until(self, done: Callable[[], bool], seconds: float) -> bool:
        until = self.now + seconds
        while not done():
            if self.now >= until:
                return False
            self.run(min(0.5, until - self.now) or 0.1)
        return True

    def latency(self) -> float:
        return self.random.uniform(0.005, 0.1 + self.slowness)

    def next_sync(self, server: Server) -> float:
        return self.synced.get(server.number, -1e9) + self.sync_every

    def linked(self, one: Server, other: Server) -> bool:
        return self.groups is None or any({one.number, other.number} <= group for group in self.groups)

    def reaches_directory(self, server: Server) -> bool:
        return self.has_directory is None or server.number in self.has_directory

    def of(self, peer: PeerID) -> list[Server]:
        return [server for server in self.servers if server.peer == peer]

    def records(self) -> list[bytes]:
        found = [*self.published.values(), *self.strangers]
        self.random.shuffle(found)
        return found

    def hosts(self) -> dict[PeerID, int]:
        return self.ghosts | {
            server.peer: server.declared
            for server in self.servers
            if server.declared is not None and self.reaches_directory(server)
        }

    def send(self, sender: Server, peer: PeerID, question: Question) -> None:
        sent, life = self.now, sender.life
        targets = [one for one in self.of(peer) if one.alive and one is not sender]
        answered: list[bool] = []
        machine = sender.machine

        def silent() -> None:
            if not answered:
                answered.append(True)
                machine.answered(peer, question, None, sent, self.now, sender.wall)

        self.after(self.patience, sender.receive, life, silent)
        fate = self.fates.pop(0) if self.fates and peer in {one.peer for one in self.up} else self.latency()
        if fate is None:
            return
        if not targets or not self.linked(sender, targets[0]):
            return
        target = self.random.choice(targets)

        def arrive() -> None:
            answer = target.machine.ask(sender.peer, question, self.now, target.wall)
            target.settle()
            if not target.machine.may.write:
                return

            def come_back() -> None:
                if not answered:
                    answered.append(True)
                    machine.answered(peer, question, answer, sent, self.now, sender.wall)

            if self.linked(sender, target):
                self.after(self.latency(), sender.receive, life, come_back)

        self.after(fate, target.receive, target.life, arrive)

    # -- faults --------------------------------------------------------------------------------------------------------

    def partition(self, *groups: set[int], directory: Iterable[int] | None = None) -> None:
        """Those of one group reach each other; `directory`: who reaches that (the largest group)."""
        self.groups = list(groups)
        self.has_directory = set(max(groups, key=len) if directory is None else directory)

    def fault(self, num: int, kinds: Sequence[str]) -> None:
        """So many faults, one after the other."""
        for _ in range(num):
            kind, one = self.random.choice(kinds), self.random.choice(self.servers)
            if kind == "kill" and one.alive:
                one.kill()
            elif kind == "restart" and not one.alive:
                one.start()
            elif kind == "stall" and one.alive:
                self.stall(one, self.random.choice((0.5, 2.0, 4.0, 6.0, 12.0, 50.0)) * self.authority.lease / 5)
            elif kind == "split":
                numbers = [server.number for server in self.servers]
                some = set(self.random.sample(numbers, self.random.randint(1, len(numbers) - 1)))
                self.partition(some, set(numbers) - some, directory=numbers)
            elif kind == "split, and the network with one part":
                numbers = [server.number for server in self.servers]
                some = set(self.random.sample(numbers, self.random.randint(1, len(numbers) - 1)))
                self.partition(some, set(numbers) - some, directory=some)
            elif kind == "heal":
                self.heal()
            self.run(self.random.uniform(0.0, 3 * self.authority.lease))

    def end_faults(self) -> None:
        """All run, and reach each other."""
        self.heal()
        for server in self.servers:
            if not server.alive:
                server.start()
        self.run_until(lambda: all(server.is_up for server in self.servers), 20 * self.authority.lease)

    def lies(self, liar: Server) -> list[bytes]:
        """What a host that is a member of nothing may make up at this moment."""
        now, fresh = int(self.now), None
        found = [fresh := sign_term(liar.identity, RUN, uid=UID, epoch=now, boot=bytes(8), kind=TermKind.GENESIS)]
        peers = [server.peer for server in self.up][:3]
        values = {"version": 2**62, "root": bytes(32), "size": 1, "time": now + 30, "successors": peers}
        found.append(sign_seal(liar.identity, RUN, term=fresh, number=7, **values))
        for server in self.leaders:
            if server.machine.held is not None:
                seal = server.machine.held
                more = {"uid": UID, "epoch": now + 59, "boot": bytes(8), "seal": seal}
                found.append(sign_term(liar.identity, RUN, kind=TermKind.ADOPTION, **more))
        self.ghosts[liar.peer] = now
        return [record.blob for record in found]

    def heal(self) -> None:
        self.groups = self.has_directory = None

    def stall(self, server: Server, seconds: float) -> None:
        server.stalled_until = self.now + seconds
        self.after(seconds, server.settle)

    # -- what is checked -----------------------------------------------------------------------------------------------

    @property
    def up(self) -> list[Server]:
        return [server for server in self.servers if server.is_up]

    @property
    def leaders(self) -> list[Server]:
        return [server for server in self.up if server.leads]

    def has_primary(self) -> bool:
        return bool(self.leaders)

    def views(self) -> set[bytes | None]:
        """The Terms that hold, by what each one knows."""
        return {None if one.machine.lineage.best is None else one.machine.lineage.best.digest for one in self.up}

    def agree(self) -> bool:
        """One leads, and all who are up see the same Term."""
        return len(self.leaders) == 1 and len(self.views()) == 1

    def has_members(self, num: int) -> bool:
        """Whether the primary and its successors are so many, and settled."""
        (leader,) = self.leaders
        return leader.machine.is_content and len(leader.machine.members) + 1 >= num

    def describe(self) -> list[object]:
        return [(s.number, s.is_up and (s.machine.state.value, s.machine.epoch, s.leads)) for s in self.servers]

    def begin(self) -> Server:
        """Everybody starts, one leads, and others succeed it."""
        for server in self.servers:
            self.after(self.random.uniform(0.0, 10.0), server.start)
        wanted = min(3, len(self.servers))
        lease = self.authority.lease

        def is_settled() -> bool:
            if not self.agree():
                return False
            return self.has_members(wanted)

        assert self.run_until(is_settled, 30 * lease), self.describe()
        (leader,) = self.leaders
        members = set(leader.machine.members)
        assert self.run_until(
            lambda: all(one.machine.state is State.FOLLOWING for one in self.up if one.peer in members), 5 * lease
        )
        return leader
