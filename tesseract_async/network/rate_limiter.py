"""How much one source may ask for, counted by address range: ids cost nothing, addresses do. Pure."""

from __future__ import annotations

from tesseract_async.lru import LRU
from tesseract_async.network.contacts import Address, address_range, pack_address
from tesseract_async.transport.token_bucket import TokenBucket

MAX_SOURCES = 4096
"""Sources with a bucket of their own. Beyond that, those that have been idle longest start afresh."""


class RateLimiter:
    """A token bucket for each source: an address range, or an address and port where ranges say nothing."""

    def __init__(self, *, rate: float, burst: float) -> None:
        """`rate`: what a source may spend per second; `burst`: what it may save up."""
        self._rate = rate
        self._burst = burst
        self._buckets: LRU[bytes, TokenBucket] = LRU(MAX_SOURCES)

    def allows(self, address: Address, cost: float, now: float) -> bool:
        """Spend `cost` of the source's budget; return False, and spend nothing, if it has less."""
        source = address_range(address) or pack_address(address)
        bucket = self._buckets.get(source) or TokenBucket(self._rate, burst=self._burst, now=now)
        self._buckets[source] = bucket
        return bucket.spend(cost, now)
