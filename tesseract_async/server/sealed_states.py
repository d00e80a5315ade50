"""SealedStates: writes, shows, fetches and loads the sealed files of a server's experts of runs."""

import contextlib
import logging
from collections.abc import Mapping
from functools import partial
from typing import Final

from tesseract_async.errors import CheckpointError, TesseractError, describe
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.pieces import possession
from tesseract_async.experts.tenure_words import Fetch, State
from tesseract_async.experts.terms import Seal
from tesseract_async.experts.trust import SHARED
from tesseract_async.identity import PeerID
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.checkpoint import encode_state, largest_state, with_recent_journal
from tesseract_async.server.fetching import SealFetcher
from tesseract_async.server.fragments import MAX_STATE_BYTES, FragmentBackend, fetch_replay
from tesseract_async.server.hosted import HostedState
from tesseract_async.server.other_replicas import check_fitting
from tesseract_async.server.server import TesseractServer
from tesseract_async.server.state_files import SealedFile, SealedFiles, read_sealed
from tesseract_async.server.tenured import Tenured
from tesseract_async.transport.base import PeerAddress

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = 300.0
"""A sealed state's journal holds the backwards of the last seconds, this many, so that a server that goes on from it
applies none twice."""


class SealedStates:
    def __init__(
        self,
        server: TesseractServer,
        experts: Mapping[str, Tenured],
        addresses: Mapping[PeerID, PeerAddress],
        *,
        call_timeout: float,
    ) -> None:
        """`experts`: those that are here now. `addresses`: where members can be dialed, as far as it is known."""
        self._server, self._node, self._experts, self._addresses = server, server.node, experts, addresses
        self._call_timeout = call_timeout
        self.template: ExpertBackend | None = None
        """An expert like all of the run: what is fetched must fit it."""
        self.files = SealedFiles(server.checkpoint_dir)
        self._fetcher = SealFetcher(self._node, self.files, timeout=call_timeout, aside=server.call_aside)

    async def return_to(self, held: Seal | None, hosted: HostedState) -> None:
        """Go on from the sealed file, unless the checkpoint is of this server's own steps and has more of them."""
        file = None if held is None else self.files.find(hosted.uid, held.root)
        if held is None or file is None or (held.primary == self._node.peer_id and hosted.version >= held.version):
            return
        try:
            state = await self._server.call_aside(partial(check_file, hosted.uid, hosted.backend, file))
            await hosted.install(state)
            hosted.shared_version = hosted.version
        except (TesseractError, OSError) as error:
            logger.error("the sealed state of %s cannot be used: %s", hosted.uid, describe(error))

    async def write(self, expert: Tenured) -> tuple[bytes, int, int, tuple[int, int] | None]:
        """Write the state down for a Seal, where it has moved; return its root, size, version and progress.

        Raises: CheckpointError, OSError.
        """
        uid, hosted, held = expert.uid, expert.hosted, expert.tenure.held
        if hosted is None or (held is not None and not expert.has_moved and self.files.find(uid, held.root)):
            assert held is not None
            return held.root, held.size, held.version, expert.progress
        state = await hosted.snapshot()
        state = with_recent_journal(state, since=self._version_before(expert, int(state["version"])))

        file = await self._server.call_aside(lambda: self.files.keep(uid, encode_state(state)))
        version = hosted.shared_version = int(state["version"])
        return file.root, file.size, version, (version, state["num_accumulated"])

    @staticmethod
    def _version_before(expert: Tenured, version: int) -> int:
        """Note this version, and return one that the expert had `RETRY_SECONDS` ago, or before."""
        versions, now = expert.versions, expert.sealed_at
        versions.append((now, version))
        while len(versions) > 1 and versions[1][0] <= now - RETRY_SECONDS:
            versions.popleft()
        return versions[0][1] if versions[0][0] <= now - RETRY_SECONDS else -1

    async def possession(self, uid: str, seal: Seal, nonce: bytes) -> bytes:
        """Return the proof that this server has the file; empty if it does not have it."""
        file = self.files.find(uid, seal.root)
        return b"" if file is None else await self._server.call_aside(lambda: possession(file.map(), nonce))

    async def pull(self, expert: Tenured, command: Fetch, stack: contextlib.AsyncExitStack) -> bool:
        """Take the sealed state, from this server's own files or from others. False if it is not wanted any more.

        `stack` holds `installing` afterwards.
        Raises: as `SealFetcher.fetch` and `check_fitting`; then nothing has changed.
        """
        uid, seal, aside = expert.uid, command.seal, self._server.call_aside
        backend = self.template if expert.hosted is None else expert.hosted.backend
        is_fragment = split_uid(uid)[0].endswith(SHARED)
        if backend is None and not is_fragment:
            return False
        if not command.check and not command.aside:
            await stack.enter_async_context(expert.installing)
            if await self._replay(expert, seal):
                return True
            await stack.aclose()  # nobody waits for what comes from afar
        max_bytes = MAX_STATE_BYTES if is_fragment or backend is None else largest_state(backend)
        sources = [address for peer in command.sources if (address := self._addresses.get(peer)) is not None]
        file = await self._fetcher.fetch(uid, seal, sources, max_bytes=max_bytes)
        if command.check:
            return True
        if is_fragment:
            backend = await aside(lambda: FragmentBackend.of_file(uid, file.map()))
        assert backend is not None
        state = await aside(partial(check_file, uid, backend, file))
        await stack.enter_async_context(expert.installing)
        is_free = expert.tenure.state in (State.ABSENT, State.FOLLOWING, State.HOLDING, State.ASIDE)
        if not is_free or self._experts.get(uid) is not expert:
            return False  # it was long on its way: this server is the primary now, or about to be, or gave it up
        if (hosted := expert.hosted) is not None:
            await self.take(hosted, expert.authority, state, aside=command.aside)
            expert.progress = hosted.backend.progress
        elif command.aside:
            root = await aside(partial(self.files.put_aside, uid, seal.root))
            if root is not None and self._server.checkpoint_dir is not None:
                logger.warning("a state of %s that is not in the line that goes on is kept here", uid)
                _tell_way_back(uid, expert.authority, self._node.peer_id, root)
        await aside(partial(self.files.take_in, uid, file))
        self._node.metrics.count("states_pulled")
        return True

    async def _replay(self, expert: Tenured, seal: Seal) -> bool:
        """Reach the sealed state of a fragment by its primary's updates, which are a thousandth of the bytes."""
        uid, hosted, aside = expert.uid, expert.hosted, self._server.call_aside
        primary = self._addresses.get(seal.primary)
        is_free = expert.tenure.state in (State.FOLLOWING, State.HOLDING)
        if primary is None or not is_free or not split_uid(uid)[0].endswith(SHARED):
            return False
        try:
            backend = await aside(partial(self.fragment, uid)) if hosted is None else hosted.backend
            assert isinstance(backend, FragmentBackend)
            update = await fetch_replay(
                self._node, uid, backend, primary, up_to=seal.version, timeout=self._call_timeout
            )
            if update is None:
                return False
            await (aside(update) if hosted is None else hosted.runtime.call(update))
        except (TesseractError, TimeoutError, OSError) as error:
            logger.info("%s could not be followed by its updates: %s", uid, describe(error))
            return False
        file = encode_state(backend.state() if hosted is None else await hosted.snapshot())
        if await aside(lambda: file.root) != seal.root:
            return False
        await aside(lambda: self.files.keep(uid, file))
        if hosted is not None:
            hosted.shared_version, expert.progress = hosted.version, backend.progress
        self._node.metrics.count("fragments_replayed")
        return True

    def fragment(self, uid: str) -> FragmentBackend:
        """Return the fragment in the sealed file that is here. Blocking. Raises: CheckpointError, ProtocolError."""
        held = self._experts[uid].tenure.held
        file = None if held is None else self.files.find(uid, held.root)
        if file is None:
            raise CheckpointError(f"the state of {uid} is not here yet")
        return FragmentBackend.of_file(uid, file.map())

    async def take(self, hosted: HostedState, authority: Authority, state: StateDict, *, aside: bool) -> None:
        """Continue from this state, and say how to get back the steps of this server that it lacks."""
        uid, path = hosted.uid, await hosted.take(state, aside=aside)
        if path is not None:
            root = (await self._server.call_aside(partial(read_sealed, path))).root
            _tell_way_back(uid, authority, self._node.peer_id, root)

    async def restore(self, expert: Tenured, hosted: HostedState, root: bytes) -> bool:
        """Go on from the state that the run's owner named, if this server has it. Returns whether it does."""
        uid, aside = expert.uid, self._server.call_aside
        try:
            file = await aside(partial(self.files.find_aside, uid, root))
            if file is None:
                logger.warning("the owner of the run gives %s to this server, in a state that is not here", uid)
                return False
            state = await aside(partial(check_file, uid, hosted.backend, file))
            await self.take(hosted, expert.authority, state, aside=True)
        except (TesseractError, OSError) as error:
            logger.error("%s cannot go on as its run's owner says: %s", uid, describe(error))
            return False
        expert.progress = None  # nobody has a Seal of that
        return True


def _tell_way_back(uid: str, authority: Authority, me: PeerID, root: bytes) -> None:
    name = authority.run.full_name
    logger.warning(
        "the owner of %s can go back to that state of %s: tesseract run appoint %s %s %s --state %s",
        *(name, uid, name, uid, me, root.hex()),
    )


def check_file(uid: str, backend: ExpertBackend, file: SealedFile) -> StateDict:
    """Return the state in a file, for this expert. Raises: as `check_fitting`."""
    return check_fitting(uid, backend, file.map())
