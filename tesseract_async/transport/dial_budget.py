"""How often a node dials a host in vain: whose addresses a stranger names is not to be knocked at for ever. No I/O."""

from __future__ import annotations

import ipaddress
from typing import Final

from tesseract_async.lru import LRU
from tesseract_async.transport.base import split_host_port
from tesseract_async.transport.token_bucket import TokenBucket

BURST: Final = 8.0
"""Dials of one ``host:port`` in a row that may fail ..."""
PER_SECOND: Final = 0.2
"""... and how many more then."""
HOST: Final = 8.0
"""So many times as much for all ports of a host, but not on loopback, where every node of a test is one host."""
MAX_TARGETS: Final = 4096


class DialledInVain(OSError):
    """A dial that was not made, since too many before it failed."""


class DialBudget:
    """Counts failed dials. One that succeeds makes up for all before it."""

    def __init__(self) -> None:
        self._failed: LRU[str, TokenBucket] = LRU(MAX_TARGETS)

    def check(self, address: str, now: float) -> None:
        """Raises: DialledInVain if ``host:port`` may not be dialed now."""
        wait = max((self._failed[one].wait(now) for one in _targets(address) if one in self._failed), default=0.0)
        if wait > 0:
            raise DialledInVain(f"it was dialed in vain too often; it may be again in {wait:.1f} s")

    def finished(self, address: str, error: BaseException | None, now: float) -> None:
        """A dial has ended: nobody answered, or another one than was looked for, or (None) the right one."""
        if isinstance(error, DialledInVain):
            return
        for target, times in _targets(address).items():
            bucket = self._failed.pop(target, None)
            if error is not None:
                bucket = bucket or TokenBucket(times * PER_SECOND, burst=times * BURST, now=now)
                bucket.take(1, now)
                self._failed[target] = bucket


def _targets(address: str) -> dict[str, float]:
    host = split_host_port(address)[0]
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return {address: 1.0} if loopback else {address: 1.0, host: HOST}
