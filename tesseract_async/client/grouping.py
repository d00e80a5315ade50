"""One message per server: the calls of a pass grouped by who is asked, and who is asked next. Pure: no loop, no clock.

`dispatch` decides which experts a pass asks about which rows; `Grouping` decides at which server. All that go to one
server at one moment become one `Request`. It is answered in parts, each about some of its experts. These are settled
then, and a request that is sent elsewhere names only the others. The rows of a call are never split, or merged with
another call's, so that the call's id holds wherever it is sent.

In forward any replica may answer; the next one is asked when one fails, or is slower than it usually is. In backward
the primary answers; where it fails, the expert is looked up anew.
"""

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tesseract_async.client.dispatch import CallsUnderWay, ExpertCall
from tesseract_async.client.latency import BLOCK_SECONDS
from tesseract_async.errors import (
    ConnectionLost,
    ExpertNotFound,
    InputsForgotten,
    NotAllowed,
    NotPrimary,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    RemoteError,
    SchemaMismatch,
    TesseractError,
    UnknownMethod,
)
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire.apply import MAX_EXPERTS

REPLICA_FAULTS: Final = (
    *(PeerUnreachable, ConnectionLost, ProtocolError),
    *(ExpertNotFound, UnknownMethod, TimeoutError),
)
"""Errors that say something about a replica, not about the request: it is masked until its next sign of life."""
MAX_LOOKUPS: Final = 5
"""An expert is looked up anew at most this many times."""
GONE_SECONDS: Final = 0.8
"""An expert is gone, and no longer looked up, once none of its servers has said anything about it for this long. A
server that stood still for a moment is back by then."""


def may_pass(error: BaseException) -> bool:
    """Return whether the same call may succeed elsewhere or later; not if the expert itself refused it."""
    return isinstance(error, REPLICA_FAULTS) or (isinstance(error, RemoteError) and error.retryable)


@dataclass(slots=True, eq=False)
class Request:
    asked: dict[ExpertCall, ExpertReplica]
    """Its calls, each with the replica that is asked."""
    sent: float
    open: dict[ExpertCall, ExpertReplica] = field(init=False)
    """The calls that are not settled and have not failed here."""
    hedge_at: float = math.inf
    """The time at which others are asked what is still open."""

    def __post_init__(self) -> None:
        self.open = dict(self.asked)

    @property
    def peer(self) -> PeerAddress:
        return next(iter(self.asked.values())).peer


class Instructions(NamedTuple):
    send: Sequence[Request]
    cancel: Sequence[Request]
    """The requests to cancel: nothing in them is open any more."""
    look_up: Sequence[ExpertCall]
    """The calls to look up: tell `Grouping.found` who hosts them now."""
    strange: Sequence[tuple[ExpertReplica, SchemaMismatch]]
    """Replicas that refused what another one of the same expert answered, and how."""


@dataclass(slots=True, eq=False)
class _Search:
    known: Sequence[ExpertReplica] = ()
    left: list[ExpertReplica] = field(default_factory=list)
    """The replicas to ask next."""
    requests: list[Request] = field(default_factory=list)
    """The requests in which it is open."""
    strange: list[tuple[ExpertReplica, SchemaMismatch]] = field(default_factory=list)
    """Replicas that refused the call because they take something else."""
    num_lookups: int = 0
    look_up_at: float = -math.inf
    gone_at: float = math.inf
    """The time at which it is gone, while all servers keep silent."""
    is_silent: bool = False
    """The last one asked did not even say when to ask again."""
    is_redirected: bool = False
    is_forgotten: bool = False


