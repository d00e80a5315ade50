"""How much one source may ask for, counted by address range: ids cost nothing, addresses do. Pure."""

from __future__ import annotations

from tesseract_async.network.contacts import Address, address_range, pack_address

MAX_SOURCES = 4096
"""Sources with a bucket of their own. When they are more, those that have been idle longest start afresh."""


class RateLimiter:
    """A token bucket for each source: an address range, or an address and port where ranges say nothing."""

    def __init__(self, *, rate: float, burst: float) -> None:
        """`rate` is what a source may spend a second, `burst` what it may save up."""
        self._rate = rate
        self._burst = burst
        self._sources: dict[bytes, tuple[float, float]] = {}

    def allows(self, address: Address, cost: float, now: float) -> bool:
        """Spends `cost` of the source's budget if it has that much."""
        source = address_range(address) or pack_address(address)
        left, since = self._sources.pop(source, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        allowed = left >= cost
        self._sources[source] = (left - cost if allowed else left, now)
        if len(self._sources) > MAX_SOURCES:
            del self._sources[next(iter(self._sources))]
        return allowed
