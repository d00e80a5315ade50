"""Token buckets: how long to wait so that bytes keep to a rate. No I/O: time is given to them."""

from collections.abc import Hashable
from typing import Final

from tesseract_async.lru import LRU

MAX_SOURCES: Final = 4096


class TokenBucket:
    """Lets `rate` bytes per second pass on average, and up to `burst` at once after a rest.

    It works by debt: bytes that have passed already (because they were received, or cannot be split) are taken in full,
    and the excess becomes the wait before the next ones. So over any time t at most ``burst + rate * t`` bytes pass,
    and one piece.
    """

    __slots__ = ("rate", "burst", "_level", "_at")

    def __init__(self, rate: float, *, burst: float | None = None, now: float = 0.0) -> None:
        """`rate`: bytes per second; `burst`: bytes, a quarter of a second's worth if not given.

        Raises: ValueError unless both are positive.
        """
        burst = rate / 4 if burst is None else burst
        if not rate > 0 or not burst > 0:
            raise ValueError(f"rate and burst are more than 0; not {rate} and {burst}")
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at = now

    def take(self, num_bytes: int, now: float) -> float:
        """Take `num_bytes`, which pass at `now` (any clock that does not go back). Returns the seconds to wait before
        more may pass."""
        self._refill(now)
        self._level -= num_bytes
        return max(0.0, -self._level / self.rate)

    def spend(self, amount: float, now: float) -> bool:
        """Take `amount` if there is that much; return whether there was. Leaves no debt."""
        self._refill(now)
        if self._level < amount:
            return False
        self._level -= amount
        return True

    def wait(self, now: float, amount: float = 0.0) -> float:
        """Return the seconds until there is as much as `amount`; without it, until debts are paid. 0: at once."""
        self._refill(now)
        return max(0.0, (amount - self._level) / self.rate)

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._level = min(self.burst, self._level + (now - self._at) * self.rate)
            self._at = now


class RateLimiter:
    """A token bucket for each source. Beyond `MAX_SOURCES`, those that have been idle longest start afresh."""

    def __init__(self, *, rate: float, burst: float) -> None:
        """`rate`: what a source may spend per second; `burst`: what it may save up."""
        self._rate = rate
        self._burst = burst
        self._buckets: LRU[Hashable, TokenBucket] = LRU(MAX_SOURCES)

    def allows(self, source: Hashable, cost: float, now: float) -> bool:
        """Spend `cost` of the source's budget; return False, and spend nothing, if it has less."""
        bucket = self._buckets.get(source) or TokenBucket(self._rate, burst=self._burst, now=now)
        self._buckets[source] = bucket
        return bucket.spend(cost, now)
