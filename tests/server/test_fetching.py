"""Sealed files from several sources at once: through scripted sources in virtual time.

Copies count that show a state which the primary sealed.
"""

import asyncio
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import (
    CheckpointError,
    ConnectionLost,
    NotAllowed,
    PeerUnreachable,
    ProtocolError,
)
from tesseract_async.experts.pieces import PIECE_BYTES, root_of
from tesseract_async.experts.terms import Seal, TermKind, sign_seal, sign_term
from tesseract_async.identity import Identity
from tesseract_async.server.checkpoint import EncodedState
from tesseract_async.server.fetching import SealFetcher, find_shown
from tesseract_async.server.state_files import SealedFile, SealedFiles, expert_folder
from tesseract_async.server.state_transfer import SealedState, StateSource
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tests.client.virtual_time import in_made_up_time
from tests.experts.tenure_world import RUN, identity

UID = "ffn.0.0"
SIZE = 5 * PIECE_BYTES + 77
FILE = Random(1).randbytes(SIZE)
PEERS = [PeerAddress(Identity.from_seed(bytes([n]) * 32).peer_id, (f"127.0.0.1:{n}",)) for n in range(1, 6)]
TIMEOUT = 10.0

Fault = Callable[[messages.StateRequest, Message], Awaitable[Message]]


async def aside(work: Callable[[], Any]) -> Any:
    await asyncio.sleep(0.001)
    return work()


class Swarm:
    """The node of the one that fetches, and places with the sealed file: each sends a piece in half a second."""

    def __init__(self, folder: Path, num_places: int = 3) -> None:
        self.files = SealedFiles(folder / "theirs")
        file = self.files.keep(UID, EncodedState(FILE, []))
        self.seal: Any = SimpleNamespace(root=file.root, size=file.size)
        self.faults: dict[PeerAddress, Fault] = {}
        self.asked: Counter[tuple[PeerAddress, int]] = Counter()
        self.sources = {peer: self._place(file) for peer in PEERS[:num_places]}
        self.turns = {peer: asyncio.Lock() for peer in PEERS}
        self.own = SealedFiles(folder / "own")

    def _place(self, file: SealedFile) -> StateSource:
        source = StateSource(aside)
        source.find_sealed = self.files.find
        return source

    def path(self, peer: PeerAddress) -> None:
        return None

    async def call_expert(
        self, peer: PeerAddress, method: str, body: Any, *, timeout: float, idempotent: bool, priority: int
    ) -> Message:
        assert method == messages.STATE and priority == messages.LOWEST_PRIORITY
        request = messages.decode(messages.StateRequest, body)
        self.asked[peer, request.piece] += 1
        async with asyncio.timeout(timeout), self.turns[peer]:
            await asyncio.sleep(0.5)
            file = self.files.find(UID, request.root)
            assert file is not None
            call = IncomingCall(peer.peer_id, method, body, (), timeout, 0)  # type: ignore[arg-type]
            reply = await self.sources[peer].answer(SealedState(UID, 7, file, aside), call)
            if peer in self.faults:
                reply = await self.faults[peer](request, reply)
            return reply

    def fetcher(self) -> SealFetcher:
        return SealFetcher(self, self.own, timeout=TIMEOUT, aside=aside)  # type: ignore[arg-type]

    async def fetch(self, *, max_bytes: int = SIZE) -> SealedFile:
        return await self.fetcher().fetch(UID, self.seal, list(self.sources), max_bytes=max_bytes)

    def num_asked(self, peer: PeerAddress) -> int:
        return sum(count for (one, _), count in self.asked.items() if one == peer)


@in_made_up_time
async def test_a_file_comes_from_all_at_once_and_is_kept(tmp_path: Path) -> None:
    swarm, loop = Swarm(tmp_path), asyncio.get_running_loop()
    begin = loop.time()
    file = await swarm.fetch()
    assert loop.time() - begin < 2.5, "one after the other the pieces take 3.5 s"
    assert file.map() == FILE and file.path.suffix == ".part"
    assert all(swarm.num_asked(peer) for peer in swarm.sources)
    kept = swarm.own.take_in(UID, file)
    assert kept.path.suffix == ".sealed" and swarm.own.find(UID, swarm.seal.root) == kept
    assert [one.name for one in kept.path.parent.iterdir()] == [kept.path.name]
    swarm.asked.clear()
    assert await swarm.fetch() == kept and not swarm.asked, "what is here is not fetched"
    again = SealedFiles(tmp_path / "own")
    again.load(UID)
    assert again.find(UID, swarm.seal.root) == kept


