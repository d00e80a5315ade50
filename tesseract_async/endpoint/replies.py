"""Large replies that wait for their callers to take them: how many bytes of them, and for how long. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tesseract_async.endpoint.budget import Budget, Owner
from tesseract_async.endpoint.under_way import Incoming

PATIENCE: Final = 30.0
"""Seconds within which a caller must say that it has room, and over which it is watched whether it takes anything."""
LEAST_TAKEN: Final = 240 * 1024
"""Bytes of its replies that a connection must take in `PATIENCE` seconds: 64 kbit/s."""


class Replies:
    """Those of one connection. `budget` is shared by all connections of the node, None: there is no such bound."""

    def __init__(self, budget: Budget | None, owner: Owner, *, max_bytes: int) -> None:
        self.num_bytes = 0
        """That wait to be granted or sent."""
        self._budget = budget
        self._owner = owner
        self._max_bytes = max_bytes
        self._added = 0  # bytes of all replies so far
        self._taken = 0  # what of them had left at `_taken_at`
        self._taken_at = 0.0

    def hold(self, call: Incoming, size: int, *, now: float, give_up: Callable[[], None]) -> bool:
        """Whether a reply of `size` bytes may wait here, within the bounds on such memory (one always may)."""
        if self.num_bytes and self.num_bytes + size > self._max_bytes:
            return False
        if self._budget is not None:
            call.reply_held = self._budget.keep(self._owner, size, give_up)
            if call.reply_held is None:
                return False
        if not self.num_bytes:
            self._taken, self._taken_at = self._added, now
        self.num_bytes += size
        self._added += size
        call.reply_size, call.reply_since = size, now
        return True

    def drop(self, call: Incoming) -> None:
        """This call's reply has been taken or given up, if it had one that waited here."""
        self.num_bytes -= call.reply_size
        call.reply_size = 0
        if call.reply_held is not None:
            call.reply_held.release()

    def overdue(self, incoming: Mapping[int, Incoming], now: float) -> list[int]:
        """The calls whose replies nobody takes."""
        if not self.num_bytes:
            return []
        waiting = {stream: call for stream, call in incoming.items() if call.reply_size and call.sending is not None}
        taken = self._added - sum(call.sending.left for call in waiting.values() if call.sending is not None)
        stands_still = False
        if now - self._taken_at > PATIENCE:
            stands_still = taken - self._taken < LEAST_TAKEN
            self._taken, self._taken_at = taken, now
        return [
            stream
            for stream, call in waiting.items()
            if now - call.reply_since > PATIENCE
            and (stands_still or (call.sending is not None and not call.sending.granted))
        ]
