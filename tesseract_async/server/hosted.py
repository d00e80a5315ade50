"""HostedState: one expert of a server, with its role, its state and its checkpoints."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tesseract_async.errors import CheckpointError, Overloaded, describe
from tesseract_async.identity import PeerID
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.runtime.states import StateDict
from tesseract_async.runtime.structure import describe_module
from tesseract_async.server.state_files import CheckpointStore

logger = logging.getLogger(__name__)

UNFIT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)
"""The errors that loading a state that does not fit may raise."""


class Succession:
    """The seam that says who is the primary of each expert, and whether this server may act as it.

    This one leaves the roles as the server began with them. `ReplicaKeeper` is the one that changes them.
    """

    @property
    def sync_seconds(self) -> float:
        """Seconds between two Seals of the experts of runs that this server leads, at most; 0 for none."""
        return 0.0

    def may_step(self, uid: str) -> bool:
        """Return whether a primary may take a step at this moment, or answer one: it is asked before each."""
        return True

    async def find_primary(self, uid: str) -> tuple[PeerID | None, float]:
        """Return who trains an expert that this server only follows, or None, and the seconds until to ask again."""
        return None, 1.0


class HostedState:
    """An expert's state on one server. The backend belongs to it: only its runtime touches the module."""

    def __init__(
        self,
        uid: str,
        backend: ExpertBackend,
        runtime: TesseractRuntime,
        *,
        is_primary: bool,
        store: CheckpointStore | None,
        writer: TesseractRuntime,
    ) -> None:
        """`store` holds its checkpoints, which are written on the helper thread of `writer`."""
        self.uid, self.backend, self.runtime = uid, backend, runtime
        self.is_primary = is_primary
        """True if this server trains the expert."""
        self.epoch = 0
        """The epoch of the expert's lineage; 0 outside of runs."""
        self.shared_version = 0
        """The steps up to this one are in a state that other servers have, or can fetch."""
        self._store, self._writer = store, writer
        self.saved: tuple[int, int] | None = None
        """The backend's `progress` in the newest checkpoint."""
        self.is_restored = False
        """True if it began from a checkpoint of this server's, whatever state its backend had before."""

    @property
    def version(self) -> int:
        return self.backend.version

    async def snapshot(self) -> StateDict:
        return await self.runtime.snapshot(self.backend)

    def structure(self) -> StateDict:
        return describe_module(self.backend.module)

    async def restore(self) -> None:
        """Load the newest checkpoint, if there is one, and move the expert to its device. Raises: CheckpointError."""
        state = None if self._store is None else await self._writer.call_aside(partial(self._store.load, self.uid))

        def load() -> None:
            if state is not None:
                self.backend.load_state(state)
            self.backend.to(self.runtime.device)

        try:
            await self.runtime.call(load)
        except UNFIT as error:
            assert self._store is not None
            raise CheckpointError(
                f"the checkpoint of {self.uid} does not fit it ({describe(error)}): serve the expert that "
                f"{self._store.directory} was written for, in the same size, or choose another folder"
            ) from error
        if state is not None:
            self.saved, self.is_restored = self.backend.progress, True
            logger.info("%s continues at version %d", self.uid, self.backend.version)

    async def save(self) -> bool:
        """Write a checkpoint, unless nothing changed since the last one. Raises: CheckpointError."""
        if self._store is None or self.saved == self.backend.progress:
            return False
        try:
            state = await self.snapshot()
        except Overloaded as error:  # of a mesh that is lost
            raise CheckpointError(f"{self.uid} cannot be saved: {error}") from error
        await self._writer.call_aside(partial(self._store.save, self.uid, state, version=state["version"]))
        self.saved = state["version"], state["num_accumulated"]
        return True

    async def take(self, state: StateDict, *, aside: bool = False) -> Path | None:
        """Continue from a state that comes from elsewhere.

        Steps beyond `shared_version` (with `aside`, all steps) are not in that state. So the present state, which has
        them, is first written to a file whose name no checkpoint takes; that name is returned. Raises: CheckpointError.
        """
        path = None
        if self._store is not None and (aside or self.backend.version > self.shared_version):
            own = await self.snapshot()
            path = await self._writer.call_aside(partial(self._store.set_aside, self.uid, own, version=own["version"]))
            logger.warning("the steps that %s took here alone are kept in %s", self.uid, path)
        await self.install(state)
        self.shared_version = self.backend.version
        if path is not None:
            try:
                await self.save()  # the next start is not from what was put aside
            except CheckpointError as error:
                logger.error("%s", error)
        return path

    async def install(self, state: StateDict) -> None:
        """Continue from `state`, between two batches.

        Raises: CheckpointError if it does not fit; nothing changes then.
        """
        self.saved = None  # it may be another state of the same version

        def load() -> None:
            before = self.backend.state()
            try:
                self.backend.load_state(state)
            except BaseException:  # a state may be anything: back to the one before
                self.backend.load_state(before)
                raise

        try:
            await self.runtime.call(load)
            await self.snapshot()
        except UNFIT as error:
            raise CheckpointError(f"the state does not fit {self.uid}: {describe(error)}") from error


def check_experts(experts: Mapping[str, ExpertBackend], *, host: object = None) -> None:
    """Refuse objects that are no backends, a backend that a server other than `host` has, and two that train the same
    weights.

    Raises: TypeError, ValueError.
    """
    if not isinstance(experts, Mapping) or not all(isinstance(uid, str) for uid in experts):
        raise TypeError("experts maps uids to ExpertBackends, such as {'ffn.3.7': backend}")
    for uid, one in experts.items():
        if not isinstance(one, ExpertBackend):
            raise TypeError(f"{uid} takes an ExpertBackend, with module and schemas; got {type(one).__name__}")
    owner: dict[int, str] = {}
    any_trains = any(backend.trains for backend in experts.values())
    for trains in (True, False):
        for uid, backend in experts.items():
            if backend.host not in (None, host):
                raise ValueError(f"{uid}: another server hosts this ExpertBackend now; make one for each server")
            if backend.trains != trains:
                continue
            # frozen weights may be shared with other frozen ones
            for part in (backend, *(backend.module.parameters() if any_trains else ())):
                other = owner.setdefault(id(part), uid) if trains or part is backend else owner.get(id(part), uid)
                if other != uid:
                    raise ValueError(
                        f"{other} and {uid} train the same weights; make an ExpertBackend for each, of its own module"
                    )
