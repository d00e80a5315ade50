"""The client's view of a node: one way to call and one directory to ask."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.transport.base import PeerAddress
from tesseract_async.uncopied import Uncopied

T = TypeVar("T")


class CallReply(Protocol):
    """The answer to a call."""

    @property
    def body(self) -> object:
        """Any value that msgpack can hold."""

    @property
    def buffers(self) -> Sequence[memoryview]:
        """Writable, owned by the receiver."""


class LiveView(Protocol):
    """The live experts of one grid at one moment. A view never changes."""

    @property
    def coords(self) -> npt.NDArray[np.int64]:
        """``[num_live, dims]``, ascending."""

    @property
    def replicas(self) -> Mapping[tuple[int, ...], Sequence[ExpertReplica]]:
        """Coordinates to the replicas there, the primary first."""


class Directory(Protocol):
    """Where experts are found. It answers from memory where it can."""

    async def find(self, uid: str, *, even_failed: bool = False) -> Sequence[ExpertReplica]:
        """The live replicas; with `even_failed`, those that failed if there are no others."""

    def known(self, uid: str) -> Sequence[ExpertReplica]:
        """The replicas that `find` knows from memory; empty where it would ask."""

    def watch(self, prefix: str, grid_size: tuple[int, ...]) -> None: ...
    async def wait_warm(self, prefix: str) -> None: ...
    @property
    def trouble(self) -> str | None:
        """A sentence on why nothing can be read, where no node of the network answers."""

    async def wait_read(self, prefix: str) -> None: ...
    def live(self, prefix: str, grid_size: tuple[int, ...]) -> LiveView | None:
        """The view of one watched size; None while nothing was read."""

    def report_failure(self, replica: ExpertReplica, *, reason: str = "silent") -> None: ...
    def report_late(self, replica: ExpertReplica) -> None: ...
    def report_answer(self, replica: ExpertReplica) -> None: ...
    def report_outdated(self, uid: str) -> None: ...


class Node(Protocol):
    """The part of a `TesseractNode` that the client talks to."""

    client_state: object
    """Where the client keeps what it learns about this node's peers; None at first."""

    @property
    def directory(self) -> Directory: ...

    @property
    def metrics(self) -> Metrics: ...

    def path(self, peer: PeerAddress) -> tuple[float, float] | None:
        """Round trip (seconds) and bytes per second (0.0: not known) of the path to `peer`; None without one."""

    def check_running(self) -> None: ...

    def distrust(self, peer_id: PeerID, reason: str) -> None:
        """Believes and asks that peer no more."""

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
    ) -> CallReply: ...


class PlainCalls(Uncopied):
    """A node for code without a loop: modules that are given one deliver results instead of awaitables."""

    @property
    def node(self) -> Node:
        """The node that makes the calls, on its own loop."""
        raise NotImplementedError

    def check(self) -> object:
        """Raises: RuntimeError where `run` would."""
        raise NotImplementedError

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """The coroutine's result; blocks meanwhile."""
        raise NotImplementedError


def check_running(given: Node | PlainCalls) -> None:
    """Raises: RuntimeError if no call can be made (from here), before a coroutine is made in vain."""
    if isinstance(given, PlainCalls):
        given.check()
        given = given.node
    given.check_running()


def deliver(given: Node | PlainCalls, coroutine: Coroutine[object, object, T]) -> Coroutine[object, object, T] | T:
    """Return what a module's call gives: the coroutine, to be awaited, or its result where calls are plain."""
    return given.run(coroutine) if isinstance(given, PlainCalls) else coroutine
