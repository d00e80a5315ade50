"""Who may do what at a node."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from tesseract_async.identity import PeerID

Action = Literal["call", "train", "store"]
"""``call``: ask anything of this node; ``train``: change an expert's weights (backward); ``store``: put records."""


@dataclass(frozen=True, slots=True)
class Policy:
    """For each action the peers that may take it, or None for everybody, which is the default.

    Whoever may not call may not train either.
    """

    callers: Collection[PeerID] | None = None
    trainers: Collection[PeerID] | None = None
    storers: Collection[PeerID] | None = None

    @classmethod
    def only(cls, peers: Collection[PeerID]) -> Policy:
        """The allow-list: these peers may do everything, all others nothing."""
        allowed = frozenset(peers)
        return cls(callers=allowed, trainers=allowed, storers=allowed)

    def allows(self, peer_id: PeerID, action: Action) -> bool:
        """Whether `peer_id` may take this action."""
        if action == "store":
            return self.storers is None or peer_id in self.storers
        if self.callers is not None and peer_id not in self.callers:
            return False
        return action == "call" or self.trainers is None or peer_id in self.trainers
