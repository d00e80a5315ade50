"""Share: a trainer's side of the samples: what it holds, and which batches it has begun and ended. Pure."""

from collections import deque

from tesseract_async.sharing.samples import MAX_OPEN, Allotment, Report
from tesseract_async.sharing.spans import MAX_SPANS, Piece, Spans, fewest_pieces


class Share:
    """One trainer's samples. See `samples.Ledger`."""

    def __init__(self, num_samples: int, *, batch_size: int, ahead: int) -> None:
        """`batch_size`: samples of a batch; `ahead`: batches that are fetched before they are needed."""
        self.num_samples, self.batch_size, self.ahead = num_samples, batch_size, ahead
        self.epoch = 0
        self.num_again = 0
        """Samples that came here after somebody held them who did not end them."""
        self.num_begun = 0
        """The number of batches begun since the start."""
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
        """Ask for no more samples, and give back those that are in no batch."""
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
        """True while a batch is being filled."""
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
        """True if all samples that are left are being trained on, by others or here."""
        return not self.queue and self._is_dry

    def end_batch(self) -> None:
        """End the batch that is being filled, full or not."""
        if self._filling:
            self.begun[self.num_begun] = fewest_pieces(self._filling)
            self.num_begun += 1
            self._filling = []

    def ended(self, number: int | None = None, *, failed: bool = False) -> None:
        """Note that a batch has ended, by default the oldest. A batch that failed taught nothing, and is handed out
        again."""
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
        held = fewest_pieces([*self.queue, *begun, *self._filling])[:MAX_SPANS]
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
