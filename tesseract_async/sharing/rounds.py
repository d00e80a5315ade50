"""Rounds: gathers the members' pushes of one fragment, and says when a round closes and what it comes to. Pure.

A round opens with the first push. It closes when every peer that pushed or came in the last two rounds has pushed, or
`deadline` after it opened: the median arrival plus four median deviations, at least `MIN_WAIT`, at most one interval
between rounds. A push that comes later counts in the next round. Each member counts as one of all that are known, also
where it comes alone: differences of rounds that split would add up otherwise, where their mean is meant.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tesseract_async.errors import Overloaded
from tesseract_async.identity import PeerID
from tesseract_async.runtime.gradients import trimmed_mean
from tesseract_async.sharing.fragment import KEPT_UPDATES, Outer
from tesseract_async.sharing.layout import Cut, Kind
from tesseract_async.wire import compression

MIN_WAIT: Final = 2.0
"""Seconds that a round waits at least for members who pushed lately."""
FIRST_INTERVAL: Final = 30.0
"""Seconds that count as one interval before two rounds have opened."""
TRIMMED_FROM: Final = 4
"""Members from which the trimmed mean decides. Fewer cannot outvote a liar."""
TRIMMED_SHARE: Final = 0.25
MAX_NORM_RATIO: Final = 3.0
"""Differences count with at most so many times the median norm, from three members on."""
MAX_MEMBERS: Final = 1024
"""Members that one round counts."""
_OFFSETS: Final = 32


@dataclass(frozen=True, slots=True)
class Push:
    """One member's difference, encoded, and what was found when it arrived."""

    peer: PeerID
    call_id: bytes
    steps: int
    data: bytes
    norm: float


def judge(peer: PeerID, call_id: bytes, steps: int, data: bytes, cut: Cut, outer: Outer) -> Push:
    """Decode a difference and measure it. Untrusted; takes milliseconds.

    Raises: ProtocolError if it does not fit the fragment; ValueError if it is not finite, or of frozen parameters.
    """
    if cut.kind is Kind.FIXED:
        raise ValueError("frozen parameters stay as they are")
    norm = 0.0
    values = _decode(data, cut, outer)
    if cut.kind is not Kind.NEWEST:
        norm = float(torch.linalg.vector_norm(values))
        if norm == float("inf") or norm != norm:
            raise ValueError("a difference that is not finite")
    return Push(peer, call_id, steps, data, norm)


