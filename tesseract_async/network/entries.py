"""Entries of the network as its users see them. Pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tesseract_async.identity import PeerID
from tesseract_async.wire.packed import Value


@dataclass(frozen=True, slots=True)
class StoreItem:
    """One item of `TesseractNetwork.store_many`; the fields are `store`'s arguments."""

    key: str
    value: Value
    ttl: float
    subkey: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One live entry of the network, as its owner signed it."""

    key: str
    subkey: str | None
    owner: PeerID
    sequence: int
    """Rises with every store of the same entry."""
    expiration: float
    """Wall-clock seconds (``time.time()``)."""
    value: Value


class Entries(list[Entry]):
    complete = True
    """False if holders reported entries that none of them sent."""


def key_digest(key: str) -> bytes:
    """Return where in the id space a key lives. Raises: TypeError unless it is text; ValueError for lone surrogates."""
    if not isinstance(key, str):
        raise TypeError(f"a key is text, not {type(key).__name__}")
    return hashlib.sha256(key.encode()).digest()


def single_view(entries: Sequence[Entry]) -> Value:
    """Return None, a single value, or a dictionary of the subkeys' values: the latest of each, whichever its owner."""
    best: dict[str | None, Entry] = {}
    for entry in entries:
        shown = best.get(entry.subkey)
        if shown is None or (entry.sequence, entry.owner) > (shown.sequence, shown.owner):
            best[entry.subkey] = entry
    single = best.pop(None, None)
    if best:
        return {subkey: entry.value for subkey, entry in best.items()}
    return None if single is None else single.value
