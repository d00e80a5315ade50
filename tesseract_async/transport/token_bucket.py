"""A token bucket: how long to wait so that bytes keep to a rate. No I/O: time is given to it."""

from __future__ import annotations


class TokenBucket:
    """Lets `rate` bytes per second pass on average, and up to `burst` at once after a rest.

    It works by debt: bytes that have passed already (they were received, or cannot be split) are taken in full, and
    what is too much is the wait before the next ones. So over any time t at most ``burst + rate * t`` bytes pass, and
    one piece.
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
        """`num_bytes` pass at `now` (any clock that does not go back). Returns the seconds to wait before more may."""
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

    def wait(self, now: float) -> float:
        """Return the seconds until bytes may pass again; 0 if they may now."""
        self._refill(now)
        return max(0.0, -self._level / self.rate)

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._level = min(self.burst, self._level + (now - self._at) * self.rate)
            self._at = now
