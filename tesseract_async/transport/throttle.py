"""Keeps all pipes of a node, together, to an upload and a download rate; any transport's pipes alike.

A throttled pipe stops reading, or says that it has not drained, until the bytes that passed are paid for. So nothing
is buffered here, and the ordinary backpressure does the rest at both ends.
"""

from __future__ import annotations

from typing import Final

from tesseract_async.transport.token_bucket import TokenBucket

SMALL: Final = 4096
"""Pieces up to this size are paid for but do not wait: a heartbeat must not stand behind megabytes."""
MAX_DEBT: Final = 2.0
"""... unless others of them already made a debt of so many seconds."""
MIN_WAIT: Final = 0.002
"""Shorter waits are not worth a timer; their debt stays and adds up."""


class Throttle:
    """A bucket for each direction, and counts of the bytes that passed. Shared by all pipes of a node."""

    def __init__(self, *, upload_rate: float | None = None, download_rate: float | None = None) -> None:
        """Rates are bytes per second, None for no limit. Raises: ValueError for a rate that is not positive."""
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


def _wait(bucket: TokenBucket | None, num_bytes: int, now: float) -> float:
    if bucket is None:
        return 0.0
    wait = bucket.take(num_bytes, now)
    return 0.0 if wait < MIN_WAIT or (num_bytes <= SMALL and wait < MAX_DEBT) else wait
