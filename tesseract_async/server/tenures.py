"""Tenures: who is the primary of a server's experts of runs. Drives their `Tenure`s.

It carries their questions, reads and publishes their records, writes down what they must remember, and moves the sealed
files.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, NotAllowed, ProtocolError, TesseractError, describe
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.claiming import GRANT_SUBKEY
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.membership import Leave
from tesseract_async.experts.merkle import leaf_of, leaves_of, possession, root_from
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.pieces import LIST
from tesseract_async.experts.place_directory import MAX_MEMBERS
from tesseract_async.experts.placement import Place
from tesseract_async.experts.tenure import Tenure
from tesseract_async.experts.tenure_words import (
    Command,
    Fetch,
    Look,
    Persist,
    Publish,
    Question,
    Response,
    RoleChanged,
    Send,
    State,
)
from tesseract_async.experts.terms import RECORDS_SECONDS, Kind, Seal
from tesseract_async.experts.trust import SHARED
from tesseract_async.identity import PeerID
from tesseract_async.network.entries import StoreItem
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.checkpoint import encode, largest_state, with_recent_journal
from tesseract_async.server.fetching import SealFetcher, ask_piece
from tesseract_async.server.fragments import MAX_STATE_BYTES, FragmentBackend, fetch_replay
from tesseract_async.server.hosted import HostedState
from tesseract_async.server.other_replicas import (
    MAX_SHARDS_READ,
    check_fitting,
    owner_of,
    read_replicas,
    record_subkey,
    wall_clock,
)
from tesseract_async.server.server import TesseractServer
from tesseract_async.server.state_files import SealedFile, SealedFiles, read_sealed, stored_uids
from tesseract_async.server.state_transfer import SealedState, StateSource
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)

MAX_ADDRESSES: Final = 2 * MAX_MEMBERS
"""Members whose addresses are remembered."""
MAX_ASKED: Final = 3
"""Members of whom a newer state is asked for at a time."""
ASK_TIMEOUT: Final = 1.5
"""Seconds for a question about who is primary."""
MAX_RECORD_BYTES: Final = 1024
UPLOAD_SHARE: Final = 0.5
"""The share of the upload rate that copies of states may take."""
RETRY_SECONDS: Final = 300.0
"""Backwards of so long are in a sealed state's journal: whoever goes on from there applies none of them twice."""
AUTHORITY_PERIOD: Final = 2.0
"""Seconds after which grants, revocations and appointments are looked at again: they come by themselves."""


