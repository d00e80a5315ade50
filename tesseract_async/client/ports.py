"""What the client needs of a node: one way to call and one directory to ask. Tests give it a small fake."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tesseract_async.metrics import Metrics
from tesseract_async.uncopied import Uncopied

T = TypeVar("T")


class Reply(Protocol):
    """What a call brings back: what msgpack can hold, and raw buffers (writable, owned by the receiver)."""

    @property
    def body(self) -> Any: ...
    @property
    def buffers(self) -> Sequence[memoryview]: ...


class Replica(Protocol):
    """One expert at one server, as the directory tells it."""

    @property
    def uid(self) -> str: ...
    @property
    def peer(self) -> Any: ...
    @property
    def primary(self) -> bool: ...


class View(Protocol):
    """The live experts of one grid at one moment. A view never changes."""

    @property
    def coords(self) -> npt.NDArray[np.int64]:
        """``[num_live, dims]``, ascending."""

    @property
    def replicas(self) -> Mapping[tuple[int, ...], list[Any]]:
        """Coordinates to the replicas there, the primary first."""

    @property
    def version(self) -> int:
        """Another number whenever the live experts may have changed."""


class Directory(Protocol):
    """Where experts are found. It answers from memory where it can."""

    async def find(self, uid: str, *, even_failed: bool = False) -> list[Any]:
        """The live replicas; with `even_failed`, those that failed if there are no others."""

    def known(self, uid: str) -> list[Any]:
        """What `find` answers from memory; empty where it would ask."""

    def watch(self, prefix: str, grid_size: tuple[int, ...]) -> None: ...
    async def wait_warm(self, prefix: str) -> None: ...
    @property
    def trouble(self) -> str | None:
        """A sentence on why nothing can be read, where no node of the network answers."""

    async def wait_read(self, prefix: str) -> None: ...
    def live(self, prefix: str, grid_size: tuple[int, ...]) -> Any:
        """The view of one watched size; None while nothing was read."""

    def report_failure(self, replica: Any, *, reason: str = "silent") -> None: ...
    def report_late(self, replica: Any) -> None: ...
    def report_answer(self, replica: Any) -> None: ...


class Node(Protocol):
    """The part of a `TesseractNode` that the client talks to."""

    @property
    def directory(self) -> Directory: ...

    @property
    def metrics(self) -> Metrics: ...

    def path(self, peer: Any) -> tuple[float, float] | None:
        """Round trip (seconds) and bytes per second (0.0: not known) of the path to `peer`; None without one."""

    def check_running(self) -> None: ...

    def distrust(self, peer_id: Any, reason: str) -> None:
        """Believes and asks that peer no more."""

    def at_close(self, aclose: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Awaits ``aclose()`` when the node closes."""

    async def call_expert(
        self,
        peer: Any,
        method: str,
        body: Any = None,
        buffers: Sequence[Any] = (),
        *,
        timeout: float,
        idempotent: bool = False,
        priority: int = 0,
    ) -> Any: ...


class PlainCalls(Uncopied):
    """A node for code without a loop: modules that are given one deliver results instead of awaitables."""

    @property
    def node(self) -> Node:
        """The node that makes the calls, on a loop of its own."""
        raise NotImplementedError

    def check(self) -> Any:
        """Raises: RuntimeError where `run` would."""
        raise NotImplementedError

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; blocks meanwhile."""
        raise NotImplementedError
