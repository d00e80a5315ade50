"""Rounds: gathers the members' pushes of one fragment, and says when a round closes and what its result is. Pure.

A round opens with the first push. It closes when every peer that pushed or came in the last two rounds has pushed, or
`timeout` after it opened: the members' median arrival plus four median deviations, at least `MIN_WAIT`, at most one
interval between rounds. A push that comes later counts in the next round. Each member counts as one of all known
members, even if it comes alone: otherwise, the differences of rounds that split would add up instead of being averaged.

With three members or more, none gains by coming often. That does not shorten the others' rounds: members that came
within two usual periods are known and waited for, an interval is at least one such period, and each member's arrivals
count alike. The sum of what a member sends is capped until all others have come once more, by count and not by time.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final

import torch

from tesseract_async.errors import Overloaded
from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU
from tesseract_async.runtime.gradients import trimmed_mean
from tesseract_async.sharing.fragment import KEPT_UPDATES, Fragment, Outer
from tesseract_async.sharing.layout import Cut, MergeKind
from tesseract_async.wire import compression

MIN_WAIT: Final = 2.0
"""The least seconds that a round waits for members that pushed lately."""
FIRST_INTERVAL: Final = 30.0
"""Seconds that count as one interval before two rounds have opened, and as the usual period before that is known."""
TRIMMED_FROM: Final = 4
"""The number of members from which the trimmed mean decides. Fewer cannot outvote a member that lies."""
TRIMMED_SHARE: Final = 0.25
JUDGED_FROM: Final = 3
"""The number of members from which each is measured by what most of them do."""
MAX_NORM_RATIO: Final = 3.0
"""A difference counts with at most this many times the members' median norm. Where fewer members are known, as after a
takeover, the largest of the last updates stands for it."""
MAX_MEMBERS: Final = 1024
"""Members that one round counts."""
GONE_AFTER: Final = 4.0
"""A member that stays away for this many of its own periods no longer counts in how often members come."""
MAX_TIMED: Final = 32
"""Members whose last arrivals say how long a round waits."""


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
    if cut.kind is MergeKind.FIXED:
        raise ValueError("frozen parameters stay as they are")
    norm = 0.0
    values = _decode(data, cut, outer)
    if cut.kind is not MergeKind.NEWEST:
        norm = float(torch.linalg.vector_norm(values))
        if not norm < math.inf:  # of values that are so large that sums of them would not be finite, too
            raise ValueError("a difference that is not finite, or far too large")
    return Push(peer, call_id, steps, data, norm)


@dataclass(slots=True)
class _Member:
    """A peer that has pushed."""

    at: float
    """The time of its last push."""
    norm: float
    """The norm of its last difference."""
    period: float = 0.0
    """Seconds between its last two differences (0: there was one at most); at least half of what they were before,
    since a flush comes early, and with little."""
    offsets: deque[float] = field(default_factory=partial(deque, maxlen=8))
    """The member's last arrivals, in seconds after the opening of the round that continues from the base."""
    spent: float = 0.0
    """The part of its allowance, which lasts until all others have pushed once more, that has counted already."""