@dataclass(slots=True)
class _Expert:
    uid: str
    hosted: HostedState | None
    """None: as a file alone."""
    authority: Authority
    tenure: Tenure
    carrying: asyncio.Lock = field(default_factory=asyncio.Lock)
    installing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from where a state is chosen to where the machine knows that it is here. Taken before `carrying`."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after every command; those who wait for something look again, and clear it."""
    progress: tuple[int, int] | None = None
    """How far the sealed file is."""
    sealed_at: float = -math.inf
    versions: deque[tuple[float, int]] = field(default_factory=deque)
    """When the last states were sealed, and their versions."""
    waited_for: bool = False
    """It was told that this expert may have a state, which nobody shows."""
    wanted_root: bytes | None = None
    """The state that the run's owner named last."""
    unwritten: bytes | None = None
    """What the disk did not take, and must before anything is said."""

    async def until(self, condition: Callable[[Tenure], bool], timeout: float) -> bool:
        """Wait until something holds. False if it does not within `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not condition(self.tenure):
                    self.changed.clear()
                    await self.changed.wait()
        return condition(self.tenure)


class Tenures:
    """Settles the roles of these experts, and follows their primaries by the Seals. `ReplicaKeeper` starts it."""

    def __init__(
        self,
        server: TesseractServer,
        authorities: Mapping[str, Authority],
        *,
        call_timeout: float,
        elapsed: Callable[[], float],
    ) -> None:
        """`authorities`: uid -> its run's. `elapsed` is that of `ReplicaKeeper`."""
        self._server, self._node = server, server.node
        self._call_timeout, self._elapsed = call_timeout, elapsed
        self._authorities = dict(authorities)
        self._experts: dict[str, _Expert] = {}
        self.source: StateSource | None = None
        """Sends what is here as a file alone."""
        self.template: ExpertBackend | None = None
        """An expert like all of the run: what is fetched must fit it."""
        self.places: dict[str, Mapping[str, Mapping[PeerID, int]]] = {}
        """Prefix -> uid -> members that have its state by their own word, be it as a file alone, and the epoch of
        that."""
        self.on_leading: dict[str, Callable[[str], None]] = {}
        """Prefix -> called when this server became the primary of an expert that is here as a file alone."""
        self.upload_rate: float | None = None
        """Bytes per second that the volunteer gives; None without a limit."""
        self._boot, self._random = os.urandom(8), Random()
        self.files = SealedFiles(server.checkpoint_dir)
        self._fetcher = SealFetcher(self._node, self.files, timeout=call_timeout, aside=server.call_aside)
        self._addresses: dict[PeerID, PeerAddress] = {}  # of servers that were found to host one of the experts
        self._shown: dict[str, tuple[bytes, float]] = {}  # by shard key: the grant that lies there, and until when
        self._looks: set[str] = set()
        self._looking: set[str] = set()  # being looked at: what is wanted of these meanwhile comes after that
        self._wants_look, self._wants_announcement, self._wake = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Take up what was left, and return once each expert has a role here, or a while has passed."""
        for uid, authority in self._authorities.items():
            self._experts[uid] = await self._load(uid, authority, self._server.hosted[uid])
        self._spawn(self._turn())
        self._spawn(self._whenever(self._wants_look, self._look_at_wanted))
        self._spawn(self._whenever(self._wants_announcement, self._server.announce))
        self._spawn(self._seal_often())
        for expert in self._experts.values():
            await self._carry_out(expert)

        def is_settled(tenure: Tenure) -> bool:
            # and what it is, it also says
            says = self._server.is_primary(tenure.uid) == (tenure.state is State.PRIMARY)
            return tenure.state in (State.PRIMARY, State.FOLLOWING, State.HOLDING) and says

        await asyncio.gather(*(expert.until(is_settled, self._call_timeout) for expert in self._experts.values()))

    async def _return_to(self, held: Seal | None, hosted: HostedState) -> None:
        """Go on from the sealed file, unless the checkpoint is of this server's own steps and has more of them."""
        file = None if held is None else self.files.find(hosted.uid, held.root)
        if held is None or file is None or (held.primary == self._node.peer_id and hosted.version >= held.version):
            return
        try:
            state = await self._server.call_aside(partial(_check_file, hosted.uid, hosted.backend, file))
            await hosted.install(state)
            hosted.shared_version = hosted.version
        except (TesseractError, OSError) as error:
            logger.error("the sealed state of %s cannot be used: %s", hosted.uid, describe(error))

    async def _load(self, uid: str, authority: Authority, hosted: HostedState | None) -> _Expert:
        make = partial(
            Tenure,
            self._node.identity,
            uid,
            authority,
            boot=self._boot,
            now=self._elapsed(),
            wall=wall_clock(),
            stored=await self._server.call_aside(partial(self.files.load, uid)),
            random=self._random,
        )
        tenure = make(has_file=True)
        held = tenure.held
        own = held is not None and held.primary == self._node.peer_id and hosted is not None
        if held is not None and not own and self.files.find(uid, held.root) is None:
            tenure = make(has_file=False)  # its own state is in its checkpoints; another's is nowhere
        if hosted is not None:
            await self._return_to(tenure.held, hosted)
        return _Expert(uid, hosted, authority, tenure)

    async def add(self, uid: str, authority: Authority, leave: Leave) -> None:
        """Have this expert here, too, as a file alone. Raises: OSError."""
        if uid in self._experts or self._closed:
            return
        expert = await self._load(uid, authority, None)
        for name in ("lead", "begin", "anew", "passive"):
            setattr(expert.tenure.may, name, getattr(leave, name))
        self._authorities[uid], self._experts[uid] = authority, expert
        self._answer_as_file(uid)
        await self._carry_out(expert)

    def _answer_as_file(self, uid: str) -> None:
        handlers = {messages.TENURE: partial(self._answer, uid), messages.STATE: partial(self._send_file, uid)}
        self._node.host_expert(uid, handlers)

    async def _send_file(self, uid: str, call: IncomingCall) -> Message:
        held = self._experts[uid].tenure.held
        file = None if held is None else self.files.find(uid, held.root)
        if held is None or file is None or self.source is None:
            raise NotAllowed(f"the state of {uid} is not here yet")
        return await self.source.answer(SealedState(uid, held.version, file, self._server.call_aside), call)

    async def compute(self, uid: str, backend: ExpertBackend) -> None:
        """Compute an expert that is here as a file alone, as its follower or as its primary.

        Raises: CheckpointError, ProtocolError if the file does not fit it; OSError; ValueError.
        """
        expert = self._experts[uid]
        async with expert.installing:  # a newer one that has come meanwhile waits, and is taken by the expert
            state = None
            if (held := expert.tenure.held) is not None:
                file = self.files.find(uid, held.root)
                if file is None:
                    raise CheckpointError(f"the sealed file of {uid} is gone")
                state = await self._server.call_aside(partial(_check_file, uid, backend, file))
            # until then the file answers: a primary that says nothing is taken for dead
            leave = partial(self._node.unhost_expert, uid)
            expert.hosted = await self._server.add(uid, backend, state, ready=leave)
            expert.progress = None if state is None else backend.progress
        expert.hosted.epoch = expert.tenure.epoch
        await self._server.set_primary(uid, expert.tenure.state is State.PRIMARY, announce=False)
        self._wants_announcement.set()

    async def rest(self, uid: str) -> None:
        """Keep an expert, of which this server is not the primary, as a file alone. Raises: CheckpointError."""
        expert = self._experts[uid]
        async with expert.installing:
            if expert.hosted is not None and expert.tenure.state in (State.FOLLOWING, State.HOLDING):
                await self._server.remove(uid)
                expert.hosted, expert.progress = None, None
                self._answer_as_file(uid)
                self._wants_announcement.set()

    async def drop(self, uid: str, *, even_primary: bool = False) -> None:
        """Give an expert up, and its file, unless this server is its primary.

        `even_primary`: it fell silent as one that cannot compute it. Others take over after a lease; its file stays.
        """
        expert = self._experts[uid]
        await self.rest(uid)
        async with expert.installing, expert.carrying:
            if expert.hosted is None and (even_primary or expert.tenure.state is not State.PRIMARY):
                del self._experts[uid], self._authorities[uid]
                self._node.unhost_expert(uid)
                if not even_primary:
                    await self._server.call_aside(partial(self.files.forget, uid))

    def stored(self, pattern: ExpertPattern) -> list[str]:
        """Return the experts of a run that have a folder here, and are not looked after yet."""
        return [uid for uid in stored_uids(self._server.checkpoint_dir) if uid in pattern and uid not in self._experts]

    def uids(self) -> list[str]:
        """Return the experts that are here, computed or as files."""
        return list(self._experts)

    def knows(self, addresses: Mapping[PeerID, PeerAddress]) -> None:
        """Take where members can be dialed. Of those that come and go, the last are remembered."""
        known = {peer: one for peer, one in self._addresses.items() if peer not in addresses} | dict(addresses)
        self._addresses = dict(itertools.islice(known.items(), max(0, len(known) - MAX_ADDRESSES), None))

    async def aclose(self) -> None:
        """Stop. Nothing is answered or trained any more."""
        self._closed = True
        async with contextlib.AsyncExitStack() as stack:
            for expert in self._experts.values():  # no command is cut off
                await stack.enter_async_context(expert.carrying)
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for expert in self._experts.values():
                for command in expert.tenure.commands():
                    if isinstance(command, Persist):
                        await self._do(expert, command)
        if self._experts:
            await self._server.call_aside(self.files.close)

    def has(self, uid: str) -> bool:
        """Return whether it looks after this expert."""
        return uid in self._authorities

    def may_step(self, uid: str) -> bool:
        """Return whether a step of this expert may be taken, or answered, at this moment."""
        expert = self._experts.get(uid)
        return expert is None or (not self._closed and expert.tenure.is_primary(self._elapsed()))

    def primary(self, uid: str) -> PeerID | None:
        """Return the primary, if that is another server."""
        expert = self._experts.get(uid)
        primary = None if expert is None else expert.tenure.primary
        return None if primary == self._node.peer_id else primary

    def tenure(self, uid: str) -> Tenure:
        """Return the machine of one expert, to look at."""
        return self._experts[uid].tenure

    def _now(self) -> tuple[float, float]:
        return self._elapsed(), wall_clock()

    async def answer(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Answer ``expert.tenure``. Raises: NotAllowed, ProtocolError."""
        return await self._answer(hosted.uid, call)

    async def _answer(self, uid: str, call: IncomingCall) -> Message:
        request = messages.decode(messages.TenureRequest, call.body)
        expert = self._experts.get(uid)
        if expert is None:
            raise NotAllowed(f"{uid} is of no run here")
        if request.kind in ("prepare", "take_over"):
            agrees, proof = await self._take_over(expert, call.peer_id, request)
            return Message(messages.encode(messages.TenureReply(agrees, [0, 0], [b"", proof])))
        boot, term, seal = _check_records(request.records, 3)
        question = Question(request.kind, request.epoch, boot, term, seal)
        answer = expert.tenure.ask(call.peer_id, question, *self._now())
        await self._carry_out(expert)
        if expert.unwritten is not None:
            raise NotAllowed(f"nothing is said about {uid} here: the disk does not take what must be remembered")
        return Message(
            messages.encode(messages.TenureReply(answer.agrees, list(answer.held), [answer.term, answer.vote]))
        )

    async def _take_over(self, expert: _Expert, peer: PeerID, request: messages.TenureRequest) -> tuple[bool, bytes]:
        tenure = expert.tenure
        if tenure.primary != peer:
            raise NotAllowed(f"{peer.short} is not the primary of {expert.uid} here")
        nonce_or_signature, blob = _check_records(request.records, 2)
        if request.kind == "prepare":
            tenure.sight(blob, *self._now())
            await self._carry_out(expert)
            await expert.until(lambda tenure: tenure.held is not None and tenure.held.blob == blob, self._call_timeout)
            held = tenure.held
            if held is None or held.blob != blob:
                return False, b""
            return True, await self._possession(expert.uid, held, nonce_or_signature)
        took = tenure.take(nonce_or_signature, *self._now())
        await self._carry_out(expert)
        if took:
            await expert.until(lambda tenure: tenure.state is State.PRIMARY, self._call_timeout)
        return took, b""

    async def _possession(self, uid: str, seal: Seal, nonce: bytes) -> bytes:
        """Return the proof that this server has the file; empty if it does not."""
        file = self.files.find(uid, seal.root)
        return b"" if file is None else await self._server.call_aside(lambda: possession(file.map(), nonce))

    async def hand_over(self, uid: str, to: PeerID | None = None) -> bool:
        """Give the expert to one of its successors, or to this one. Returns whether one took it; it stays otherwise."""
        expert = self._experts[uid]
        tenure = expert.tenure
        # those that could not lead it come last
        heirs = sorted(tenure.heirs(self._elapsed()), key=lambda heir: heir in tenure.may.passive)
        heirs = [heir for heir in heirs if to in (None, heir)]
        if not heirs or not tenure.leave():
            return False
        signed = False
        try:
            await self._carry_out(expert)
            await self._server.calls.wait_backwards(uid)
            seal = await self._seal(expert)
            if seal is None:
                return False
            for heir in heirs:
                nonce = os.urandom(16)
                reply = await self._call(uid, heir, "prepare", [nonce, seal.blob], timeout=self._call_timeout)
                if reply is None or reply.records[1] != await self._possession(uid, seal, nonce):
                    logger.warning("%s could not be handed over to %s: it has not fetched the state", uid, heir.short)
                    continue
                if tenure.state is not State.YIELDING:
                    return False  # another has it meanwhile
                signature, signed = tenure.hand_over(heir), True
                await self._carry_out(expert)
                reply = await self._call(uid, heir, "take_over", [signature, b""], timeout=self._call_timeout)
                logger.info("%s was handed over to %s", uid, heir.short)
                await self._see_term_of(expert, heir)
                return reply is not None and reply.agrees
            return False
        finally:
            if not signed:
                tenure.keep(self._elapsed())
                await self._carry_out(expert)

    async def count_shown(self, uid: str, peers: Iterable[PeerID]) -> int:
        """Return how many of these show a random piece of the sealed file that is here."""
        held = self._experts[uid].tenure.held
        file = None if held is None else self.files.find(uid, held.root)
        if file is None:
            return 0
        found = await asyncio.gather(*(self._shows(uid, peer, file) for peer in peers))
        return sum(found)

    async def _shows(self, uid: str, peer: PeerID, file: SealedFile) -> bool:
        address, piece = self._addresses.get(peer), LIST
        if len(file.leaves) > 1:
            piece = self._random.randrange(1, len(file.leaves) + 1)
        if address is None:
            return False
        request = messages.StateRequest(uid, False, 0, file.root, piece)
        try:
            _, data = await ask_piece(self._node, address, request, timeout=self._call_timeout)
        except (TesseractError, TimeoutError, OSError) as error:
            logger.info("%s does not show the state of %s: %s", peer.short, uid, describe(error))
            return False
        return leaf_of(data) == file.leaves[max(0, piece - 1)]

    def look_for_newer(self, places: Mapping[PeerID, Place]) -> None:
        """Ask those that say they have a newer state than this server for its Seal: its signer may be gone, the network
        hears of few Seals, and the file of one that lies there may be nowhere any more."""
        for uid, expert in self._experts.items():
            held, best = expert.tenure.held, expert.tenure.lineage.best
            if expert.tenure.state not in (State.ABSENT, State.FOLLOWING, State.HOLDING):
                continue
            age, blob = ((0, 0), b"") if held is None else (held.age, held.blob)
            newer = [
                peer
                for peer, one in places.items()
                if (part := one.parts.get(uid)) and part.has_file and part.age > age and peer != self._node.peer_id
            ]
            question = Question("probe", expert.tenure.epoch, self._boot, b"" if best is None else best.blob, blob)
            # any, not the newest: who only says so must not keep it from the others
            for peer in self._random.sample(newer, min(MAX_ASKED, len(newer))):
                self._spawn(self._send(expert, peer, question))

    async def _see_term_of(self, expert: _Expert, heir: PeerID) -> None:
        """Ask for the successor's Term, so that this server names it to trainers."""
        best = expert.tenure.lineage.best
        records = [b"", b"" if best is None else best.blob, b""]
        reply = await self._call(expert.uid, heir, "probe", records, timeout=ASK_TIMEOUT, epoch=expert.tenure.epoch)
        if reply is not None:
            expert.tenure.sight(reply.records[0], *self._now())
        await self._carry_out(expert)

    async def _carry_out(self, expert: _Expert) -> None:
        """Carry out each command before the next: what is to be on disk is there before anything that depends on it."""
        async with expert.carrying:
            while commands := expert.tenure.commands():
                for command in commands:
                    await self._do(expert, command)
            if expert.hosted is not None:
                expert.hosted.epoch = expert.tenure.epoch
        expert.changed.set()
        self._wake.set()

    async def _do(self, expert: _Expert, command: Command) -> None:
        match command:
            case Persist(stored):
                await self._remember(expert, stored)
            case Publish() | Send() if expert.unwritten is not None:
                pass  # it is as if it were cut off: what it promised is not on its disk
            case Publish(records, past):
                self._spawn(self._publish(expert.uid, dict(enumerate(records)) | dict(enumerate(past, 2))))
            case Send(peer, question):
                self._spawn(self._send(expert, peer, question))
            case Look():
                self._looks.add(expert.uid)
                self._wants_look.set()
            case Fetch():
                self._spawn(self._fetch(expert, command))
            case RoleChanged(is_primary, _) if expert.hosted is None:
                if is_primary:
                    self._node.metrics.count("experts_taken_over")
                    self.on_leading[split_uid(expert.uid)[0]](expert.uid)
            case RoleChanged(is_primary, _):
                term = expert.tenure.term
                if is_primary and term is not None and term.kind is Kind.GENESIS and expert.waited_for:
                    logger.error("nobody came with a state of %s: it begins anew, from genesis", expert.uid)
                assert expert.hosted is not None
                if is_primary != expert.hosted.is_primary:
                    self._node.metrics.count("experts_taken_over" if is_primary else "experts_given_up")
                await self._server.set_primary(expert.uid, is_primary, announce=False)
                self._wants_announcement.set()

    async def _remember(self, expert: _Expert, stored: bytes) -> None:
        """Write down what must be on the disk before anything else is said of the expert."""
        before, expert.unwritten = expert.unwritten, None
        try:
            await self._server.call_aside(partial(self.files.remember, expert.uid, stored))
        except OSError as error:
            expert.unwritten = stored
            if before is None:
                logger.error("%s: this server says nothing until its disk takes it: %s", expert.uid, describe(error))
        expert.tenure.may.write = expert.unwritten is None

    async def _send(self, expert: _Expert, peer: PeerID, asked: Question) -> None:
        sent, answer = self._elapsed(), None
        records = [asked.boot, asked.term, asked.seal]
        reply = await self._call(expert.uid, peer, asked.kind, records, timeout=ASK_TIMEOUT, epoch=asked.epoch)
        if reply is not None:
            answer = Response(reply.agrees, (reply.held[0], reply.held[1]), reply.records[0], reply.records[1])
        expert.tenure.answered(peer, asked, answer, sent, *self._now())
        await self._carry_out(expert)

    async def _call(
        self, uid: str, peer: PeerID, kind: str, records: list[bytes], *, timeout: float, epoch: int = 0
    ) -> messages.TenureReply | None:
        """Ask a peer. None if it does not answer, or not what was asked."""
        address = self._addresses.get(peer)
        if address is None:
            return None
        body = messages.encode(messages.TenureRequest(uid, kind, epoch, records))
        try:
            async with asyncio.timeout(timeout):
                reply = await self._node.call_expert(address, messages.TENURE, body, timeout=timeout, idempotent=True)
            decoded = messages.decode(messages.TenureReply, reply.body)
            _check_records(decoded.records, 2)
            if len(decoded.held) != 2 or any(type(part) is not int or part < 0 for part in decoded.held):
                raise ProtocolError("a malformed answer about who is primary")
            return decoded
        except (TesseractError, TimeoutError, OSError) as error:
            logger.debug("%s of %s at %s: %s", kind, uid, peer.short, describe(error))
            return None

    async def _fetch(self, expert: _Expert, command: Fetch) -> None:
        found, uid = False, expert.uid
        async with contextlib.AsyncExitStack() as stack:
            try:
                found = await self._pull(expert, command, stack)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("the state of %s could not be fetched: %s", uid, describe(error))
            expert.tenure.fetched(command, found, *self._now())
        if self._experts.get(uid) is expert:
            await self._carry_out(expert)
        else:  # it was given up meanwhile
            await self._server.call_aside(partial(self.files.forget_parts, uid))

    async def _pull(self, expert: _Expert, command: Fetch, stack: contextlib.AsyncExitStack) -> bool:
        """Take the sealed state, from this server's own files or from others. False if it is not wanted any more.

        `stack` holds `installing` afterwards.
        Raises: as `SealFetcher.fetch` and `check_fitting`; then nothing has changed.
        """
        uid, seal, aside = expert.uid, command.seal, self._server.call_aside
        backend = self.template if expert.hosted is None else expert.hosted.backend
        is_fragment = split_uid(uid)[0].endswith(SHARED)
        if backend is None and not is_fragment:
            return False
        if not command.check and not command.aside:
            await stack.enter_async_context(expert.installing)
            if await self._replay(expert, seal):
                return True
            await stack.aclose()  # nobody waits for what comes from afar
        max_bytes = MAX_STATE_BYTES if is_fragment or backend is None else largest_state(backend)
        sources = [address for peer in command.sources if (address := self._addresses.get(peer)) is not None]
        file = await self._fetcher.fetch(uid, seal, sources, max_bytes=max_bytes)
        if command.check:
            return True
        if is_fragment:
            backend = await aside(lambda: FragmentBackend.of_file(uid, file.map()))
        assert backend is not None
        state = await aside(partial(_check_file, uid, backend, file))
        await stack.enter_async_context(expert.installing)
        is_free = expert.tenure.state in (State.ABSENT, State.FOLLOWING, State.HOLDING, State.ASIDE)
        if not is_free or self._experts.get(uid) is not expert:
            return False  # it was long on its way: this server is the primary now, or about to be, or gave it up
        if (hosted := expert.hosted) is not None:
            await self._take(hosted, expert.authority, state, aside=command.aside)
            expert.progress = hosted.backend.progress
        elif command.aside:
            await aside(partial(self.files.put_aside, uid, seal.root))
        await aside(partial(self.files.take_in, uid, file))
        self._node.metrics.count("states_pulled")
        return True

    async def _replay(self, expert: _Expert, seal: Seal) -> bool:
        """Come to the sealed state of a fragment by its primary's updates: a thousandth of the bytes."""
        uid, hosted, aside = expert.uid, expert.hosted, self._server.call_aside
        primary = self._addresses.get(seal.primary)
        is_free = expert.tenure.state in (State.FOLLOWING, State.HOLDING)
        if primary is None or not is_free or not split_uid(uid)[0].endswith(SHARED):
            return False
        try:
            backend = await aside(partial(self.fragment, uid)) if hosted is None else hosted.backend
            assert isinstance(backend, FragmentBackend)
            update = await fetch_replay(
                self._node, uid, backend, primary, up_to=seal.version, timeout=self._call_timeout
            )
            if update is None:
                return False
            await (aside(update) if hosted is None else hosted.runtime.call(update))
        except (TesseractError, TimeoutError, OSError) as error:
            logger.info("%s could not be followed by its updates: %s", uid, describe(error))
            return False
        file = encode(backend.state() if hosted is None else await hosted.snapshot())
        if await aside(lambda: root_from(leaves_of(file), file.size)) != seal.root:
            return False
        await aside(lambda: self.files.keep(uid, file))
        if hosted is not None:
            hosted.shared_version, expert.progress = hosted.version, backend.progress
        self._node.metrics.count("fragments_replayed")
        return True

    def fragment(self, uid: str) -> FragmentBackend:
        """Return the fragment in the sealed file that is here. Blocking. Raises: CheckpointError, ProtocolError."""
        held = self._experts[uid].tenure.held
        file = None if held is None else self.files.find(uid, held.root)
        if file is None:
            raise CheckpointError(f"the state of {uid} is not here yet")
        return FragmentBackend.of_file(uid, file.map())

    async def _take(self, hosted: HostedState, authority: Authority, state: StateDict, *, aside: bool) -> None:
        """Continue from this state, and say how to get back the steps of this server that it lacks."""
        uid, path = hosted.uid, await hosted.take(state, aside=aside)
        if path is not None:
            root = (await self._server.call_aside(partial(read_sealed, path))).root
            name = authority.run.full_name
            logger.warning(
                "the owner of %s can go back to that state of %s: tesseract run appoint %s %s %s --state %s",
                *(name, uid, name, uid, self._node.peer_id, root.hex()),
            )

    async def _restore(self, expert: _Expert, hosted: HostedState, root: bytes) -> None:
        """Go on from the state that the run's owner named, if this server has it."""
        uid, aside = expert.uid, self._server.call_aside
        try:
            file = await aside(partial(self.files.find_aside, uid, root))
            if file is None:
                logger.warning("the owner of the run gives %s to this server, in a state that is not here", uid)
                return
            state = await aside(partial(_check_file, uid, hosted.backend, file))
            await self._take(hosted, expert.authority, state, aside=True)
        except (TesseractError, OSError) as error:
            logger.error("%s cannot go on as its run's owner says: %s", uid, describe(error))
            return
        expert.progress = None  # nobody has a Seal of that
        expert.tenure.restored(root, *self._now())
        await self._carry_out(expert)

    async def _turn(self) -> None:
        """Let each machine act when it is due."""
        told_at = self._elapsed()
        while True:
            now = self._elapsed()
            if now - told_at >= AUTHORITY_PERIOD:
                told_at = now
                for expert in list(self._experts.values()):
                    if expert.unwritten is not None:
                        async with expert.carrying:
                            await self._remember(expert, expert.unwritten)
                    expert.tenure.authority_changed(*self._now())
                    await self._carry_out(expert)
                    root, hosted = expert.tenure.wanted_root, expert.hosted
                    if hosted is not None and root != expert.wanted_root:
                        expert.wanted_root = root
                        if root is not None:
                            self._spawn(self._restore(expert, hosted, root))
                self._node.metrics.set(
                    "lineage_forks", sum(one.tenure.lineage.num_forks for one in self._experts.values())
                )
            due = min((expert.tenure.timer_at() for expert in self._experts.values()), default=math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, max(0.01, due - now))):
                    await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(0.02)  # one turn for all that came at once
            for expert in list(self._experts.values()):
                if self._elapsed() >= expert.tenure.timer_at():
                    expert.tenure.handle_timer(*self._now())
                    await self._carry_out(expert)

    async def _whenever(self, wanted: asyncio.Event, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            try:
                await act()
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("who is primary could not be published: %s", describe(error))
            await asyncio.sleep(0.05)

    async def _look_at_wanted(self) -> None:
        """Have the wanted ones looked at, each by itself: where one takes long, the others do not wait."""
        if uids := self._looks - self._looking:
            self._looks -= uids
            self._looking |= uids
            self._spawn(self._look_at(uids))

    async def _look_at(self, uids: Iterable[str]) -> None:
        try:
            await self.read(uids)
        except (TesseractError, TimeoutError, OSError) as error:
            logger.info("who is primary could not be read: %s", describe(error))
        finally:
            self._looked_at(uids)

    def _looked_at(self, uids: Iterable[str]) -> None:
        self._looking.difference_update(uids)
        if self._looks:
            self._wants_look.set()

    async def read(self, uids: Iterable[str]) -> None:
        """Read who else hosts these, and their records. Raises: TimeoutError if the network does not answer."""
        async with asyncio.timeout(self._call_timeout):
            if self._node.initial_peers and not await self._node.network.wait_joined(self._call_timeout):
                return  # alone for the moment: that nobody is seen says nothing
            wanted = set(uids)
            if len({self._node.trust.shard_key(uid) for uid in wanted}) > MAX_SHARDS_READ:  # the grid says what is new
                for uid, others in (await read_replicas(self._node, wanted)).items():
                    if not self._has_changed(uid, others):
                        wanted.discard(uid)
                        await self._take_in(uid, others, [])
            # each by itself: where one is late, the others are taken in
            await asyncio.gather(*map(self._read_one, wanted))

    async def _read_one(self, uid: str) -> None:
        records: dict[str, list[bytes]] = {uid: []}
        others = (await read_replicas(self._node, [uid], by_shard=True, records=records))[uid]
        await self._take_in(uid, others, records[uid])
        self._looked_at([uid])

    async def _take_in(self, uid: str, others: Iterable[ExpertReplica], records: Iterable[bytes]) -> None:
        """Take what the network holds of one expert."""
        if (expert := self._experts.get(uid)) is None:
            return
        for record in records:
            expert.tenure.sight(record, *self._now())
        self._addresses |= {owner_of(one): one.peer for one in others}
        said = self.places.get(split_uid(uid)[0], {}).get(uid, {})
        hosts = {**said, **{owner_of(one): one.epoch for one in others}}
        expert.tenure.set_hosts(hosts | {self._node.peer_id: expert.tenure.epoch}, *self._now())
        expert.tenure.looked(*self._now())
        if expert.tenure.waits_for_state(*self._now()) and not expert.waited_for:
            expert.waited_for = True
            logger.warning("nobody has a state of %s now: this server waits for one that had it", uid)
        await self._carry_out(expert)

    def _has_changed(self, uid: str, others: Iterable[ExpertReplica]) -> bool:
        if uid not in self._experts:
            return False
        tenure = self._experts[uid].tenure
        return tenure.state not in (State.PRIMARY, State.FOLLOWING) or any(o.epoch != tenure.epoch for o in others)

    async def _publish(self, uid: str, records: Mapping[int, bytes]) -> None:
        """Store records by the numbers of `record_subkey`, with this node's grant. What cannot be stored is logged."""
        key = self._node.trust.shard_key(uid)
        named = [(record_subkey(uid, number), record) for number, record in records.items()]
        grant = self._node.trust.own_grant(split_uid(uid)[0])
        blob, until = self._shown.get(key, (b"", 0.0))
        if grant != blob or self._elapsed() >= until:
            # records outlive manifests: their readers must know that the signer might sign them
            self._shown[key] = grant, self._elapsed() + RECORDS_SECONDS / 2
            named += [(GRANT_SUBKEY, grant)] if grant else []
        try:
            items = [StoreItem(key, record, RECORDS_SECONDS, subkey) for subkey, record in named]
            await self._node.network.store_many(items)  # by one look-up
        except (TesseractError, TimeoutError, OSError) as error:
            logger.warning("records of %s could not be stored: %s", uid, describe(error))

    async def _seal_often(self) -> None:
        """Seal what changed, every `sync_every` of the run; at once what has no Seal yet."""
        while True:
            await asyncio.sleep(0.1)
            for expert in list(self._experts.values()):
                tenure, now = expert.tenure, self._elapsed()
                if not tenure.is_primary(now) or (expert.hosted is None and tenure.held is None):
                    continue
                is_new = tenure.held is None or tenure.term is None or tenure.held.term != tenure.term.digest
                hosted = expert.hosted
                at_once = hosted is not None and isinstance(hosted.backend, FragmentBackend) and self._has_moved(expert)
                if is_new or at_once or now - expert.sealed_at >= self.sync_every(expert.authority):
                    if not is_new and tenure.is_content and not self._has_moved(expert):
                        expert.sealed_at = now  # a Seal would say nothing
                        continue
                    try:
                        await self._seal(expert)
                    except (CheckpointError, OSError) as error:
                        logger.error("%s could not be sealed: %s", expert.uid, describe(error))
                        expert.sealed_at = now

    def sync_every(self, authority: Authority) -> float:
        """Return the seconds between two Seals: the run's, or longer, where the upload rate does not suffice for all
        copies of what this server leads."""
        period, rate = authority.sync_every, self.upload_rate
        if rate is None:
            return period
        led = (one.tenure.held for one in self._experts.values() if one.tenure.state is State.PRIMARY)
        num_bytes = sum(seal.size for seal in led if seal is not None)
        return max(period, num_bytes * authority.run.manifest.num_replicas / (UPLOAD_SHARE * rate))

    @staticmethod
    def _has_moved(expert: _Expert) -> bool:
        return expert.hosted is not None and expert.progress != expert.hosted.backend.progress

    async def _seal(self, expert: _Expert) -> Seal | None:
        """Write the state down, and sign for it."""
        uid, tenure, hosted, held = expert.uid, expert.tenure, expert.hosted, expert.tenure.held
        expert.sealed_at = self._elapsed()
        if hosted is not None and (held is None or self._has_moved(expert) or self.files.find(uid, held.root) is None):
            state = await hosted.snapshot()
            state = with_recent_journal(state, since=self._version_before(expert, int(state["version"])))

            file = await self._server.call_aside(lambda: self.files.keep(uid, encode(state)))
            root, size = file.root, file.size
            version = hosted.shared_version = int(state["version"])
            expert.progress = version, state["num_accumulated"]
        else:
            assert held is not None
            root, size, version = held.root, held.size, held.version
        seal = tenure.seal(root, size, version, *self._now())
        await self._carry_out(expert)
        return seal

    @staticmethod
    def _version_before(expert: _Expert, version: int) -> int:
        """Note this version, and return one that the expert had `RETRY_SECONDS` ago, or before."""
        versions, now = expert.versions, expert.sealed_at
        versions.append((now, version))
        while len(versions) > 1 and versions[1][0] <= now - RETRY_SECONDS:
            versions.popleft()
        return versions[0][1] if versions[0][0] <= now - RETRY_SECONDS else -1

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="server: tenures")
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an expert's tenure: %s", describe(error), exc_info=error)


def _check_file(uid: str, backend: ExpertBackend, file: SealedFile) -> StateDict:
    return check_fitting(uid, backend, file.map())


def _check_records(records: list[bytes], num: int) -> list[bytes]:
    """Check that these are so many records of at most 1 KiB. Raises: ProtocolError."""
    if len(records) != num or any(type(one) is not bytes or len(one) > MAX_RECORD_BYTES for one in records):
        raise ProtocolError("malformed records about who is primary")
    return records
