"""Decides which experts to ask for which rows, and when a mixture's pass is over. Pure: no loop, no clock, no network.

A machine for each direction. Each is told what happened and when (`start`, `answered`, `failed`, and in forward
`came`), and says which calls are to be sent (`calls_to_send`), when it wants to look at the clock again (`timer_at`)
and whether the pass `is_over`. Times are points on the caller's clock, in seconds.

An `ExpertCall` describes what one expert is asked; `grouping` combines the calls that go to one server. `StrictForward`
is for callers that want all answers or an error. Suffixes of names: R rows, K experts wanted, N experts, T experts
tried, L lines (pairs of a row and an expert).
"""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from tesseract_async.client.latency import ABANDON_SECONDS, BLOCK_SECONDS, Patience
from tesseract_async.client.routing import Candidates, Indices, group, within_capacity
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import NotEnoughExperts, Overloaded, describe
from tesseract_async.wire.names import new_name

Direction = Literal["forward", "backward"]

_MIN_PATIENCE_SECONDS: Final = 0.02
_MAX_SHARE: Final = 4.0
"""A call with more rows than the others is given at most this many times as long."""


_SENT: Final = {"forward": "answer", "backward": "gradient"}


@dataclass(slots=True, eq=False)
class ExpertCall:
    expert: int
    """The expert's number among the candidates."""
    uid: str
    rows: Indices
    sent: float
    id: bytes = field(default_factory=new_name)
    """Identifies what is asked, wherever and however often it is asked, and again in the backward: see
    `ApplyRequest.ids`."""
    expected: float | None = None
    """Seconds that it usually takes, set by the sender; None if that is not known."""
    grace: float = 0.0
    """Seconds to go on waiting for it when it is slow and all rows have enough answers; set by the sender."""
    is_slow: bool = False
    """True if it takes longer than usual: its rows are sent elsewhere, and only rows that need it wait for it."""
    seconds: float = 0.0
    """Seconds until it was answered or given up."""
    error: BaseException | None = None
    """The first error that a replica answered, or that kept a replica from being asked; set by the sender."""


