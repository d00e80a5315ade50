"""Answers the calls for fragments of shared parameters: trainers' pushes, which are gathered into rounds, updates, and
samples."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tesseract_async.endpoint.budget import FairCount, Owner
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import Overloaded, ProtocolError, RemoteError, TesseractError
from tesseract_async.identity import PeerID
from tesseract_async.runtime.encoding import apart
from tesseract_async.server.answering import ExpertCalls, journal_key, told_of
from tesseract_async.server.fragments import MAX_STEPS, FragmentBackend
from tesseract_async.server.hosted import HostedState
from tesseract_async.sharing.rounds import Rounds, judge
from tesseract_async.sharing.samples import (
    GRACE_SECONDS,
    Ledger,
    Report,
)
from tesseract_async.sharing.spans import decode_pieces, encode_pieces
from tesseract_async.wire import messages
from tesseract_async.wire.names import new_name

MAX_HELD_BYTES: Final = 256 << 20
"""The most bytes of differences in open rounds, of all fragments of a server together."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A push that waits to be counted."""

    counts: asyncio.Future[None]
    owner: Owner
    num_bytes: int


@dataclass(slots=True)
class _Gathering:
    rounds: Rounds
    num_followed: int = 0
    """The backend's `num_followed` when the round opened: if it has gone on from another state since, this round's
    pushes do not count."""
    waiting: dict[bytes, _Waiting] = field(default_factory=dict)
    """The waiting pushes, by journal key."""
    timer: asyncio.TimerHandle | None = None
    closing: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Samples:
    """The samples of the trainers, at the primary of the first fragment."""

    ledger: Ledger
    num_followed: int
    """The backend's `num_followed` then: another number means that it went on from what another host did meanwhile."""
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
            await self._calls.check_primary(hosted)
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
                await self._calls.check_primary(hosted)
                if self._may_share(call.peer_id, hosted.uid):
                    self._gathering_of(hosted).rounds.expect(call.peer_id)
            return _updates(hosted, request, counted=False, journal=request.journal)

    async def push(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Count a push, once, and answer when its round has closed. Raises only RemoteErrors."""
        with self._calls.answering(call):
            await self._calls.check_primary(hosted)
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
            self._calls.check_may_step(hosted)
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
            await self._calls.check_primary(hosted)
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
        """Count no more pushes. Trainers that wait are told, and ask elsewhere."""
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
