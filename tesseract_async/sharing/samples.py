"""Samples: which of an epoch's samples are free, on their way, and done. Pure.

Samples are places in the epoch's order, and travel as spans of an epoch. The `Ledger` hands them out. Each message of a
trainer lists all that it holds, so that a lost reply costs nothing, and after a takeover the next primary, which knows
what was done when the last round closed, learns the rest from the trainers before it hands out more.

At other times a trainer can end only samples that it held before: its word about others does not count.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgpack

from tesseract_async.errors import Overloaded, ProtocolError
from tesseract_async.identity import PeerID
from tesseract_async.sharing.spans import MAX_SPANS, Piece, Spans

LEASE_SECONDS: Final = 30.0
"""Seconds of silence after which a trainer's samples are handed out again."""
GRACE_SECONDS: Final = 8.0
"""Seconds that a new primary waits to hear what trainers hold; each of them reports every second. For `LEASE_SECONDS`
it believes them about samples that nobody else has."""
STALL_SECONDS: Final = 600.0
"""Seconds after which a trainer that reports, but ends nothing, loses its samples: its loop may hang."""
REST_SECONDS: Final = 2.0
"""Seconds for which it then gets nothing: others come first."""
MAX_HELD: Final = 1 << 20
"""The most samples that a trainer holds at a time."""
MAX_TRAINERS: Final = 4096
MAX_TRAINERS_OF_PEER: Final = 8
MAX_OPEN: Final = 2
"""The most epochs that are under way at a time."""
MAX_EPOCH: Final = 2**40
STATE_BYTES: Final = 32 << 10

TrainerName = tuple[PeerID, bytes]
"""A trainer: its peer, and the 16 random bytes of one start of its program."""


class Report(NamedTuple):
    """A trainer's message. After it, the trainer holds the pieces that it says it holds, if they are neither done nor
    held by others. A new primary also believes it about the pieces that it says it has done."""

    epoch: int
    """The epoch that it goes through."""
    num_samples: int
    wanted: int
    """Samples."""
    held: Sequence[Piece]
    done: Sequence[Piece]
    returned: Sequence[Piece]


class Allotment(NamedTuple):
    """The answer to a `Report`."""

    pieces: Sequence[Piece]
    """Samples that the trainer holds from now on, too."""
    again: int
    """The number of these samples that another trainer held before and did not end."""
    gone: Sequence[Piece]
    """Samples that the trainer says it holds, but that others hold or have done."""
    first: int
    """All epochs before this one are over."""
    waits: bool
    """True if there may be free samples, but none are handed out yet."""


@dataclass(slots=True)
class _Epoch:
    num_samples: int
    free: Spans
    held: dict[TrainerName, Spans] = field(default_factory=dict)
    again: Spans = field(default_factory=Spans)

    def let_go(self, name: TrainerName) -> None:
        for start, stop in self.held.pop(name, ()):
            self.free.add(start, stop)
            self.again.add(start, stop)

    def done(self) -> Spans:
        done = Spans([(0, self.num_samples)])
        for spans in (self.free, *self.held.values()):
            for start, stop in spans:
                done.cut(start, stop)
        return done


