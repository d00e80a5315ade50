"""Keeps all pipes of a node together, whatever their transport, to an upload and a download rate.

A throttled pipe stops reading, or says that it has not drained, until the bytes that passed are paid for. So nothing
is buffered here, and the ordinary backpressure does the rest at both ends.
"""

import math
from typing import Final

from tesseract_async.transport.token_bucket import TokenBucket

SMALL: Final = 4096
"""Pieces up to this size are paid for but do not wait: a heartbeat must not stand behind megabytes."""
MAX_DEBT: Final = 2.0
"""Seconds of debt beyond which small pieces wait, too."""
LEAST_SHARE: Final = 0.05
"""Share of the upload rate that messages which may wait always have."""
AVERAGE_SECONDS: Final = 2.0
MIN_WAIT: Final = 0.002
"""Seconds below which a wait is not worth a timer; its debt stays and adds up."""


class Throttle:
    """A bucket for each direction, and counts of the bytes that passed. Shared by all pipes of a node."""

    def __init__(self, *, upload_rate: float | None = None, download_rate: float | None = None) -> None:
        """Rates are bytes per second, None for no limit. Raises: ValueError for a rate that is not positive."""
        self.upload_rate = upload_rate
        self._upload = None if upload_rate is None else TokenBucket(upload_rate)
        self._download = None if download_rate is None else TokenBucket(download_rate)
        self.num_bytes_sent = 0
        self.num_bytes_received = 0

    def sent(self, num_bytes: int, now: float) -> float:
        """`num_bytes` were sent at `now` (loop time). Returns the seconds to wait before more."""
        self.num_bytes_sent += num_bytes
        return _wait(self._upload, num_bytes, now)

    def received(self, num_bytes: int, now: float) -> float:
        """`num_bytes` were received at `now` (loop time). Returns the seconds to wait before more."""
        self.num_bytes_received += num_bytes
        return _wait(self._download, num_bytes, now)


class Leftover:
    """Paces bytes that may wait, such as the states of experts: they get the part of the upload rate that other traffic
    leaves."""

    def __init__(self, rate: float, throttle: Throttle | None) -> None:
        """`rate`: bytes per second at most; `throttle`: the node's, with its limit and count."""
        self._rate, self._throttle = rate, throttle
        self._free_at = 0.0
        self._measured_at: float | None = None
        self._others = 0.0  # bytes per second, of late
        self._count = 0  # bytes of others until then
        self._own = 0

    def wait(self, now: float) -> float:
        """Return the seconds until the next bytes are to go out."""
        return max(0.0, self._free_at - now)

    def take(self, num_bytes: int, now: float) -> float:
        """Reserve `num_bytes`, which go out next. Return the seconds to wait before that."""
        wait, rate = self.wait(now), self._rate
        if self._throttle is not None and self._throttle.upload_rate is not None:
            self._measure(self._throttle.num_bytes_sent - self._own, now)
            limit = min(rate, self._throttle.upload_rate)
            rate = max(LEAST_SHARE * limit, limit - self._others)
        self._own += num_bytes
        self._free_at = now + wait + num_bytes / rate
        return wait

    def _measure(self, count: int, now: float) -> None:
        seconds = math.inf if self._measured_at is None else now - self._measured_at
        if seconds > 0 and count > self._count:  # what was taken and has not gone out yet makes it less
            found = (count - self._count) / seconds
            self._others += (found - self._others) * min(1.0, seconds / AVERAGE_SECONDS)
        elif seconds > AVERAGE_SECONDS:
            self._others = 0.0
        else:
            return
        self._count, self._measured_at = max(count, self._count), now


def _wait(bucket: TokenBucket | None, num_bytes: int, now: float) -> float:
    if bucket is None:
        return 0.0
    wait = bucket.take(num_bytes, now)
    return 0.0 if wait < MIN_WAIT or (num_bytes <= SMALL and wait < MAX_DEBT) else wait
