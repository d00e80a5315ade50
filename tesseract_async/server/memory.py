"""A server's memory for its callers: answers, inputs that a backward will need, and which backwards may come."""

import asyncio
import ctypes
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import torch

from tesseract_async.identity import PeerID
from tesseract_async.runtime.work import WorkResult

KEEP_SECONDS: Final = 300.0
"""Seconds for which inputs and answers are kept: a trainer's step takes seconds, and a caller that asks again does so
within its timeout."""
SMALL_BYTES: Final = 16 * 1024
ENTRY_BYTES: Final = 1024
TENSOR_BYTES: Final = 512
"""Bytes of the objects around a remembered tensor: measured at 550 for an entry and 450 for a tensor, 1,300 in a
server."""

MAX_EXPECTED: Final = 65536
"""The most expected backwards; beyond that, the oldest are no longer expected."""
MAX_PEERS: Final = 1024
EXPECT_SECONDS: Final = 60.0
"""Seconds after which a backward is no longer expected: by default, no trainer waits longer for a call."""
MIN_PATIENCE: Final = 0.5
PATIENCE: Final = 2.0
"""A caller is waited for this many times as long as its slowest recent backward took."""
GONE_AFTER: Final = 1.0
"""Seconds without a connection after which a caller is gone: one that lost its connection dials again sooner."""
DECAY: Final = 0.9
"""The lag of the slowest backward shrinks to this part with each backward that came sooner."""

CallKey = tuple[str, bytes]
"""A backward: the expert's uid, and what `journal_key` gives."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Memory(Generic[Key, Value]):
    """A map within `max_bytes`, counted by `num_bytes_of`: beyond it, the owner that holds most loses its oldest entry.

    Entries older than `max_age` seconds are forgotten by `expire`.
    """

    def __init__(self, max_bytes: int, num_bytes_of: Callable[[Value], int], *, max_age: float = math.inf) -> None:
        self.max_bytes, self.max_age = max_bytes, max_age
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
        """Remember an entry as the newest. False if it is beyond the budget, alone or because of younger entries."""
        if key in self._entries:
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
        while self._entries:
            key, (_, _, since) = next(iter(self._entries.items()))
            if since > now - self.max_age:
                return
            self.pop(key)

    def clear(self) -> int:
        num_bytes, self.num_bytes = self.num_bytes, 0
        self._entries.clear()
        self._owners.clear()
        self._held.clear()
        return num_bytes


class CallerMemory:
    """Inputs of forwards and answers of backwards, for `KEEP_SECONDS`. On the loop."""

    def __init__(self, *, max_inputs_bytes: int, max_answers_bytes: int) -> None:
        self.inputs: Memory[bytes, Sequence[torch.Tensor | None]] = Memory(
            max_inputs_bytes, _num_bytes, max_age=KEEP_SECONDS
        )
        self.answers: Memory[CallKey, WorkResult] = Memory(
            max_answers_bytes, lambda answer: _num_bytes(answer.tensors), max_age=KEEP_SECONDS
        )
        self._sweep: asyncio.TimerHandle | None = None

    def keep_inputs(self, name: bytes, inputs: Sequence[torch.Tensor | None], owner: Hashable) -> bool:
        """Keep a forward's inputs. False if they are beyond the budget."""
        return self._keep(self.inputs, name, alone(inputs), owner)

    def keep_answer(self, key: CallKey, answer: WorkResult, owner: Hashable) -> None:
        self._keep(self.answers, key, WorkResult(alone(answer.tensors), answer.version), owner)

    def forget(self) -> int:
        """Drop everything: callers can send it again, or have it computed again. Returns the bytes."""
        return self.inputs.clear() + self.answers.clear()

    def close(self) -> None:
        """Drop everything, and cancel the timer."""
        self.forget()
        if self._sweep is not None:
            self._sweep.cancel()

    def _keep(self, memory: Memory[Key, Value], key: Key, value: Value, owner: Hashable) -> bool:
        loop = asyncio.get_running_loop()
        if self._sweep is None:
            self._sweep = loop.call_later(KEEP_SECONDS / 8, self._sweep_now)
        return memory.put(key, value, owner=owner, now=loop.time())

    def _sweep_now(self) -> None:
        loop = asyncio.get_running_loop()
        self.inputs.expire(loop.time())
        self.answers.expire(loop.time())
        again = self.inputs or self.answers
        self._sweep = loop.call_later(KEEP_SECONDS / 8, self._sweep_now) if again else None


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
        self._entries: OrderedDict[bytes, tuple[str, PeerID]] = OrderedDict()
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
        caller = self._callers.get(peer)
        if name is None and caller is not None:
            name = next(iter(caller.names.get(uid, ())), None)
        if name is None or name not in self._entries:
            return
        lag = now - self._drop(name)
        self._lag = _slowest(self._lag, lag)
        if caller is not None:
            caller.lag = _slowest(caller.lag, lag)

    def next_change(
        self, now: float, *, is_gone: Callable[[PeerID], bool], expects: Callable[[str], bool]
    ) -> float | None:
        """Return when to look again, if nothing comes before; None if nothing is worth waiting for."""
        soonest = math.inf
        for peer, caller in self._callers.items():
            if not caller.names:
                continue
            if not is_gone(peer):
                caller.gone_since = None
            elif caller.gone_since is None:
                caller.gone_since = now
            leaves = math.inf if caller.gone_since is None else caller.gone_since + GONE_AFTER
            lag = self._lag if caller.lag is None else caller.lag
            patience = EXPECT_SECONDS if lag is None else min(EXPECT_SECONDS, PATIENCE * lag + MIN_PATIENCE)
            for uid, names in list(caller.names.items()):
                for name, answered in list(names.items()):
                    due = min(leaves, answered + patience)
                    if due <= now or not expects(uid):
                        self._drop(name)
                    else:
                        soonest = min(soonest, due)
        return None if soonest == math.inf else soonest

    def _drop(self, name: bytes) -> float:
        uid, peer = self._entries.pop(name)
        names = self._callers[peer].names
        answered = names[uid].pop(name)
        if not names[uid]:
            del names[uid]
        return answered


def _slowest(before: float | None, lag: float) -> float:
    return lag if before is None else max(lag, DECAY * before + (1 - DECAY) * lag)


def alone(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return tensors that keep no more memory alive than their own: rows of a batch are copied, and small tensors,
    which lie in a block with others."""
    owned: list[torch.Tensor | None] = []
    for x in tensors:
        shares = x is not None and (x.nbytes < SMALL_BYTES or x.untyped_storage().nbytes() > x.nbytes)
        owned.append(x.clone() if shares and x is not None else x)
    return owned


def trim_heap() -> None:
    """Give free memory back to the system, where the C library has a call for it (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # macOS, Windows, musl: they do it by themselves, or never
        return


def _num_bytes(tensors: Sequence[torch.Tensor | None]) -> int:
    """Return the bytes of remembering them: small tensors are mostly objects, and those of strangers may be empty."""
    num_bytes = ENTRY_BYTES
    for x in tensors:
        if x is not None:
            num_bytes += TENSOR_BYTES + x.nbytes
    return num_bytes
