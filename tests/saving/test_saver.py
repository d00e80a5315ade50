"""Saved experts: collected over two real nodes, loaded without any."""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

import tesseract_async as ta
from tesseract_async.client.experience import experience_of
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, ExpertNotFound, Overloaded, TooStale
from tesseract_async.experts.grants import GRANT_SECONDS, Role, grant_text, sign_grant
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.places import MemberPart, MemberRole, Place, encode_place, places_key
from tesseract_async.experts.publisher import ExpertPublisher
from tesseract_async.experts.run import RunManifest, SignedRun, sign_run
from tesseract_async.experts.terms import EPOCH_ZERO, Seal, Term, TermKind, sign_seal, sign_term
from tesseract_async.experts.trust import SHARED
from tesseract_async.runtime.structure import describe_module
from tesseract_async.saving.folder import SavedExperts, open_folder_or_make
from tesseract_async.saving.restorer import restore_experts
from tesseract_async.saving.saver import Origin, SavePoint, SaveReport, find_origins, find_pieces, take_trunk
from tesseract_async.server.checkpoint import encode_state
from tesseract_async.server.fragments import FragmentBackend
from tesseract_async.server.run_experts import build_run_backend, complete
from tesseract_async.server.state_files import SealedFile, SealedFiles
from tesseract_async.server.state_transfer import SealedState, StateSource
from tesseract_async.shared_pieces import SharedPieces
from tesseract_async.sharing.fragment import Fragment, Outer
from tesseract_async.sharing.layout import Layout
from tesseract_async.sharing.manifest import SharedManifest
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tesseract_async.wire.messages import RESTORE, STATE, TENURE
from tests.scripted_node import ScriptedNode

ALICE = ta.Identity.from_seed(bytes(32))
UIDS = ("ffn.0.0", "ffn.1.1")
EPOCH = int(time.time()) - EPOCH_ZERO - 60


@pytest.fixture(scope="module")
def run() -> SignedRun:
    return sign_run(ALICE, complete(RunManifest("digits", "ffn", (2, 2), "ffn", sizes={"in_features": 8})))


class Swarm:
    """Real nodes: `guest` exports what `host` hosts."""

    def __init__(self, host: ta.TesseractNode, guest: ta.TesseractNode, run: SignedRun) -> None:
        self.host, self.guest = host, guest
        self.backends = {uid: build_run_backend(run.manifest, uid) for uid in UIDS}
        self.source = StateSource(self.aside)
        self.num_calls = 0
        for uid in UIDS:
            host.host_expert(uid, {STATE: self.answer})

    def hosted(self, uid: str) -> Any:
        backend = self.backends[uid]

        async def snapshot() -> dict[str, Any]:
            return backend.state()

        def structure() -> dict[str, Any]:
            return describe_module(backend.module)

        return SimpleNamespace(uid=uid, version=backend.version, snapshot=snapshot, structure=structure)

    async def aside(self, work: Any) -> Any:
        return work()

    async def answer(self, call: IncomingCall) -> Message:
        self.num_calls += 1
        uid = call.body[0]
        return await self.source.answer(self.hosted(uid), call)

    def train(self, uid: str) -> None:
        _, gradients = self.backends[uid].gradients([torch.ones(1, 8)], [torch.ones(1, 8)])
        self.backends[uid].step(gradients)

    def origins(self, *uids: str, before: PeerAddress | None = None) -> dict[str, list[Origin]]:
        peers = [self.host.peer_address] if before is None else [before, self.host.peer_address]
        return {uid: [Origin(peer, "primary") for peer in peers] for uid in uids}


async def save(
    guest: ta.TesseractNode, run: SignedRun, origins: Any, folder: Path, *, progress: Any = None
) -> SaveReport:
    store = open_folder_or_make(folder)
    store.add_run(run)
    point = SavePoint(guest, origins)
    await point.mark()
    report = await point.fetch(store, progress=progress or (lambda uid: None))
    store.write_index()
    return report


