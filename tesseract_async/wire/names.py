"""Unguessable names of 16 random bytes, for what a stranger may ask for by name.

Many are drawn at once: the system call releases the interpreter's lock, and next to a busy device thread it takes long.
"""

import os
from typing import Final

NAME_BYTES: Final = 16
_AT_ONCE: Final = 256

_names: list[bytes] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_names.clear)  # else parent and child would draw the same


def new_name() -> bytes:
    """A name that was never given before. From any thread."""
    try:
        return _names.pop()
    except IndexError:
        drawn = os.urandom(NAME_BYTES * _AT_ONCE)
        _names.extend([drawn[at : at + NAME_BYTES] for at in range(NAME_BYTES, len(drawn), NAME_BYTES)])
        return drawn[:NAME_BYTES]
