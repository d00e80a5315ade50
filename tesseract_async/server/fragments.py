"""Fragments of shared parameters, hosted like experts: their state as a backend, and the calls that they answer.

A `FragmentBackend` has no module that computes: its module holds the fragment's tensors, so that checkpoints,
followers, Seals and transfers take it for any expert. `FragmentCalls` gathers the trainers' pushes and closes the
rounds.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from torch import nn

from tesseract_async.endpoint.budget import FairCount, Owner
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import Overloaded, ProtocolError, RemoteError, TesseractError, describe
from tesseract_async.experts.manifest import split_uid
from tesseract_async.identity import PeerID
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.encoding import apart
from tesseract_async.runtime.states import JOURNAL_LENGTH, StateDict
from tesseract_async.server.answering import ExpertCalls, journal_key, told_of
from tesseract_async.server.checkpoint import check_state
from tesseract_async.server.hosted import UNFIT, HostedState
from tesseract_async.sharing.fragment import KEPT_UPDATES, LAST, NEWCOMERS, ROOT_BYTES, Fragment, Update
from tesseract_async.sharing.layout import MAX_ELEMENTS, MAX_LAYOUT_BYTES, MergeKind, is_finite
from tesseract_async.sharing.manifest import FragmentPart, SharedManifest
from tesseract_async.sharing.rounds import Push, Rounds, judge
from tesseract_async.sharing.samples import (
    GRACE_SECONDS,
    STATE_BYTES,
    Ledger,
    Report,
)
from tesseract_async.sharing.spans import decode_pieces, encode_pieces
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tesseract_async.wire.compression import encoded_bytes
from tesseract_async.wire.names import new_name
from tesseract_async.wire.tensors import TensorSpec

MAX_STEPS: Final = 1024
"""Optimizer steps that a push counts as, at most."""
JOURNALED_VERSIONS: Final = 64
"""Versions whose pushes are remembered. Those whose base is older than 8 versions are not counted anyway."""

MAX_HELD_BYTES: Final = 256 << 20
"""Differences of rounds that are open, of all fragments of a server together."""
MAX_STATE_BYTES: Final = (16 + 8 * KEPT_UPDATES) * MAX_ELEMENTS + 2 * MAX_LAYOUT_BYTES
"""The longest file that a state of a fragment is."""
_SAMPLES_BYTES: Final = 4 + STATE_BYTES

NamedTensors = Mapping[str, torch.Tensor]


class _Tensors(nn.Module):
    """The state of a fragment, as tensors whose shapes follow from the manifest."""

    def __init__(self, part: FragmentPart, fragment: Fragment, steps: int) -> None:
        super().__init__()
        num_bytes = encoded_bytes(part.cut.numel, part.cut.dtype, part.outer.codec_of(part.cut))
        self.register_buffer("anchor", fragment.anchor.clone())
        if fragment.has_momentum:
            self.register_buffer("momentum", fragment.momentum)
        # the update that led to version v lies in row v % 8, its root in row v % 9
        self.register_buffer("updates", torch.zeros(KEPT_UPDATES, num_bytes, dtype=torch.uint8))
        self.register_buffer("roots", torch.zeros(KEPT_UPDATES + 1, ROOT_BYTES, dtype=torch.uint8))
        self.register_buffer("counts", torch.tensor([steps, len(fragment.updates)]))
        self.register_buffer("manifest", _octets(part.data))
        if part.number == 0:
            self.register_buffer("samples", torch.zeros(_SAMPLES_BYTES, dtype=torch.uint8))
        self.put_root(fragment.version - len(fragment.updates), fragment.before)
        for update in fragment.updates:
            self.put(update)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows as they came: only an expert's module is ever run."""
        return x

    def put(self, update: Update) -> None:
        self.get_buffer("updates")[update.version % KEPT_UPDATES] = _octets(update.data)
        self.put_root(update.version, update.root)

    def read_samples(self) -> bytes:
        """Return the state of the samples when the last round closed; nothing in other fragments than the first."""
        return _read_samples(self.get_buffer("samples")) if "samples" in self._buffers else b""

    def put_samples(self, state: bytes) -> None:
        """Write it down, in the first fragment."""
        if "samples" in self._buffers:
            self.samples = _octets((len(state).to_bytes(4, "big") + state).ljust(_SAMPLES_BYTES, b"\0"))

    def put_root(self, version: int, root: bytes) -> None:
        self.get_buffer("roots")[version % (KEPT_UPDATES + 1)] = _octets(root)


