"""The recent use of each peer, against its quota (`admission.Quota`). No I/O: time is given to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tesseract_async.admission import Policy, Quota
from tesseract_async.identity import PeerID
from tesseract_async.transport.token_bucket import TokenBucket

MAX_PEERS: Final = 8192
"""Peers whose use is remembered; beyond that the one that was seen longest ago is forgotten, unless it has calls under
way (which the bounds on connections and calls bound).
"""
BUSY_RETRY: Final = 0.2
"""Seconds after which a peer with too many calls under way may come back: when they end is not known."""


@dataclass(slots=True)
class Use:
    quota: Quota
    calls: TokenBucket | None
    num_bytes: TokenBucket | None
    under_way: int = 0


class Quotas:
    """The use of all peers of a node. `policy` may be replaced at any time; `refused` is told why a call was
    refused."""

    def __init__(
        self,
        policy: Policy,
        *,
        refused: Callable[[str], None] = lambda reason: None,
        max_peers: int = MAX_PEERS,
    ) -> None:
        self.policy = policy
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
        """Ask to take a request of `num_bytes`. Return the seconds until it may come back, or 0.0 if it may go on, and
        then counts until `end`; None if the peer has no quota, so that nothing is counted.
        """
        quota = self.policy.quotas.get(peer_id, self.policy.quota)
        if quota is None:
            return None
        use = self._uses.pop(peer_id, None)
        if use is None or use.quota != quota:
            per_call, per_byte = (
                None if amount is None else TokenBucket(amount / quota.period, burst=max(1.0, amount), now=now)
                for amount in (quota.calls, quota.num_bytes)
            )
            use = Use(quota, per_call, per_byte, 0 if use is None else use.under_way)
        self._uses[peer_id] = use
        if len(self._uses) > self._max_peers:
            idle = next((one for one, use in self._uses.items() if not use.under_way), None)
            if idle is not None:
                del self._uses[idle]
        if quota.concurrent is not None and use.under_way >= quota.concurrent:
            self._refused("concurrent")
            return BUSY_RETRY
        for_calls, for_bytes = (
            0.0 if bucket is None else bucket.wait(now, 1.0) for bucket in (use.calls, use.num_bytes)
        )
        if for_calls or for_bytes:
            self._refused("bytes" if for_bytes >= for_calls else "calls")
            return min(max(for_calls, for_bytes, 0.001), 3600.0)
        if use.calls is not None:
            use.calls.take(1, now)
        if use.num_bytes is not None:
            use.num_bytes.take(num_bytes, now)
        use.under_way += 1
        return 0.0

    def counts_calls(self, peer_id: PeerID) -> bool:
        """Return whether `add` could refuse something to this peer."""
        use = self._uses.get(peer_id)
        return use is not None and use.calls is not None

    def add(self, peer_id: PeerID, now: float) -> float:
        """Count one more thing that a call under way asks for as another call. Return the seconds until that may come
        back, or 0.0 if it may go on."""
        use = self._uses.get(peer_id)
        if use is None or use.calls is None or use.calls.spend(1, now):
            return 0.0
        self._refused("calls")
        return min(max(use.calls.wait(now, 1.0), 0.001), 3600.0)

    def charge(self, peer_id: PeerID, num_bytes: int, now: float) -> None:
        use = self._uses.get(peer_id)
        if use is not None and use.num_bytes is not None:
            use.num_bytes.take(num_bytes, now)

    def end(self, peer_id: PeerID) -> None:
        use = self._uses.get(peer_id)
        if use is not None:
            use.under_way -= 1