class Grouping:
    """The messages of one pass. `step` says what to do; tell it what came of that."""

    def __init__(
        self,
        calls: CallsUnderWay,
        *,
        rank: Callable[[ExpertCall, Sequence[ExpertReplica] | None, float], Sequence[ExpertReplica]],
        key: Callable[[ExpertCall, ExpertReplica], Hashable],
        hedge_after: Callable[[ExpertReplica], float],
        is_strict: bool = False,
    ) -> None:
        """`calls`: which are to be made. `rank(call, found, now)`: the replicas that may answer, in the order in which
        to ask them, of those just found, or (None) of those known; it may raise a TesseractError. `key`: calls whose
        keys are equal may travel in one message. `hedge_after`: seconds after which another replica is asked, too.
        With `is_strict`, experts are looked up anew in forward, too."""
        self.calls = calls
        self._rank, self._key, self._hedge_after = rank, key, hedge_after
        self._takes_any = calls.direction == "forward"
        self._looks_up = is_strict or not self._takes_any
        self._searches: dict[ExpertCall, _Search] = {}
        self._due: dict[ExpertCall, None] = {}
        """Calls to be sent to their next replica."""
        self._pausing: dict[ExpertCall, float] = {}
        """The times at which these are to be looked up."""
        self._open: dict[Request, None] = {}
        self._cancel: list[Request] = []
        self._strange: list[tuple[ExpertReplica, SchemaMismatch]] = []

    def rivals(self, request: Request) -> list[ExpertReplica]:
        """Return the replicas asked in a backward, and others that say that they are the primary of such an expert."""
        if self._takes_any:
            return []
        peer, known = request.peer, [one for call in request.open for one in self._searches[call].known]
        others = [one for one in known if one.primary and one.peer is not peer and one.peer != peer]
        return [*request.open.values(), *others] if others else []

    def timer_at(self) -> float:
        """Return when to ask `step` next if nothing happens before. Each event may change it."""
        hedge_at = min((request.hedge_at for request in self._open), default=math.inf)
        return min(self.calls.timer_at(), hedge_at, min(self._pausing.values(), default=math.inf))

    def step(self, now: float, *, stalled: float = 0.0) -> Instructions:
        """Decide, after any event or when the timer is due. `stalled`: see `CallsUnderWay.calls_to_send`."""
        send: list[Request] = []
        strange, self._strange = self._strange, []
        while True:
            for call in self.calls.calls_to_send(now, stalled=stalled):
                search = self._searches[call] = _Search()
                self._take(call, search, None, now)
            if self.calls.is_over:
                return Instructions((), (), (), strange)
            for request in self._open:
                if now >= request.hedge_at:
                    request.hedge_at = math.inf
                    self._due |= dict.fromkeys(call for call in request.open if self._searches[call].left)
            if not self._due:
                break
            send += self._group(now)
        look_up = [call for call, at in self._pausing.items() if at <= now]
        for call in look_up:
            del self._pausing[call]
        cancel, self._cancel = self._cancel, []
        return Instructions(send, cancel, look_up, strange)

    def part(
        self,
        request: Request,
        settled: Collection[ExpertCall],
        errors: Mapping[ExpertCall, BaseException],
        now: float,
    ) -> bool:
        """Take in a part: one sum over the answers of `settled`. The calls in `errors` failed.

        Returns whether the sum counts. It does not if it holds an answer that has meanwhile come from elsewhere, or one
        that must not count (it is in `errors`, too); the other calls are then asked again.
        """
        counts = all([call in request.open and call not in errors for call in settled])
        for call in settled:
            if call in errors or (replica := request.open.pop(call, None)) is None:
                continue
            search = self._searches[call]
            search.requests.remove(request)
            if counts:
                self._give_up(call, search)
                self._strange += search.strange
            else:
                search.left.insert(0, replica)
                self._due[call] = None
        if counts and settled:
            self.calls.answered([*settled], now)
        for call, error in errors.items():
            if (replica := request.open.pop(call, None)) is not None:
                self._failed(call, request, replica, error, now)
        return counts

    def ended(self, request: Request, error: BaseException | None, now: float) -> None:
        self._open.pop(request, None)
        for call, replica in request.open.items():
            silent = error or ProtocolError(f"the reply ended without a word about {call.uid}")
            self._failed(call, request, replica, silent, now)
        request.open.clear()

    def gone_at(self, call: ExpertCall) -> float:
        """Return until when a look-up of this call is worth waiting for."""
        return search.gone_at if (search := self._searches.get(call)) is not None else -math.inf

    def found(self, call: ExpertCall, replicas: Sequence[ExpertReplica], now: float) -> None:
        """Take in the replicas of a call that was looked up; none if the look-up failed, too."""
        if (search := self._searches.get(call)) is not None:
            search.num_lookups = search.num_lookups + 1 if replicas else MAX_LOOKUPS
            self._take(call, search, replicas, now)

    def _take(self, call: ExpertCall, search: _Search, found: Sequence[ExpertReplica] | None, now: float) -> None:
        try:
            search.known = self._rank(call, found, now)
        except TesseractError as error:
            search.known, search.is_silent, call.error = (), False, call.error or error
        search.left = [*search.known]
        if search.strange:
            strange = [replica.peer for replica, _ in search.strange]
            search.left = [replica for replica in search.known if replica.peer not in strange]
        if not self._takes_any:
            del search.left[1:]
        self._due[call] = None

    def _group(self, now: float) -> list[Request]:
        due, self._due = self._due, {}
        # of each group the messages: an expert that is asked about other rows, too, is in another one
        groups: dict[Hashable, list[dict[int, tuple[ExpertCall, ExpertReplica]]]] = {}
        for call in due:
            if (search := self._searches.get(call)) is None:
                continue
            if search.left:
                replica = search.left.pop(0)
                messages = groups.setdefault(self._key(call, replica), [{}])
                message = messages[0]
                if call.expert in message and not (message := next((x for x in messages if call.expert not in x), {})):
                    messages.append(message)
                message[call.expert] = call, replica
            elif not search.requests and call not in self._pausing:
                self._exhausted(call, search, now)
        requests = []
        for message in itertools.chain.from_iterable(groups.values()):
            asked = [*message.values()]
            for start in range(0, len(asked), MAX_EXPERTS):
                request = Request(dict(asked[start : start + MAX_EXPERTS]), now)
                requests.append(request)
                self._open[request] = None
                for call, replica in request.asked.items():
                    search = self._searches[call]
                    search.requests.append(request)
                    if search.left and self._takes_any:
                        after = now + self._hedge_after(replica)
                        request.hedge_at = after if request.hedge_at == math.inf else max(after, request.hedge_at)
        return requests

    def _exhausted(self, call: ExpertCall, search: _Search, now: float) -> None:
        if not search.is_silent:
            search.gone_at = math.inf
        elif search.gone_at == math.inf:
            search.gone_at = now + GONE_SECONDS
        pause = BLOCK_SECONDS * 2**search.num_lookups if search.num_lookups else 0.0
        look_up_at = max(now + pause, search.look_up_at)
        may_come = look_up_at < search.gone_at and search.look_up_at < self.calls.deadline
        if self._looks_up and search.num_lookups < MAX_LOOKUPS and may_come:
            self._pausing[call] = look_up_at
        else:
            self._fail(call, search, now)

    def _failed(
        self, call: ExpertCall, request: Request, replica: ExpertReplica, error: BaseException, now: float
    ) -> None:
        search = self._searches[call]
        search.requests.remove(request)
        search.is_silent = True
        call.error = call.error or error
        self._due[call] = None
        if isinstance(error, SchemaMismatch):
            search.strange.append((replica, error))
        elif isinstance(error, InputsForgotten) and not search.is_forgotten:
            search.is_forgotten = True
            search.left.insert(0, replica)
        elif not may_pass(error) and not (isinstance(error, NotAllowed) and not self._takes_any):
            self._fail(call, search, now)
        elif isinstance(error, Overloaded | NotPrimary):
            named = [one for one in search.known if isinstance(error, NotPrimary) and one.peer.peer_id == error.primary]
            if named and named[0] is not replica and not search.is_redirected:
                # only if the directory knows it, so that a server that lies can't send anybody to strangers
                search.is_redirected = True
                search.left = named
            else:
                search.is_redirected, search.is_silent = False, False
                search.look_up_at = now + max(error.retry_after, BLOCK_SECONDS)

    def _fail(self, call: ExpertCall, search: _Search, now: float) -> None:
        self._give_up(call, search)
        self.calls.failed(call, now, call.error or ExpertNotFound(f"no live server hosts the expert {call.uid}"))

    def _give_up(self, call: ExpertCall, search: _Search) -> None:
        """End this call, and take it out of the other messages that still carry it."""
        del self._searches[call]
        for request in search.requests:
            del request.open[call]
            if not request.open:
                del self._open[request]
                self._cancel.append(request)