class CallsUnderWay(ABC):
    """The calls of one pass: which have ended, and which take longer than is usual."""

    direction: ClassVar[Direction]
    is_strict = False
    """True if it fails with the first call that fails: nothing is left out."""

    def __init__(self, candidates: Candidates, num_rows: int, *, timeout: float, patience: Patience) -> None:
        """`timeout`: seconds for the whole pass. A call is slow if it exceeds the usual time by more than the share
        `patience` of that time."""
        self.candidates = candidates
        self.is_over = False
        self.rows_in_need: torch.Tensor | None = None
        """``bool[rows]``: the rows that have tried all experts in vain. Report further experts to `came`."""
        self.answers: list[ExpertCall] = []
        self.given_up: list[ExpertCall] = []
        """The calls that had not ended when the pass was over."""
        self.num_answers_R: Indices = np.zeros(num_rows, dtype=np.int64)
        self.errors: dict[str, BaseException] = {}
        """The errors, by uid, of the experts that failed or were given up, without those that answered after all."""
        self.left_out: dict[str, BaseException] = {}
        """The errors, by uid, of the experts that failed or were too slow, with those that answered after all."""
        self._timeout = timeout
        self._patience = patience
        self._fresh: list[ExpertCall] = []
        self._under_way: dict[ExpertCall, None] = {}
        self._unneeded: set[ExpertCall] = set()
        """Calls that are neither waited for nor counted as given up: stand-ins whose rows have all of their answers."""
        self._num_first = 0
        """Calls sent at the start."""
        self._started = math.inf
        self.deadline = math.inf
        """The time at which it is over, whatever has come."""
        self._stalled = 0.0
        self._late: dict[ExpertCall, float] | None = None
        """See `_late_times`; None while it has to be worked out anew."""
        self._usual: tuple[float, float] | None = None
        """Seconds and rows of the median answer, once half of those first asked (and not failed) have answered."""
        self._num_judged = -1, -1
        """Answers and experts left out when that was worked out."""

    def start(self, now: float) -> None:
        """Begin the pass. Call it once."""
        self._started, self.deadline = now, now + self._timeout

    def answered(self, calls: Sequence[ExpertCall], now: float) -> None:
        """Note that the answers of these calls came. `calls_to_send` says what follows from that."""
        self.num_answers_R += self._ended(calls, now)
        self.answers += calls
        if self.errors:
            for call in calls:
                self.errors.pop(call.uid, None)

    def failed(self, call: ExpertCall, now: float, error: BaseException) -> None:
        self._ended([call], now)
        self.errors[call.uid] = self.left_out[call.uid] = error

    def calls_to_send(self, now: float, *, stalled: float = 0.0) -> list[ExpertCall]:
        """Decide, after any event or when the timer is due, and return the calls to send now, each once.

        `stalled`: seconds since the start in which the caller could not have heard from anybody.
        """
        if self._num_judged != (len(self.answers), len(self.left_out)):
            before, self._usual = self._usual, None
            if self.answers and 2 * len(self.answers) >= self._num_first - len(self.left_out):
                seconds = statistics.median([call.seconds for call in self.answers])
                self._usual = seconds, statistics.median([len(call.rows) for call in self.answers])
            if self._usual != before:
                self._late = None
            self._num_judged = len(self.answers), len(self.left_out)
        if stalled != self._stalled:
            self._stalled, self._late = stalled, None
        if not self.is_over:
            self._decide(now)
        fresh, self._fresh = self._fresh, []
        if fresh:
            self._late = None  # their senders set what is expected of them
        return fresh

    @abstractmethod
    def timer_at(self) -> float:
        """Return when to ask `calls_to_send` next if nothing happens before. Each event may change it."""

    def usual_seconds(self, calls: Iterable[ExpertCall]) -> list[float | None]:
        """Return the seconds that each of `calls` may reasonably take, by what it usually takes and what others of its
        size took; None if nothing is known."""
        if self._usual is None:
            return [call.expected for call in calls]
        seconds, num_rows = self._usual
        found: list[float | None] = []
        for call in calls:  # without a call of a function: all are looked at again after each answer
            share, expected = len(call.rows) / num_rows, call.expected
            usual = seconds * (1.0 if share < 1.0 else share if share < _MAX_SHARE else _MAX_SHARE)
            found.append(usual if expected is None or expected < usual else expected)
        return found

    @abstractmethod
    def shortage(self) -> NotEnoughExperts | None:
        """Return why the pass failed; None if it did not, or has not yet."""

    def _strict_shortage(self, calls: Iterable[tuple[int, Indices]], what: str) -> NotEnoughExperts | None:
        if not self.errors:
            return None
        is_short_R = np.zeros(len(self.num_answers_R), dtype=np.bool_)
        for expert, rows in calls:
            is_short_R[rows] |= self.candidates.uid(expert) in self.errors
        return NotEnoughExperts(None, int(is_short_R.sum()), self.errors, what=what)

    @property
    def late(self) -> list[ExpertCall]:
        """The calls given up that took longer than is usual."""
        return [call for call in self.given_up if call.is_slow]

    @abstractmethod
    def _decide(self, now: float) -> None:
        """Ask further experts, or end the pass, after something happened."""

    def _send(self, call: ExpertCall) -> None:
        self._late = None
        self._fresh.append(call)
        self._under_way[call] = None

    def _ended(self, calls: Sequence[ExpertCall], now: float) -> Indices:
        """Note that these calls are over. Return how many of them each row was in."""
        for call in calls:
            del self._under_way[call]
            call.seconds = now - call.sent
            if self._late is not None:
                self._late.pop(call, None)
        return self._per_row(calls)

    def _per_row(self, calls: Sequence[ExpertCall]) -> Indices:
        rows = np.concatenate([call.rows for call in calls])
        counts_R: Indices = np.bincount(rows, minlength=len(self.num_answers_R))
        return counts_R

    def _late_times(self) -> dict[ExpertCall, float]:
        if self._late is None:
            self._late = {}
            patience = self._patience.alone if self._usual is None else self._patience.beside_others
            for call, usual in zip(self._under_way, self.usual_seconds(self._under_way), strict=True):
                if usual is None:
                    self._late[call] = math.inf
                    continue
                margin = patience * usual
                if margin < _MIN_PATIENCE_SECONDS:
                    margin = _MIN_PATIENCE_SECONDS
                self._late[call] = call.sent + usual + margin + self._stalled
        return self._late

    def _give_up_at(self) -> float:
        """Return the time at which waiting ends, if all rows have enough answers."""
        late, unneeded = self._late_times().items(), self._unneeded
        return max([late_at + call.grace for call, late_at in late if call not in unneeded], default=-math.inf)

    def _end(self, now: float, *, only_slow: bool = False) -> None:
        """Gives up the calls under way; with `only_slow` the others are not counted as given up."""
        self.is_over = True
        for call in self._fresh:  # never sent
            del self._under_way[call]
        self._fresh.clear()
        for call in self._under_way:
            if (only_slow and not call.is_slow) or call in self._unneeded:
                continue
            call.seconds = now - call.sent
            self.given_up.append(call)
            why = "" if call.error is None else f" after {describe(call.error)}"
            self.errors.setdefault(call.uid, TimeoutError(f"{call.uid} sent no {_SENT[self.direction]} in time{why}"))
            if call.is_slow:
                self.left_out.setdefault(call.uid, self.errors[call.uid])