class Rounds:
    """The pushes of one fragment at its primary. Times are seconds of any clock that does not jump."""

    def __init__(self, version: int, *, max_steps: int) -> None:
        """`max_steps`: a push counts as at most this many optimizer steps, whatever it claims."""
        self._version, self._max_steps = version, max_steps
        self._pushes: dict[PeerID, Push] = {}
        self._came: LRU[PeerID, int] = LRU(MAX_MEMBERS)
        """Peers that fetched the state since they pushed last, and the version up to which they are waited for."""
        self._members: LRU[PeerID, _Member] = LRU(MAX_MEMBERS)
        self._last_two: deque[frozenset[PeerID]] = deque(maxlen=2)
        """The members that pushed in each of the last two rounds."""
        self._waits_first = version > 0
        """True if it continues from what another host did, and knows none of the members yet."""
        self._share = 1.0
        """The part of all known members that pushed in the round that closed last."""
        self._num_known = 0
        """The number of known members in that round."""
        self._most = 0.0
        """The largest norm that their differences may have (0: not known)."""
        self._rooms: dict[PeerID, float] = {}
        """The part of that norm which is left to each member that pushed."""
        self._opened: dict[int, float] = {}
        """The time at which the round after each of the last versions opened."""
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
        one, before = _Member(now, push.norm), self._members.get(push.peer)
        if before is not None:
            one.norm, one.period = max(push.norm, before.norm / 2), max(now - before.at, before.period / 2)
            one.spent, one.offsets = before.spent, before.offsets
        known = max(base_version, next(iter(self._opened)))
        one.offsets.append(now - self._opened.get(known, now))
        self._members[push.peer] = one

    def expect(self, peer: PeerID) -> None:
        """Wait in the next two rounds for a peer that fetched the state: it will push. Not again before it did."""
        if peer not in self._came:
            self._came[peer] = self._version + 2

    def closes_at(self, now: float) -> float | None:
        """Return when this round closes, `now` if it should at once; None if none is open."""
        if not self._pushes:
            return None
        came = {peer for peer, until in self._came.items() if until > self._version}
        if came.union(*self._last_two, self._lately(now)) <= self._pushes.keys() and (came or not self._waits_first):
            return now
        return self._opened[self._version] + self.timeout

    @property
    def _period(self) -> float:
        """Return the usual seconds between two pushes of the members that still come; 0 while few are known. The
        `JUDGED_FROM` members that came last count in any case."""
        known = [one for one in reversed(self._members.values()) if one.period]
        if len(known) < JUDGED_FROM:
            return 0.0
        latest = known[0].at
        come = [one for one in known[JUDGED_FROM:] if latest - one.at < GONE_AFTER * one.period]
        return statistics.median_low([one.period for one in (*known[:JUDGED_FROM], *come)])

    def _lately(self, now: float) -> dict[PeerID, _Member]:
        """Return the members that came within two usual periods; none while there are too few for a usual one."""
        window = 2 * (self._period or FIRST_INTERVAL) if len(self._members) >= JUDGED_FROM else 0.0
        return {peer: one for peer, one in self._members.items() if now - one.at < window}

    @property
    def timeout(self) -> float:
        """Seconds after its first push at which a round closes in any case."""
        offsets = [at for one in islice(reversed(self._members.values()), MAX_TIMED) for at in one.offsets]
        median = statistics.median(offsets) if offsets else 0.0
        deviation = statistics.median(abs(one - median) for one in offsets) if offsets else 0.0
        return min(max(MIN_WAIT, median + 4 * deviation), max(MIN_WAIT, self._interval, self._period))

    def close(self) -> list[Push]:
        """End the round. Returns its pushes, in the order of their peers: their result must not depend on chance."""
        pushes = sorted(self._pushes.values(), key=lambda push: push.peer)
        lately = self._lately(max(self._members[peer].at for peer in self._pushes))
        lately |= {peer: self._members[peer] for peer in self._pushes}
        self._num_known = len(lately.keys() | frozenset[PeerID]().union(*self._last_two))
        self._share = len(pushes) / self._num_known
        norms = [one.norm for one in lately.values() if one.norm]
        self._most = MAX_NORM_RATIO * statistics.median_low(norms) if len(norms) >= JUDGED_FROM else 0.0
        for peer, one in self._members.items():  # by what others did: nobody earns room by coming often
            num_others = len(pushes) - (peer in self._pushes)
            one.spent = max(0.0, one.spent - num_others / max(1, self._num_known - 1))
        self._rooms = {peer: 1.0 - lately[peer].spent for peer in self._pushes}
        for push in pushes if self._most else ():
            lately[push.peer].spent += min(self._rooms[push.peer], push.norm / self._most)
        self._last_two.append(frozenset(self._pushes))
        for peer in self._pushes:
            self._came.pop(peer, None)
        self._pushes, self._waits_first = {}, False
        self._version += 1
        return pushes

    def merge(self, pushes: Sequence[Push], fragment: Fragment) -> torch.Tensor:
        """Return the result of the pushes of the round that closed last, decoded: their mean difference, or the newest
        values.

        While fewer than `TRIMMED_FROM` members are known, that is the mean weighted by steps. From there on each counts
        alike, and with that many in one round the trimmed mean decides. For integers it is the upper median, in which
        members that did not come stand for the present values. Takes milliseconds for each of them.
        """
        cut, outer, is_robust = fragment.cut, fragment.outer, self._num_known >= TRIMMED_FROM
        steps = [1 if is_robust else min(max(1, push.steps), self._max_steps) for push in pushes]
        if cut.kind is MergeKind.NEWEST and not is_robust:
            return _decode(pushes[steps.index(max(steps))].data, cut, outer)
        num_absent = self._num_known - len(pushes)
        if cut.kind is MergeKind.NEWEST and num_absent > len(pushes):
            return fragment.anchor.clone()
        differences = [_decode(push.data, cut, outer) for push in pushes]
        if cut.kind is MergeKind.NEWEST:
            present = [fragment.anchor] * num_absent
            return torch.stack([*differences, *present]).sort(0).values[self._num_known // 2].clone()
        most = self._most or MAX_NORM_RATIO * fragment.largest_update()
        for push, difference in zip(pushes, differences, strict=True):
            room = most * self._rooms[push.peer]
            if most and push.norm > room:
                difference.mul_(room / push.norm)
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
