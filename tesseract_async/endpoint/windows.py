"""Flow-control windows: large messages within them need not ask for room first, which saves a round trip. No I/O."""

from collections.abc import Callable

from tesseract_async.endpoint.budget import Budget, Owner
from tesseract_async.errors import ProtocolError
from tesseract_async.wire import frames


class Windows:
    """The window that this end keeps for its peer, and the one that the peer keeps for it."""

    def __init__(
        self, budget: Budget, owner: Owner, window_bytes: int, *, put: Callable[[bytes], None], now: float
    ) -> None:
        self.bytes_per_second = 0.0
        """Rate at which large messages last arrived, smoothed."""
        self.out_bytes = 0
        """The peer's window for us."""
        self.out_used = 0
        """Bytes of that window that our messages use."""
        self.in_used = 0
        """Bytes of our window that the peer's messages use."""
        self.in_bytes = 0
        """The size of our window."""
        self._budget = budget
        self._owner = owner
        self._first_bytes = window_bytes
        self._put = put
        self._burst_begin = now  # of chunks without a pause, for the rate
        self._burst_last = now
        self._burst_bytes = 0

    def try_use(self, size: int) -> bool:
        if self.out_used + size > self.out_bytes:
            return False
        self.out_used += size
        return True

    def credited(self, size: int) -> None:
        """Take back `size` bytes that the peer returns. Raises: ProtocolError."""
        if size > self.out_used:
            raise ProtocolError("more credit than was taken")
        self.out_used -= size

    def told(self, size: int) -> None:
        """Note that the peer's window has `size` bytes from now on. Raises: ProtocolError."""
        if size < self.out_bytes or size > 2**48:
            raise ProtocolError("a flow-control window never shrinks")
        self.out_bytes = size

    def open(self) -> None:
        if not self.in_bytes:
            self._widen(self._first_bytes)

    def take(self, size: int) -> None:
        """Note that the peer uses `size` bytes of our window. Raises: ProtocolError."""
        self.in_used += size
        if self.in_used > self.in_bytes:
            raise ProtocolError("a message does not fit the flow-control window")

    def give_back(self, size: int) -> None:
        self.in_used -= size
        self._put(frames.frame(frames.CREDIT, stream=size))

    def measure(self, count: int, now: float, rtt: float | None) -> bool:
        """Count a chunk that arrived, and widen our window where rate times delay asks for more."""
        if now - self._burst_last > 0.1:
            self._burst_begin, self._burst_bytes = now, 0  # the first chunk of a burst only starts the clock
        else:
            self._burst_bytes += count
        self._burst_last = now
        if now - self._burst_begin < 0.1:
            return False
        rate = self._burst_bytes / (now - self._burst_begin)
        self._burst_begin, self._burst_bytes = now, 0
        self.bytes_per_second = rate if not self.bytes_per_second else 0.5 * (self.bytes_per_second + rate)
        if self.in_bytes and rtt is not None:
            # twice: a message's room comes back a round trip after its last byte
            more = int(2 * self.bytes_per_second * rtt) - self.in_bytes
            if more > self.in_bytes // 4:
                self._widen(more)
        return True

    def _widen(self, more: int) -> None:
        if self._budget.open_window(self._owner, more):
            self.in_bytes += more
            self._put(frames.frame(frames.WINDOW, stream=self.in_bytes))

    def release(self) -> None:
        self._budget.close_window(self._owner, self.in_bytes)
        self.in_bytes = 0
