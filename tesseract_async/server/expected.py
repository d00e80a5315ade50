"""The backwards that a leaving server should still wait for. No I/O: time and who is connected are given to it.

A forward with ``keep_inputs`` announces a backward. Most come within a training step; some never do: the trainer died
or only evaluated. So each caller is waited for as long as its own backwards have lately taken, and not once it is gone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tesseract_async.identity import PeerID

MAX_EXPECTED: Final = 65536
"""Entries; the oldest are no longer expected beyond that."""
MAX_PEERS: Final = 1024
EXPECT_SECONDS: Final = 60.0
"""After so long no backward is expected any more: the longest that a trainer waits for one call by default."""
MIN_PATIENCE: Final = 0.5
PATIENCE: Final = 2.0
"""How many times as long as its slowest recent backward took a caller is waited for."""
GONE_AFTER: Final = 1.0
"""Seconds without a connection after which a caller is gone: one that lost its connection dials again sooner."""
DECAY: Final = 0.9
"""The slowest one's weight shrinks to this part with each that came sooner."""

_Key = tuple[str, PeerID]


@dataclass(slots=True)
class _Caller:
    lag: float | None = None
    """Seconds from a forward's answer to its backward, about the slowest of late; None before the first one came."""
    names: dict[str, OrderedDict[bytes, float]] = field(default_factory=dict)
    """uid -> name of the forward -> when it was answered."""
    gone_since: float | None = None


class ExpectedBackwards:
    """Forwards that were answered and whose backward has not come. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, _Key] = OrderedDict()
        self._callers: OrderedDict[PeerID, _Caller] = OrderedDict()
        self._lag: float | None = None  # all callers'

    def __len__(self) -> int:
        return len(self._entries)

    def expect(self, name: bytes, uid: str, peer: PeerID, now: float) -> None:
        """Take note of an answered forward; `name` tells it apart."""
        caller = self._callers.setdefault(peer, _Caller())
        self._callers.move_to_end(peer)
        caller.names.setdefault(uid, OrderedDict())[name] = now
        self._entries[name] = (uid, peer)
        if len(self._entries) > MAX_EXPECTED:
            self._drop(next(iter(self._entries)))
        if len(self._callers) > MAX_PEERS:
            _, oldest = self._callers.popitem(last=False)
            for gone in [one for names in oldest.names.values() for one in names]:
                del self._entries[gone]

    def came(self, name: bytes | None, uid: str, peer: PeerID, now: float) -> None:
        """Take note of a backward: of the forward `name`, or, where it brings its own inputs, the caller's oldest."""
        if name is None:
            caller = self._callers.get(peer)
            names = None if caller is None else caller.names.get(uid)
            name = next(iter(names)) if names else None
        if name is None or name not in self._entries:
            return
        answered = self._drop(name)
        owner = self._callers.get(peer)
        lag = now - answered
        self._lag = lag if self._lag is None else max(lag, DECAY * self._lag + (1 - DECAY) * lag)
        if owner is not None:
            owner.lag = lag if owner.lag is None else max(lag, DECAY * owner.lag + (1 - DECAY) * lag)

    def next_change(
        self, now: float, *, is_gone: Callable[[PeerID], bool], expects: Callable[[str], bool]
    ) -> float | None:
        """Return when to look again, if nothing comes before; None if nothing is worth waiting for.

        Forgotten are those of callers that are gone, of experts whose backwards go elsewhere (`expects`), and those
        that are later than usual for their callers.
        """
        soonest: float | None = None
        for peer, caller in self._callers.items():
            if not caller.names:
                continue
            if not is_gone(peer):
                caller.gone_since = None
            elif caller.gone_since is None:
                caller.gone_since = now
            leaves = None if caller.gone_since is None else caller.gone_since + GONE_AFTER
            patience = self._patience(caller)
            for uid, names in list(caller.names.items()):
                for name, answered in list(names.items()):
                    due = answered + patience if leaves is None else min(leaves, answered + patience)
                    if due <= now or not expects(uid):
                        self._drop(name)
                    else:
                        soonest = due if soonest is None else min(soonest, due)
        return soonest

    def _patience(self, caller: _Caller) -> float:
        lag = self._lag if caller.lag is None else caller.lag
        return EXPECT_SECONDS if lag is None else min(EXPECT_SECONDS, PATIENCE * lag + MIN_PATIENCE)

    def _drop(self, name: bytes) -> float:
        uid, peer = self._entries.pop(name)
        names = self._callers[peer].names
        answered = names[uid].pop(name)
        if not names[uid]:
            del names[uid]
        return answered