class Rounds:
    """The pushes of one fragment at its primary. Times are seconds of any clock that does not jump."""

    def __init__(self, version: int, *, max_steps: int) -> None:
        """`max_steps`: a push counts as at most so many optimizer steps, whatever it claims."""
        self._version, self._max_steps = version, max_steps
        self._pushes: dict[PeerID, Push] = {}
        self._came: dict[PeerID, int] = {}
        """Peers that will push, and the version up to which they are waited for."""
        self._members: deque[frozenset[PeerID]] = deque(maxlen=2)
        self._waits_first = version > 0
        """It goes on from what another host did, and knows none of the members yet."""
        self._share = 1.0
        """The part of all who pushed lately that did so in the round that closed last."""
        self._offsets: deque[float] = deque(maxlen=_OFFSETS)
        self._norms: deque[float] = deque(maxlen=_OFFSETS)
        self._opened: dict[int, float] = {}
        """When the round opened that led on from each of the last versions."""
        self._interval = FIRST_INTERVAL

    @property
    def version(self) -> int:
        """The version of the anchor that the present round leads on from."""
        return self._version

    @property
    def is_open(self) -> bool:
        """True between the first push and the end of a round."""
        return bool(self._pushes)

    def add(self, push: Push, base_version: int, now: float) -> None:
        """Count a push whose difference was taken from the anchor of `base_version`.

        Raises: Overloaded for a second push of one peer, or one more than fits.
        """
        if push.peer in self._pushes:
            raise Overloaded("one push per round: wait for the answer to the last one", retry_after=1.0)
        if len(self._pushes) >= MAX_MEMBERS:
            raise Overloaded("this round has as many members as it can hold", retry_after=self._interval)
        if not self._pushes:
            last = self._opened.get(self._version - 1)
            if last is not None:
                self._interval = max(MIN_WAIT, now - last)
            self._opened[self._version] = now
            while len(self._opened) > KEPT_UPDATES + 1:
                del self._opened[next(iter(self._opened))]
        self._pushes[push.peer] = push
        self._offsets.append(now - self._opened.get(base_version, now))

    def expect(self, peer: PeerID) -> None:
        """Wait in the next two rounds for a peer that fetched the state: it will push."""
        if len(self._came) < MAX_MEMBERS:
            self._came[peer] = self._version + 2

    def closes_at(self, now: float) -> float | None:
        """Return when this round closes, `now` if it should at once; None if none is open."""
        if not self._pushes:
            return None
        if self._came.keys() | self._known <= self._pushes.keys() and (self._came or not self._waits_first):
            return now
        return self._opened[self._version] + self.deadline

    @property
    def _known(self) -> frozenset[PeerID]:
        return frozenset(self._pushes).union(*self._members)

    @property
    def deadline(self) -> float:
        median = statistics.median(self._offsets) if self._offsets else 0.0
        deviation = statistics.median(abs(one - median) for one in self._offsets) if self._offsets else 0.0
        return min(max(MIN_WAIT, median + 4 * deviation), max(MIN_WAIT, self._interval))

    def close(self) -> list[Push]:
        """End the round. Returns its pushes, in the order of their peers: what they come to must not depend on luck."""
        pushes = sorted(self._pushes.values(), key=lambda push: push.peer)
        self._share = len(pushes) / len(self._known)
        self._members.append(frozenset(self._pushes))
        self._pushes, self._waits_first = {}, False
        self._version += 1
        self._came = {peer: until for peer, until in self._came.items() if until > self._version}
        return pushes

    def merge(self, pushes: Sequence[Push], cut: Cut, outer: Outer) -> torch.Tensor:
        """Return what the pushes of the round that closed last come to, decoded: their mean difference, or the newest
        values.

        Under `TRIMMED_FROM` members the mean weighted by steps; from there on the trimmed mean, in which each counts
        alike (of integers the upper median). Takes milliseconds for each of them.
        """
        steps = [min(max(1, push.steps), self._max_steps) for push in pushes]
        if cut.kind is Kind.NEWEST and len(pushes) < TRIMMED_FROM:
            return _decode(pushes[steps.index(max(steps))].data, cut, outer)
        differences = [_decode(push.data, cut, outer) for push in pushes]
        if cut.kind is Kind.NEWEST:
            return torch.stack(differences).sort(0).values[len(pushes) // 2].clone()
        # those of earlier rounds count, too: who comes alone must not go as far as he likes
        self._norms.extend(push.norm for push in pushes if push.norm)
        if len(self._norms) >= 3:
            most = MAX_NORM_RATIO * statistics.median_low(self._norms)
            for push, difference in zip(pushes, differences, strict=True):
                if push.norm > most:
                    difference.mul_(most / push.norm)
        if len(pushes) >= TRIMMED_FROM:
            (mean,) = trimmed_mean([[one] for one in differences], TRIMMED_SHARE, scale=self._share)
            assert mean is not None
            return mean
        total = sum(steps)
        mean = torch.zeros(cut.numel, dtype=cut.dtype, device="cpu")
        for difference, count in zip(differences, steps, strict=True):
            mean.add_(difference, alpha=self._share * count / total)
        return mean


def _decode(data: bytes, cut: Cut, outer: Outer) -> torch.Tensor:
    return compression.decode(memoryview(bytearray(data)), cut.dtype, (cut.numel,), outer.codec_of(cut))
