"""SharedEntry: a trainer's way into a run's shared parameters: finds the pieces, or begins them, and hosts them."""

import asyncio
import contextlib
import hashlib
import logging
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch

from tesseract_async.errors import (
    ConnectionLost,
    ExpertNotFound,
    NotAllowed,
    NotPrimary,
    Overloaded,
    PeerUnreachable,
    TesseractError,
    describe,
)
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.manifest import is_prefix, join_uid
from tesseract_async.experts.run import RunMismatch, SignedRun
from tesseract_async.experts.trust import SHARED
from tesseract_async.node import TesseractNode
from tesseract_async.server.fragments import FragmentBackend
from tesseract_async.server.other_replicas import ReplicaSettings
from tesseract_async.server.placing import Placing
from tesseract_async.server.server import TesseractServer
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.shared_pieces import PAUSE, FoundPieces, SharedPieces
from tesseract_async.sharing.fragment import UNKNOWN, Fragment
from tesseract_async.sharing.layout import Layout
from tesseract_async.sharing.manifest import SharedManifest

logger = logging.getLogger(__name__)

NUM_HOSTS: Final = 3
"""The number of trainers that host the fragments if nobody says which ones do."""
FIND_TIMEOUT: Final = 60.0
"""Seconds that entering waits for others' fragments, where this trainer may not begin them itself."""
FOUND_SECONDS: Final = 2.0
"""The least seconds that entering looks for others' fragments before it begins them; the most are twice as many."""