@pytest.fixture
async def swarm(run: SignedRun) -> Any:
    async with ta.TesseractNode() as host, ta.TesseractNode() as guest:
        swarm = Swarm(host, guest, run)
        yield swarm
        swarm.source.close()


async def test_what_is_saved_loads_without_the_swarm_and_gives_equal_outputs(
    swarm: Swarm, run: SignedRun, tmp_path: Path
) -> None:
    swarm.train("ffn.1.1")
    report = await save(swarm.guest, run, swarm.origins(*UIDS), tmp_path)
    assert report.taken == {"ffn.0.0": 0, "ffn.1.1": 1} and not report.failed and not report.kept
    x = torch.randn(5, 8)
    experts = SavedExperts(tmp_path)
    assert sorted(experts) == sorted(UIDS) and len(experts) == 2
    assert experts.saved.runs["ffn"].blob == run.blob
    for uid in UIDS:
        with torch.no_grad():
            (expected,) = swarm.backends[uid].forward([x])
            assert torch.equal(experts[uid](x), expected)
        assert experts[uid] is experts[uid] and not experts[uid].training
    # any reader of the format takes the weights
    plain = safetensors.torch.load_file(tmp_path / experts.index["ffn.1.1"].file)
    assert set(plain) == {f"module/{name}" for name in swarm.backends["ffn.1.1"].module.state_dict()}


MBIT_PIECE = 2**20 / 125_000
"""Seconds that a piece takes on a line of 1 Mbit/s."""


class Line:
    """A server's line of 1 Mbit/s, in made-up time: each call takes as long as those before it and its own piece."""

    def __init__(self) -> None:
        self.num_under_way = self.most_under_way = 0

    async def call(self, call: Any, peer: Any, method: str, *rest: Any, timeout: float, **options: Any) -> Any:
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        is_late = self.num_under_way * MBIT_PIECE > timeout
        try:
            reply = await call(peer, method, *rest, timeout=timeout, **options)
        finally:
            self.num_under_way -= 1
        if is_late:
            raise TimeoutError
        return reply


async def test_a_server_with_a_slow_line_and_many_small_experts_is_saved(run: SignedRun, tmp_path: Path) -> None:
    line = Line()
    async with ta.TesseractNode() as host, ScriptedNode() as guest:
        swarm = Swarm(host, guest, run)
        uids = [f"ffn.2.{number}" for number in range(64)]
        for uid in uids:
            swarm.backends[uid] = swarm.backends[UIDS[0]]
            host.host_expert(uid, {STATE: swarm.answer})
        guest.on_call = line.call
        report = await save(guest, run, swarm.origins(*uids), tmp_path)
        swarm.source.close()
    assert line.most_under_way > 8  # they shared the line
    assert sorted(report.taken) == sorted(uids) and not report.failed


async def test_a_second_time_only_what_is_newer_is_taken(swarm: Swarm, run: SignedRun, tmp_path: Path) -> None:
    await save(swarm.guest, run, swarm.origins(*UIDS), tmp_path)
    swarm.train("ffn.0.0")
    done: list[str] = []
    report = await save(swarm.guest, run, swarm.origins(*UIDS), tmp_path, progress=done.append)
    assert (report.taken, report.kept) == ({"ffn.0.0": 1}, {"ffn.1.1": 0})
    assert sorted(done) == sorted(UIDS)
    assert {uid: one.version for uid, one in SavedExperts(tmp_path).index.items()} == {"ffn.0.0": 1, "ffn.1.1": 0}


async def test_a_dead_server_is_passed_over_and_what_nobody_gives_is_told(
    swarm: Swarm, run: SignedRun, tmp_path: Path
) -> None:
    nobody = PeerAddress(ta.Identity.from_seed(b"n" * 32).peer_id, ("127.0.0.1:9",))
    origins = swarm.origins("ffn.0.0", before=nobody) | swarm.origins("ffn.0.1")
    report = await save(swarm.guest, run, origins, tmp_path)
    assert report.taken == {"ffn.0.0": 0}
    assert isinstance(report.failed["ffn.0.1"], ExpertNotFound)
    assert list(SavedExperts(tmp_path)) == ["ffn.0.0"]


