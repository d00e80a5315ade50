"""Samples: which of an epoch's samples are free, on their way, and done: at the primary, and at one trainer. Pure.

Samples are places in the epoch's order, and travel as spans of an epoch. The `Ledger` hands them out. Each message of a
trainer says all that it holds; so a reply that was lost costs nothing, and after a takeover the next primary, which
knows what was done when the last round closed, learns the rest from the trainers before it hands out more.

At other times a trainer ends only what it held before: that it has ended others counts for nothing.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Final, NamedTuple

import msgpack

from tesseract_async.errors import Overloaded, ProtocolError
from tesseract_async.identity import PeerID

LEASE_SECONDS: Final = 30.0
"""Seconds of silence after which a trainer's samples are handed out again."""
GRACE_SECONDS: Final = 8.0
"""A new primary waits so long for what trainers hold; each of them reports every second. For `LEASE_SECONDS` it takes
their word for what nobody else has."""
STALL_SECONDS: Final = 600.0
"""Seconds after which a trainer that reports, but ends nothing, loses what it holds: its loop may hang."""
REST_SECONDS: Final = 2.0
"""Seconds for which it then gets nothing: others come first."""
MAX_HELD: Final = 1 << 20
"""Samples that a trainer holds at a time."""
MAX_SPANS: Final = 512
"""Spans of a trainer, of a message, and of an epoch's free samples where trainers name what they hold."""
MAX_TRAINERS: Final = 4096
MAX_TRAINERS_OF_PEER: Final = 8
MAX_OPEN: Final = 2
"""Epochs that are under way at a time."""
MAX_EPOCH: Final = 2**40
STATE_BYTES: Final = 32 << 10

Span = tuple[int, int]
"""First and last but one."""
Piece = tuple[int, int, int]
"""An epoch's number, and a span of it."""
TrainerName = tuple[PeerID, bytes]
"""A trainer: its peer, and the 16 random bytes of one start of its program."""


class Spans:
    """A set of whole numbers, as spans in ascending order that do not touch one another."""

    __slots__ = ("_spans",)

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans: list[Span] = []
        for start, stop in spans:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def num(self) -> int:
        """The count of numbers."""
        return sum(stop - start for start, stop in self._spans)

    def add(self, start: int, stop: int) -> None:
        """Put these in."""
        if start >= stop:
            return
        first = last = bisect_left(self._spans, start, key=itemgetter(1))
        while last < len(self._spans) and self._spans[last][0] <= stop:
            start, stop = min(start, self._spans[last][0]), max(stop, self._spans[last][1])
            last += 1
        self._spans[first:last] = [(start, stop)]

    def cut(self, start: int, stop: int) -> list[Span]:
        """Take these out, as far as they are in. Returns those that were."""
        if start >= stop:
            return []
        first = last = bisect_right(self._spans, start, key=itemgetter(1))
        found, left = list[Span](), list[Span]()
        while last < len(self._spans) and self._spans[last][0] < stop:
            low, high = self._spans[last]
            found.append((max(low, start), min(high, stop)))
            left += [one for one in ((low, start), (stop, high)) if one[0] < one[1]]
            last += 1
        self._spans[first:last] = left
        return found

    def take(self, num: int, *, most: int) -> list[Span]:
        """Take the first `num` out, in at most so many spans."""
        found = list[Span]()
        while num > 0 and self._spans and len(found) < most:
            start, stop = self._spans[0]
            found += self.cut(start, min(stop, start + num))
            num -= found[-1][1] - found[-1][0]
        return found


def encode_pieces(pieces: Iterable[Piece]) -> list[int]:
    """Return the pieces one after the other, as they travel."""
    return [number for piece in pieces for number in piece]


def decode_pieces(flat: object) -> list[Piece]:
    """Read what `encode_pieces` made. Untrusted. Raises: ProtocolError."""
    if type(flat) is not list or len(flat) > 3 * MAX_SPANS or len(flat) % 3:
        raise ProtocolError("malformed samples")
    if any(type(number) is not int or not 0 <= number < 2**48 for number in flat):
        raise ProtocolError("malformed samples")
    pieces = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    if any(start >= stop for _, start, stop in pieces):
        raise ProtocolError("malformed samples")
    return pieces


class Report(NamedTuple):
    """A trainer's message. Pieces that it says it holds, and that are neither done nor held by others, it holds then.
    To a new primary so are those that it says it has done."""

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
    """Samples that it says it holds, and that others hold or have done."""
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
        """The time at which a trainer ended something last, or held nothing. If that is to come, it gets nothing."""
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
                raise Overloaded("more trainers than samples can be handed out to", retry_after=LEASE_SECONDS)
        last, answer = self._answered.get(name, (-1, None))
        if turn == last and answer is not None:
            return answer
        if turn < last:
            raise Overloaded("a later message of this trainer came before", retry_after=0.0)
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
        """Begin an epoch, if it is its time."""
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
        """Return what a next primary needs: what is done. At most `STATE_BYTES`: beyond, some counts as not done."""
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


