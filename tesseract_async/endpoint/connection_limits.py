"""Limits of a process's connections, and of those that are not established yet. No I/O."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, NamedTuple, TypeVar

Guest = TypeVar("Guest", bound=Hashable)

KEPT: Final = 1 / 4
"""Share of the process's descriptors that connections of others never take."""
SETTLED: Final = 1.0
"""Seconds after which a guest may have to make room for one of its own group; an honest guest has been let in by
then."""


class Room(NamedTuple):
    """Counts; a connection takes two descriptors, and so does a relayed pair."""

    connections: int
    half_open: int
    """Connections that may wait before their first bytes, and as many in the middle of the handshake."""
    splices: int


def room_for(limit: int) -> Room:
    usable = int(limit * (1 - KEPT))
    return Room(max(4, usable // 3), max(4, usable // 12), max(1, usable // 12))


def descriptor_limit() -> int:
    """Return how many files and sockets this process may have open; a large number where there is no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return 1 << 20
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft in (resource.RLIM_INFINITY, -1) else soft


def raise_descriptor_limit(wanted: int = 65536) -> None:
    """Take as many descriptors as the system lets a process have, up to `wanted`: for programs, not for libraries."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (ValueError, OSError):  # macOS has a lower one of its own
            return


class WaitingRoom(Generic[Guest]):
    """Guests by the group (an address range) that they come from. When a guest leaves, call `leave`."""

    def __init__(self, *, most: int, most_per_group: int) -> None:
        self._most = most
        self._most_per_group = most_per_group
        self._groups: dict[Hashable, OrderedDict[Guest, float]] = {}
        self._group_of: dict[Guest, Hashable] = {}

    def __len__(self) -> int:
        return len(self._group_of)

    def guests(self) -> list[Guest]:
        return list(self._group_of)

    def enter(self, guest: Guest, group: Hashable, now: float) -> tuple[bool, Guest | None]:
        """Return whether the guest may come in, and which guest makes room for it: one of its own group, or of the
        largest group."""
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
        if guest in self._group_of:
            group = self._group_of.pop(guest)
            del self._groups[group][guest]
            if not self._groups[group]:
                del self._groups[group]
