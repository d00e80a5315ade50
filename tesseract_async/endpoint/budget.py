"""A bound on bytes that several connections share, and the line of those who wait for room in it."""

from __future__ import annotations

from collections.abc import Callable


class Reservation:
    """Room for `size` bytes of a `Budget`: held once `held` is true, until `release`."""

    __slots__ = ("size", "held", "_budget", "_granted")

    def __init__(self, budget: Budget, size: int, granted: Callable[[], None]) -> None:
        self.size = size
        self.held = False
        self._budget: Budget | None = budget
        self._granted = granted

    def release(self) -> None:
        """Gives the room back, or leaves the line. Repeating it does nothing."""
        budget, self._budget = self._budget, None
        if budget is not None:
            budget._leave(self)


class Budget:
    """At most `total` bytes are held at once. First come, first served: a large wish is never overtaken for ever."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._line: dict[Reservation, None] = {}

    @property
    def num_waiting(self) -> int:
        """Reservations in the line."""
        return len(self._line)

    def reserve(self, size: int, granted: Callable[[], None]) -> Reservation:
        """Reserves `size` bytes at once (`held` is true) or as soon as there is room, when `granted` is called.

        Raises: ValueError if it could never be granted.
        """
        if size > self.total:
            raise ValueError(f"{size} bytes never fit a budget of {self.total}")
        reservation = Reservation(self, size, granted)
        if not self._line and self.used + size <= self.total:
            self.used += size
            reservation.held = True
        else:
            self._line[reservation] = None
        return reservation

    def try_reserve(self, size: int) -> Reservation | None:
        """Reserves at once or not at all."""
        if self._line or self.used + size > self.total:
            return None
        return self.reserve(size, _nothing)

    def _leave(self, reservation: Reservation) -> None:
        if reservation.held:
            reservation.held = False
            self.used -= reservation.size
        else:
            self._line.pop(reservation, None)
        while self._line:
            first = next(iter(self._line))
            if self.used + first.size > self.total:
                return
            del self._line[first]
            self.used += first.size
            first.held = True
            first._granted()


def _nothing() -> None:
    pass
