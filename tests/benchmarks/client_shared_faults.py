"""Shared parameters when trainers are slow, lost, replaced or liars, and when the fragments' primary is killed.

In one process and in virtual time: the trainers really train (the model of `examples/train_lm.py`, small; its experts
are here, and step at each trainer's backward), and the machines are the real ones (`Copy`, `Rounds`,
`FragmentBackend`); only calls and clocks are simulated. A step takes half a second of virtual time, a call a tenth.

What is compared are losses of the merged copies, over equally many steps of all trainers together (of each, where one
lies). `--scenarios`, `--steps` and `--seeds` make it shorter than the quarter of an hour that all takes on one core.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from torch import nn

from tesseract_async.errors import Overloaded
from tesseract_async.identity import PeerID
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.answering import journal_key
from tesseract_async.server.fragments import MAX_STEPS, FragmentBackend
from tesseract_async.shared_pieces import PAUSE, PUSH_TIMEOUT
from tesseract_async.sharing.fragment import Copy, Fragment, Outer, Update
from tesseract_async.sharing.layout import Layout
from tesseract_async.sharing.manifest import SharedManifest
from tesseract_async.sharing.rounds import Rounds, judge
from tesseract_async.wire import compression
from tests.benchmarks.client_shared import SIZES, lm
from tests.benchmarks.figures import emit

STEP, CALL, LEASE, SEAL = 0.5, 0.1, 5.0, 0.5
"""Seconds of a trainer's step, of a call, until a follower takes over, and until it has what its primary sealed."""
EVERY: Final = 32


@dataclass(frozen=True)
class Scenario:
    """What goes wrong."""

    trainers: int = 4
    slow: float = 1.0
    """Times that the first trainer's steps take longer."""
    lost: float = 0.0
    """Share of the pushes, and of their answers, that are lost."""
    replaced_after: int = 0
    """Steps after which a trainer is gone with what it had not pushed, and a new one comes."""
    killed_every: float = 0.0
    """Seconds between two kills of all fragments' primaries."""
    liar: float = 1.0
    """The last trainer's differences are multiplied by this, ..."""
    hasty: int = 1
    """... and it pushes so many times as often."""
    shares: bool = True


HONEST: Final = {
    "undisturbed": Scenario(),
    "nothing shared": Scenario(shares=False),
    "three honest": Scenario(3),
    "seven honest": Scenario(7),
}
FAULTS: Final = {
    "undisturbed": Scenario(),
    "one 4 x slower": Scenario(slow=4.0),
    "20 % of pushes lost": Scenario(lost=0.2),
    "a trainer replaced every 100 steps": Scenario(replaced_after=100),
    "primaries killed every 60 s": Scenario(killed_every=60.0),
    "all of these": Scenario(slow=4.0, lost=0.2, replaced_after=100, killed_every=60.0),
    "one of four negates": Scenario(4, liar=-1.0),
    "one of eight x 10": Scenario(8, liar=10.0),
    "one of eight x -10, 8 x as often": Scenario(8, liar=-10.0, hasty=8),
}
BASES: Final = {
    "undisturbed": "nothing shared",
    "one of four negates": "three honest",
    "one of eight x 10": "seven honest",
    "one of eight x -10, 8 x as often": "seven honest",
}


class Mixture(nn.Module):
    """A gate of one's own, over experts that belong to all."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(int(SIZES["width"]), len(experts)), lambda: experts  # no submodules

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        scores, chosen = self.gate(flat).topk(int(SIZES["k_best"]))
        weights, found = scores.softmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts()):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            found = found.index_add(0, rows, expert(flat[rows]) * weights[rows, place].unsqueeze(-1))
        return found.view_as(x)


@dataclass
class Ask:
    """A push under way, repeated under one id."""

    trainer: Trainer
    number: int
    call_id: bytes
    version: int
    root: bytes
    steps: int
    data: bytes


@dataclass
class Host:
    """A fragment's primary, and what a follower has."""

    backend: FragmentBackend
    rounds: Rounds
    sealed: StateDict
    waiting: dict[bytes, Ask] = field(default_factory=dict)


