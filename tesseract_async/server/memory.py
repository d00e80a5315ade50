"""What a server remembers for its callers, within byte budgets: answers, and inputs that a backward will need."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

_TRIM: Any = None


def trim_heap() -> None:
    """Gives free memory back to the system, where the C library has a call for it (glibc)."""
    global _TRIM
    if _TRIM is None:
        try:
            _TRIM = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError, TypeError):  # macOS, Windows, musl: they do it by themselves, or never
            _TRIM = _nothing
    _TRIM(0)


def _nothing(_: int) -> None:
    return


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Memory(Generic[Key, Value]):
    """A map within `max_bytes`, counted by `num_bytes_of`: beyond it, the owner that holds most loses its oldest entry.

    Entries older than `max_age` seconds are forgotten by `expire`.
    """

    def __init__(self, max_bytes: int, num_bytes_of: Callable[[Value], int], *, max_age: float = float("inf")) -> None:
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.num_bytes = 0
        self._num_bytes_of = num_bytes_of
        self._entries: OrderedDict[Key, tuple[Value, Hashable, float]] = OrderedDict()
        self._owners: dict[Hashable, OrderedDict[Key, int]] = {}  # each owner's entries, with their bytes
        self._held: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Value | None:
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def put(self, key: Key, value: Value, *, owner: Hashable = None, now: float = 0.0) -> bool:
        """Remembers an entry as the newest. False if it is beyond the budget, alone or because of what is younger."""
        self.pop(key)
        num_bytes = self._num_bytes_of(value)
        if num_bytes > self.max_bytes:
            return False
        self._entries[key] = (value, owner, now)
        self._owners.setdefault(owner, OrderedDict())[key] = num_bytes
        self._held[owner] = self._held.get(owner, 0) + num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            most = max(self._held, key=self._held.__getitem__)
            self.pop(next(iter(self._owners[most])))
        return key in self._entries

    def pop(self, key: Key) -> Value | None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        value, owner, _ = entry
        mine = self._owners[owner]
        num_bytes = mine.pop(key)
        self.num_bytes -= num_bytes
        self._held[owner] -= num_bytes
        if not mine:
            del self._owners[owner], self._held[owner]
        return value

    def expire(self, now: float) -> None:
        """Forgets what is too old."""
        while self._entries:
            key, (_, _, since) = next(iter(self._entries.items()))
            if since > now - self.max_age:
                return
            self.pop(key)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self._owners.clear()
        self._held.clear()
        self.num_bytes = 0