class ForwardDispatch(CallsUnderWay):
    """The forward of a batch: every row goes to its best experts, and to its next-best ones while it lacks answers."""

    direction = "forward"

    def __init__(
        self,
        candidates: Candidates,
        scores_RS: torch.Tensor,
        *,
        k_best: int,
        k_min: int,
        settings: MixtureSettings,
        patience: Patience,
    ) -> None:
        """`scores_RS`: ``[rows, sum(grid_size)]``, on the CPU, outside of the graph, without NaN. `k_best` and
        `k_min`: see `GatingFunction`."""
        super().__init__(candidates, len(scores_RS), timeout=settings.forward_timeout, patience=patience)
        self.chosen_RK = torch.empty(0, 0, dtype=torch.int64, device="cpu")
        """The experts that were asked first."""
        self._k_min = k_min
        self.scores_RS = scores_RS
        self._k_best = k_best
        self._settings = settings
        self._may_come = settings.refill and k_min > 0 and settings.capacity_factor is None
        """True if rows that have tried every expert wait for others; if False, they are given up."""
        num_rows, num_live = len(scores_RS), len(candidates)
        self._num_open_R: Indices = np.zeros(num_rows, dtype=np.int64)
        """Each row's calls under way, slow ones included."""
        self._num_slow_R: Indices = np.zeros(num_rows, dtype=np.int64)
        self._has_tried_all_R: npt.NDArray[np.bool_] = np.zeros(num_rows, dtype=np.bool_)
        self._tried_RT: Indices = np.empty((num_rows, 0), dtype=np.int64)
        """Experts that each row was sent to; -1 pads."""
        self._is_excluded_N: npt.NDArray[np.bool_] = np.zeros(num_live, dtype=np.bool_)
        self._failed_calls: list[ExpertCall] = []
        self._stand_ins: list[ExpertCall] = []
        """Calls sent since the start, for others that failed or are slow."""
        self._free_again: dict[int, float] = {}
        """The times at which overloaded experts may be asked again."""
        self._free_at = math.inf
        self._all_enough = False
        self._room_N: Indices | None = None
        if settings.capacity_factor is not None and num_live:
            share = num_rows * min(k_best, num_live) / num_live
            self._room_N = np.full(num_live, max(1, math.ceil(settings.capacity_factor * share)), dtype=np.int64)

    def shortage(self) -> NotEnoughExperts | None:
        num_short = int((self.num_answers_R < self._k_min).sum())
        if not num_short or self._settings.on_missing == "zero":
            return None
        return NotEnoughExperts(self._k_min, num_short, self.errors, num_live=len(self.candidates))

    @property
    def num_tried(self) -> int:
        """The most experts that a row has tried."""
        return int(self._tried_RT.shape[1])

    def start(self, now: float) -> None:
        super().start(now)
        grid, bias_N = self.candidates.grid, self.candidates.bias_N
        self.chosen_RK = grid.top_k(self.scores_RS, self._k_best, bias_N=bias_N)
        best_RK = self.chosen_RK.numpy()
        num_rows, k = best_RK.shape
        self._assign(np.repeat(np.arange(num_rows), k), best_RK.reshape(-1), now)
        self._refill(now)  # what did not fit into the capacity
        self._num_first = len(self._fresh)

    def failed(self, call: ExpertCall, now: float, error: BaseException) -> None:
        """See `CallsUnderWay.failed`. The expert is asked no more in this pass, unless it comes back."""
        super().failed(call, now, error)
        self._is_excluded_N[call.expert] = True
        self._failed_calls.append(call)
        if isinstance(error, Overloaded):
            free_at = now + max(error.retry_after, BLOCK_SECONDS)
            self._free_again[call.expert] = max(free_at, self._free_again.get(call.expert, free_at))

    def came(self, candidates: Candidates, experts: Collection[int]) -> None:
        """Take in further experts: `candidates` are those known before, under the same numbers, and new ones; `experts`
        are the numbers of those that came or came back.

        If `experts` is empty, rows that have tried all are given up.
        """
        self.candidates = candidates
        self._may_come = bool(experts)
        self._is_excluded_N = np.pad(self._is_excluded_N, (0, len(candidates) - len(self._is_excluded_N)))
        self._admit(experts)

    def timer_at(self) -> float:
        late_at = min([at for call, at in self._late_times().items() if not call.is_slow], default=math.inf)
        give_up_at = self._give_up_at() if self._all_enough else math.inf
        return min(self.deadline, give_up_at, late_at, self._free_at)

    def _decide(self, now: float) -> None:
        self._mark_slow(now)
        self._refill(now)
        stuck_R = self._stuck_R()
        free = [expert for expert, free_at in self._free_again.items() if free_at <= now]
        if self._may_come and stuck_R.any() and self._admit(free):
            self._refill(now)
            stuck_R = self._stuck_R()
        some_stuck = bool(stuck_R.any())
        self.rows_in_need = torch.from_numpy(stuck_R) if some_stuck and self._may_come else None
        self._free_at = min(self._free_again.values(), default=math.inf) if self.rows_in_need is not None else math.inf
        if self._stand_ins:
            self._unneeded = {call for call in self._stand_ins if not call.is_slow and self._has_all(call)}
        if some_stuck and not self._may_come and self._k_min and self._settings.on_missing == "raise":
            self._end(now, only_slow=True)  # there is nothing to wait for any more
            return
        done_R = self._is_satisfied_R() if self._may_come else self._is_satisfied_R() | stuck_R
        self._all_enough = bool(done_R.all())
        if self._all_enough and self._settings.timeout_after_k_min is not None:
            self.deadline = min(self.deadline, now + self._settings.timeout_after_k_min)
        if now >= self.deadline or (self._all_enough and now >= self._give_up_at()):
            self._end(now)

    def _is_satisfied_R(self) -> npt.NDArray[np.bool_]:
        # even where no answer is needed, one is worth waiting for
        return self.num_answers_R >= max(1, self._k_min)

    def _has_all(self, call: ExpertCall) -> bool:
        """Return whether each row of the call has as many answers as it asked for at first."""
        return bool((self.num_answers_R[call.rows] >= self._k_best).all())

    def _stuck_R(self) -> npt.NDArray[np.bool_]:
        """Rows that lack answers, of which none is under way, and for which no expert is left."""
        stuck_R: npt.NDArray[np.bool_] = self._has_tried_all_R & (self._num_open_R == 0) & ~self._is_satisfied_R()
        return stuck_R

    def _mark_slow(self, now: float) -> None:
        for call, late_at in self._late_times().items():
            if not call.is_slow and now >= late_at:
                call.is_slow = True
                self._num_slow_R[call.rows] += 1

    def _ended(self, calls: Sequence[ExpertCall], now: float) -> Indices:
        counts_R = super()._ended(calls, now)
        self._num_open_R -= counts_R
        if any([call.is_slow for call in calls]):
            self._num_slow_R -= self._per_row([call for call in calls if call.is_slow])
        return counts_R

    def _end(self, now: float, *, only_slow: bool = False) -> None:
        if now >= self._started + self._timeout:
            for call in self._under_way:
                call.is_slow = True
        super()._end(now, only_slow=only_slow)

    def _admit(self, experts: Collection[int]) -> bool:
        """Let these be asked again, also for the rows with which they failed. Return whether there are any."""
        if not experts:
            return False
        self._is_excluded_N[list(experts)] = False
        for expert in experts:
            self._free_again.pop(expert, None)
        for call in self._failed_calls:
            if call.expert in experts:
                tried_LT = self._tried_RT[call.rows]
                self._tried_RT[call.rows] = np.where(tried_LT == call.expert, -1, tried_LT)
        self._failed_calls = [call for call in self._failed_calls if call.expert not in experts]
        self._has_tried_all_R[:] = False
        return True

    def _refill(self, now: float) -> None:
        """Sends the rows that have too few answers to come to their next-best experts."""
        if not self._settings.refill:
            self._has_tried_all_R[:] = True
            return
        target = min(max(1, self._k_min) + self._settings.spare, self._k_best)
        while True:
            is_open_R = ~self._is_satisfied_R() & ~self._has_tried_all_R
            num_to_come_R = self.num_answers_R + self._num_open_R - self._num_slow_R
            missing_R = np.where(is_open_R, target - num_to_come_R, 0)
            rows = np.flatnonzero(missing_R > 0)
            if not len(rows):
                return
            at_L, experts_L = self.candidates.grid.next_best(
                self.scores_RS[torch.from_numpy(rows)],
                tried_RT=self._tried_RT[rows],
                excluded_N=self._is_excluded_N,
                wanted_R=missing_R[rows],
                bias_N=self.candidates.bias_N,
            )
            self._has_tried_all_R[np.delete(rows, at_L)] = True
            self._assign(rows[at_L], experts_L, now)
            if self._room_N is None:
                return  # else some may not have fitted

    def _assign(self, rows_L: Indices, experts_L: Indices, now: float) -> None:
        """Makes calls of these pairs of a row and an expert and remembers them as tried, also those that do not fit."""
        if not len(rows_L):
            return
        order = np.argsort(rows_L, kind="stable")
        rows_L, experts_L = rows_L[order], experts_L[order]
        at_L = np.arange(len(rows_L)) - np.searchsorted(rows_L, rows_L)
        tried_RT = np.full((len(self._tried_RT), int(at_L.max()) + 1), -1, dtype=np.int64)
        tried_RT[rows_L, at_L] = experts_L
        self._tried_RT = np.concatenate([self._tried_RT, tried_RT], axis=1)
        if self._room_N is not None:
            columns_LD = self.candidates.grid.columns_ND.numpy()[experts_L]
            scores_L = self.scores_RS.numpy()[rows_L[:, None], columns_LD].sum(1)
            kept = within_capacity(rows_L, experts_L, scores_L, self._room_N)
            rows_L, experts_L = rows_L[kept], experts_L[kept]
            self._room_N -= np.bincount(experts_L, minlength=len(self._room_N))
            self._is_excluded_N |= self._room_N <= 0
        np.add.at(self._num_open_R, rows_L, 1)
        for expert, rows in group(rows_L, experts_L):
            call = ExpertCall(expert, self.candidates.uid(expert), rows, now)
            self._send(call)
            if self._num_first:
                self._stand_ins.append(call)