class Share:
    """A trainer's side: what it holds, and which batches it has begun and ended. See `Ledger`."""

    def __init__(self, num_samples: int, *, batch_size: int, ahead: int) -> None:
        """`batch_size`: samples of a batch; `ahead`: batches that are fetched before they are needed."""
        self.num_samples, self.batch_size, self.ahead = num_samples, batch_size, ahead
        self.epoch = 0
        self.num_again = 0
        """Samples that came here after somebody held them who did not end them."""
        self.num_begun = 0
        """Batches, ever."""
        self._turn, self._session = 0, b""
        self.queue: deque[Piece] = deque()
        """Samples that wait to be taken."""
        self.begun: dict[int, list[Piece]] = {}
        """The samples of each batch that has not ended, by its number."""
        self._filling: list[Piece] = []
        self._done: list[Piece] = []
        self._returned: list[Piece] = []
        self.sent = (0, 0)
        self._all_done: dict[int, Spans] = {}
        self._is_iterating = False
        self._is_over = self._is_dry = False

    # ------------------------------------------------------------------------------------------------ the loop's side

    def begin(self, epoch: int, *, gives_back: bool) -> None:
        """Go through the samples of an epoch from now on. `gives_back`: the batches that have not ended."""
        self.end()
        if gives_back:
            self.give_back()
        self.epoch = epoch
        self._is_iterating, self._is_over, self._is_dry = True, False, False

    def end(self) -> None:
        """Ask for no more, and give back what no batch has."""
        self._is_iterating = False
        self._returned += self.queue
        self.queue.clear()
        self.end_batch()

    def give_back(self) -> None:
        """Give back the batches that have not ended."""
        for pieces in self.begun.values():
            self._returned += pieces
        self.begun.clear()

    @property
    def has_begun(self) -> bool:
        """True if there are batches that have not ended."""
        return bool(self.begun or self._filling)

    @property
    def is_filling(self) -> bool:
        """True in the midst of a batch."""
        return bool(self._filling)

    def take(self) -> tuple[int, int] | None:
        """Return the next sample, as epoch and place; None while there is none here."""
        if not self.queue:
            return None
        epoch, start, stop = self.queue.popleft()
        if start + 1 < stop:
            self.queue.appendleft((epoch, start + 1, stop))
        self._filling.append((epoch, start, start + 1))
        if len(self._filling) == self.batch_size:
            self.end_batch()
        return epoch, start

    @property
    def is_over(self) -> bool:
        """True if nothing more will come in this epoch."""
        return not self.queue and (self._is_over or not self._is_iterating)

    @property
    def is_dry(self) -> bool:
        """True if all that is left is on its way at others, or here."""
        return not self.queue and self._is_dry

    def end_batch(self) -> None:
        """End the batch that is being filled, full or not."""
        if self._filling:
            self.begun[self.num_begun] = _joined(self._filling)
            self.num_begun += 1
            self._filling = []

    def ended(self, number: int | None = None, *, failed: bool = False) -> None:
        """A batch has ended, the oldest by default; one that failed taught nothing, and is handed out again."""
        if number is None:
            number = next(iter(self.begun), -1)
        pieces = self.begun.pop(number, [])
        if failed:
            self._returned += pieces
            return
        self._done += pieces
        for epoch, start, stop in pieces:
            self._all_done.setdefault(epoch, Spans()).add(start, stop)

    # ------------------------------------------------------------------------------------------------ the network's

    @property
    def wants(self) -> bool:
        """True if it is time to ask for more."""
        low = 2 * sum(stop - start for _, start, stop in self.queue) <= self.ahead * self.batch_size
        return self._is_iterating and not self._is_over and low

    @property
    def has_news(self) -> bool:
        """True if there is something to tell."""
        return bool(self._done or self._returned)

    def report(self) -> tuple[int, Report]:
        """Return the next message, and its number. One is under way at a time."""
        self._turn += 1
        queued = sum(stop - start for _, start, stop in self.queue)
        wanted = self.ahead * self.batch_size - queued if self.wants else 0
        begun = [piece for pieces in self.begun.values() for piece in pieces]
        held = _joined([*self.queue, *begun, *self._filling])[:MAX_SPANS]
        done, returned = self._done[:MAX_SPANS], self._returned[:MAX_SPANS]
        self.sent = len(done), len(returned)
        return self._turn, Report(self.epoch, self.num_samples, max(0, wanted), held, done, returned)

    def granted(self, session: bytes, report: Report, grant: Allotment) -> None:
        """Take the answer to the last message. `session` names the ledger: a new one is told all that was done."""
        num_done, num_returned = self.sent
        del self._done[:num_done], self._returned[:num_returned]
        if session != self._session:
            if self._session:
                self._done = [
                    (at, *span) for at, spans in self._all_done.items() if at >= grant.first for span in spans
                ]
            self._session = session
        # a takeover may go back to a state in which an epoch was not over
        self._all_done = {at: spans for at, spans in self._all_done.items() if at >= grant.first - MAX_OPEN}
        lost: dict[int, Spans] = {}
        for epoch, start, stop in grant.gone:
            lost.setdefault(epoch, Spans()).add(start, stop)
        if lost:
            kept = [(at, Spans([(start, stop)])) for at, start, stop in self.queue]
            for at, spans in kept:
                for start, stop in lost.get(at, ()):
                    spans.cut(start, stop)
            self.queue = deque((at, *span) for at, spans in kept for span in spans)
        if not self._is_iterating or report.epoch != self.epoch:
            self._returned += grant.pieces
            return
        self.queue += grant.pieces
        self.num_again += grant.again
        self._is_over = grant.first > self.epoch
        self._is_dry = report.wanted > 0 and not grant.pieces and not grant.waits


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Return the same samples in as few pieces as can be."""
    epochs: dict[int, Spans] = {}
    for epoch, start, stop in pieces:
        epochs.setdefault(epoch, Spans()).add(start, stop)
    return [(epoch, *span) for epoch, spans in epochs.items() for span in spans]
