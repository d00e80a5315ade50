"""Looks for better paths to peers that are reached through a relay or a punched hole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from tesseract_async.errors import PeerUnreachable
from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.nat.background import BackgroundTasks
from tesseract_async.transport.base import DialPath, PeerAddress

logger = logging.getLogger(__name__)

IMPROVABLE: Final = ("relay", "datachannel")
"""Kinds of path for which a better one may appear."""
UPGRADE_AFTER: Final = (5.0, 30.0, 300.0)
"""Seconds after which a relayed connection looks for a better path; the last one repeats. It does so at once when this
node's place in the network or the peer's addresses have changed, and so do data channels."""


class Upgradable(Protocol):
    """What an `Endpoint` does for this."""

    def path_kind(self, peer_id: PeerID) -> str:
        """Return the kind of path that calls to this peer take now; empty where there is none."""

    async def upgrade(self, peer: PeerAddress, paths: Sequence[DialPath]) -> None:
        """Open a better connection for later calls. Raises: PeerUnreachable."""


class _Watched:
    """A peer to which there may be a better path than the one in use."""

    __slots__ = ("peer", "again")

    def __init__(self, peer: PeerAddress) -> None:
        self.peer = peer
        self.again = asyncio.Event()


class PathUpgrader:
    """`better_paths` returns what is better for a peer than a path of the given kind, and possible."""

    def __init__(
        self,
        endpoint: Upgradable,
        *,
        better_paths: Callable[[PeerAddress, PeerID, str], Sequence[DialPath]],
        metrics: Metrics,
        upgrade_after: Sequence[float] = UPGRADE_AFTER,
    ) -> None:
        self._endpoint = endpoint
        self._better_paths = better_paths
        self._metrics = metrics
        self._upgrade_after = upgrade_after
        self._watched: dict[PeerID, _Watched] = {}
        self.tasks = BackgroundTasks(metrics)

    def watch(self, peer: PeerAddress, peer_id: PeerID) -> None:
        """A path that could be better was opened to this peer."""
        if peer_id not in self._watched:
            one = self._watched[peer_id] = _Watched(peer)
            self.tasks.spawn(self._improve(one, peer_id))

    def peer_known(self, peer: PeerAddress) -> None:
        """This peer is known at other addresses than before: maybe there is a better path now."""
        one = self._watched.get(peer.peer_id) if peer.peer_id is not None else None
        if one is not None and peer != one.peer:
            is_news = bool(set(peer.addresses) - set(one.peer.addresses))
            one.peer = peer
            if is_news:
                one.again.set()

    def place_changed(self) -> None:
        """This node can be dialed now, or no longer: what was no path before may be one."""
        for one in self._watched.values():
            one.again.set()

    async def aclose(self) -> None:
        """Look no longer."""
        await self.tasks.aclose()

    async def _improve(self, one: _Watched, peer_id: PeerID) -> None:
        """Look for a better path now and then, and when told, until there can be none."""
        attempt = 0
        try:
            while True:
                was_told = True
                try:
                    async with asyncio.timeout(self._upgrade_after[min(attempt, len(self._upgrade_after) - 1)]):
                        await one.again.wait()
                except TimeoutError:
                    was_told = False
                one.again.clear()
                attempt += 1
                kind = self._endpoint.path_kind(peer_id)
                if kind not in IMPROVABLE:
                    return
                paths = self._better_paths(one.peer, peer_id, kind) if was_told or kind == "relay" else []
                if not paths:
                    continue
                try:
                    await self._endpoint.upgrade(one.peer, paths)
                except PeerUnreachable as error:
                    logger.debug("no better path to %s: %s", peer_id.short, error)
                else:
                    now = self._endpoint.path_kind(peer_id)
                    logger.info("%s is reached by %s now, no longer by %s", peer_id.short, now, kind)
                    self._metrics.count("nat_paths_improved", path=now)
        finally:
            del self._watched[peer_id]