class StrictForward(CallsUnderWay):
    """The forward of calls whose answers are all needed."""

    direction = "forward"
    is_strict = True

    def __init__(self, candidates: Candidates, calls: Sequence[tuple[int, Indices]], num_rows: int, *, timeout: float):
        """`calls`: experts, each with its rows."""
        super().__init__(candidates, num_rows, timeout=timeout, patience=Patience(0.0, 0.0))
        self._calls = calls

    def start(self, now: float) -> None:
        super().start(now)
        for expert, rows in self._calls:
            self._send(ExpertCall(expert, self.candidates.uid(expert), rows, now))
        self._num_first = len(self._fresh)

    def shortage(self) -> NotEnoughExperts | None:
        return self._strict_shortage(self._calls, "answers")

    def timer_at(self) -> float:
        return self.deadline

    def _decide(self, now: float) -> None:
        if self.errors or not self._under_way:
            self._end(now, only_slow=True)
        elif now >= self.deadline:
            self._end(now)


class BackwardDispatch(CallsUnderWay):
    """The backward of a batch: all experts that answered are asked, and those that take too long are left out."""

    direction = "backward"

    def __init__(self, forward: CallsUnderWay, *, settings: MixtureSettings, patience: Patience) -> None:
        """`forward`: if it is strict, all gradients are needed, too."""
        super().__init__(
            forward.candidates,
            len(forward.num_answers_R),
            timeout=settings.backward_timeout + ABANDON_SECONDS,
            patience=patience,
        )
        self.is_strict = forward.is_strict
        self._k_min = settings.backward_k_min
        self._forward = forward
        needed = forward.num_answers_R if self.is_strict else np.minimum(forward.num_answers_R, self._k_min)
        self._needed_R: Indices = needed
        self.forward_calls: dict[ExpertCall, ExpertCall] = {}
        """The call whose answer is differentiated, by gradient call."""

    @property
    def _num_short(self) -> int:
        return int((self.num_answers_R < self._needed_R).sum())

    def shortage(self) -> NotEnoughExperts | None:
        if self.is_strict:
            return self._strict_shortage([(call.expert, call.rows) for call in self._forward.answers], "gradients")
        if not (num_short := self._num_short):
            return None
        return NotEnoughExperts(self._k_min, num_short, self.errors, what="gradients")

    def start(self, now: float) -> None:
        super().start(now)
        for answer in self._forward.answers:
            call = ExpertCall(answer.expert, answer.uid, answer.rows, now, answer.id or new_name())
            answer.id = b""  # another backward is another step
            self.forward_calls[call] = answer
            self._send(call)
        self._num_first = len(self._fresh)

    def timer_at(self) -> float:
        return self.deadline if self._num_short else min(self.deadline, self._give_up_at())

    def _decide(self, now: float) -> None:
        if self.is_strict and self.errors:
            self._end(now, only_slow=True)
        elif not self._under_way or now >= self.timer_at():
            for call in self._under_way:
                call.is_slow = True
            self._end(now)
