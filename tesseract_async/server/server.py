"""TesseractServer: hosts experts on a node. It declares them, has their calls answered and keeps their checkpoints."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Self, TypeVar

import torch

from tesseract_async.endpoint.call_table import CallHandler
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, Overloaded, TesseractError, describe
from tesseract_async.experts.publisher import ExpertPublisher, PublisherSettings
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import RuntimeSettings, TesseractRuntime
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.answering import ExpertCalls
from tesseract_async.server.applying import Applying, ExpertShares
from tesseract_async.server.fragment_calls import FragmentCalls
from tesseract_async.server.fragments import FragmentBackend
from tesseract_async.server.hosted import HostedState, Succession, check_experts
from tesseract_async.server.lockstep import LockstepCalls
from tesseract_async.server.memory import CallerMemory, trim_heap
from tesseract_async.server.restoring import Restoring
from tesseract_async.server.rhythm import Rhythm
from tesseract_async.server.state_files import CheckpointStore, FolderLock
from tesseract_async.server.state_transfer import StateSource
from tesseract_async.tasks import TaskSet
from tesseract_async.uncopied import Uncopied
from tesseract_async.wire import messages
from tesseract_async.wire.apply import APPLY

logger = logging.getLogger(__name__)

_MOVED_AT_ONCE: Final = 64
"""The number of experts that a device's thread moves to its device before it turns to other work."""
FAREWELL_TIMEOUT: Final = 2.0
"""Seconds that withdrawing the experts may take after `drain`, so that a network that does not answer does not hold up
a server."""

Result = TypeVar("Result")

ExpertHandler = Callable[[HostedState, IncomingCall], Awaitable[Message]]
"""Answers calls of one ``expert.`` method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The settings by which a server keeps its experts."""

    runtime: RuntimeSettings = RuntimeSettings()
    """The settings of each of its devices."""
    max_answers_bytes: int = 64 << 20
    """Answers of backwards, for callers that ask again because the first one was lost: less where memory is scarce."""
    max_inputs_bytes: int = 256 << 20
    """Inputs of forwards that a backward will follow, so that it need not send them again: less where memory is scarce,
    more where many trainers share a server."""
    drain_timeout: float = 5.0
    """Seconds that leaving waits for running calls and for backwards of forwards that were answered: more for slow
    trainers, less where the machine must be free at once."""