async def lie(request: messages.StateRequest, reply: Message) -> Message:
    data = bytearray(reply.buffers[0])
    data[len(data) // 2] ^= 1
    return Message(reply.body, (memoryview(data),))


async def truncate(request: messages.StateRequest, reply: Message) -> Message:
    return Message(reply.body, (reply.buffers[0][:-1],))


async def withhold(request: messages.StateRequest, reply: Message) -> Message:
    if request.piece:
        await asyncio.Event().wait()
    return reply


async def send_an_old_one(request: messages.StateRequest, reply: Message) -> Message:
    return Message(list(messages.StateReply(*reply.body)._replace(root=b"o" * 32)), reply.buffers)


async def have_none(request: messages.StateRequest, reply: Message) -> Message:
    return Message(list(messages.StateReply(*reply.body)._replace(size=0)), ())


async def talk_nonsense(request: messages.StateRequest, reply: Message) -> Message:
    return Message([[]], reply.buffers)


async def refuse(request: messages.StateRequest, reply: Message) -> Message:
    raise NotAllowed("not you")


async def vanish(request: messages.StateRequest, reply: Message) -> Message:
    if request.piece > 1:
        raise ConnectionLost("it", "for the test")
    return reply


async def be_nowhere(request: messages.StateRequest, reply: Message) -> Message:
    raise PeerUnreachable("it", {})


BAD = [lie, truncate, withhold, send_an_old_one, have_none, talk_nonsense, refuse, vanish, be_nowhere]


@pytest.mark.parametrize("fault", BAD)
@in_made_up_time
async def test_bad_sources_cost_little(tmp_path: Path, fault: Fault) -> None:
    swarm, loop = Swarm(tmp_path), asyncio.get_running_loop()
    for bad in PEERS[:2]:
        swarm.faults[bad] = fault
    begin = loop.time()
    assert (await swarm.fetch()).map() == FILE
    assert loop.time() - begin < 0.5 * 7 + 10.0
    assert all(swarm.num_asked(bad) <= 10 for bad in PEERS[:2])


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        (lie, ProtocolError, f"{PEERS[0].short} sent a wrong piece"),
        (truncate, ProtocolError, f"{PEERS[0].short} sent a wrong piece"),
        (withhold, TimeoutError, f"{PEERS[0].short} stopped sending"),
        (send_an_old_one, ProtocolError, f"{PEERS[0].short} sent another piece"),
        (have_none, ProtocolError, f"{PEERS[0].short} does not have"),
        (talk_nonsense, ProtocolError, "malformed"),
        (refuse, NotAllowed, "not you"),
        (vanish, ConnectionLost, "for the test"),
        (be_nowhere, PeerUnreachable, "it"),
    ],
)
@in_made_up_time
async def test_where_nobody_sends_it_the_error_says_why(
    tmp_path: Path, fault: Fault, error: type[Exception], sentence: str
) -> None:
    swarm = Swarm(tmp_path, 1)
    swarm.faults[PEERS[0]] = fault
    with pytest.raises(error, match=re.escape(sentence)):
        await swarm.fetch()


@in_made_up_time
async def test_without_a_source_there_is_nothing_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="nobody is known"):
        await Swarm(tmp_path, 0).fetch()


