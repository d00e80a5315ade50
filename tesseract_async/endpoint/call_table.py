"""The handlers of a node's calls: by method, or by method and the uid that the call's body begins with. No I/O."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tesseract_async.admission import Action
from tesseract_async.errors import ExpertNotFound, RemoteError, UnknownMethod
from tesseract_async.identity import PeerID
from tesseract_async.wire.heads import MAX_METHOD_LENGTH
from tesseract_async.wire.messages import uid_of
from tesseract_async.wire.packed import Value


class Message(NamedTuple):  # two are made for every call: a frozen dataclass takes twice the time
    """The content of a request or a reply."""

    body: Value = None
    """Any value that msgpack can hold."""
    buffers: tuple[memoryview, ...] = ()
    """Raw bytes. When received: 64-byte aligned, writable, owned by the receiver."""


class LastPart(Message):
    """A part of a reply after which no other comes: it ends the reply, which takes an empty message otherwise."""

    __slots__ = ()


@dataclass(slots=True)
class IncomingCall:
    """A call that a peer made here."""

    peer_id: PeerID
    method: str
    body: Value
    buffers: tuple[memoryview, ...]
    deadline: float
    """The time, on this loop's clock, at which the caller stops waiting."""
    priority: int
    origin: str = ""
    """The remote host as this end sees it, without the port; empty for a node's calls to itself."""
    in_parts: bool = False
    """True if the caller takes a reply in parts: the handler may be an async generator then."""


Answer = Awaitable[Message] | AsyncGenerator[Message, None]
"""The result of calling a handler: an awaitable message, or the parts of one."""
CallHandler = Callable[[IncomingCall], Answer]


def in_one(answer: Answer, method: str) -> Awaitable[Message]:
    """The answer to a caller that takes no parts. Raises: RemoteError for one in parts."""
    if isinstance(answer, AsyncGenerator):
        raise RemoteError(f"{method} replies in parts, which its caller does not take")
    return answer


class CallTable:
    """`name` is the node in errors. `uid_methods` go to the handlers of the uid in their body, and take these actions.

    `check` is asked before a handler of a uid is called, and raises to refuse.
    """

    def __init__(
        self,
        name: str,
        *,
        uid_methods: Mapping[str, Action] | None = None,
        check: Callable[[IncomingCall, str], None] = lambda call, uid: None,
    ) -> None:
        self._name = name
        self.actions: dict[str, Action] = dict(uid_methods or {})
        """The action that a caller of each method takes."""
        self._check = check
        self._by_method: dict[str, CallHandler] = {}
        self._by_uid: dict[str, Mapping[str, CallHandler]] = {}

    @property
    def uids(self) -> Collection[str]:
        return self._by_uid.keys()

    def add(self, method: str, handler: CallHandler, *, action: Action = "call") -> None:
        """Answer calls of `method`, whatever their body. Raises: ValueError if the method is taken, or too long."""
        if not 0 < len(method) <= MAX_METHOD_LENGTH:
            raise ValueError(f"a method's name has 1 to {MAX_METHOD_LENGTH} characters")
        if method in self.actions:
            raise ValueError(f"{method} has a handler already")
        self.actions[method] = action
        self._by_method[method] = handler

    def remove(self, method: str) -> None:
        if self._by_method.pop(method, None) is not None:
            del self.actions[method]

    def host(self, uid: str, handlers: Mapping[str, CallHandler]) -> None:
        """Answer calls for `uid` by their method. `handlers` is read at each call: it may change meanwhile.

        Raises: ValueError if the uid is taken.
        """
        if uid in self._by_uid:
            raise ValueError(f"this node hosts {uid} already")
        self._by_uid[uid] = handlers

    def unhost(self, uid: str) -> None:
        self._by_uid.pop(uid, None)

    def find(self, call: IncomingCall) -> CallHandler:
        """The handler of this call. Raises: UnknownMethod, ExpertNotFound, or what `check` raises."""
        method = call.method
        if (handler := self._by_method.get(method)) is not None:
            return handler
        if method not in self.actions:
            raise UnknownMethod(f"no such method at {self._name}: {method}")
        return self.find_for(call, uid_of(call.body), method)

    def find_for(self, call: IncomingCall, uid: str | None, method: str, *, is_checked: bool = False) -> CallHandler:
        """Return the handler that a uid has for `method`, if a call like this one may reach it; `is_checked` says that
        it may. Raises: as `find`."""
        handlers = None if uid is None else self._by_uid.get(uid)
        if uid is None or handlers is None:
            raise ExpertNotFound(f"node {self._name} does not host the expert {str(uid)[:80]}")
        if not is_checked:
            self._check(call, uid)
        if (handler := handlers.get(method)) is None:
            raise UnknownMethod(f"the expert {uid} at {self._name} does not answer {method}")
        return handler
