"""The part of a node that the client uses, and calls for code without a loop."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Protocol, TypeVar

from tesseract_async.endpoint.call_table import Message
from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.experts.directory import ExpertDirectory
from tesseract_async.experts.progress import Thanks
from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.transport.base import PeerAddress
from tesseract_async.uncopied import Uncopied

T = TypeVar("T")


class Node(Protocol):
    """The part of a `TesseractNode` that the client talks to."""

    client_state: object
    """The client's knowledge of this node's peers (`client.experience`); None at first."""

    @property
    def directory(self) -> ExpertDirectory: ...

    @property
    def metrics(self) -> Metrics: ...

    @property
    def thanks(self) -> Thanks: ...

    def path(self, peer: PeerAddress) -> tuple[float, float] | None:
        """Round trip (seconds) and bytes per second (0.0: not known) of the path to `peer`; None without one."""

    def check_running(self) -> None: ...

    def distrust(self, peer_id: PeerID, reason: str) -> None:
        """Stop believing that peer, and stop asking it."""

    def at_close(self, aclose: Callable[[], Coroutine[object, object, None]]) -> None:
        """Awaits ``aclose()`` when the node closes."""

    async def call_expert(
        self,
        peer: PeerAddress,
        method: str,
        body: object = None,
        buffers: Sequence[memoryview] = (),
        *,
        timeout: float,
        idempotent: bool = False,
        priority: int = 0,
    ) -> Message: ...

    def apply_experts(
        self,
        peer: PeerAddress,
        uids: Sequence[str],
        body: object,
        buffers: Sequence[memoryview],
        *,
        timeout: float,
        priority: int = 0,
    ) -> AsyncGenerator[Message, None]:
        """The parts of the reply to an `expert.apply` that names these experts."""

    def endpoint_towards(self, peer: PeerAddress, method: str, uids: Sequence[str]) -> Endpoint | None:
        """The endpoint for a call about these experts to `peer`; None for this node itself. Raises: PeerUnreachable."""


class PlainCalls(Uncopied, ABC):
    """A node for code without a loop: modules that are given one deliver results instead of awaitables."""

    @property
    @abstractmethod
    def node(self) -> Node:
        """The node that makes the calls."""

    @abstractmethod
    def check(self) -> object:
        """Raises: RuntimeError where `run` would."""

    def check_running(self) -> None:
        """Raises: RuntimeError if no call can be made (from here), before a coroutine is made in vain."""
        self.check()
        self.node.check_running()

    @abstractmethod
    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """The coroutine's result; blocks meanwhile."""

    @abstractmethod
    def wait(self, begin: Callable[[Callable[[], object]], None], cancel: Callable[[], None]) -> None:
        """Call ``begin(done)`` on the node's loop, and block until it has called ``done``."""

    @abstractmethod
    def begin(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run the coroutine on the node's loop, without waiting for it."""


def deliver(given: Node | PlainCalls, coroutine: Coroutine[object, object, T]) -> Coroutine[object, object, T] | T:
    """Return what a module's call gives: the coroutine, to be awaited, or its result where calls are plain."""
    return given.run(coroutine) if isinstance(given, PlainCalls) else coroutine