def _octets(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _read_samples(tensor: torch.Tensor) -> bytes:
    data = tensor.numpy().tobytes()
    return data[4 : 4 + int.from_bytes(data[:4], "big")]


def read_manifest(tensors: NamedTensors) -> SharedManifest:
    """Return the manifest in the state of fragment 0. Untrusted. Raises: ProtocolError."""
    return SharedManifest.decode(_said(tensors))


def read_part(uid: str, tensors: NamedTensors) -> FragmentPart:
    """Return what the state of a fragment says of it. Untrusted. Raises: ProtocolError."""
    return FragmentPart.read(split_uid(uid)[1][0], _said(tensors))


def _said(tensors: NamedTensors) -> bytes:
    said = tensors.get("manifest")
    if said is None or said.dtype != torch.uint8:
        raise ProtocolError("the state of a fragment that does not say of which model")
    return said.numpy().tobytes()


def read_fragment(part: FragmentPart, tensors: NamedTensors, version: int) -> tuple[Fragment, int]:
    """Return the fragment in the tensors of a state, or in those of `NEWCOMERS`, and the steps that were pushed to it.

    Untrusted. The tensors become the fragment's. Raises: ProtocolError.
    """
    cut, outer = part.cut, part.outer
    num_bytes = encoded_bytes(cut.numel, cut.dtype, outer.codec_of(cut))
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    shapes = {"anchor": (cut.dtype, (cut.numel,)), "counts": (torch.int64, (2,))}
    has_momentum = cut.kind is MergeKind.STEPPED and outer.momentum > 0
    if is_whole := not NEWCOMERS <= tensors.keys() <= NEWCOMERS | {LAST}:
        shapes["updates"] = torch.uint8, (KEPT_UPDATES, num_bytes)
        shapes["roots"] = torch.uint8, (KEPT_UPDATES + 1, ROOT_BYTES)
        if part.number == 0:
            shapes["samples"] = torch.uint8, (_SAMPLES_BYTES,)
    elif has_momentum:
        shapes[LAST] = torch.uint8, (num_bytes,)
    for name, wanted in shapes.items():
        found = tensors.get(name)
        if found is None or (found.dtype, tuple(found.shape)) != wanted:
            raise ProtocolError(f"the state of a fragment has another {name}")
    steps, num_updates = tensors["counts"].tolist()
    if _said(tensors) != part.data:
        raise ProtocolError("a fragment of another model")
    if part.number == 0 and is_whole:
        Ledger(_read_samples(tensors["samples"]))
    if not 0 <= num_updates <= min(KEPT_UPDATES, version) or not 0 <= steps < 2**62:
        raise ProtocolError("the state of a fragment has other counts")
    if not is_whole:
        fragment = Fragment(cut, outer, tensors["anchor"], version=version)
        if has_momentum and num_updates:
            last = Update(version, tensors[LAST].numpy().tobytes(), fragment.root)
            fragment = Fragment(cut, outer, tensors["anchor"], version=version, updates=[last])
            if not is_finite(fragment.merged()):  # no root proves it
                raise ProtocolError("the last update of a fragment is not finite")
        return fragment, steps

    def root(at: int) -> bytes:
        return tensors["roots"][at % (KEPT_UPDATES + 1)].numpy().tobytes()

    updates = [
        Update(at, tensors["updates"][at % KEPT_UPDATES].numpy().tobytes(), root(at))
        for at in range(version - num_updates + 1, version + 1)
    ]
    fragment = Fragment(
        *(cut, outer, tensors["anchor"]),
        version=version,
        momentum=tensors.get("momentum"),
        updates=updates,
        before=root(version - num_updates),
    )
    return fragment, steps


def holds_push(state: StateDict, peer: PeerID, call_id: bytes) -> bool:
    """Return whether a push of this peer has counted in the whole state of a fragment. Untrusted."""
    ids, key = state["applied"].get("ids"), journal_key(peer, call_id)
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.uint8:
        return False
    keys = ids.numpy().tobytes()
    return any(keys[at : at + len(key)] == key for at in range(0, len(keys), len(key)))


class FragmentBackend(ExpertBackend):
    """A fragment that a server hosts. It stays on the CPU, and takes its steps on the runtime's thread."""

    def __init__(self, part: FragmentPart, fragment: Fragment, *, steps: int = 0) -> None:
        """`steps`: of all members, that `fragment` holds."""
        self.part, self.fragment, self.steps = part, fragment, steps
        self._tensors = _Tensors(part, fragment, steps)
        super().__init__(self._tensors, args_schema=(TensorSpec((1,)),), max_batch_size=2)
        self.recent: dict[int, tuple[int, bytes, bytes]] = {}
        """By version: `steps` then, the journal's keys of the pushes that led there, and the state of the samples, as
        other hosts must know."""
        self.num_followed = 0
        """Times that it went on from another host's state."""
        self._take(fragment, steps)

    @classmethod
    def of_file(cls, uid: str, file: bytes | memoryview) -> "FragmentBackend":
        """Return the fragment in the file of a whole state. Untrusted. Raises: ProtocolError."""
        state = check_state(uid, file)
        part, tensors = read_part(uid, state["module"]), {name: one.clone() for name, one in state["module"].items()}
        fragment, steps = read_fragment(part, tensors, state["version"])
        found = cls(part, fragment, steps=steps)
        try:
            found.load_state(state)
        except UNFIT as error:
            raise ProtocolError(f"{uid}: a state that does not fit: {describe(error)}") from None
        return found

    def _take(self, fragment: Fragment, steps: int) -> None:
        self.fragment, self.steps, self.version = fragment, steps, fragment.version

    def to(self, device: torch.device) -> None:
        """Stay where it is: a step is a few sums, and its bits are the same on every CPU."""

    def load_state(self, state: StateDict) -> None:
        """Continue from what `state` returned. Raises: ValueError, RuntimeError or KeyError if it does not fit."""
        super().load_state(state)
        tensors = {name: tensor.clone() for name, tensor in self._tensors.state_dict().items()}
        try:
            self._take(*read_fragment(self.part, tensors, state["version"]))
            self.num_followed += 1
        except ProtocolError as error:
            raise ValueError(str(error)) from error

    @property
    def samples(self) -> bytes:
        """The state of the samples when the last round closed."""
        return self._tensors.read_samples()

    def close_round(self, rounds: Rounds, pushes: Sequence[Push], samples: bytes = b"") -> None:
        fragment = self.fragment
        update = fragment.step(rounds.merge(pushes, fragment))
        steps = self.steps + sum(min(max(1, push.steps), MAX_STEPS) for push in pushes)
        self._stepped(update, steps, b"".join(journal_key(push.peer, push.call_id) for push in pushes), samples)

    def replay(self, updates: Sequence[Update], journal: Sequence[tuple[int, bytes, bytes]]) -> None:
        """Take steps that the primary took, with `recent` of each. Raises: ProtocolError; the rest is not taken."""
        for update, row in zip(updates, journal, strict=True):
            if update.version > self.version:
                self.fragment.replay([update])
                self._stepped(update, *row)
                self.num_followed += 1

    def _stepped(self, update: Update, steps: int, keys: bytes, samples: bytes) -> None:
        fragment, tensors = self.fragment, self._tensors
        self.steps = steps
        tensors.anchor = fragment.anchor
        if fragment.has_momentum:
            assert fragment.momentum is not None
            tensors.momentum = fragment.momentum
        tensors.put(update)
        tensors.counts = torch.tensor([self.steps, len(fragment.updates)])
        tensors.put_samples(samples)
        self.version = fragment.version
        self.recent[self.version] = steps, keys, samples
        self.recent.pop(self.version - KEPT_UPDATES, None)
        for at in range(0, len(keys), 16):
            self.applied[keys[at : at + 16]] = self.version
        oldest = self.version - JOURNALED_VERSIONS
        while len(self.applied) > JOURNAL_LENGTH or (self.applied and next(iter(self.applied.values())) <= oldest):
            self.applied.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A push that is to count."""

    counts: asyncio.Future[None]
    owner: Owner
    num_bytes: int


@dataclass(slots=True)
class _Gathering:
    rounds: Rounds
    num_followed: int = 0
    """The backend's when the round opened: if it goes on from another state since, this round's pushes do not count."""
    waiting: dict[bytes, _Waiting] = field(default_factory=dict)
    """By journal key."""
    timer: asyncio.TimerHandle | None = None
    closing: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Samples:
    """The samples of the trainers, at the primary of the first fragment."""

    ledger: Ledger
    num_followed: int
    """The backend's, then: another one goes on from what another host did meanwhile."""
    session: bytes


class FragmentCalls:
    """Answers ``expert.push``, ``expert.pull`` and ``expert.samples`` for the fragments of one server. Lives on the
    loop."""

    def __init__(self, calls: ExpertCalls, may_share: Callable[[PeerID, str], bool]) -> None:
        """`may_share`: whether this peer may push to the fragment of this uid."""
        self._calls, self._may_share = calls, may_share
        self._gathering: dict[str, _Gathering] = {}
        self._held = FairCount(MAX_HELD_BYTES)
        self._samples: dict[str, _Samples] = {}

    async def samples(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Hand out samples of the dataset, and take note of those that are done. Raises only RemoteErrors."""
        with self._calls.answering(call):
            await self._calls.check_leads(hosted)
            if _backend(hosted).part.number:
                raise RemoteError("samples are handed out with the first fragment")
            request, now = messages.decode(messages.SamplesRequest, call.body), asyncio.get_running_loop().time()
            held, done, returned = map(decode_pieces, (request.held, request.done, request.returned))
            report = Report(request.epoch, request.num_samples, request.wanted, held, done, returned)
            one = self._samples_of(hosted, now)
            try:
                grant = one.ledger.report((call.peer_id, request.trainer), request.turn, report, now)
            except ValueError as error:
                raise RemoteError(str(error)) from None
            pieces, gone = encode_pieces(grant.pieces), encode_pieces(grant.gone)
            reply = messages.SamplesReply(one.session, [*pieces], grant.again, [*gone], grant.first, grant.waits)
            return Message(messages.encode(reply))

    def _samples_of(self, hosted: HostedState, now: float) -> _Samples:
        backend, known = _backend(hosted), self._samples.get(hosted.uid)
        if known is None or known.num_followed != backend.num_followed:
            # where there were rounds before, trainers may hold samples that another primary handed out
            free_at = now + GRACE_SECONDS if backend.version else -math.inf
            ledger = Ledger(backend.samples, free_at=free_at)
            known = self._samples[hosted.uid] = _Samples(ledger, backend.num_followed, new_name())
        return known

    async def pull(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Answer with the updates since a base. Raises only RemoteErrors."""
        with self._calls.answering(call):
            request = messages.decode(messages.PullRequest, call.body)
            if not request.journal:  # hosts ask one that hands the fragment over, too, and check where updates lead
                await self._calls.check_leads(hosted)
                if self._may_share(call.peer_id, hosted.uid):
                    self._gathering_of(hosted).rounds.expect(call.peer_id)
            return _updates(hosted, request, counted=False, journal=request.journal)

    async def push(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Count a push, once, and answer when its round has closed. Raises only RemoteErrors."""
        with self._calls.answering(call):
            await self._calls.check_leads(hosted)
            request = messages.decode(messages.PushRequest, call.body)
            backend, key = _backend(hosted), journal_key(call.peer_id, request.call_id)
            one = self._gathering_of(hosted)
            waiting = one.waiting.get(key)
            if waiting is None and backend.led_to(key, request.call_id) is None:
                if backend.fragment.since(request.version, request.root) is None:
                    return _updates(hosted, request, counted=False)
                if not call.buffers:  # it asks what became of a push
                    return _updates(hosted, request, counted=False)
                if len(call.buffers) != 1:
                    raise ProtocolError("a push holds one difference")
                waiting = self._wait(one, key, call)
                try:
                    await self._add(hosted, one, request, call)
                except BaseException as error:  # cancelled, too: who else waits must hear of it
                    self._end(one, key)
                    # another call of this id may wait, too
                    told = error if isinstance(error, TesseractError) else ProtocolError("given up")
                    waiting.counts.set_exception(told)
                    raise
            if waiting is not None:
                await asyncio.shield(waiting.counts)
            self._calls.check_led(hosted)
            return _updates(hosted, request, counted=True)

    def _gathering_of(self, hosted: HostedState) -> _Gathering:
        one = self._gathering.setdefault(hosted.uid, _Gathering(Rounds(hosted.version, max_steps=MAX_STEPS)))
        if one.closing is None and not one.rounds.is_open:
            one.num_followed = _backend(hosted).num_followed
            if one.rounds.version != hosted.version:
                one.rounds = Rounds(hosted.version, max_steps=MAX_STEPS)  # it goes on from a state from elsewhere
        return one

    def _wait(self, one: _Gathering, key: bytes, call: IncomingCall) -> _Waiting:
        """Take a push in, before it costs anything. Raises: Overloaded."""
        owner, num_bytes = Owner(self._calls.owner(call), call.peer_id), len(call.buffers[0])
        if any(other.owner.peer == owner.peer for other in one.waiting.values()):
            raise Overloaded("one push per round: wait for the answer to the last one", retry_after=1.0)
        if not self._held.take(owner, num_bytes):
            raise Overloaded("this server holds as many differences as it can", retry_after=1.0)
        waiting = one.waiting[key] = _Waiting(asyncio.get_running_loop().create_future(), owner, num_bytes)
        waiting.counts.add_done_callback(lambda future: future.cancelled() or future.exception())
        return waiting

    def _end(self, one: _Gathering, key: bytes) -> asyncio.Future[None]:
        waiting = one.waiting.pop(key)
        self._held.give_back(waiting.owner, waiting.num_bytes)
        return waiting.counts

    async def _add(
        self, hosted: HostedState, one: _Gathering, request: messages.PushRequest, call: IncomingCall
    ) -> None:
        fragment, data = _backend(hosted).fragment, bytes(call.buffers[0])
        measure = partial(judge, call.peer_id, request.call_id, request.steps, data, fragment.cut, fragment.outer)
        try:
            push = await apart(4 * fragment.cut.numel, measure)
        except ValueError as error:
            raise RemoteError(str(error)) from None
        self._gathering_of(hosted).rounds.add(push, request.version, asyncio.get_running_loop().time())
        self._look(hosted, one)

    def _look(self, hosted: HostedState, one: _Gathering) -> None:
        loop = asyncio.get_running_loop()
        closes_at = None if one.closing is not None else one.rounds.closes_at(loop.time())
        if one.timer is not None:
            one.timer.cancel()
            one.timer = None
        if closes_at is None:
            return
        if closes_at > loop.time():
            one.timer = loop.call_at(closes_at, self._look, hosted, one)
            return
        one.closing = loop.create_task(self._close(hosted, one), name="server: closing a round")

    async def _close(self, hosted: HostedState, one: _Gathering) -> None:
        pushes = one.rounds.close()
        # what is merged is held no longer than that takes
        waiting = [self._end(one, journal_key(push.peer, push.call_id)) for push in pushes]
        backend = _backend(hosted)
        try:
            await self._calls.check_leads(hosted)
            found = self._samples.get(hosted.uid)
            is_mine = found is not None and found.num_followed == backend.num_followed
            samples = found.ledger.encode() if found is not None and is_mine else backend.samples

            def close() -> None:
                if backend.num_followed != one.num_followed:
                    raise Overloaded("this piece goes on from another state: push again", retry_after=0.0)
                backend.close_round(one.rounds, pushes, samples)

            await hosted.runtime.call(close)
        except BaseException as error:  # all who wait must hear of it, however it ended
            for future in waiting:
                future.set_exception(told_of(error, messages.PUSH))
            if not isinstance(error, Exception):
                raise
        else:
            for future in waiting:
                future.set_result(None)
        one.closing = None
        self._look(hosted, one)

    def close(self) -> None:
        """Count nothing any more: who waits is told, and asks elsewhere."""
        for one in self._gathering.values():
            if one.timer is not None:
                one.timer.cancel()
            if one.closing is not None:
                one.closing.cancel()
            for waiting in one.waiting.values():
                if not waiting.counts.done():
                    waiting.counts.set_exception(RemoteError("this server has left"))
        self._gathering.clear()
        self._samples.clear()


def _backend(hosted: HostedState) -> FragmentBackend:
    assert isinstance(hosted.backend, FragmentBackend)
    return hosted.backend


def _updates(
    hosted: HostedState,
    base: messages.PushRequest | messages.PullRequest,
    *,
    counted: bool,
    journal: bool = False,
) -> Message:
    backend = _backend(hosted)
    updates = backend.fragment.since(base.version, base.root)
    rows = [backend.recent.get(one.version) for one in updates or ()] if journal else []
    if None in rows:  # taken before this server had the fragment
        updates, rows = None, []
    version = backend.version if not updates else updates[-1].version
    reply = messages.UpdatesReply(
        counted,
        updates is not None,
        hosted.epoch,
        version,
        backend.steps,
        [one.root for one in updates or ()],
        [list(row) for row in rows if row is not None],
    )
    return Message(messages.encode(reply), tuple(memoryview(one.data) for one in updates or ()))


Replay = Callable[[], None]


async def fetch_replay(
    node: TesseractNode,
    uid: str,
    backend: FragmentBackend,
    primary: PeerAddress,
    *,
    up_to: int | None = None,
    timeout: float,
) -> Replay | None:
    """Return what has a fragment follow its primary by its updates, up to this version or the newest, once it is called
    where the fragment is used; it raises ProtocolError for updates that lie. None if the state must be fetched whole.

    Raises: ProtocolError; what the call raises.
    """
    base = backend.fragment
    request = messages.PullRequest(uid, base.version, base.root, True)
    message = await node.call_expert(primary, messages.PULL, messages.encode(request), timeout=timeout, idempotent=True)
    reply = messages.decode(messages.UpdatesReply, message.body)
    if not reply.known:
        return None
    updates = read_updates(request.version, reply, message.buffers)
    journal = [_journal_row(row) for row in reply.journal]
    if len(journal) != len(updates):
        raise ProtocolError("updates without their journal")
    up_to = reply.version if up_to is None else up_to
    num = sum(one.version <= up_to for one in updates)
    return partial(backend.replay, updates[:num], journal[:num]) if base.version + num == up_to else None


def _journal_row(row: object) -> tuple[int, bytes, bytes]:
    if type(row) is not list or len(row) != 3 or type(row[0]) is not int or not 0 <= row[0] < 2**62:
        raise ProtocolError("a malformed journal of a fragment")
    if type(row[1]) is not bytes or len(row[1]) % 16 or type(row[2]) is not bytes or len(row[2]) > STATE_BYTES:
        raise ProtocolError("a malformed journal of a fragment")
    return row[0], row[1], row[2]


def read_updates(base: int, reply: messages.UpdatesReply, buffers: Sequence[memoryview]) -> list[Update]:
    """Return the updates of a reply to a base of that version. Untrusted. Raises: ProtocolError."""
    fits = (
        0 <= reply.steps < 2**62
        and len(reply.roots) == len(buffers) <= KEPT_UPDATES
        and base + len(buffers) == reply.version
    )
    if not fits or any(type(root) is not bytes or len(root) != ROOT_BYTES for root in reply.roots):
        raise ProtocolError("malformed updates of a fragment")
    rows = enumerate(zip(buffers, reply.roots, strict=True), base + 1)
    return [Update(version, bytes(data), root) for version, (data, root) in rows]