class World:
    """All of it."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario, self.given, self.random = scenario, scenario, random.Random(seed)
        self.now, self.order, self.down_until = 0.0, itertools.count(), 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.args = argparse.Namespace(**SIZES, seed=seed)
        torch.manual_seed(seed)
        num = int(SIZES["layers"]) * int(SIZES["grid"]) ** 2
        self.experts = [lm.feed_forward(SIZES["width"]) for _ in range(num)]
        self.steppers = [torch.optim.Adam(one.parameters(), SIZES["lr"]) for one in self.experts]
        self.first = self.make_model()
        self.manifest = SharedManifest(Layout.of(self.first), Outer())
        self.hosts: list[Host] = []
        for number, cut in enumerate(self.manifest.layout.cuts):
            fragment = Fragment(cut, self.manifest.outer, self.manifest.layout.read(self.first, cut))
            backend = FragmentBackend(self.manifest.part(number), fragment)
            self.hosts.append(Host(backend, Rounds(0, max_steps=MAX_STEPS), backend.state()))
        self.numbers, self.num_steps, self.most_steps = itertools.count(), 0, 0
        self.trainers = [Trainer(self, place) for place in range(scenario.trainers)]
        if scenario.killed_every:
            self.after(scenario.killed_every, self.kill)

    def make_model(self) -> nn.Module:
        per_layer = int(SIZES["grid"]) ** 2
        layers = range(int(SIZES["layers"]))
        mixtures = [Mixture(self.experts[i * per_layer : (i + 1) * per_layer]) for i in layers]
        model: nn.Module = lm.Transformer(mixtures, self.args)
        return model

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), act))

    def run(self, steps: int) -> None:
        """Train until all have taken so many steps together, then let all count."""
        self.most_steps = steps
        for trainer in self.trainers:
            self.after(self.random.random(), trainer.step)
        while self.events and self.num_steps < steps:
            self.turn()
        self.scenario = Scenario(self.scenario.trainers, liar=self.scenario.liar)  # from here on all is well
        ends = self.now + 120.0
        for trainer in self.trainers:
            trainer.flush()
        while self.events and self.now < ends:
            self.turn()
        assert not self.given.shares or all(one.num_merged for one in self.trainers), "nothing may hang"

    def turn(self) -> None:
        self.now, _, act = heapq.heappop(self.events)
        act()

    # ------------------------------------------------------------------------------------------------ hosts

    def kill(self) -> None:
        """All open rounds are gone; a follower goes on from what it has, after a lease."""
        self.down_until = self.now + LEASE
        for number, host in enumerate(self.hosts):
            backend = host.backend
            state = host.sealed
            host.backend = FragmentBackend(backend.part, self.blank(number))
            host.backend.load_state(state)
            waiting, host.waiting = host.waiting, {}
            host.rounds = Rounds(host.backend.version, max_steps=MAX_STEPS)
            for ask in waiting.values():  # its connection is gone
                self.after(PAUSE, partial(self.arrives, ask))
        if self.scenario.killed_every:
            self.after(self.scenario.killed_every, self.kill)

    def blank(self, number: int) -> Fragment:
        cut = self.manifest.layout.cuts[number]
        return Fragment(cut, self.manifest.outer, torch.zeros(cut.numel, dtype=cut.dtype))

    def arrives(self, ask: Ask) -> None:
        host = self.hosts[ask.number]
        backend, key = host.backend, journal_key(ask.trainer.peer, ask.call_id)
        if self.now < self.down_until:
            return self.after(PAUSE, lambda: self.arrives(ask))
        if key in host.waiting:
            return
        if backend.led_to(key, ask.call_id) is not None:
            return self.answer(ask, counted=True)
        if backend.fragment.since(ask.version, ask.root) is None:
            return self.answer(ask, counted=False)
        part = backend.part
        push = judge(ask.trainer.peer, ask.call_id, ask.steps, ask.data, part.cut, part.outer)
        try:
            host.rounds.add(push, ask.version, self.now)
        except Overloaded:
            return
        host.waiting[key] = ask
        self.look(host)

    def look(self, host: Host) -> None:
        closes_at = host.rounds.closes_at(self.now)
        if closes_at is not None and closes_at > self.now:
            return self.after(closes_at - self.now, lambda: self.look(host))
        if closes_at is None:
            return
        pushes = host.rounds.close()
        host.backend.close_round(host.rounds, pushes)
        backend, state = host.backend, host.backend.state()

        def seal() -> None:
            if host.backend is backend:
                host.sealed = state

        self.after(SEAL, seal)
        for push in pushes:
            self.answer(host.waiting.pop(journal_key(push.peer, push.call_id)), counted=True)

    def answer(self, ask: Ask, *, counted: bool) -> None:
        if self.random.random() < self.scenario.lost / 2:
            return
        fragment = self.hosts[ask.number].backend.fragment
        updates = fragment.since(ask.version, ask.root)
        whole = None if updates is not None else (fragment.anchor.clone(), fragment.version)
        self.after(CALL, lambda: ask.trainer.answered(ask, updates, whole, counted))

    # ------------------------------------------------------------------------------------------------ what comes out

    def loss(self) -> float:
        if not self.given.shares:
            return statistics.mean(self.loss_of(trainer.model) for trainer in self.trainers)
        for host, cut in zip(self.hosts, self.manifest.layout.cuts, strict=True):
            self.manifest.layout.write(self.first, cut, host.backend.fragment.merged())
        return self.loss_of(self.first)

    def loss_of(self, model: nn.Module) -> float:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            batches = [lm.sample(VALID, self.args, draw) for _ in range(64)]
            return statistics.mean(float(at_once(lm.loss_of(model, batch))) for batch in batches)


class Trainer:
    """One trainer; who replaces it is another one in its place."""

    def __init__(self, world: World, place: int) -> None:
        self.world, self.place = world, place
        self.is_liar = place == world.scenario.trainers - 1 and world.scenario.liar != 1.0
        self.seconds = STEP * (world.scenario.slow if place == 0 else 1.0)
        self.num_merged = 0
        self.enter()

    def enter(self) -> None:
        world, number = self.world, next(self.world.numbers)
        self.peer = PeerID(number.to_bytes(32, "big"))
        self.draw = torch.Generator().manual_seed(1000 * world.args.seed + number)
        torch.manual_seed(1000 * world.args.seed + number)
        self.model = world.make_model()
        layout = world.manifest.layout
        self.copies = []
        for cut, host in zip(layout.cuts, world.hosts, strict=True):
            fragment = host.backend.fragment
            if world.given.shares:  # else it trains its own, from first values of its own
                layout.write(self.model, cut, fragment.anchor)
            self.copies.append(Copy(Fragment(cut, world.manifest.outer, fragment.anchor, version=fragment.version)))
            host.rounds.expect(self.peer)
        self.optimizer = torch.optim.Adam(self.model.parameters(), SIZES["lr"])
        self.steps, num = 0, len(layout.cuts)
        self.due = [max(1, EVERY * (one + 1) // num) for one in range(num)]
        self.steps_then, self.asks = [0] * num, dict[int, Ask]()

    def step(self) -> None:
        world = self.world
        if world.num_steps >= world.most_steps:
            return
        self.optimizer.zero_grad()
        for one in world.steppers:
            one.zero_grad()
        at_once(lm.loss_of(self.model, lm.sample(TRAIN, world.args, self.draw))).backward()
        for optimizer in (self.optimizer, *world.steppers):
            optimizer.step()
        self.steps += 1
        world.num_steps += 1
        for number, due in enumerate(self.due):
            if self.steps >= due:
                self.push(number)
        if world.scenario.replaced_after and self.place == 1 and self.steps >= world.scenario.replaced_after:
            self.enter()
        world.after(self.seconds * world.random.uniform(0.9, 1.1), self.step)

    def flush(self) -> None:
        for number in range(len(self.copies)):
            if self.steps > self.steps_then[number]:
                self.push(number)

    def push(self, number: int) -> None:
        if number in self.asks or not self.world.given.shares:
            return
        self.due[number] = self.steps + EVERY // (self.world.scenario.hasty if self.is_liar else 1)
        own, layout = self.copies[number], self.world.manifest.layout
        local, (_, version, root) = layout.read(self.model, own.cut), own.base
        data = own.push(local)
        if self.is_liar:
            lie = (own.anchor - local) * self.world.scenario.liar
            data = bytes(compression.encode(lie, own.outer.codec_of(own.cut)))
        steps = max(1, self.steps - self.steps_then[number])
        call_id = self.world.random.randbytes(16)
        self.asks[number] = ask = Ask(self, number, call_id, version, root, steps, data)
        self.steps_then[number] = self.steps
        self.ask(ask)

    def ask(self, ask: Ask) -> None:
        if self.asks.get(ask.number) is ask:
            if self.world.random.random() >= self.world.scenario.lost:
                self.world.after(CALL, lambda: self.world.arrives(ask))
            self.world.after(PUSH_TIMEOUT + PAUSE, lambda: self.ask(ask))

    def answered(
        self,
        ask: Ask,
        updates: tuple[Update, ...] | None,
        whole: tuple[torch.Tensor, int] | None,
        counted: bool,
    ) -> None:
        if self.asks.get(ask.number) is not ask:
            return
        del self.asks[ask.number]
        own = self.copies[ask.number]
        if whole is not None:
            state = Fragment(own.cut, self.world.manifest.outer, whole[0], version=whole[1])
            change = own.rebase(state, epoch=0, counted=counted)
            if not counted:  # its base was too old
                self.due[ask.number] = self.steps
        else:
            change = own.merge(updates or (), epoch=0)
        self.world.manifest.layout.add(self.model, own.cut, change)
        self.num_merged += 1
        if self.world.num_steps >= self.world.most_steps:
            self.flush()  # what came after that push


def at_once(coroutine: Coroutine[None, None, torch.Tensor]) -> torch.Tensor:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as found:
        value: torch.Tensor = found.value
        return value
    raise AssertionError("nothing here waits")


TRAIN, VALID = torch.empty(0), torch.empty(0)


def main(steps: int, seeds: int, text: str | None, names: list[str]) -> None:
    global TRAIN, VALID
    torch.set_num_threads(1)
    tokens = lm.read_text(text, 2_000_000)
    TRAIN, VALID = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    losses: dict[str, float] = {}

    def loss_of(name: str, scenario: Scenario) -> float:
        if name not in losses:
            found = []
            for seed in range(seeds):
                world = World(scenario, seed)
                world.run(steps * scenario.trainers)
                found.append(world.loss())
            losses[name] = statistics.mean(found)
            emit(f"shared parameters, {name}: loss", losses[name], "nats", None, seeds=found, steps=steps)
        return losses[name]

    for name in names:
        base = BASES.get(name, "undisturbed")
        asked = "<= 0.92" if base == "nothing shared" else "<= 1.08" if name in BASES else "<= 1.02"
        ratio = loss_of(name, FAULTS[name]) / loss_of(base, HONEST[base])
        emit(f"shared parameters: loss, {name} / {base}", ratio, "", asked)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=384, help="of each trainer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", help="a text file")
    parser.add_argument("--scenarios", nargs="*", default=[*FAULTS], choices=FAULTS)
    given = parser.parse_args()
    main(given.steps, given.seeds, given.text, list(given.scenarios))
