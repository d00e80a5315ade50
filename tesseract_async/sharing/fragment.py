"""Fragment: a piece of the shared parameters, with the outer optimizer's momentum and its last updates. Pure.

A fragment takes a step when a round of pushes closes. The step is encoded first and then applied as it decodes, so that
everybody who applies the same update to the same anchor has the same bits: primary, followers, holders and trainers.
Momentum follows from the updates as well, so hosts need nothing else to replay them.

With m the momentum, g the members' mean difference and u the update: Nesterov's rule is m' = mu m + g, u = g + mu m'.
Solved for what everybody knows, m' = (mu m + u) / (1 + mu): what quantizing u lost is not carried on.

The anchor is ahead of what the members had on average, by mu m': it is where the next differences are taken from. To
evaluate a model, use `Fragment.merged`.

A `Copy` is a trainer's side: it pushes anchor - local, goes on stepping, and adds new - sent when the answer comes,
where `sent` are its values at the time of the push: what it learned meanwhile stays.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tesseract_async.errors import ProtocolError
from tesseract_async.sharing.layout import Cut, MergeKind, is_finite
from tesseract_async.wire import compression

KEPT_UPDATES: Final = 8
"""Updates that a fragment keeps: a trainer whose base is older fetches the whole state."""
ROOT_BYTES: Final = 16
UNKNOWN: Final = bytes(ROOT_BYTES)
"""Stands for a root that is not known."""
NEWCOMERS: Final = frozenset({"anchor", "counts", "manifest"})
"""The tensors of a fragment's state that a trainer needs; for stepped fragments also the last update (`LAST`). Hosts
have more: momentum and all of the last updates."""
LAST: Final = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """The outer optimizer: SGD with Nesterov's momentum on the members' mean difference."""

    learning_rate: float = 1.0
    momentum: float = 0.5
    codec: str = "int4_blockwise"
    """The codec of differences and updates of floating fragments."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate <= 10:
            raise ValueError(f"the outer learning rate is above 0 and at most 10, not {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"the outer momentum is 0 or more and less than 1, not {self.momentum}")
        if self.codec not in compression.CODECS:
            raise ValueError(f"unknown codec {self.codec!r}; known: {', '.join(compression.CODECS)}")

    def codec_of(self, cut: Cut) -> str:
        return "none" if cut.kind is MergeKind.NEWEST else self.codec


@dataclass(frozen=True, slots=True)
class Update:
    """One step of a fragment, in the form in which it travels."""

    version: int
    """The version that it leads to."""
    data: bytes
    """The encoded step; of integers, their new values."""
    root: bytes
    """The `anchor_root` after it."""


def anchor_root(anchor: torch.Tensor) -> bytes:
    return hashlib.blake2b(memoryview(anchor.numpy()).cast("B"), digest_size=ROOT_BYTES).digest()  # type: ignore[arg-type, unused-ignore]


class Fragment:
    """The state of one fragment. Its methods take milliseconds for large fragments: do not call them on an event
    loop."""

    def __init__(
        self,
        cut: Cut,
        outer: Outer,
        anchor: torch.Tensor,
        *,
        version: int = 0,
        momentum: torch.Tensor | None = None,
        updates: Sequence[Update] = (),
        before: bytes = UNKNOWN,
    ) -> None:
        """`updates`: those that led here, and `before`, the root that they began at.

        Raises: ProtocolError if these do not fit one another.
        """
        self.cut, self.outer, self.version = cut, outer, version
        self.has_momentum = cut.kind is MergeKind.STEPPED and outer.momentum > 0
        if momentum is None and self.has_momentum:
            momentum = torch.zeros_like(anchor)
        for tensor in (anchor, momentum):
            if tensor is not None and (tensor.shape != (cut.numel,) or tensor.dtype != cut.dtype):
                raise ProtocolError("a fragment's state has another shape or dtype")
            if tensor is not None and tensor.is_floating_point() and not is_finite(tensor):
                raise ProtocolError("a fragment's state is not finite")
        if not 0 <= version < 2**62 or len(updates) > KEPT_UPDATES:
            raise ProtocolError("malformed version or updates of a fragment")
        if any(one.version != version - len(updates) + 1 + at for at, one in enumerate(updates)):
            raise ProtocolError("a fragment's updates do not follow one another")
        self.anchor = anchor
        self.momentum = momentum if self.has_momentum else None
        self.root = anchor_root(anchor)
        if updates and updates[-1].root != self.root:
            raise ProtocolError("a fragment's last update leads elsewhere")
        first = Update(version - len(updates), b"", before if updates else self.root)
        # one tuple, so that other threads may look at it while a step is taken
        self._line: tuple[Update, ...] = (first, *updates)
        self._norms: dict[int, float] = {}

    def copied(self, *, keeps_momentum: bool = True) -> "Fragment":
        """Return a copy that goes on by itself; without momentum it can replay updates, but take no step. The two may
        share tensors, since tensors are replaced and never changed."""
        made = copy.copy(self)
        made._norms = {}
        if not keeps_momentum:
            made.has_momentum, made.momentum = False, None
        return made

    @property
    def updates(self) -> tuple[Update, ...]:
        return self._line[1:]

    @property
    def before(self) -> bytes:
        """The root of the state that the first of `updates` began at."""
        return self._line[0].root

    def merged(self) -> torch.Tensor:
        """Return the values to evaluate: what the members had on average at the last update, as far as that tells.

        Of mu m', by which the anchor is ahead, mu u / (1 + mu) is taken back: the part of the last update, which all
        have who have the anchor. What is left of it is a third with the usual momentum, and of older rounds.
        """
        mu = self.outer.momentum
        if self.cut.kind is not MergeKind.STEPPED or not mu or not self.updates:
            return self.anchor
        last = self._decoded(self.updates[-1].data)
        return self.anchor + last.mul_(self.outer.learning_rate * mu / (1 + mu))

    def step(self, mean: torch.Tensor) -> Update:
        """Take one step on the members' mean difference (of integers: on their new values). Returns the update."""
        wanted = mean
        if self.has_momentum:
            assert self.momentum is not None
            mu = self.outer.momentum
            wanted = mean * (1 + mu) + self.momentum * (mu * mu)
        data = bytes(compression.encode(wanted, self.outer.codec_of(self.cut)))
        self._take(data)
        self._append(Update(self.version, data, self.root))
        return self._line[-1]

    def largest_update(self) -> float:
        """Return the largest norm among the last `KEPT_UPDATES` updates; 0 while there are fewer. Takes milliseconds
        for each that was not measured yet."""
        kept = {one.version: one for one in self.updates}
        if len(kept) < KEPT_UPDATES:
            return 0.0
        for version in kept.keys() - self._norms.keys():
            self._norms[version] = float(torch.linalg.vector_norm(self._decoded(kept[version].data)))
        self._norms = {version: self._norms[version] for version in kept}
        return max(self._norms.values())

    def _append(self, update: Update) -> None:
        self._line = (*self._line[-KEPT_UPDATES:], update)

    def replay(self, updates: Sequence[Update]) -> None:
        """Apply updates that others took, skipping those that this state has.

        Raises: ProtocolError if they do not follow from this state, or do not lead where they say. Nothing changes
        then; the state must be fetched whole.
        """
        before = self.anchor, self.momentum, self.version, self.root, self._line
        try:
            for one in updates:
                if one.version <= self.version:
                    continue
                if one.version != self.version + 1:
                    raise ProtocolError("an update is missing")
                self._take(one.data)
                if one.root != self.root:
                    raise ProtocolError("an update leads to another state than its sender has")
                self._append(one)
        except ProtocolError:
            self.anchor, self.momentum, self.version, self.root, self._line = before
            raise

    def since(self, version: int, root: bytes) -> tuple[Update, ...] | None:
        """Return the updates that lead from a base to this state; None if the base is unknown or too old.

        May be asked on any thread.
        """
        line = self._line
        at = version - line[0].version
        return line[at + 1 :] if 0 <= at < len(line) and line[at].root == root else None

    def _take(self, data: bytes) -> None:
        """Apply one encoded step. Each operation is done by itself, so that no machine fuses two and rounds only
        once."""
        step = self._decoded(data)
        if self.cut.kind is MergeKind.NEWEST:
            self.anchor = step
        else:
            mu, momentum = self.outer.momentum, self.momentum
            if momentum is not None:
                momentum = momentum.mul(mu).add_(step).div_(1 + mu)
            rate = self.outer.learning_rate if self.cut.kind is MergeKind.STEPPED else 1.0
            anchor = self.anchor - (step if rate == 1.0 else step.mul_(rate))
            for one in (anchor, momentum):
                if one is not None and not is_finite(one):
                    raise ProtocolError("an update leads to values that are not finite")
            self.anchor, self.momentum = anchor, momentum
        self.version += 1
        self.root = anchor_root(self.anchor)

    def _decoded(self, data: bytes) -> torch.Tensor:
        shape = (self.cut.numel,)
        return compression.decode(memoryview(bytearray(data)), self.cut.dtype, shape, self.outer.codec_of(self.cut))


class Copy:
    """One fragment at a trainer: the anchor that it knows, and the push that is under way."""

    def __init__(self, fragment: Fragment, *, epoch: int = 0) -> None:
        """`fragment`, and its `epoch`: as fetched from the fragment's hosts."""
        self.epoch = epoch
        # a trainer needs no momentum: updates hold it already
        self._fragment = fragment.copied(keeps_momentum=False)
        self.cut, self._outer = fragment.cut, fragment.outer
        self.sent: torch.Tensor | None = None

    @property
    def base(self) -> tuple[int, int, bytes]:
        """The epoch, version and root of the anchor: what a push builds on."""
        return self.epoch, self._fragment.version, self._fragment.root

    @property
    def anchor(self) -> torch.Tensor:
        """The swarm's values, as far as this trainer knows."""
        return self._fragment.anchor

    def merged(self) -> torch.Tensor:
        """The swarm's values to evaluate; see `Fragment.merged`."""
        return self._fragment.merged()

    def push(self, local: torch.Tensor) -> bytes:
        """Return the encoded difference of this trainer's values, which are kept until `merge`."""
        assert self.sent is None
        self.sent = local
        values = local if self.cut.kind is MergeKind.NEWEST else self.anchor - local
        return bytes(compression.encode(values, self._outer.codec_of(self.cut)))

    def cancel(self) -> None:
        """Forget the push under way: the next one holds its difference, too."""
        self.sent = None

    def merge(self, updates: Sequence[Update], *, epoch: int) -> torch.Tensor:
        """Take the updates that answer the push, or that came without one. Returns what to add to the local values.

        Raises: ProtocolError if they do not lead where they say, and changes nothing: fetch the state whole then, and
        `rebase`.
        """
        sent = self.anchor if self.sent is None else self.sent
        if self.sent is not None and (not updates or updates[-1].version <= self._fragment.version):
            raise ProtocolError("a push was answered without its update")
        self._fragment.replay(updates)
        self.epoch, self.sent = epoch, None
        return self.anchor - sent

    def rebase(self, fragment: Fragment, *, epoch: int, counted: bool = False) -> torch.Tensor:
        """Go on from another state. Returns what to add to the local values, whose difference stays to be pushed;
        `counted`: the push under way is in that state."""
        before = self.sent if counted and self.sent is not None else self.anchor
        self._fragment, self.epoch, self.sent = fragment.copied(keeps_momentum=False), epoch, None
        return self.anchor - before