class SharedEntry:
    """Enters one run's shared parameters, and leaves them. Lives on the node's loop."""

    def __init__(
        self,
        run: str | SignedRun,
        own: SharedManifest,
        *,
        host: bool | None,
        checkpoint_dir: str | Path | None,
        replicas: ReplicaSettings,
    ) -> None:
        """`own`: the manifest to begin with. The rest: see `SharedParameters`. Raises: ValueError for a bad name."""
        self._run, self._own, self._hosts = run, own, host
        self._checkpoint_dir, self._replicas = checkpoint_dir, replicas
        self._is_bare = isinstance(run, str) and "@" not in run
        self._stack = contextlib.AsyncExitStack()
        self.pieces: SharedPieces | None = None
        """The pieces' hosts; None outside."""
        if self._is_bare and not is_prefix(f"{run}{SHARED}"):
            raise ValueError(f"a run's name has no spaces, and no part that is a number: {run!r}")

    @property
    def name(self) -> str:
        return self._run if isinstance(self._run, str) else self._run.full_name

    async def enter(self, node: TesseractNode, values: list[torch.Tensor]) -> FoundPieces:
        """Find the run's fragments, or begin them with these values; host them if this trainer is to do that."""
        node.check_running()
        run: SignedRun | None = None
        if isinstance(self._run, str) and self._is_bare:
            prefix = self._run
        else:
            authority = await node.join_run(self._run)
            prefix, run = authority.prefix, authority.run
            self._check_roles(node, authority)
        self.pieces = pieces = SharedPieces(node, prefix + SHARED, is_bare=self._is_bare)
        if node.initial_peers:
            await node.network.wait_joined(10.0)
        founds = self._is_bare if self._hosts is None else self._hosts
        try:
            found = await self._look(node, pieces, founds)
            if found is None:
                if unsound := self._own.layout.unsound(values):
                    raise ValueError(
                        f"{', '.join(unsound[:3])}: a run begins with finite values, and these hold others"
                    )
                fragments = [
                    (Fragment(cut, self._own.outer, mine), 0)
                    for cut, mine in zip(self._own.layout.cuts, values, strict=True)
                ]
                found = FoundPieces(self._own, fragments)
                _check_genesis(run, found)
                await self._host(node, pieces, found, follows=not self._is_bare)
                # another one may have begun at the same moment, or this one continues from its checkpoints
                found = await self._look(node, pieces, False) or found
            elif self._hosts or (self._hosts is None and self._is_bare and await pieces.num_hosts() < NUM_HOSTS):
                await self._host(node, pieces, found, follows=True)
            _check_genesis(run, found)
        except BaseException:  # cancelled, too: leave what was entered
            await self.leave()
            raise
        return found

    async def leave(self) -> None:
        """Hand over what is hosted here."""
        self.pieces = None
        await self._stack.aclose()

    def _check_roles(self, node: TesseractNode, authority: Authority) -> None:
        """Raises: NotAllowed, naming what this node's grant lacks. If no grant is known, the hosts refuse instead."""
        me, name, grant = node.peer_id, authority.run.full_name, authority.grant_of(node.peer_id)
        if grant is None:
            return
        if not authority.may(me, "share", now=None):
            raise NotAllowed(f"{me} may not share in {name}: ask its owner for the role share")
        if self._hosts and not authority.may(me, "host", join_uid(authority.prefix + SHARED, (0,)), now=None):
            wanted = "the role host" if grant.pattern is None else f"the role host for more than {grant.pattern}"
            raise NotAllowed(f"{me} may not host the parameters of {name}: ask its owner for {wanted}")

    async def _look(self, node: TesseractNode, pieces: SharedPieces, founds: bool) -> FoundPieces | None:
        """Return what is there; None if nothing is, and this trainer may begin it. Raises: ExpertNotFound."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        # not all that start together begin it together
        patience = FOUND_SECONDS * (1 + random.random()) if node.initial_peers else 0.0
        while True:
            try:
                return await pieces.fetch_all(self._own.layout)
            except (ExpertNotFound, NotPrimary, Overloaded, PeerUnreachable, ConnectionLost, TimeoutError) as error:
                waited, is_absent = loop.time() - began, isinstance(error, ExpertNotFound)
                if founds and is_absent and waited >= patience:
                    return None
                if waited >= FIND_TIMEOUT and is_absent and not founds:
                    raise ExpertNotFound(f"{error}: one trainer begins them, with host=True") from error
                if waited >= FIND_TIMEOUT:
                    raise
            await asyncio.sleep(PAUSE / 2)

    async def _host(self, node: TesseractNode, pieces: SharedPieces, found: FoundPieces, *, follows: bool) -> None:
        backends = {
            pieces.uid(number): FragmentBackend(found.manifest.part(number), fragment.copied(), steps=steps)
            for number, (fragment, steps) in enumerate(found.fragments)
        }
        followers = list(backends) if follows else ()
        server = TesseractServer(
            node, backends, followers=followers, checkpoint_dir=self._checkpoint_dir, checkpoint_period=30.0
        )
        await self._stack.enter_async_context(server)
        keeper = await self._stack.enter_async_context(ReplicaKeeper(server, settings=self._replicas))
        authority = node.trust.authority(pieces.prefix)
        if authority is not None:  # the run's servers see what is here, and take their part
            num = len(backends)
            await self._stack.enter_async_context(Placing.of_fragments(server, keeper, authority, num, num))
        self._stack.push_async_callback(_hand_over, keeper)
        node.directory.forget(pieces.prefix)


async def _hand_over(keeper: ReplicaKeeper) -> None:
    try:
        await keeper.hand_over()
    except (TesseractError, TimeoutError, OSError) as error:
        logger.warning("the shared parameters could not be handed over: %s", describe(error))


def genesis(layout: Layout, roots: Iterable[bytes]) -> str:
    """Return the ``genesis`` of a run whose fragments begin with these roots."""
    return f"file:{hashlib.sha256(layout.encode() + b''.join(roots)).hexdigest()}"


def _check_genesis(run: SignedRun | None, found: FoundPieces) -> None:
    """Raises: RunMismatch if the run names the values that all begins with, and these began with others."""
    wanted = "" if run is None else run.manifest.genesis
    fragments = [fragment for fragment, _ in found.fragments]
    # later than that, nobody knows the first values any more
    if run is None or not wanted.startswith("file:") or any(one.before == UNKNOWN for one in fragments):
        return
    if any(one.version > len(one.updates) for one in fragments):
        return
    began = genesis(found.manifest.layout, [one.before for one in fragments])
    if began != wanted:
        raise RunMismatch(run.full_name, {"genesis": (wanted, began)})
