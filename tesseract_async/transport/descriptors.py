"""How many connections a process may hold, so that files, checkpoints and its own dials never lack a descriptor."""

from __future__ import annotations

from typing import Final, NamedTuple

KEPT: Final = 1 / 4
"""Of the process's descriptors that connections of others never take."""


class Room(NamedTuple):
    """Counts; a connection takes two descriptors, and so does a relayed pair."""

    connections: int
    half_open: int
    """At each of two doors: before the first bytes, and during the handshake."""
    splices: int


def room_for(limit: int) -> Room:
    """How `limit` descriptors are divided."""
    usable = int(limit * (1 - KEPT))
    return Room(max(4, usable // 3), max(4, usable // 12), max(1, usable // 12))


def descriptor_limit() -> int:
    """Files and sockets that this process may have open now; a large number where the system sets no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return 1 << 20
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft in (resource.RLIM_INFINITY, -1) else soft


def raise_descriptor_limit(wanted: int = 65536) -> None:
    """Takes as many descriptors as the system lets a process have, up to `wanted`: for programs, not for libraries."""
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
