"""`Policy` and `Quota`: what each peer may do at a node, and how much of it."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tesseract_async.identity import PeerID

Action = Literal["call", "train", "host"]
"""``call``: ask anything of this node; ``train``: change an expert's weights (backward); ``host``: be believed, as
servers must be. A peer that may not host can neither store records here nor hand over an expert; this node ignores what
it says in the network, and sends it no rows, gradients or state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """A limit to what one peer may ask of a node; None: as much as it likes.

    After a rest a peer may use a whole period's worth at once; what it used comes back evenly. So over any time t it
    gets at most ``1 + t / period`` times the figures below, and one message. Anything more is refused with
    `errors.Overloaded`, whose ``retry_after`` says when to come back.

    Raises: ValueError for a figure that is not positive.
    """

    calls: float | None = None
    """Calls in `period` seconds. A message for many experts counts as one, and each expert in it as one more."""
    num_bytes: float | None = None
    """Encoded bytes of requests and replies in `period` seconds. A message is always taken whole: if it is larger than
    what is left, the next one waits.
    """
    period: float = 60.0
    """Seconds."""
    concurrent: int | None = None
    """Calls under way at once, over all of the peer's connections."""

    def __post_init__(self) -> None:
        for name in ("calls", "num_bytes", "period", "concurrent"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"a quota's {name} is a positive number, not {value}")


@dataclass(frozen=True, slots=True)
class Policy:
    """For each action the peers that may take it, or None for everybody, which is the default; and peers' quotas.

    A peer that may not call may not train either. In a run, the run's grants have to allow it as well
    (`experts.trust`). Quotas share a node out among honest peers. They do not stop attackers, who can make as many
    identities as they like: an allow-list does, or a run.
    """

    callers: Collection[PeerID] | None = None
    trainers: Collection[PeerID] | None = None
    hosts: Collection[PeerID] | None = None
    quota: Quota | None = None
    """The limit of each peer's calls; None: none."""
    quotas: Mapping[PeerID, Quota | None] = field(default_factory=dict)
    """The same for single peers, instead of `quota`."""

    @classmethod
    def only(cls, peers: Collection[PeerID]) -> "Policy":
        """Return an allow-list: these peers may do everything, all others nothing."""
        allowed = frozenset(peers)
        return cls(callers=allowed, trainers=allowed, hosts=allowed)

    def allows(self, peer_id: PeerID, action: Action) -> bool:
        """Return whether `peer_id` may take this action."""
        if action == "host":
            return self.hosts is None or peer_id in self.hosts
        if self.callers is not None and peer_id not in self.callers:
            return False
        return action == "call" or self.trainers is None or peer_id in self.trainers
