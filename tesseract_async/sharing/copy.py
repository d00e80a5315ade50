"""Copy: a trainer's side of one fragment: what it pushes, and what it adds to its own parameters. Pure.

A trainer pushes anchor - local, goes on stepping, and adds new - sent when the answer comes, where `sent` are its
values at the time of the push: what it learned meanwhile stays.
"""

from collections.abc import Sequence

import torch

from tesseract_async.errors import ProtocolError
from tesseract_async.sharing.fragment import Fragment, Outer, Update
from tesseract_async.sharing.layout import Cut, MergeKind
from tesseract_async.wire import compression


class Copy:
    """One fragment at a trainer: the anchor that it knows, and the push that is under way."""

    def __init__(
        self,
        cut: Cut,
        outer: Outer,
        anchor: torch.Tensor,
        *,
        version: int,
        updates: Sequence[Update] = (),
        epoch: int = 0,
    ) -> None:
        """`anchor`, and the `updates` that led there: as fetched from the fragment's hosts. Raises: ProtocolError if
        they do not fit."""
        self.cut, self.outer, self.epoch = cut, outer, epoch
        self._fragment = self._made(anchor, version, updates)
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

    def _made(self, anchor: torch.Tensor, version: int, updates: Sequence[Update]) -> Fragment:
        # a trainer needs no momentum: updates hold it already
        return Fragment(self.cut, self.outer, anchor, version=version, updates=updates[-1:], keeps_momentum=False)

    def push(self, local: torch.Tensor) -> bytes:
        """Return the encoded difference of this trainer's values, which are kept until `merge`."""
        assert self.sent is None
        self.sent = local
        values = local if self.cut.kind is MergeKind.NEWEST else self.anchor - local
        return bytes(compression.encode(values, self.outer.codec_of(self.cut)))

    def cancel(self) -> None:
        """Forget the push under way: the next one holds what it held."""
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

    def rebase(
        self,
        anchor: torch.Tensor,
        *,
        version: int,
        epoch: int,
        updates: Sequence[Update] = (),
        counted: bool = False,
    ) -> torch.Tensor:
        """Go on from another state. Returns what to add to the local values, whose difference stays to be pushed;
        `counted`: the push under way is in that state.

        Raises: ProtocolError if it does not fit.
        """
        before = self.sent if counted and self.sent is not None else self.anchor
        self._fragment = self._made(anchor, version, updates)
        self.epoch, self.sent = epoch, None
        return anchor - before