class TesseractServer(Uncopied):
    """Hosts `experts`, uid -> backend, on one device or several. Use it as an async context manager.

    Entering restores each expert's newest checkpoint from `checkpoint_dir`, if given, and returns once the experts can
    be found in the network. Leaving drains, withdraws them, saves, and stops the devices' threads. The backends belong
    to the server meanwhile: nobody else may touch their modules.

    Of several servers that host one uid, one is its primary: it trains. `followers` names the uids of which this server
    is not the primary; their backwards are refused, with the name of the primary (`NotPrimary`).
    """

    def __init__(
        self,
        node: TesseractNode,
        experts: Mapping[str, ExpertBackend],
        *,
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        checkpoint_dir: str | Path | None = None,
        checkpoint_period: float = 60.0,
        followers: Collection[str] = (),
        publisher_settings: PublisherSettings | None = None,
        settings: ServerSettings = ServerSettings(),
    ) -> None:
        """`device`: one, or several, each with a runtime of its own, over which the experts are spread in turn.
        `checkpoint_period`: a killed server falls back that many seconds at most, while saving takes less than a third
        of them.

        Raises: ValueError if `followers` names an expert that is not among `experts`, for a backend that stands for two
        experts or that another server hosts, for no device, or a period that is not above 0; TypeError for an expert
        that is not an ExpertBackend, or a node that is not a TesseractNode.
        """
        if not hasattr(node, "host_expert"):
            raise TypeError(
                f"a server needs a TesseractNode, not a {type(node).__name__}; with a BackgroundNode it is "
                "entered by node.entered(TesseractServer(node.node, experts))"
            )
        if not checkpoint_period > 0:
            raise ValueError(f"checkpoint_period is a number of seconds above 0, not {checkpoint_period}")
        check_experts(experts)
        if unknown := set(followers) - experts.keys():
            raise ValueError(f"followers must be among the experts; these are not: {', '.join(sorted(unknown))}")
        self.node, self.experts = node, dict(experts)
        self.settings, self.checkpoint_period = settings, checkpoint_period
        devices = [device] if isinstance(device, str | torch.device) else list(device)
        if not devices:
            raise ValueError("a server computes on at least one device")
        self.runtimes = tuple(
            TesseractRuntime(device=one, settings=settings.runtime, metrics=node.metrics) for one in devices
        )
        """The runtimes, one for each device."""
        self.checkpoint_dir = directory = None if checkpoint_dir is None else Path(checkpoint_dir).expanduser()
        self._store = None if directory is None else CheckpointStore(directory)
        self.hosted = {
            uid: self._host(uid, backend, runtime, is_primary=uid not in followers)
            for (uid, backend), runtime in zip(experts.items(), itertools.cycle(self.runtimes), strict=False)
        }
        self.succession = Succession()
        """The seam that says who is primary; `ReplicaKeeper` puts itself here."""
        self._memory = CallerMemory(
            max_inputs_bytes=settings.max_inputs_bytes, max_answers_bytes=settings.max_answers_bytes
        )
        self.calls = ExpertCalls(
            self._memory,
            metrics=node.metrics,
            knows=node.trust.knows,
            is_gone=lambda peer: not node.is_connected(peer),
            succession=lambda: self.succession,
        )
        self._fragments = FragmentCalls(self.calls, lambda peer, uid: node.trust.may_ask(peer, "share", uid))
        self.states = StateSource(self.call_aside, throttle=node.throttle, points_dir=directory)
        """Sends the experts' states."""
        self.restoring = Restoring(node, directory, self.call_aside, self.states.drop)
        """Takes them back to older ones."""
        save = None if directory is None else self.save_checkpoints
        lockstep = LockstepCalls(self.hosted, self.calls, node.trust, save)
        self._methods: dict[str, ExpertHandler] = {
            messages.INFO: self.calls.info,
            messages.FORWARD: self.calls.forward,
            messages.BACKWARD: self.calls.backward,
            messages.STATE: self.states.answer,
            messages.RESTORE: self.restoring.answer,
            messages.LOCKSTEP: lockstep.answer,
        }
        self._handlers = {uid: self._handlers_of(one) for uid, one in self.hosted.items()}
        self._end_applying: Callable[[], None] = lambda: None
        self._lock = None if directory is None else FolderLock(directory)
        self._saving = asyncio.Lock()
        self._unwatch: Callable[[], None] = lambda: None
        self._tasks = TaskSet("server")
        self._publisher_settings = publisher_settings or PublisherSettings()
        self._publisher: ExpertPublisher | None = None
        self.is_paused = False
        """True between `pause` and `resume`."""
        self._is_started = False
        self._closed = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.aclose(drain_timeout=None if kind is None else 0.0)

    async def start(self) -> None:
        """Do what entering does.

        Raises: CheckpointError if an expert has checkpoints and none of them fits it, none can be written, or another
        server keeps its own in the same folder; ValueError if the node hosts one of the uids already; RuntimeError if
        the server was started before, or its node is not running.
        """
        if self._is_started:
            raise RuntimeError("this server was started before; make a new one")
        self.node.check_running()
        check_experts(self.experts)
        self._is_started = True
        for uid, backend in self.experts.items():
            backend.host, backend.name = self, uid
        hosted: list[str] = []
        try:
            for runtime in self.runtimes:
                await runtime.start()
            if self._lock is not None:
                await self.call_aside(self._lock.acquire)
            await self._restore()
            # first of all, so that a server that is killed early returns with the weights that it answered with
            await self.save_checkpoints()
            for uid in self.experts:
                self.node.host_expert(uid, self._handlers[uid])
                hosted.append(uid)
            self._end_applying = self.node.host_together(Applying(self.calls, self.node.find_experts).answer)
            await self.node.wait_reachable()
            peer = self.node.peer_address
            self._unwatch = self.node.watch_address(lambda: self._tasks.spawn(self._update_addresses()))
            self._publisher = ExpertPublisher(
                self.node.network,
                addresses=peer.addresses,
                rendezvous=peer.rendezvous,
                settings=self._publisher_settings,
                metrics=self.node.metrics,
                trust=self.node.trust,
                places=self.node.publisher_places,
            )
            await self.announce()
        except BaseException:  # cancelled, too: nothing half started stays
            self._closed = True
            await self._stop_tasks()
            self._end_applying()
            for uid in hosted:
                self.node.unhost_expert(uid)
            if self._publisher is not None:
                await self._publisher.aclose()
            await self._stop_runtimes()
            raise
        if self._lock is not None:
            self._tasks.spawn(self._save_periodically())
        self._tasks.spawn(self._make_optimizers())

    async def _restore(self) -> None:
        """Load the newest checkpoints, and move all experts to their devices. Raises: CheckpointError."""
        new: dict[TesseractRuntime, list[ExpertBackend]] = {}
        for one in self.hosted.values():
            if self._store is not None:
                await one.restore()
            else:  # many at once: each wake-up of a device's thread takes as long as moving some
                new.setdefault(one.runtime, []).append(one.backend)
        for runtime, backends in new.items():
            for start in range(0, len(backends), _MOVED_AT_ONCE):
                await runtime.call(partial(_move, backends[start : start + _MOVED_AT_ONCE], runtime.device))

    async def _stop_tasks(self) -> None:
        self._unwatch()
        await self._tasks.aclose()

    async def _stop_runtimes(self) -> None:
        try:
            await asyncio.gather(*(runtime.aclose() for runtime in self.runtimes))
        finally:
            for backend in self.experts.values():
                backend.host = None
            if self._lock is not None:
                self._lock.release()

    async def _make_optimizers(self) -> None:
        """Make the optimizers that are still missing: after the experts can be found, before a backward needs them."""
        if not any(backend.trains and backend.optimizer is None for backend in self.experts.values()):
            return
        # the first one of the process imports PyTorch's compiler, for a second: not on the device's thread
        await self.call_aside(lambda: torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
        for one in list(self.hosted.values()):
            try:
                await one.runtime.call(one.backend.prepare)
            except Exception as error:  # an optimizer may raise anything; its backwards will say so, too
                logger.error("%s cannot be trained: its optimizer cannot be made: %s", one.uid, describe(error))

    async def _update_addresses(self) -> None:
        peer = self.node.peer_address
        if self._publisher is not None and (peer.addresses or peer.rendezvous):
            try:
                await self._publisher.update_addresses(peer.addresses, peer.rendezvous)
            except TesseractError as error:
                logger.warning("the new addresses could not be published yet: %s", describe(error))

    async def aclose(self, *, drain_timeout: float | None = None) -> None:
        """Leave the network: `drain`, withdraw, save, stop. Closing twice is harmless.

        `drain_timeout` overrides the settings'. Raises: CheckpointError, once all else is done, if what was learned
        since the last checkpoint could not be saved.
        """
        if self._closed:
            return
        self._closed = True
        await self._stop_tasks()
        try:
            if self.node.is_running:
                await self.drain(timeout=self.settings.drain_timeout if drain_timeout is None else drain_timeout)
                if self._publisher is not None:  # what `drain` had no time for
                    async with asyncio.timeout(FAREWELL_TIMEOUT):
                        await self._publisher.aclose()
            else:
                logger.warning("the node was closed before its server: others learn late that its experts are gone")
                if self._publisher is not None:
                    await self._publisher.stop_renewing()
        except TimeoutError:
            logger.warning("the network does not answer: this server's experts will expire there")
        finally:
            self._end_applying()
            for uid in self.experts:
                self.node.unhost_expert(uid)
            self._memory.close()
            self._fragments.close()
            self.states.close()
            self.restoring.close()
            try:
                await self.save_checkpoints()
            except CheckpointError as error:
                raise CheckpointError(f"the last steps are not saved: {error}") from error
            finally:
                await self._stop_runtimes()

    async def drain(self, *, timeout: float) -> bool:
        """Take no new forwards, and tell the network so; wait for the calls under way and for the backwards of forwards
        that were answered, which are still applied. False if they did not all come within `timeout` seconds.
        """
        self.calls.refuse_forwards = Overloaded("this server is leaving; ask another replica", retry_after=60.0)
        try:
            async with asyncio.timeout(timeout), asyncio.TaskGroup() as group:
                if self._publisher is not None:
                    # not before: a network that does not answer must not cost the last backwards their time
                    group.create_task(self._publisher.withdraw())
                group.create_task(self.calls.wait_quiet(self._applies))
        except TimeoutError:
            return False
        return True

    def _applies(self, uid: str) -> bool:
        """Return whether this server applies the backwards of an expert, which it may host no longer."""
        hosted = self.hosted.get(uid)
        return hosted is not None and hosted.is_primary

    async def pause(self, reason: str, *, retry_after: float) -> None:
        """Refuse forwards with `reason` and withdraw the experts, but keep them, and apply the backwards that come."""
        self.is_paused = True
        self.calls.refuse_forwards = Overloaded(reason, retry_after=retry_after)
        if self._publisher is not None:
            await self._publisher.withdraw()

    async def announce(self) -> None:
        """Publish the present roles, after calls of `set_primary` that did not. A paused server publishes nothing."""
        if self._publisher is not None and not self.is_paused and not self._closed:
            roles = {uid: one.is_primary for uid, one in self.hosted.items()}
            await self._publisher.declare(roles, epochs={uid: one.epoch for uid, one in self.hosted.items()})

    async def resume(self) -> None:
        """End `pause`; return once the experts can be found again."""
        self.is_paused = False
        self.calls.refuse_forwards = None
        await self.announce()

    def free_memory(self) -> int:
        """Forget what was kept for callers, who send their inputs again, and give free pages back to the system.

        Returns the bytes of what was forgotten.
        """
        num_bytes = self._memory.forget()
        trim_heap()
        return num_bytes

    def is_primary(self, uid: str) -> bool:
        """Return whether this server trains the expert. Raises: KeyError if it does not host it."""
        return self.hosted[uid].is_primary

    async def set_primary(self, uid: str, primary: bool, *, announce: bool = True) -> None:
        """Change the role of one expert here, and unless told otherwise say so in the network. Raises: KeyError."""
        before, self.hosted[uid].is_primary = self.is_primary(uid), primary
        if announce and before != primary:
            await self.announce()

    async def call_aside(self, function: Callable[[], Result]) -> Result:
        """Run `function`, which touches files and no module, on a helper thread: one at a time, in order."""
        return await self.runtimes[0].call_aside(function)

    def handle(self, method: str, handler: ExpertHandler) -> None:
        """Have calls of an ``expert.`` method answered by `handler`, for every expert of this server."""
        self._methods[method] = handler
        for uid, one in self.hosted.items():
            if not (isinstance(one.backend, FragmentBackend) and method in (messages.FORWARD, messages.BACKWARD)):
                self._handlers[uid][method] = partial(handler, one)

    def _handlers_of(self, hosted: HostedState) -> dict[str, CallHandler]:
        methods: dict[str, CallHandler] = {name: partial(handler, hosted) for name, handler in self._methods.items()}
        if not isinstance(hosted.backend, FragmentBackend):
            return {APPLY: ExpertShares(self.calls, hosted), **methods}
        for name in (messages.FORWARD, messages.BACKWARD):
            methods.pop(name, None)
        fragments = self._fragments
        own = {messages.PUSH: fragments.push, messages.PULL: fragments.pull, messages.SAMPLES: fragments.samples}
        return methods | {name: partial(answer, hosted) for name, answer in own.items()}

    def _host(
        self, uid: str, backend: ExpertBackend, runtime: TesseractRuntime, *, is_primary: bool = False
    ) -> HostedState:
        return HostedState(uid, backend, runtime, is_primary=is_primary, store=self._store, writer=self.runtimes[0])

    async def add(
        self, uid: str, backend: ExpertBackend, state: StateDict | None, *, ready: Callable[[], None] = lambda: None
    ) -> HostedState:
        """Host one more expert from now on, as a follower, in this state (None: as it is). `announce` follows.

        `ready` is called once it can be computed, right before calls for it come here.
        Raises: CheckpointError if the state does not fit; ValueError if the uid or the backend is hosted already.
        """
        if uid in self.experts or self._closed:
            raise ValueError(f"{uid} is hosted here already, or this server is closed")
        runtime = min(self.runtimes, key=lambda one: sum(hosted.runtime is one for hosted in self.hosted.values()))
        hosted = self._host(uid, backend, runtime)
        check_experts({**self.experts, uid: backend}, host=self)
        backend.host, backend.name = self, uid
        try:
            await runtime.call(lambda: backend.to(runtime.device))
            if state is not None:
                await hosted.install(state)
                hosted.shared_version = backend.version
            await runtime.call(backend.prepare)
            self._handlers[uid] = self._handlers_of(hosted)
            ready()
            self.node.host_expert(uid, self._handlers[uid])
        except BaseException:  # the backend is free again, whatever it was
            backend.host = None
            raise
        self.experts[uid], self.hosted[uid] = backend, hosted
        return hosted

    async def remove(self, uid: str) -> None:
        """Stop hosting this expert; what it learned here and nobody else has is saved first. `announce` follows.

        Raises: CheckpointError, and then it stays; KeyError if it is not hosted.
        """
        hosted = self.hosted[uid]
        if hosted.backend.version > hosted.shared_version:
            await hosted.save()
        del self.hosted[uid], self.experts[uid], self._handlers[uid]
        self.node.unhost_expert(uid)
        hosted.runtime.forget(hosted.backend)
        hosted.backend.host = None

    async def save_checkpoints(self) -> int:
        """Write a checkpoint of each expert that changed since its last one. Returns how many.

        States are copied between two batches, and written meanwhile. Raises: CheckpointError for the first that could
        not be written, after trying all.
        """
        num_saved, failed = 0, list[CheckpointError]()
        async with self._saving:
            for one in list(self.hosted.values()):
                try:
                    num_saved += await one.save()
                except CheckpointError as error:
                    failed.append(error)
        if failed:
            raise failed[0]
        return num_saved

    async def _save_periodically(self) -> None:
        loop = asyncio.get_running_loop()
        rhythm = Rhythm(self.checkpoint_period, loop.time(), rest=1.0)
        while True:
            await asyncio.sleep(rhythm.next_at - loop.time())
            began, num_saved = loop.time(), 0
            try:
                num_saved = await self.save_checkpoints()
            except CheckpointError as error:
                logger.error("%s", error)
                self.node.metrics.count("checkpoints_failed")
            rhythm.note(began, loop.time(), worked=num_saved > 0)


def _move(backends: Sequence[ExpertBackend], device: torch.device) -> None:
    for one in backends:
        one.to(device)
