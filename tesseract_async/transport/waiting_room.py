"""Limits on connections that are not established yet: in all, and for one address range. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

Guest = TypeVar("Guest", bound=Hashable)

SETTLED: Final = 1.0
"""Seconds after which a guest may have to go for one of its own group; an honest one is in by then."""


class WaitingRoom(Generic[Guest]):
    """Guests by the group (an address range) that they come from. What leaves must be told by `leave`."""

    def __init__(self, *, most: int, most_per_group: int) -> None:
        self._most = most
        self._most_per_group = most_per_group
        self._groups: dict[Hashable, OrderedDict[Guest, float]] = {}
        self._group_of: dict[Guest, Hashable] = {}

    def __len__(self) -> int:
        return len(self._group_of)

    def guests(self) -> list[Guest]:
        """All of them."""
        return list(self._group_of)

    def enter(self, guest: Guest, group: Hashable, now: float) -> tuple[bool, Guest | None]:
        """Whether the guest may come in, and who has to go for it: one of its own group, or of the one with most."""
        num_mine = len(self._groups.get(group, ()))
        crowd: OrderedDict[Guest, float] | None = None
        if num_mine >= self._most_per_group:
            crowd = self._groups[group]
        elif len(self) >= self._most:
            crowd = max(self._groups.values(), key=len)
            if len(crowd) <= num_mine:
                crowd = self._groups[group]
        victim: Guest | None = None
        if crowd is not None:
            victim, since = next(iter(crowd.items()))
            if crowd is self._groups.get(group) and now - since < SETTLED:
                return False, None
            self.leave(victim)
        self._groups.setdefault(group, OrderedDict())[guest] = now
        self._group_of[guest] = group
        return True, victim

    def leave(self, guest: Guest) -> None:
        """It is in, or gone. Repeating it does nothing."""
        if guest in self._group_of:
            group = self._group_of.pop(guest)
            del self._groups[group][guest]
            if not self._groups[group]:
                del self._groups[group]
