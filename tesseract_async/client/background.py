"""`BackgroundNode`: a node for scripts and notebooks. One of the files that cross threads.

The node runs on an event loop in a separate thread. The package's modules notice that their node is such a node, and
return results instead of awaitables; ``loss.backward()`` works as always, because it does not run on the loop's thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Concatenate, Final, Literal, ParamSpec, Self, TypeVar

from tesseract_async.admission import Policy
from tesseract_async.client.ports import PlainCalls
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.experts.authority import Authority
from tesseract_async.identity import Identity, PeerID
from tesseract_async.leaving import new_event_loop
from tesseract_async.metrics import Metrics
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.node import TesseractNode
from tesseract_async.transport.base import PeerAddress
from tesseract_async.uncopied import Uncopied

P = ParamSpec("P")
T = TypeVar("T")

_LOOK_SECONDS: Final = 1.0
"""Seconds between looks at the node while calls are waited for: it may have been closed."""


class BackgroundNode(PlainCalls):
    """A `TesseractNode` that brings its event loop, for code that has none: the same names, with plain calls.

    ::

        with ta.BackgroundNode(host="0.0.0.0", initial_peers=["198.51.100.7:31337"]) as node:
            expert = node.get_expert("ffn.3.7")
            gate = ta.GatingFunction(node, uid_prefix="ffn", grid_size=(16, 16), in_features=1024)
            loss = gate(expert(x)).sum()
            loss.backward()

    Calls block the calling thread; any thread but the node's own may call, several at once. In a notebook, call
    `start` and `close` instead of using ``with``. Inside asynchronous code use `TesseractNode`: this one would block
    the loop there, except when it is called in a thread (``asyncio.to_thread``).
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        initial_peers: Sequence[str | PeerAddress] = (),
        identity: Identity | str | Path | None = None,
        announce: str | Sequence[str] | None = None,
        public: bool = False,
        security: Literal["tls", "plain"] = "tls",
        policy: Policy | None = None,
        refresh_period: float = 10.0,
    ) -> None:
        """The arguments are those of `TesseractNode`; those missing here have their defaults. Raises the same."""
        self._inner = TesseractNode(
            host,
            port,
            initial_peers=initial_peers,
            identity=identity,
            announce=announce,
            public=public,
            security=security,
            policy=policy,
            refresh_period=refresh_period,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Start the thread and the node in it. Raises: RuntimeError if started before; what `TesseractNode.start`
        raises."""
        if self._thread is not None:
            raise RuntimeError("this node was started before; make a new one")
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._serve, args=(started,), name="tesseract-background", daemon=True)
        self._thread.start()
        self._loop = started.result()
        try:
            self.run(self._inner.start())
        except BaseException:  # Ctrl-C, too, must not leave the thread
            self.close()
            raise
        return self

    def close(self) -> None:
        """Say farewell and stop the loop and its thread; calls under way in other threads fail. May be called twice.

        Raises: RuntimeError on the node's own thread.
        """
        if self._loop is None or self._thread is None:
            return
        if threading.current_thread() is self._thread:
            raise RuntimeError("a BackgroundNode can't be closed on its own thread")
        loop, self._loop = self._loop, None
        if not self._thread.is_alive():  # in a fork's child: the node is its parent's
            return
        try:
            asyncio.run_coroutine_threadsafe(self._inner.aclose(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()

    def _serve(self, started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:  # cancels what is left when the loop has stopped
            loop = runner.get_loop()
            asyncio.set_event_loop(loop)
            loop.call_soon(started.set_result, loop)
            loop.run_forever()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        raise RuntimeError("a BackgroundNode is for code without a loop (`with`); asynchronous code uses TesseractNode")

    async def __aexit__(self, *args: object) -> None:
        raise AssertionError("never entered")

    def check(self) -> asyncio.AbstractEventLoop:
        """The node's loop. Raises: RuntimeError if the node is not running (in this process), or on its own thread."""
        if self._loop is None:
            raise RuntimeError("this BackgroundNode is not running: use it inside `with`, or call start()")
        if threading.current_thread() is self._thread:
            raise RuntimeError("on the node's own thread there is a loop: await the call on `node.node` instead")
        if self._thread is None or not self._thread.is_alive():
            raise RuntimeError(
                "this BackgroundNode runs in another process, which this one was forked from: start one here, too"
            )
        return self._loop

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """Run any coroutine on the node's loop and return its result; blocks meanwhile. Interrupting cancels it.

        Raises: what the coroutine raises; RuntimeError if the node is not running, or on the node's own thread.
        """
        try:
            loop = self.check()
        except RuntimeError:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the BackgroundNode was closed during this call") from None
        except BaseException:  # Ctrl-C, too: the call ends with its caller
            future.cancel()
            raise

    def wait(self, begin: Callable[[Callable[[], object]], None], cancel: Callable[[], None]) -> None:
        """Call ``begin(done)`` on the node's loop, and block until it has called ``done``, which it does exactly once.
        It must not raise. An interrupt calls `cancel` on the loop.

        Raises: RuntimeError as `run`.
        """
        loop, waiting = self.check(), threading.Lock()
        waiting.acquire()
        try:
            loop.call_soon_threadsafe(begin, waiting.release)
            while not waiting.acquire(timeout=_LOOK_SECONDS):
                self.check()
        except BaseException:  # Ctrl-C, too: the call ends with its caller
            with contextlib.suppress(RuntimeError):  # the loop is gone
                loop.call_soon_threadsafe(cancel)
            raise

    def begin(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run the coroutine, which must not raise, on the node's loop, without waiting for it.

        Raises: RuntimeError as `run`.
        """
        try:
            loop = self.check()
        except RuntimeError:
            coroutine.close()
            raise
        asyncio.run_coroutine_threadsafe(coroutine, loop)

    @property
    def node(self) -> TesseractNode:
        """The node itself, for coroutines that run on its loop (see `run`). Raises: RuntimeError if not running."""
        if self._loop is None:
            raise RuntimeError("this BackgroundNode is not running: use it inside `with`, or call start()")
        return self._inner

    @property
    def address(self) -> str:
        """``"host:port"`` that the node listens on."""
        return self._inner.address

    @property
    def peer_id(self) -> PeerID:
        """The id that follows from the node's key."""
        return self._inner.peer_id

    @property
    def identity(self) -> Identity:
        """The node's key."""
        return self._inner.identity

    @property
    def metrics(self) -> Metrics:
        """The node's counters; any thread may take a snapshot."""
        return self._inner.metrics

    def wait_reachable(self, timeout: float = 10.0) -> bool:
        """See `TesseractNode.wait_reachable`."""
        return self.run(self._inner.wait_reachable(timeout))

    @property
    def network(self) -> Network:
        """The DHT, with plain calls."""
        return Network(self)

    def get_expert(self, uid: str) -> RemoteExpert:
        """The expert `uid`, as a module with plain calls. Raises: as `TesseractNode.get_expert`."""
        found = self.run(self._inner.get_expert(uid))
        return RemoteExpert(self, uid, found.replicas)

    def join_run(self, run: str, *, grant: str | None = None) -> Authority:
        """Take part in the run ``NAME@OWNER``. Raises: as `TesseractNode.join_run`."""
        return self.run(self._inner.join_run(run, grant=grant))

    @contextlib.contextmanager
    def entered(self, context: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Enter an asynchronous context manager on the node's loop for the length of a ``with`` block::

        with node.entered(ta.TesseractServer(node.node, {"ffn.3.7": backend})) as server:
            ...
        """

        stack = contextlib.AsyncExitStack()
        value = self.run(stack.enter_async_context(context))
        try:
            yield value
        except BaseException as error:  # the context manager decides, as in `with`
            if not self.run(stack.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self.run(stack.aclose())


def _plain(
    method: Callable[Concatenate[TesseractNetwork, P], Coroutine[object, object, T]],
) -> Callable[Concatenate[Network, P], T]:
    @functools.wraps(method)
    def call(self: Network, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._node.run(method(self._node.node.network, *args, **kwargs))

    return call


class Network(Uncopied):
    """`TesseractNetwork` with plain calls."""

    def __init__(self, node: BackgroundNode) -> None:
        self._node = node

    store = _plain(TesseractNetwork.store)
    store_many = _plain(TesseractNetwork.store_many)
    get = _plain(TesseractNetwork.get)
    get_many = _plain(TesseractNetwork.get_many)
    get_entries = _plain(TesseractNetwork.get_entries)
    withdraw = _plain(TesseractNetwork.withdraw)
    wait_joined = _plain(TesseractNetwork.wait_joined)

    @property
    def num_contacts(self) -> int:
        """See `TesseractNetwork.num_contacts`."""
        return self._node.node.network.num_contacts