@in_made_up_time
async def test_what_was_interrupted_goes_on_with_the_pieces_on_the_disk(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path)
    task = asyncio.create_task(swarm.fetch())
    await asyncio.sleep(1.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (part,) = expert_folder(tmp_path / "own", UID).iterdir()
    data = bytearray(part.read_bytes())
    there = [n for n in range(5) if data[n * PIECE_BYTES :][:100] == FILE[n * PIECE_BYTES :][:100]]
    assert there and len(data) == SIZE
    data[there[0] * PIECE_BYTES + 500] ^= 1  # what was damaged meanwhile is fetched again
    part.write_bytes(data)
    swarm.asked.clear()
    swarm.own = SealedFiles(tmp_path / "own")  # by another process
    assert (await swarm.fetch()).map() == FILE
    again = {piece - 1 for _, piece in swarm.asked} - {-1}
    assert again == set(range(6)) - set(there[1:])


@in_made_up_time
async def test_of_one_expert_one_unfinished_file_stays_on_the_disk(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path)
    old = expert_folder(tmp_path / "own", UID) / "0123456789abcdef.part"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"older")
    with swarm.own.open_part(UID, bytes(32)):
        file = await swarm.fetch()
        assert not old.exists() and len(list(old.parent.glob("*.part"))) == 2, "that on its way stays"
    assert file.map() == FILE


@in_made_up_time
async def test_a_full_disk_is_noticed_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    swarm = Swarm(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(CheckpointError, match="No space left"):
            await swarm.fetch()
    assert not swarm.asked and not list(expert_folder(tmp_path / "own", UID).iterdir())
    assert (await swarm.fetch()).map() == FILE, "there is room again"


@in_made_up_time
async def test_a_longer_file_than_the_expert_can_have_is_not_asked_for(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path)
    with pytest.raises(ProtocolError, match="at most"):
        await swarm.fetch(max_bytes=SIZE - 1)
    assert not swarm.asked and not list(tmp_path.rglob("*.part"))  # noqa: ASYNC240


@in_made_up_time
async def test_two_who_want_one_file_fetch_it_once(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path)
    fetcher = swarm.fetcher()
    sources = list(swarm.sources)
    files = await asyncio.gather(*(fetcher.fetch(UID, swarm.seal, sources, max_bytes=SIZE) for _ in range(2)))
    assert files[0] == files[1]
    pieces = Counter(piece for _, piece in swarm.asked.elements())
    assert pieces.pop(0) <= 2 and set(pieces.values()) == {1}


def test_an_expert_that_was_given_up_leaves_no_part_of_a_file_behind(tmp_path: Path) -> None:
    files = SealedFiles(tmp_path)
    files.keep("ffn.0", EncodedState(b"state", []))
    with files.open_part("ffn.0", b"1" * 32) as part:
        files.forget("ffn.0")
        assert os.path.exists(part.name), "it is being written"
    files.forget_parts("ffn.0")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


PRIMARY, LIAR = identity(1), identity(2)
TERM = sign_term(PRIMARY, RUN, uid=UID, epoch=100, boot=bytes(8), kind=TermKind.GENESIS)
FILES = {PRIMARY.peer_id: b"the state", LIAR.peer_id: b"what is not"}


def sealed(who: Any, number: int) -> Seal:
    data = FILES[who.peer_id]
    state = {"version": 1, "root": root_of(data), "size": len(data), "time": 100, "successors": []}
    return sign_seal(who, RUN, term=TERM, number=number, **state)


async def test_a_piece_of_what_another_signed_in_the_primarys_term_shows_nothing() -> None:
    shown = {"10.0.0.1:1": sealed(PRIMARY, 7), "10.0.0.2:1": sealed(LIAR, 9), "10.0.0.3:1": sealed(PRIMARY, 3)}

    async def call_expert(peer: PeerAddress, method: str, *_: Any, **__: Any) -> Message:
        seal = shown[peer.addresses[0]]
        if method == messages.TENURE:
            return Message(messages.encode(messages.TenureReply(False, [], [b"", seal.blob])))
        data = FILES[seal.primary]
        return Message(messages.encode(messages.StateReply(1, root_of(data), len(data), 0)), (memoryview(data),))

    peers = {identity(number).peer_id: PeerAddress(None, (where,)) for number, where in enumerate(shown, 10)}
    node: Any = SimpleNamespace(call_expert=call_expert)
    found = await find_shown(node, RUN, sealed(PRIMARY, 7), peers, timeout=1.0, random=Random(1))
    assert found == {identity(10).peer_id}
