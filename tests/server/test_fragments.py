"""Fragments of shared parameters: their states, and rounds over a network that loses, doubles and reorders."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tesseract_async.errors import Overloaded, ProtocolError
from tesseract_async.identity import Identity, PeerID
from tesseract_async.runtime.states import JOURNAL_LENGTH, StateDict
from tesseract_async.server.answering import journal_key
from tesseract_async.server.checkpoint import check_state, encode_state, largest_state
from tesseract_async.server.fragments import (
    MAX_STATE_BYTES,
    FragmentBackend,
    read_fragment,
    read_manifest,
    read_updates,
)
from tesseract_async.sharing.fragment import LAST, NEWCOMERS, Copy, Fragment, Outer, Update
from tesseract_async.sharing.layout import Layout
from tesseract_async.sharing.manifest import SharedManifest
from tesseract_async.sharing.rounds import Rounds, judge
from tesseract_async.sharing.samples import Ledger, Report
from tesseract_async.wire import messages

MANIFEST = SharedManifest(Layout.of(nn.Linear(16, 40)), Outer())
PEERS = [Identity.from_seed(bytes([n]) * 32).peer_id for n in range(1, 6)]


def make_backend(number: int = 0, manifest: SharedManifest = MANIFEST) -> FragmentBackend:
    cut = manifest.layout.cuts[number]
    return FragmentBackend(manifest.part(number), Fragment(cut, manifest.outer, torch.zeros(cut.numel)))


def pushed(backend: FragmentBackend, seed: int, peer: PeerID = PEERS[0]) -> bytes:
    """Have a round of one push close; returns its call id."""
    values = torch.randn(backend.fragment.cut.numel, generator=torch.Generator().manual_seed(seed))
    copy = Copy(backend.fragment)
    call_id, rounds = seed.to_bytes(16, "big"), Rounds(backend.version, max_steps=100)
    rounds.add(judge(peer, call_id, 3, copy.push(values), backend.fragment.cut, MANIFEST.outer), backend.version, 0.0)
    backend.close_round(rounds, rounds.close(), ledger(seed).encode())
    return call_id


def ledger(seed: int) -> Ledger:
    """One in which some samples are done."""
    made = Ledger()
    done = [(0, 0, seed + 1)]
    made.report((PEERS[0], bytes(16)), 1, Report(0, 1000, 0, (), done, ()), 0.0)
    return made


def through_a_file(backend: FragmentBackend) -> StateDict:
    return check_state("x.0", b"".join(encode_state(backend.state())))


@pytest.mark.parametrize("num_rounds", [0, 3, 8, 9, 20])
def test_a_state_goes_through_a_file(num_rounds: int) -> None:
    backend, other = make_backend(), make_backend()
    call_ids = [pushed(backend, seed) for seed in range(num_rounds)]
    state = through_a_file(backend)
    assert sum(map(len, encode_state(state))) <= largest_state(other)
    other.load_state(state)
    for one in (other.fragment, read_fragment(MANIFEST.part(0), state["module"], num_rounds)[0]):
        assert one.root == backend.fragment.root and one.updates == backend.fragment.updates
        assert one.before == backend.fragment.before
    assert other.samples == backend.samples == (ledger(num_rounds - 1).encode() if num_rounds else b"")
    few = {name: state["module"][name] for name in NEWCOMERS} | {LAST: state["module"]["updates"][num_rounds % 8]}
    newcomer = read_fragment(MANIFEST.part(0), few, num_rounds)[0]
    assert newcomer.root == backend.fragment.root and torch.equal(newcomer.merged(), backend.fragment.merged())
    assert read_manifest(state["module"]).data == MANIFEST.data
    assert other.version == num_rounds and other.steps == 3 * num_rounds
    assert all(other.led_to(journal_key(PEERS[0], one), one) for one in call_ids)
    assert [pushed(one, 99) for one in (backend, other)] and backend.fragment.root == other.fragment.root


def test_a_follower_that_replays_has_the_same_file() -> None:
    backend, other = make_backend(), make_backend()
    for seed in range(3):
        pushed(backend, seed)
    other.load_state(through_a_file(backend))
    for seed in range(3, 12):
        version, root = other.version, other.fragment.root
        pushed(backend, seed, PEERS[seed % 3])
        updates = backend.fragment.since(version, root) or ()
        other.replay(updates, [backend.recent[one.version] for one in updates])
        assert b"".join(encode_state(other.state())) == b"".join(encode_state(backend.state()))
    assert len(backend.recent) <= 8


def test_states_that_lie_are_refused() -> None:
    backend = make_backend()
    for seed in range(3):
        pushed(backend, seed)

    def lie(change: Callable[[dict[str, torch.Tensor]], None], number: int = 0, version: int = 3) -> None:
        tensors = dict(through_a_file(backend)["module"])
        change(tensors)
        with pytest.raises(ProtocolError):
            read_fragment(MANIFEST.part(number), tensors, version)

    lie(lambda tensors: tensors.__delitem__("anchor"))
    lie(lambda tensors: tensors.update(anchor=tensors["anchor"].double()))
    lie(lambda tensors: tensors.update(anchor=tensors["anchor"] + 1.0))
    lie(lambda tensors: tensors.update(counts=torch.tensor([-1, 3])))
    lie(lambda tensors: tensors.update(counts=torch.tensor([3, 9])))
    lie(lambda tensors: tensors.update(roots=tensors["roots"][:4]))
    lie(lambda tensors: tensors.update(momentum=torch.full_like(tensors["anchor"], torch.nan)))
    lie(lambda tensors: tensors.update(samples=torch.full_like(tensors["samples"], 7)))
    lie(lambda tensors: tensors.__delitem__("samples"))
    lie(lambda tensors: tensors.update(manifest=tensors["manifest"][:-1]))
    few = {
        **{name: through_a_file(backend)["module"][name] for name in NEWCOMERS},
        LAST: backend.state()["module"]["updates"][3],
    }
    assert read_fragment(MANIFEST.part(0), few, 3)[0].version == 3
    for lies in (few[LAST][:-1], torch.full_like(few[LAST], 0xFF)):
        with pytest.raises(ProtocolError):
            read_fragment(MANIFEST.part(0), {**few, LAST: lies}, 3)
    lie(lambda tensors: None, version=2)
    lie(lambda tensors: None, number=1)
    with pytest.raises(ValueError):
        backend.load_state({**through_a_file(backend), "version": 7})


def test_a_server_hosts_what_a_file_says_by_itself() -> None:
    for number in (0, 1):
        backend = make_backend(number)
        for seed in range(11):
            pushed(backend, seed)
        file = b"".join(encode_state(backend.state()))
        other = FragmentBackend.of_file(f"x.{number}", file)
        assert b"".join(encode_state(other.state())) == file and other.part == MANIFEST.part(number)
        assert largest_state(other) <= MAX_STATE_BYTES
        for uid, data in ((f"x.{1 - number}", file), (f"x.{number}", file[:-9]), (f"x.{number}", b"")):
            with pytest.raises(ProtocolError):
                FragmentBackend.of_file(uid, data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("applied", {}),
        ("applied", {"ids": 3, "versions": 4}),
        ("applied", {"ids": torch.zeros(3), "versions": torch.zeros(2, 2)}),
        ("module", {}),
        ("module", {"manifest": torch.zeros(9, dtype=torch.uint8)}),
        ("accumulated", 7),
        ("version", 5),
    ],
)
def test_files_that_lie_are_refused(key: str, value: object) -> None:
    backend = make_backend()
    pushed(backend, 1)
    with contextlib.suppress(ProtocolError):
        other = FragmentBackend.of_file("x.0", b"".join(encode_state({**backend.state(), key: value})))
        assert key in ("applied", "accumulated") and other.fragment.root == backend.fragment.root
        pushed(other, 2)


def test_a_journal_from_elsewhere_is_bounded() -> None:
    state, num = make_backend().state(), JOURNAL_LENGTH + 12
    ids = b"".join(number.to_bytes(16, "big") for number in range(num))
    state["applied"] |= {"ids": torch.frombuffer(bytearray(ids), dtype=torch.uint8)}
    state["applied"] |= {"versions": torch.full((num,), 2**40)}
    other = FragmentBackend.of_file("x.0", b"".join(encode_state(state)))
    assert len(other.applied) == JOURNAL_LENGTH and list(other.applied)[-1] == ids[-16:]
    for seed in range(20):
        pushed(other, num + seed)
        assert len(other.applied) <= JOURNAL_LENGTH


@given(
    st.integers(-2, 12),
    st.integers(-2, 2**63),
    st.lists(st.binary(max_size=17) | st.integers() | st.just(bytes(16)), max_size=10),
    st.lists(st.binary(max_size=40) | st.just(b"\x77" * 332), max_size=10),
)
def test_a_primary_that_lies_to_a_trainer_changes_nothing(
    version: int, steps: int, roots: list[Any], buffers: list[bytes]
) -> None:
    cut = MANIFEST.layout.cuts[0]
    copy = Copy(Fragment(cut, MANIFEST.outer, torch.zeros(cut.numel), version=3))
    base = copy.base
    reply = messages.UpdatesReply(True, True, 1, version, steps, roots)
    with pytest.raises(ProtocolError):
        copy.push(torch.ones(cut.numel))
        copy.merge(read_updates(3, reply, [memoryview(one) for one in buffers]), epoch=1)
    assert copy.base == base and copy.sent is not None


class World:
    """Trainers and hosts of one fragment. Messages are lost, doubled and overtake one another; primaries are replaced
    by a host that has an older, sealed state."""

    def __init__(self, seed: int) -> None:
        self.random, self.now = Random(seed), 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.epoch, self.backend = 1, make_backend()
        self.rounds = Rounds(0, max_steps=100)
        self.waiting: dict[bytes, list[Callable[[Reply], None]]] = {}
        self.pushes: dict[bytes, Push] = {}
        self.sealed = self.backend.state()
        self.roots: dict[tuple[int, int], bytes] = {}
        self.trainers = [Trainer(self, peer) for peer in PEERS[: self.random.randint(1, 5)]]
        self.see(1, 0, self.backend.fragment.root)
        self.after(self.random.uniform(20, 60), self.take_over)

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), act))

    def send(self, act: Callable[[], None]) -> None:
        for _ in range(self.random.choice([0, 1, 1, 1, 2])):
            self.after(self.random.expovariate(2.0), act)

    def run(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, act = heapq.heappop(self.events)
            act()

    def see(self, epoch: int, version: int, root: bytes) -> None:
        assert self.roots.setdefault((epoch, version), root) == root

    def take_over(self) -> None:
        """Another host goes on from what was sealed last: who waits is told nothing."""
        self.epoch += 1
        self.backend = make_backend()
        self.backend.load_state(check_state("x.0", b"".join(encode_state(self.sealed))))
        self.rounds, self.waiting = Rounds(self.backend.version, max_steps=100), {}
        self.see(self.epoch, self.backend.version, self.backend.fragment.root)
        self.after(self.random.uniform(10, 60), self.take_over)

    def answer(self, push: Push, reply: Callable[[Reply], None]) -> None:
        fragment, key = self.backend.fragment, journal_key(push.peer, push.call_id)
        if key in self.waiting:
            self.waiting[key].append(reply)
        elif self.backend.led_to(key, push.call_id) is not None:
            self.send_reply(push, reply, counted=True)
        elif fragment.since(push.version, push.root) is None:
            self.send_reply(push, reply, counted=False)
        else:
            measured = judge(push.peer, push.call_id, 1, push.data, fragment.cut, fragment.outer)
            try:
                self.rounds.add(measured, push.version, self.now)
            except Overloaded:
                return
            self.waiting[key] = [reply]
            self.pushes[key] = push
            self.look()

    def look(self) -> None:
        closes_at = self.rounds.closes_at(self.now)
        if closes_at is None:
            return
        if closes_at > self.now:
            self.after(closes_at - self.now, self.look)
            return
        pushes = self.rounds.close()
        for one in pushes:
            assert self.backend.led_to(journal_key(one.peer, one.call_id), one.call_id) is None
        self.backend.close_round(self.rounds, pushes)
        self.see(self.epoch, self.backend.version, self.backend.fragment.root)
        if self.random.random() < 0.7:
            self.sealed = self.backend.state()
        for one in pushes:
            key = journal_key(one.peer, one.call_id)
            for reply in self.waiting.pop(key):
                self.send_reply(self.pushes[key], reply, counted=True)

    def send_reply(self, push: Push, reply: Callable[[Reply], None], *, counted: bool) -> None:
        backend = self.backend
        updates = backend.fragment.since(push.version, push.root)
        whole = None if updates is not None else (backend.fragment.anchor.clone(), backend.version)
        made = Reply(self.epoch, counted, updates, whole)
        self.send(lambda: reply(made))


class Push:
    """A request, which a trainer repeats as it is."""

    def __init__(self, peer: PeerID, call_id: bytes, version: int, root: bytes, data: bytes) -> None:
        self.peer, self.call_id, self.version, self.root, self.data = peer, call_id, version, root, data


class Reply:
    """What a primary answers."""

    def __init__(
        self,
        epoch: int,
        counted: bool,
        updates: tuple[Update, ...] | None,
        whole: tuple[torch.Tensor, int] | None,
    ) -> None:
        self.epoch, self.counted, self.updates, self.whole = epoch, counted, updates, whole


class Trainer:
    """Walks towards a point of its own, and pushes now and then."""

    def __init__(self, world: World, peer: PeerID) -> None:
        self.world, self.peer = world, peer
        cut = MANIFEST.layout.cuts[0]
        self.local = torch.zeros(cut.numel)
        self.copy = Copy(Fragment(cut, MANIFEST.outer, torch.zeros(cut.numel)), epoch=1)
        self.push: Push | None = None
        self.num_merged = 0
        world.after(world.random.random(), self.step)

    def step(self) -> None:
        random = self.world.random
        self.local += 0.1 * torch.randn(
            len(self.local), generator=torch.Generator().manual_seed(random.getrandbits(30))
        )
        if self.push is None:
            _, version, root = self.copy.base
            call_id = random.randbytes(16)
            self.push = Push(self.peer, call_id, version, root, self.copy.push(self.local.clone()))
            self.ask()
        self.world.after(random.uniform(0.5, 3.0), self.step)

    def ask(self) -> None:
        push = self.push
        if push is not None:
            self.world.send(lambda: self.world.answer(push, lambda reply: self.answered(push, reply)))
            self.world.after(5.0, lambda: self.ask() if self.push is push else None)

    def answered(self, push: Push, reply: Reply) -> None:
        if self.push is not push:
            return
        self.push = None
        if reply.whole is not None:
            anchor, version = reply.whole
            whole = Fragment(self.copy.cut, MANIFEST.outer, anchor, version=version)
            self.local += self.copy.rebase(whole, epoch=reply.epoch, counted=reply.counted)
        else:
            self.local += self.copy.merge(reply.updates or (), epoch=reply.epoch)
            self.num_merged += 1
        self.world.see(*self.copy.base)


def check_world(seed: int) -> None:
    world = World(seed)
    world.run(120.0)
    assert world.epoch > 2 and all(one.num_merged > 3 for one in world.trainers)
    assert all(bool(torch.isfinite(one.local).all()) for one in world.trainers)


@pytest.mark.parametrize("seed", range(30))
def test_equal_versions_have_equal_bits(seed: int) -> None:
    check_world(seed)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_equal_versions_have_equal_bits_in_many_worlds(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        check_world(seed)