class Ledger:
    """The ledger that the primary of the first fragment keeps. Times are seconds of any clock that does not jump."""

    def __init__(self, state: bytes = b"", *, free_at: float = -math.inf) -> None:
        """`state`: as `encode` gave it. `free_at`: nothing is handed out before, and trainers may hold what another
        ledger handed out. Raises: ProtocolError."""
        self._free_at = free_at
        self.first_epoch = 0
        self.epochs: dict[int, _Epoch] = {}
        self._answered: dict[TrainerName, tuple[int, Allotment]] = {}
        self._heard: dict[TrainerName, float] = {}
        self._moved: dict[TrainerName, float] = {}
        """The time at which each trainer last ended something, or held nothing. While that time is in the future, the
        trainer gets nothing."""
        if state:
            self.first_epoch, self.epochs = _decode(state)

    def report(self, name: TrainerName, turn: int, report: Report, now: float) -> Allotment:
        """Take a trainer's message; its messages have ascending numbers, `turn`. One that comes again gets its answer.

        Raises: Overloaded for more trainers than can be remembered, and for a message that was overtaken; ValueError
        for an epoch that does not fit, and for numbers that the next primary could not read.
        """
        claimed = {number for number, _, _ in (*report.held, *report.done)}
        if not 0 < report.num_samples < 2**48 or max(claimed | {report.epoch}) > MAX_EPOCH:
            raise ValueError(f"epochs have at least one sample, and numbers up to {MAX_EPOCH}")
        for other in [other for other, heard in self._heard.items() if heard < now - LEASE_SECONDS]:
            self._forget(other)
        if name not in self._heard:
            of_peer = Counter(peer for peer, _ in self._heard)[name[0]]
            if len(self._heard) >= MAX_TRAINERS or of_peer >= MAX_TRAINERS_OF_PEER:
                raise Overloaded("too many trainers to hand out samples to", retry_after=LEASE_SECONDS)
        last, answer = self._answered.get(name, (-1, None))
        if turn == last and answer is not None:
            return answer
        if turn < last:
            raise Overloaded("a later message of this trainer has come already", retry_after=0.0)
        self._heard[name] = now
        if claimed and not self.epochs and not self.first_epoch:  # there was a primary before, which left no state
            self._free_at = now + GRACE_SECONDS
        is_waiting = now < self._free_at
        if not is_waiting:  # an epoch of which nobody said anything until now is over
            self.first_epoch = min(self.epochs, default=self.first_epoch)
        for number in sorted(claimed | {report.epoch}):
            if not is_waiting:
                self._open(number, report.num_samples)
            elif number in claimed:
                self._reopen(number, report.num_samples)
        believes = now < self._free_at - GRACE_SECONDS + LEASE_SECONDS
        self._let_go_of_stalled(name, report, now)
        rests = self._moved[name] > now
        gone = self._take(name, report, rests=rests, believes=believes)
        self._close()
        is_waiting |= rests
        pieces, again = ([], 0) if is_waiting else self._hand_out(name, report)
        waits = is_waiting or (report.epoch >= self.first_epoch and report.epoch not in self.epochs)
        grant = Allotment(pieces, again, gone, self.first_epoch, waits)
        self._answered[name] = turn, grant
        return grant

    def _forget(self, name: TrainerName) -> None:
        for epoch in self.epochs.values():
            epoch.let_go(name)
        del self._heard[name]
        self._moved.pop(name, None)
        self._answered.pop(name, None)

    def _let_go_of_stalled(self, name: TrainerName, report: Report, now: float) -> None:
        moved = self._moved.get(name, now)
        if report.done or report.returned or not any(name in epoch.held for epoch in self.epochs.values()):
            moved = max(now, moved)
        elif now - moved >= STALL_SECONDS:
            moved = now + REST_SECONDS
            for epoch in self.epochs.values():
                epoch.let_go(name)
        self._moved[name] = moved

    def _open(self, number: int, num_samples: int) -> None:
        """Begin an epoch, if it is the next one."""
        known = self.epochs.get(number)
        if known is not None and known.num_samples != num_samples:
            raise ValueError(f"epoch {number} has {known.num_samples} samples here, not {num_samples}")
        if known is not None or number < self.first_epoch:
            return
        if self.epochs or self.first_epoch:
            newest = max(self.epochs, default=self.first_epoch - 1)
            if number > newest + 1:
                raise ValueError(f"epoch {number} does not follow epoch {newest}, where the other trainers are")
            if len(self.epochs) >= MAX_OPEN or (self.epochs and len(self.epochs[newest].free)):
                return
        else:
            self.first_epoch = number
        self.epochs[number] = _Epoch(num_samples, Spans([(0, num_samples)]))

    def _reopen(self, number: int, num_samples: int) -> None:
        """Go on with an epoch that the last primary began after it left its state: any number may have passed since.
        The one before it may be under way, too; a trainer that holds or has done some of it says so."""
        if number < self.first_epoch or number in self.epochs:
            return
        self.epochs[number] = _Epoch(num_samples, Spans([(0, num_samples)]))
        self.first_epoch = max(self.first_epoch, max(self.epochs) - MAX_OPEN + 1)
        for old in [one for one in self.epochs if one < self.first_epoch]:
            del self.epochs[old]

    def _take(self, name: TrainerName, report: Report, *, rests: bool, believes: bool) -> list[Piece]:
        """Bring up to date what this trainer holds: nothing new if it `rests`; if the ledger `believes` it, also what
        it has done that another one handed out. Returns what it does not hold, though it says so."""
        said = {number: (Spans(), Spans(), Spans()) for number in self.epochs}
        gone = list[Piece]()
        for place, pieces in enumerate((report.held, report.done, report.returned)):
            for number, start, stop in pieces:
                if number in said:
                    said[number][place].add(start, min(stop, self.epochs[number].num_samples))
                elif not place:
                    gone.append((number, start, stop))
        for number, (held, done, returned) in said.items():
            epoch = self.epochs[number]
            own = epoch.held.setdefault(name, Spans())
            for start, stop in (*(() if rests else held), *(done if believes else ())):
                fits = own.num + stop - start <= MAX_HELD and len(own) < MAX_SPANS
                for span in epoch.free.cut(start, stop) if fits and len(epoch.free) < MAX_SPANS else ():
                    own.add(*span)
                    epoch.again.cut(*span)
            for start, stop in done:
                own.cut(start, stop)
            kept = Spans(span for start, stop in held for span in own.cut(start, stop))
            for start, stop in own:  # returned, or handed out by a reply that was lost
                epoch.free.add(start, stop)
            for start, stop in returned:
                epoch.again.cut(start, stop)
            for start, stop in kept:
                held.cut(start, stop)
            gone += [(number, start, stop) for start, stop in held]
            epoch.held[name] = kept
            if not len(kept):
                del epoch.held[name]
        return gone[:MAX_SPANS]

    def _close(self) -> None:
        """Forget epochs that are over, the first ones."""
        for number in sorted(self.epochs):
            epoch = self.epochs[number]
            if number > self.first_epoch or len(epoch.free) or epoch.held:
                return
            del self.epochs[number]
            self.first_epoch = number + 1

    def _hand_out(self, name: TrainerName, report: Report) -> tuple[list[Piece], int]:
        """Return first what is left of the epoch before."""
        held = [epoch.held.get(name, Spans()) for epoch in self.epochs.values()]
        wanted = min(report.wanted, MAX_HELD - sum(one.num for one in held))
        most = MAX_SPANS - sum(map(len, held))
        pieces, again = list[Piece](), 0
        for number in sorted(one for one in self.epochs if one <= report.epoch):
            epoch = self.epochs[number]
            for start, stop in epoch.free.take(wanted, most=most - len(pieces)):
                pieces.append((number, start, stop))
                epoch.held.setdefault(name, Spans()).add(start, stop)
                again += sum(high - low for low, high in epoch.again.cut(start, stop))
                wanted -= stop - start
        return pieces, again

    def encode(self) -> bytes:
        """Return what the next primary needs: which samples are done, in at most `STATE_BYTES`. If they do not fit,
        some count as not done."""
        if not self.epochs and not self.first_epoch:
            return b""
        done = {number: [*epoch.done()] for number, epoch in self.epochs.items()}
        while True:
            rows = [
                [number, self.epochs[number].num_samples, [place for span in spans for place in span]]
                for number, spans in done.items()
            ]
            state: bytes = msgpack.packb([self.first_epoch, rows])
            if len(state) <= STATE_BYTES:
                return state
            done = {number: spans[: len(spans) // 2] for number, spans in done.items()}


def _decode(state: bytes) -> tuple[int, dict[int, _Epoch]]:
    try:
        first, rows = msgpack.unpackb(state)
        epochs: dict[int, _Epoch] = {}
        for number, num_samples, flat in rows:
            spans = list(zip(flat[::2], flat[1::2], strict=True))
            if any(type(one) is not int or not 0 <= one < 2**48 for one in (number, num_samples, *flat)):
                raise ValueError
            if any(place > num_samples for place in flat):
                raise ValueError
            epochs[number] = _Epoch(num_samples, Spans([(0, num_samples)]))
            for start, stop in spans:
                epochs[number].free.cut(start, stop)
        if type(first) is not int or not 0 <= first < 2**48 or len(epochs) > MAX_OPEN:
            raise ValueError
        if any(number < first for number in epochs):
            raise ValueError
    except Exception:  # msgpack raises many kinds
        raise ProtocolError("malformed samples in the state of a fragment") from None
    return first, epochs