async def test_a_busy_server_is_asked_again(swarm: Swarm, run: SignedRun, tmp_path: Path) -> None:
    busy = [1, 2]

    async def answer(call: IncomingCall) -> Message:
        if busy:
            busy.pop()
            raise Overloaded("later", retry_after=0.0)
        return await swarm.answer(call)

    swarm.host.unhost_expert("ffn.0.0")
    swarm.host.host_expert("ffn.0.0", {STATE: answer})
    report = await save(swarm.guest, run, swarm.origins("ffn.0.0"), tmp_path)
    assert report.taken == {"ffn.0.0": 0} and not busy


async def test_a_busy_server_is_asked_again_to_restore(swarm: Swarm, run: SignedRun, tmp_path: Path) -> None:
    store = open_folder_or_make(tmp_path)
    async with SavePoint(swarm.guest, swarm.origins("ffn.0.0"), is_whole=True) as point:
        await point.mark()
        await point.fetch(store)
    asked: list[int] = []

    async def restore(call: IncomingCall) -> Message:
        asked.append(len(call.buffers[0]))
        if len(asked) == 1:
            raise Overloaded("later", retry_after=0.0)
        return Message(messages.encode(messages.RestoreReply(0)))

    swarm.host.unhost_expert("ffn.0.0")
    swarm.host.host_expert("ffn.0.0", {RESTORE: restore})
    publisher = ExpertPublisher(swarm.host.network, addresses=[swarm.host.address], trust=swarm.host.trust)
    await publisher.declare({"ffn.0.0": True})
    async with ta.TesseractNode(initial_peers=[swarm.host.address]) as node:
        await node.network.wait_joined(30.0)
        assert await restore_experts(node, store) == {"ffn.0.0": 0}
    assert len(asked) == 2 and asked[0] == asked[1] > 0
    await publisher.aclose()


async def test_a_state_that_is_older_than_what_was_answered_is_not_taken(
    swarm: Swarm, run: SignedRun, tmp_path: Path
) -> None:
    peer = swarm.host.peer_address
    experience_of(swarm.guest).lineages.take(ExpertReplica("ffn.0.0", peer, 1, math.inf, primary=True), 0, 3)
    for version in range(3):
        report = await save(swarm.guest, run, swarm.origins("ffn.0.0"), tmp_path)
        assert isinstance(report.failed["ffn.0.0"], TooStale) and not report.taken
        assert "version " + str(version) in str(report.failed["ffn.0.0"])
        swarm.train("ffn.0.0")
    report = await save(swarm.guest, run, swarm.origins("ffn.0.0"), tmp_path)
    assert report.taken == {"ffn.0.0": 3}


async def test_a_state_that_is_far_larger_than_others_is_not_fetched(
    swarm: Swarm, run: SignedRun, tmp_path: Path
) -> None:
    num_asked = 0

    async def lie(call: IncomingCall) -> Message:
        nonlocal num_asked
        num_asked += 1
        reply = messages.StateReply(1, bytes(32), 1 << 31, 0)
        return Message(messages.encode(reply), (memoryview(bytes(1 << 15)),))

    swarm.host.host_expert("ffn.0.1", {STATE: lie})
    report = await save(swarm.guest, run, swarm.origins(*UIDS, "ffn.0.1"), tmp_path)
    assert sorted(report.taken) == sorted(UIDS) and num_asked == 1
    assert "2147483648 bytes, many times larger" in str(report.failed["ffn.0.1"])


