"""The calls about experts that a node makes, and those that it answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence

from tesseract_async.admission import Action, Policy
from tesseract_async.endpoint.call_table import Answer, CallHandler, CallTable, IncomingCall, Message, in_one
from tesseract_async.endpoint.endpoint import Endpoint, check_priority
from tesseract_async.errors import NotAllowed, Overloaded, PeerUnreachable, RemoteError, UnknownMethod, describe
from tesseract_async.experts.grants import Role
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.trust import Trust
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.transport.base import PeerAddress
from tesseract_async.uncopied import Uncopied
from tesseract_async.wire.apply import APPLY
from tesseract_async.wire.frames import Buffer
from tesseract_async.wire.messages import (
    BACKWARD,
    FORWARD,
    INFO,
    LOCKSTEP,
    NO_POINT,
    NO_ROOT,
    PULL,
    PUSH,
    RESTORE,
    SAMPLES,
    STATE,
    TAKE_OVER,
    TENURE,
    uid_of,
)
from tesseract_async.wire.packed import Value

logger = logging.getLogger(__name__)

NOT_STARTED = "the node has no address or endpoint before it is started: use `async with TesseractNode(...)`"

# a primary that hands its expert over acts as a server: it need not be among those who train
EXPERT_METHODS: dict[str, Action] = {
    INFO: "call",
    FORWARD: "call",
    BACKWARD: "train",
    STATE: "call",
    RESTORE: "host",
    TAKE_OVER: "host",
    TENURE: "host",
    PUSH: "train",
    PULL: "call",
    SAMPLES: "train",
    LOCKSTEP: "train",
}
# what each takes in a run; to be a member is enough for the others
_ROLES: dict[str, Role] = {
    BACKWARD: "train",
    LOCKSTEP: "train",
    STATE: "host",
    TAKE_OVER: "host",
    TENURE: "host",
    PUSH: "share",
    SAMPLES: "share",
    RESTORE: "host",
}


class NodeCalls(Uncopied):
    """The part of `TesseractNode` that calls experts and answers for those that it hosts. Calls to this node itself go
    straight to their handlers."""

    def __init__(self, identity: Identity, policy: Policy) -> None:
        self.identity = identity
        self.policy = policy
        self.metrics = Metrics()
        self.trust = Trust(identity.peer_id, policy)
        """The peers that this node believes about experts, and the runs that it takes part in (`join_run`)."""
        self._table = CallTable(identity.peer_id.short, uid_methods=EXPERT_METHODS, check=self._check_caller)
        self._table.add(APPLY, self._apply)
        self._apply_handlers: list[CallHandler] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._endpoint: Endpoint | None = None
        self._closed = False

    @property
    def peer_id(self) -> PeerID:
        """The id that follows from this node's key."""
        return self.identity.peer_id

    @property
    def endpoint(self) -> Endpoint:
        """The TCP side. Raises: RuntimeError before `start`."""
        if self._endpoint is None:
            raise RuntimeError(NOT_STARTED)
        return self._endpoint

    @property
    def is_running(self) -> bool:
        """True from `start` to `aclose`."""
        return self._endpoint is not None and not self._closed

    def check_running(self) -> None:
        """Raises: RuntimeError, with a sentence, unless the node is started and not closed."""
        if self._closed:
            raise RuntimeError(
                "this node is closed: its experts and gates, and the losses made with them, can be used inside its "
                "`async with` only"
            )
        if self._endpoint is None:
            raise RuntimeError("this node is not started: use `async with TesseractNode(...)`, or await node.start()")

    def _check_loop(self) -> None:
        """Raises: RuntimeError on another event loop than the node's."""
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "this node runs on another event loop than this call: await it there (for instance by "
                "asyncio.run_coroutine_threadsafe), or give each loop a node of its own"
            )

    def path(self, peer: PeerAddress) -> tuple[float, float] | None:
        """Return round trip (seconds) and bytes per second (0.0: not known yet) of the connection that a call to `peer`
        would take; None if there is none, or nothing was measured. To this node itself it takes no time."""
        if peer.peer_id == self.identity.peer_id:
            return 0.0, 0.0
        connection = None if self._endpoint is None else self._endpoint.pool.find(peer)
        if connection is None or connection.protocol.life.rtt is None:
            return None
        return connection.protocol.life.rtt, connection.protocol.windows.bytes_per_second

    def host_expert(self, uid: str, handlers: Mapping[str, CallHandler]) -> None:
        """Answer ``expert.*`` calls for `uid`, from the network or from this node, by their method's handler.

        `handlers` is read at each call. Raises: ValueError if this node hosts the uid already or the uid is malformed.
        """
        split_uid(uid)
        self._table.host(uid, handlers)

    def unhost_expert(self, uid: str) -> None:
        """End `host_expert`; later calls are answered with ExpertNotFound."""
        self._table.unhost(uid)

    def host_together(self, handler: CallHandler) -> Callable[[], None]:
        """Answer ``expert.apply``, which is for many of this node's experts, by `handler`: it asks `find_experts` for
        them. Of several handlers, which all do the same, the first one answers. Returns a function that ends this."""
        self._apply_handlers.append(handler)
        return lambda: self._apply_handlers.remove(handler)

    def find_experts(self, call: IncomingCall, uids: Sequence[str]) -> list[CallHandler | RemoteError]:
        """Return, for each of these experts, the handler for ``expert.apply`` that `host_expert` was given, or the
        error that refuses it: ExpertNotFound, NotAllowed, UnknownMethod, Overloaded.

        `call` says who asks the experts, and how: by ``expert.forward`` or ``expert.backward``. Each expert counts as a
        call in the caller's quota.
        """
        quotas, now = self.endpoint.quotas, asyncio.get_running_loop().time()
        counts_calls, has_runs = quotas.counts_calls(call.peer_id), self.trust.has_runs
        is_checked, num_unchecked = False, 0
        found: list[CallHandler | RemoteError] = []
        for uid in uids:
            try:
                handler = self._table.find_for(call, uid, APPLY, is_checked=is_checked)
                num_unchecked += is_checked
                is_checked = not has_runs  # then a caller may do the same with all experts
                if counts_calls and (wait := quotas.add(call.peer_id, now)):
                    raise Overloaded("this peer has used up its quota here", retry_after=wait)
                found.append(handler)
            except RemoteError as error:
                found.append(error)
        if num_unchecked:  # the check counts the others
            self.metrics.count("expert_calls_answered", num_unchecked, method=call.method)
        return found

    def _apply(self, call: IncomingCall) -> Answer:
        if not self._apply_handlers:
            raise UnknownMethod(f"node {self.peer_id.short} hosts no experts")
        return self._apply_handlers[0](call)

    def call_expert(
        self,
        peer: PeerAddress,
        method: str,
        body: object = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout: float,
        idempotent: bool = False,
        priority: int = 0,
    ) -> Coroutine[object, object, Message]:
        """Call an expert as `Endpoint.call` does; a call to this node itself goes straight to its handler. Await it.

        It ends in a reply, a RemoteError, or TimeoutError after `timeout` seconds; cancelling cancels the work.
        Nothing is sent to a peer that may not host the expert that `body` begins with, by this node's policy and the
        run that it takes part in: that raises PeerUnreachable, before anything is awaited.
        Raises: RuntimeError on another event loop than the node's.
        """
        uid = uid_of(body)
        endpoint = self.endpoint_towards(peer, method, () if uid is None else (uid,))
        if endpoint is None:
            return self._call_own(method, body, buffers, timeout, priority)
        return endpoint.call(peer, method, body, buffers, timeout=timeout, idempotent=idempotent, priority=priority)

    async def _call_own(
        self, method: str, body: object, buffers: Sequence[Buffer], timeout: float, priority: int
    ) -> Message:
        call = self._own_call(method, body, buffers, timeout, priority)
        async with asyncio.timeout(timeout):
            with _as_by_the_network(method):
                return _copy(await in_one(self._table.find(call)(call), method))

    def apply_experts(
        self,
        peer: PeerAddress,
        uids: Sequence[str],
        body: object,
        buffers: Sequence[Buffer],
        *,
        timeout: float,
        priority: int = 0,
    ) -> AsyncGenerator[Message, None]:
        """Send an ``expert.apply`` about the experts `uids`, and yield the parts of the reply; see `call_expert` and
        `Endpoint.call_parts`."""
        endpoint = self.endpoint_towards(peer, APPLY, uids)
        if endpoint is None:
            return self._apply_own(self._own_call(APPLY, body, buffers, timeout, priority))
        return endpoint.call_parts(peer, APPLY, body, buffers, timeout=timeout, idempotent=True, priority=priority)

    async def _apply_own(self, call: IncomingCall) -> AsyncGenerator[Message, None]:
        call.in_parts = True
        with _as_by_the_network(call.method):
            answer = self._table.find(call)(call)
            if not isinstance(answer, AsyncGenerator):
                yield _copy(await answer)
                return
            async with contextlib.aclosing(answer) as parts:
                async for part in parts:
                    yield _copy(part)

    def endpoint_towards(self, peer: PeerAddress, method: str, uids: Sequence[str]) -> Endpoint | None:
        """Return the endpoint for a call about these experts to `peer`; None for this node itself.

        Raises: PeerUnreachable for a peer that may not host one of them; RuntimeError on another event loop.
        """
        endpoint = self._endpoint or self.endpoint  # which says what is missing
        if asyncio.get_running_loop() is not self._loop:
            self._check_loop()
        self.metrics.count("expert_calls", method=method)
        # outside of runs, a peer may host all experts or none
        for uid in uids if len(uids) > 1 and self.trust.has_runs else uids[:1]:
            if not self.trust.may_host(peer.peer_id, uid):
                self.metrics.count("expert_calls_held_back", method=method)
                refusal = NotAllowed(f"it may not host {uid}: nothing is sent there")
                raise PeerUnreachable(peer.short, {"policy": refusal})
        return None if peer.peer_id == self.identity.peer_id else endpoint

    def _own_call(
        self, method: str, body: object, buffers: Sequence[Buffer], timeout: float, priority: int
    ) -> IncomingCall:
        """Call this node itself, with copies, as the network would make: neither side may see the other's later
        changes."""
        check_priority(priority)  # as the endpoint does
        return IncomingCall(
            peer_id=self.peer_id,
            method=method,
            body=body,
            buffers=tuple(memoryview(bytearray(buffer)) for buffer in buffers),
            deadline=asyncio.get_running_loop().time() + timeout,
            priority=priority,
        )

    def _check_caller(self, call: IncomingCall, uid: str) -> None:
        """Raises: NotAllowed for a caller without the method's role in the run of `uid`, or its action's permission."""
        action = EXPERT_METHODS[call.method]
        if call.peer_id != self.identity.peer_id and not self.trust.policy.allows(call.peer_id, action):
            # asked by its method alone, unless the call is for many
            self.metrics.count("endpoint_calls_refused", action=action)
            raise NotAllowed(f"{self.peer_id.short} does not let {call.peer_id.short} {action}: ask its owner")
        role = _ROLES.get(call.method)
        if role is not None and _is_for_members(call.method, call.body):
            role = None
        if not self.trust.may_ask(call.peer_id, role, uid):
            self.metrics.count("endpoint_calls_refused", action=role or "call")
            needed = "is no member of" if role is None else f"may not {role} in"
            raise NotAllowed(
                f"{call.peer_id.short} {needed} the run of {uid}: its owner grants that (tesseract run grant)"
            )
        self.metrics.count("expert_calls_answered", method=call.method)


def _is_for_members(method: str, body: Value) -> bool:
    """Return whether it asks for something that every member may have: weights, what a primary signed, or the signed
    file."""
    if method == STATE:
        is_sealed = body[3:4] != [NO_ROOT] and body[5:6] in ([], [NO_POINT])
        return body[1:2] == [True] or is_sealed
    return method == TENURE and body[1:2] == ["probe"]


@contextlib.contextmanager
def _as_by_the_network(method: str) -> Iterator[None]:
    """Turn any error of a handler into the one that would arrive from a peer."""
    try:
        yield
    except (RemoteError, TimeoutError):
        raise
    except Exception as error:  # a handler may raise anything
        logger.exception("the handler of %s failed", method)
        raise RemoteError(describe(error)) from error


def _copy(reply: Message) -> Message:
    return Message(reply.body, tuple(memoryview(bytearray(buffer)) for buffer in reply.buffers))
