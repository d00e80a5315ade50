"""The recent use of each peer, against its quota (`admission.Quota`). No I/O: time is given to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tesseract_async.admission import Quota
from tesseract_async.identity import PeerID

MAX_PEERS: Final = 8192
"""Peers whose use is remembered; beyond that the one that was seen longest ago is forgotten, unless it has calls under
way (which the bounds on connections and calls bound).
"""
BUSY_RETRY: Final = 0.2
"""Seconds after which a peer with too many calls under way may come back: when they end is not known."""


@dataclass(slots=True)
class Use:
    """The use of one peer at time `at`, which decays evenly."""

    at: float
    calls: float = 0.0
    num_bytes: float = 0.0
    under_way: int = 0

    def pass_time(self, quota: Quota, now: float) -> None:
        """Give back what has come back until `now`."""
        share = max(0.0, now - self.at) / quota.period
        self.at = now
        if quota.calls is not None:
            self.calls = max(0.0, self.calls - share * quota.calls)
        if quota.num_bytes is not None:
            self.num_bytes = max(0.0, self.num_bytes - share * quota.num_bytes)

    def wait_for_call(self, quota: Quota) -> float:
        if quota.calls is None:
            return 0.0
        return max(0.0, self.calls + 1 - max(1.0, quota.calls)) * quota.period / quota.calls


class Quotas:
    """The use of all peers of a node. `quota_of` gives the quota of one, now; `refused` hears why a call was."""

    def __init__(
        self,
        quota_of: Callable[[PeerID], Quota | None],
        *,
        refused: Callable[[str], None] = lambda reason: None,
        max_peers: int = MAX_PEERS,
    ) -> None:
        self._quota_of = quota_of
        self._refused = refused
        self._max_peers = max_peers
        self._uses: dict[PeerID, Use] = {}  # the one that was seen last is last

    def __len__(self) -> int:
        return len(self._uses)

    @property
    def num_under_way(self) -> int:
        """Calls that count until their `end`."""
        return sum(use.under_way for use in self._uses.values())

    def begin(self, peer_id: PeerID, num_bytes: int, now: float) -> float | None:
        """A request of `num_bytes` is to be taken. Seconds until it may come back, or 0.0 if it may go on: it then
        counts until `end`. None if the peer has no quota: nothing is counted.
        """
        quota = self._quota_of(peer_id)
        if quota is None:
            return None
        use = self._uses.pop(peer_id, None) or Use(now)
        self._uses[peer_id] = use
        if len(self._uses) > self._max_peers:
            idle = next((one for one, use in self._uses.items() if not use.under_way), None)
            if idle is not None:
                del self._uses[idle]
        use.pass_time(quota, now)
        if quota.concurrent is not None and use.under_way >= quota.concurrent:
            self._refused("concurrent")
            return BUSY_RETRY
        wait = use.wait_for_call(quota)
        reason = "calls" if wait else ""
        if quota.num_bytes is not None and use.num_bytes >= quota.num_bytes:
            until = (use.num_bytes - quota.num_bytes) * quota.period / quota.num_bytes
            if until >= wait:
                wait, reason = until, "bytes"
        if reason:
            self._refused(reason)
            return _bounded(wait)
        use.calls += 1
        use.num_bytes += num_bytes
        use.under_way += 1
        return 0.0

    def add(self, peer_id: PeerID, now: float) -> float:
        """A call under way asks for one more thing, which counts as another call. Seconds until that may come back, or
        0.0 if it may go on."""
        use, quota = self._uses.get(peer_id), self._quota_of(peer_id)
        if use is None or quota is None:
            return 0.0
        use.pass_time(quota, now)
        if wait := use.wait_for_call(quota):
            self._refused("calls")
            return _bounded(wait)
        use.calls += 1
        return 0.0

    def charge(self, peer_id: PeerID, num_bytes: int, now: float) -> None:
        """A reply of `num_bytes` goes out."""
        use, quota = self._uses.get(peer_id), self._quota_of(peer_id)
        if use is not None and quota is not None:
            use.pass_time(quota, now)
            use.num_bytes += num_bytes

    def end(self, peer_id: PeerID) -> None:
        """A call for which `begin` said 0.0 has ended, however."""
        use = self._uses.get(peer_id)
        if use is not None:
            use.under_way -= 1


def _bounded(wait: float) -> float:
    return min(max(wait, 0.001), 3600.0)