async def test_a_pause_does_not_wait_for_a_slow_server(swarm: Swarm, run: SignedRun, tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def answer(call: IncomingCall) -> Message:
        await go_on.wait()
        return await swarm.answer(call)

    swarm.host.unhost_expert("ffn.0.0")
    swarm.host.host_expert("ffn.0.0", {STATE: answer})
    store = open_folder_or_make(tmp_path)
    async with SavePoint(swarm.guest, swarm.origins(*UIDS)) as point:
        await point.mark(within=0.2)
        go_on.set()
        report = await point.fetch(store)
    assert "ffn.0.0" in report.late and sorted(report.taken) == sorted(UIDS)


async def join(node: ta.TesseractNode, run: SignedRun, *, roles: tuple[Role, ...] = ("host", "train")) -> None:
    now = int(time.time())
    assert run.tag is not None
    run_id = run.tag.run_id(run.manifest.prefix)
    grant = sign_grant(ALICE, run_id, node.peer_id, roles, serial=now, not_after=now + GRANT_SECONDS)
    await node.join_run(run, grant=grant_text(grant))


class Held:
    """Files that `node` keeps, as if `primary` had sealed them and were gone."""

    def __init__(self, run: SignedRun, primary: ta.Identity, node: ta.TesseractNode, folder: Path) -> None:
        assert run.tag is not None
        self.run_id, self.primary, self.node = run.tag.run_id("ffn"), primary, node
        self.files, self.version = SealedFiles(folder), 0
        self.seals: dict[str, tuple[Term, Seal]] = {}
        self.source = StateSource(self.aside)
        self.source.find_sealed = self.find

    async def aside(self, work: Any) -> Any:
        return work()

    def find(self, uid: str, root: bytes) -> SealedFile | None:
        return self.files.find(uid, root)

    def keep(self, uid: str, state: dict[str, Any], *, number: int = 1, signer: ta.Identity | None = None) -> None:
        file, epoch = self.files.keep(uid, encode_state(state)), EPOCH
        term = sign_term(self.primary, self.run_id, uid=uid, epoch=epoch, boot=bytes(8), kind=TermKind.GENESIS)
        seal = sign_seal(
            signer or self.primary,
            self.run_id,
            term=term,
            number=number,
            version=state["version"],
            root=file.root,
            size=file.size,
            time=epoch + 1,
            successors=[],
        )
        self.seals[uid] = term, seal
        self.node.host_expert(uid, {STATE: self.send, TENURE: self.show})

    async def send(self, call: IncomingCall) -> Message:
        uid = call.body[0]
        file = self.files.find(uid, self.seals[uid][1].root)
        assert file is not None
        return await self.source.answer(SealedState(uid, 0, file, self.aside), call)

    async def show(self, call: IncomingCall) -> Message:
        term, seal = self.seals[call.body[0]]
        return Message(messages.encode(messages.TenureReply(False, list(seal.age), [term.blob, seal.blob])))

    def origin(self, number: int = 1, *, epoch: int = 7) -> Origin:
        return Origin(self.node.peer_address, "holder", (epoch, number))


def trained(run: SignedRun, uid: str, steps: int = 1) -> Any:
    backend = build_run_backend(run.manifest, uid)
    for _ in range(steps):
        _, gradients = backend.gradients([torch.ones(1, 8)], [torch.ones(1, 8)])
        backend.step(gradients)
    return backend


async def test_what_holders_give_is_the_newest_that_a_primary_signed_whatever_some_of_them_say(
    run: SignedRun, tmp_path: Path
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(ta.TesseractNode()) for _ in range(5)]
        for node in nodes[:4]:
            await join(node, run)
        await join(nodes[4], run, roles=("train",))
        primary, guest = nodes[0].identity, nodes[4]
        for node in nodes[:4]:
            guest.trust.introduced(node.peer_id, [node.trust.own_grant("ffn")])
        honest, old, swapped, liar = (Held(run, primary, one, tmp_path / str(n)) for n, one in enumerate(nodes[:4]))
        newest, garbage = trained(run, "ffn.0.0", 3), trained(run, "ffn.0.0", 9)
        old.keep("ffn.0.0", trained(run, "ffn.0.0").state(), number=1)
        honest.keep("ffn.0.0", newest.state(), number=2)
        swapped.keep("ffn.0.0", newest.state(), number=2)
        swapped.source.find_sealed = lambda uid, root: swapped.files.keep(uid, encode_state(garbage.state()))
        liar.keep("ffn.0.0", garbage.state(), number=2**31, signer=liar.node.identity)
        origins = [liar.origin(2**31), swapped.origin(2), old.origin(2**20), honest.origin(2)]
        report = await save(guest, run, {"ffn.0.0": origins}, tmp_path / "out")
        assert report.taken == {"ffn.0.0": 3} and not report.failed
        with torch.no_grad():
            found = SavedExperts(tmp_path / "out")["ffn.0.0"](torch.ones(1, 8))
            assert torch.equal(found, newest.forward([torch.ones(1, 8)])[0])
        report = await save(guest, run, {"ffn.0.0": origins[:1]}, tmp_path / "alone")
        assert "nobody shows a state" in str(report.failed["ffn.0.0"])


async def test_without_a_server_that_leads_followers_and_holders_give_what_they_have(
    run: SignedRun, tmp_path: Path
) -> None:
    async with ta.TesseractNode() as host, ta.TesseractNode(initial_peers=[host.address]) as guest:
        for node in (host, guest):
            await join(node, run)
        swarm, files = Swarm(host, guest, run), Held(run, host.identity, host, tmp_path / "files")
        held = trained(run, "ffn.0.1")
        host.unhost_expert("ffn.0.0")
        files.keep("ffn.0.0", swarm.backends["ffn.0.0"].state())
        files.keep("ffn.0.1", held.state())
        publisher = ExpertPublisher(host.network, addresses=[host.address], trust=host.trust)
        await publisher.declare({"ffn.0.0": False, "ffn.1.1": True})
        parts = {"ffn.0.0": MemberPart(MemberRole.FOLLOWER, 7, 2, 0), "ffn.0.1": MemberPart(MemberRole.HOLDER, 7, 3, 1)}
        place = Place(
            host.peer_id, 4, 4, 1.0, frozenset(), 0.0, 0.0, parts | {"ffn.1.0": MemberPart(MemberRole.HOLDER)}
        )
        assert run.tag is not None
        key, grant = places_key("ffn", run.tag), host.trust.own_grant("ffn")
        encoded = encode_place(place, prefix="ffn", tag=run.tag, grant=grant, addresses=[host.address])
        for number, part in enumerate(encoded):
            await host.network.store(key, part, ttl=60.0, subkey=str(number))
        await guest.network.wait_joined(30.0)
        origins = await find_origins(guest, "ffn", (2, 2))
        assert {uid: [(one.role, one.age) for one in some] for uid, some in origins.items()} == {
            "ffn.0.0": [("follower", (7, 2))],
            "ffn.0.1": [("holder", (7, 3))],
            "ffn.1.1": [("primary", (0, 0))],
        }
        report = await save(guest, run, origins, tmp_path / "out")
        assert report.origins == {"ffn.0.0": "follower", "ffn.0.1": "holder", "ffn.1.1": "primary"}
        assert not report.failed and report.taken["ffn.0.1"] == 1
        saved = SavedExperts(tmp_path / "out")
        assert {uid: (one.version, one.origin) for uid, one in saved.index.items()} == {
            "ffn.0.0": (0, "follower"),
            "ffn.0.1": (1, "holder"),
            "ffn.1.1": (0, "primary"),
        }
        with torch.no_grad():
            assert torch.equal(saved["ffn.0.1"](torch.ones(1, 8)), held.forward([torch.ones(1, 8)])[0])
        await publisher.aclose()
        swarm.source.close()


async def test_what_trainers_share_comes_from_holders_where_no_server_is_left(run: SignedRun, tmp_path: Path) -> None:
    model, prefix = torch.nn.Linear(4, 40), "ffn" + SHARED
    manifest = SharedManifest(Layout.of(model), Outer())
    async with ta.TesseractNode() as host, ta.TesseractNode(initial_peers=[host.address]) as guest:
        for node in (host, guest):
            await join(node, run)
        await guest.network.wait_joined(30.0)
        pieces = SharedPieces(guest, prefix, is_bare=False)
        with pytest.raises(ExpertNotFound):
            await find_pieces(guest, pieces)
        files, parts = Held(run, host.identity, host, tmp_path / "files"), dict[str, MemberPart]()
        for number, cut in enumerate(manifest.layout.cuts):
            fragment = Fragment(cut, manifest.outer, manifest.layout.read(model, cut))
            files.keep(pieces.uid(number), FragmentBackend(manifest.part(number), fragment).state())
            parts[pieces.uid(number)] = MemberPart(MemberRole.HOLDER, 7, 1)
        place = Place(host.peer_id, 4, 4, 1.0, frozenset(), 0.0, 0.0, parts)
        assert run.tag is not None
        grant = host.trust.own_grant("ffn")
        encoded = encode_place(place, prefix=prefix, tag=run.tag, grant=grant, addresses=[host.address])
        for number, part in enumerate(encoded):
            await host.network.store(places_key(prefix, run.tag), part, ttl=60.0, subkey=str(number))
        origins = await find_pieces(guest, pieces)
        assert {uid: [one.role for one in some] for uid, some in origins.items()} == dict.fromkeys(parts, ["holder"])
        store = open_folder_or_make(tmp_path / "out")
        async with SavePoint(guest, origins) as point:
            await point.mark()
            report = await point.fetch(store)
        assert set(report.origins.values()) == {"holder"}
        for name, tensor in take_trunk(store, [*origins], report, keeps=False).items():
            assert torch.equal(tensor, model.state_dict()[name])


async def test_another_runs_folder_is_not_overwritten(swarm: Swarm, run: SignedRun, tmp_path: Path) -> None:
    await save(swarm.guest, run, swarm.origins("ffn.0.0"), tmp_path)
    other = sign_run(ta.Identity.from_seed(b"b" * 32), run.manifest)
    with pytest.raises(ValueError, match=f"holds experts of {run.full_name}"):
        await save(swarm.guest, other, swarm.origins("ffn.0.0"), tmp_path)


@pytest.fixture
def saved(run: SignedRun, tmp_path: Path) -> Iterator[Path]:
    async def collect() -> None:
        async with ta.TesseractNode() as host, ta.TesseractNode() as guest:
            swarm = Swarm(host, guest, run)
            await save(guest, run, swarm.origins(*UIDS), tmp_path)
            swarm.source.close()

    asyncio.run(collect())
    yield tmp_path


def test_damage_is_noticed(saved: Path) -> None:
    file = saved / SavedExperts(saved).index["ffn.0.0"].file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    experts = SavedExperts(saved)
    with pytest.raises(CheckpointError, match="checksum is wrong|damaged"):
        experts["ffn.0.0"]
    assert experts["ffn.1.1"] is not None
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        experts.weights("ffn.0.0")
    with pytest.raises(KeyError):
        experts["ffn.7.7"]


def _set(index: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        index = index[name]
    index[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "other"),
        ("runs/ffn", "AAAA"),
        ("runs/ffn", 3),
        ("experts", []),
        ("experts/ffn.0.0/file", "../../secret"),
        ("experts/ffn.0.0/file", "/etc/passwd"),
        ("experts/ffn.0.0/version", None),
        ("experts/ffn.0.0/structure", 7),
        ("experts/ffn.0.0/other", 1),
    ],
)
def test_a_strange_index_is_refused(saved: Path, path: str, value: Any) -> None:
    index = json.loads((saved / "model.json").read_text())
    _set(index, path, value)
    (saved / "model.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no saved model|is not"):
        SavedExperts(saved)


def test_what_is_no_saved_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no saved model"):
        SavedExperts(tmp_path)
    (tmp_path / "model.json").write_bytes(b"\xff[")
    with pytest.raises(CheckpointError, match="no saved model"):
        SavedExperts(tmp_path)
