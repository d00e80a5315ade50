"""The lineages of experts of runs as replies show them: an answer from an older epoch does not count."""

import logging
from typing import Final

from tesseract_async.client.ports import Node
from tesseract_async.errors import TooStale
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU

logger = logging.getLogger(__name__)

MAX_EXPERTS: Final = 65536


class Lineages:
    """The newest epoch and version at which primaries have answered one node, by uid."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._seen: LRU[str, tuple[int, int]] = LRU(MAX_EXPERTS)
        self._reported: LRU[tuple[str, PeerID | None], int] = LRU(MAX_EXPERTS)

    def take(self, replica: ExpertReplica, epoch: int, version: int) -> None:
        """Take in the epoch and version of a reply. Raises: TooStale if the reply's branch has been replaced.

        A server is measured by its own manifest: what another one claims makes no reply invalid. A newer epoch than
        in the manifest makes the directory read again.
        """
        if epoch < replica.epoch:
            raise TooStale(f"{replica.uid} answered at epoch {epoch}; its server's manifest says {replica.epoch}")
        key = replica.uid, replica.peer.peer_id
        if epoch > replica.epoch and self._reported.get(key) != replica.sequence:
            # once per manifest: a server that lies must not make every call read the directory
            self._reported[key] = replica.sequence
            self._node.directory.report_outdated(replica.uid)
        if not replica.primary:
            return
        seen_epoch, seen_version = self._seen.get(replica.uid, (0, 0))
        if epoch > seen_epoch and version < seen_version:
            self._node.metrics.count("steps_lost")
            logger.warning(
                "%s has a new primary, which continues from version %d; this node had seen version %d",
                replica.uid,
                version,
                seen_version,
            )
        if epoch >= seen_epoch:
            self._seen[replica.uid] = epoch, version if epoch > seen_epoch else max(version, seen_version)

    def newest(self, uid: str) -> tuple[int, int]:
        """Return the newest epoch, and the newest version in it, at which the expert's primary has answered here."""
        return self._seen.get(uid, (0, 0))

    def forget(self, uid: str) -> None:
        """Forget what was seen of an expert, which goes back to an older state."""
        self._seen.pop(uid, None)
