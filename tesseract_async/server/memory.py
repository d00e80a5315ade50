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
    """A map that forgets its oldest entries beyond `max_bytes`, counted by `num_bytes_of`."""

    def __init__(self, max_bytes: int, num_bytes_of: Callable[[Value], int]) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._num_bytes_of = num_bytes_of
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Value | None:
        return self._entries.get(key)

    def put(self, key: Key, value: Value) -> bool:
        """Remembers an entry as the newest. False if it alone is beyond the budget."""
        self.pop(key)
        num_bytes = self._num_bytes_of(value)
        if num_bytes > self.max_bytes:
            return False
        self._entries[key] = value
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, old = self._entries.popitem(last=False)
            self.num_bytes -= self._num_bytes_of(old)
        return True

    def pop(self, key: Key) -> Value | None:
        value = self._entries.pop(key, None)
        if value is not None:
            self.num_bytes -= self._num_bytes_of(value)
        return value

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.num_bytes = 0
