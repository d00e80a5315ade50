"""Computes batches on one device, for the runtime's thread.

A batch goes through four calls: `stage` gathers its rows and starts their way to the device, `launch` starts the
computation, `complete` judges the results and takes the optimizer's step, `outcomes` waits for the results. On a device
that works in parallel with the CPU, the next batch is staged between `launch` and `complete`. None of the four raises.

Faults stay with their request. A batch that fails before its step (the module raised, a gradient is not finite) is
computed again in halves, until the requests at fault are alone; only they fail, and the others share the step. One
request that runs out of memory is halved once, by rows. If the optimizer itself raises, or leaves weights or moments
that are not finite, the expert's last good state is loaded, journal included, as if the steps since then had not
happened.
"""

import functools
import itertools
import logging
import math
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch

from tesseract_async.errors import ExpertFailed, Overloaded, describe
from tesseract_async.runtime.backend import ExpertBackend, step_together
from tesseract_async.runtime.batcher import RowSlice
from tesseract_async.runtime.gradients import Gradients, are_finite, for_norm, per_row
from tesseract_async.runtime.grouped import Group, Groups, Kind, Member, Unfit
from tesseract_async.runtime.norms import CHECKED_ABOVE, FAR_ABOVE, GROWTH, UNDONE_ABOVE
from tesseract_async.runtime.optimizers import rule_of
from tesseract_async.runtime.staging import Columns, HostStaging, Staging, Transfer
from tesseract_async.runtime.states import StateDict
from tesseract_async.runtime.watching import generator_states, have_moved
from tesseract_async.runtime.work import JointWork, Work, WorkResult

logger = logging.getLogger(__name__)

_MAX_SNAPSHOT_SHARE: Final = 0.02
"""Share of the thread's time that copies of good states may take."""
_MIN_SNAPSHOT_PERIOD: Final = 5.0
"""Seconds between two copies of one expert's state."""

_NOT_FINITE: Final = "the gradients that came with this call are not finite; no step was taken"

Outcomes = dict[Work, WorkResult | BaseException]
"""How a batch went for its requests. One that is absent has more rows, in a later batch."""


@dataclass(slots=True, eq=False, repr=False)
class Attempt:
    """Slices of requests that are computed together once."""

    slices: Sequence[RowSlice]
    works: list[Work]
    """The slices' requests, all of one expert, direction and mode. The first one's peer answers for their gradients."""
    halved: bool = False
    """True for half of a request that ran out of memory."""
    upload: Transfer | None = None
    results: Sequence[torch.Tensor | None] = ()
    """Outputs, or gradients of the inputs, on the device."""
    summed: Gradients | None = None
    """Gradients of the parameters."""
    norm: float = 0.0
    """The norm of `summed` before it was scaled down."""
    scales: torch.Tensor | None = None
    """By which each row's gradients were weakened, as they are stale."""
    error: BaseException | None = None
    downloads: "list[Download]" = field(default_factory=list)
    """Results of each attempt without an error that this one came to."""
    outcomes: Outcomes = field(default_factory=dict)
    """The errors of the requests that failed."""


class Download(NamedTuple):
    """Results of slices on their way back."""

    slices: Sequence[RowSlice]
    works: list[Work]
    wait: Callable[[], Sequence[torch.Tensor | None]]
    """Returns them when they are there."""
    version: int


class Step(NamedTuple):
    backend: ExpertBackend
    summed: Gradients
    call_ids: list[bytes]
    peer: Hashable
    weights: float
    """The norm of the weights before it."""


@dataclass(slots=True, eq=False, repr=False)
class Together:
    """Attempts of several experts, computed in one pass."""

    group: Group
    attempts: list[Attempt]
    upload: Transfer | None = None
    error: BaseException | None = None
    """Why there was no such pass."""
    is_each_alone: bool = False
    """True if each was computed alone."""
    is_measured: bool = False
    """True if the time that it takes says something about such passes."""
    counts: Sequence[int] = ()
    """Rows of each."""
    results: Gradients = ()
    """Of all rows, as of an `Attempt`."""
    scales: torch.Tensor | None = None
    incoming: Gradients = ()
    """The output gradients, damped, and the rows' weights."""
    verdicts: torch.Tensor | None = None
    """See `_verdicts`."""
    are_stacked: bool = False
    """True if each one's gradients are parts of stacks."""


class Executor:
    """Computes batches, each of slices from one queue. Used by one thread."""

    def __init__(self, staging: Staging | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.staging = staging or HostStaging()
        self.groups = Groups()
        self._good_states: weakref.WeakKeyDictionary[ExpertBackend, _GoodState] = weakref.WeakKeyDictionary()
        self._broken: weakref.WeakKeyDictionary[ExpertBackend, str] = weakref.WeakKeyDictionary()
        self._copy_again_at = 0.0  # time.monotonic, before which no good state is renewed: the experts share the time

    def stage(self, slices: Sequence[RowSlice], *, halved: bool = False) -> Attempt:
        attempt = Attempt(slices, [one.request for one in slices], halved)  # type: ignore[misc]
        try:
            attempt.upload = self.staging.upload(_columns(slices, attempt.works))
        except BaseException as error:  # it fails its own batch
            attempt.error = error
        return attempt

    def launch(self, attempt: Attempt) -> None:
        """Let the device compute. An error is kept for `complete`."""
        if attempt.error is not None:
            return
        assert attempt.upload is not None
        work = attempt.works[0]
        backend = work.backend
        try:
            if backend in self._broken:
                raise ExpertFailed(self._broken[backend])
            staged = attempt.upload.wait()
            num_inputs = len(backend.input_specs)
            inputs: list[torch.Tensor] = staged[:num_inputs]  # type: ignore[assignment]
            if type(work) is JointWork:
                attempt.results = self._compute_joint(work, inputs, staged[num_inputs])
                return
            # chunks of a split request draw differently, and the same in forward and backward
            seed = (work.seed + attempt.slices[0].start * 0x9E3779B1) & 0x7FFF_FFFF_FFFF_FFFF
            shared = len(attempt.slices) > 1
            if shared:
                _check_alone(work)
            if work.output_gradients is None:
                attempt.results = backend.forward(inputs, training=work.training, seed=seed)
                if shared:
                    _check_alone(work)
                return
            weights = None if work.weights is None else staged.pop()
            gradients: Gradients = staged[num_inputs:]
            if backend.settings.max_staleness is not None or backend.settings.staleness_damping:
                gradients = _damp(attempt, gradients)
            attempt.results, attempt.summed = backend.gradients(
                inputs, gradients, training=work.training, seed=seed, weights=weights
            )
            if shared:
                _check_alone(work)
            if not are_finite([*gradients, weights]):
                raise ExpertFailed(_NOT_FINITE)
            if work.call_id is not None and attempt.summed:
                _limit_norm(attempt, attempt.summed, backend.norm_of(attempt.summed))
        except BaseException as error:  # a module may raise anything: it fails its own batch
            attempt.error = error
        finally:
            attempt.upload = None

    def _compute_joint(
        self, work: JointWork, inputs: Sequence[torch.Tensor], weights: torch.Tensor | None
    ) -> list[torch.Tensor]:
        kind: Kind | None = None
        members: list[Member] = []
        if self._broken and any([backend in self._broken for backend in work.backends]):
            raise _NotNow
        for backend in work.backends:
            member = self.groups.member_of(backend)
            if member is None or not backend.may_be_grouped(work.training):
                raise _NotNow
            if kind is not None and member.kind is not kind:
                raise _NotNow
            kind = member.kind
            members.append(member)
        assert kind is not None and weights is not None and work.rows is not None
        outputs = kind.forward(members, inputs, work.counts, training=work.training)
        work.versions = [backend.version for backend in work.backends]
        sums, rows = [], work.rows.to(weights.device)
        num_rows = next(len(x) for x in work.inputs if x is not None)
        for y in outputs:
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            y = y * per_row(weights, y).to(y.dtype)
            sums.append(
                y.sum(0, keepdim=True) if num_rows == 1 else y.new_zeros(num_rows, *y.shape[1:]).index_add_(0, rows, y)
            )
        return sums

    def complete(self, attempt: Attempt) -> None:
        """Retry what failed, take the step, and start the results' way back."""
        try:
            good, attempt.outcomes = self._settle(attempt)
            version = attempt.works[0].backend.version
            if good and attempt.works[0].output_gradients is not None:
                try:
                    version = self._step(good, version)
                except BaseException as error:  # an optimizer may raise anything
                    attempt.outcomes |= {work: error for one in good for work in one.works}
                    return
            for one in good:
                results = one.results if one.scales is None else _undamped(one.results, one.scales)
                arriving = self.staging.download(results)
                attempt.downloads.append(Download(one.slices, one.works, arriving.wait, version))
        except BaseException as error:  # the thread must live, and its callers must hear of it
            self._lose(attempt, error)

    def outcomes(self, attempt: Attempt) -> Outcomes:
        """Return the result or error of each request; waits for the results to arrive."""
        try:
            outcomes = dict(attempt.outcomes)
            for slices, works, wait, version in attempt.downloads:
                shares = [wait()]
                if len(slices) > 1:
                    shares = _divided(shares[0], [stop - start for _, start, stop in slices])
                for one, work, share in zip(slices, works, shares, strict=True):
                    result = WorkResult(share, version)
                    if one.stop - one.start == work.num_rows:
                        outcomes[work] = result
                    elif (joined := _joined(one, work, result)) is not None:
                        outcomes[work] = joined
            return outcomes
        except BaseException as error:  # the thread must live, and its callers must hear of it
            self._lose(attempt, error)
            return attempt.outcomes

    # -- Several experts in one pass -------------------------------------------------------------------------------

    def stage_together(self, group: Group, batches: Sequence[Sequence[RowSlice]]) -> Together:
        """As `stage`, for batches of different experts of one group."""
        attempts = [Attempt(slices, [one.request for one in slices]) for slices in batches]  # type: ignore[misc]
        together = Together(group, attempts)
        try:
            works = [work for one in attempts for work in one.works]
            of_one_block = len({id(by.output_gradients) for by in works}) == 1
            if not of_one_block and len({_presence(one.works) for one in attempts}) > 1:
                raise Unfit("some gradients are absent for some experts")  # no gradient is not one of zeros
            together.upload = self.staging.upload(_columns([one for slices in batches for one in slices], works))
        except BaseException as error:  # told to those who asked, by `complete`
            together.error = error
        return together

    def launch_together(self, together: Together) -> None:
        """As `launch`. Where the pass raises, or its group was not checked yet, each expert is computed alone."""
        kind, group = together.group.kind, together.group
        together.is_measured = group.is_checked
        try:
            if together.error is None:
                kind.num_extra_rows = 0 if group.is_checked else 1
                self._compute_together(together)
        except BaseException as error:  # the expert at fault is found alone
            together.error = error
        together.upload = None
        if group.is_checked and together.error is None:
            return
        together.is_each_alone = True
        together.is_measured = together.is_measured and not isinstance(together.error, _NotNow)
        found = [one.summed or () for one in together.attempts]
        for one in together.attempts:
            one.error, one.summed, one.scales = None, None, None
            one.upload = self.stage(one.slices).upload  # the pass may have written what was staged
            self.launch(one)
        if isinstance(together.error, _NotNow) or any(one.error is not None for one in together.attempts):
            return
        if together.error is not None:
            if isinstance(together.error, Unfit) or not group.is_checked:
                kind.misfits(together.error)
        elif all(are_finite([*one.results, *(one.summed or ())]) for one in together.attempts):
            group.is_checked = _agree(together, found)
            if not group.is_checked:
                kind.misfits(None)

    def _compute_together(self, together: Together) -> None:
        attempts, kind = together.attempts, together.group.kind
        assert together.upload is not None
        work = attempts[0].works[0]
        members: list[Member] = []
        for one in attempts:
            backend = one.works[0].backend
            member = self.groups.member_of(backend)
            if member is None or member.kind is not kind or (self._broken and backend in self._broken):
                raise _NotNow
            members.append(member)
            if not backend.may_be_grouped(work.training):
                raise _NotNow
        states = generator_states() if work.training else ()
        staged, num_inputs = together.upload.wait(), len(work.backend.input_specs)
        counts = [sum([x.stop - x.start for x in one.slices]) for one in attempts]
        together.counts = counts
        inputs: list[torch.Tensor] = staged[:num_inputs]  # type: ignore[assignment]
        if work.output_gradients is None:
            together.results = kind.forward(members, inputs, counts, training=work.training)
        else:
            weights = None if work.weights is None else staged.pop()
            gradients = self._damp_together(together, staged[num_inputs:])
            for one in attempts:
                one.works[0].backend.prepare()
            parameters = [one.works[0].backend.parameters for one in attempts]
            together.results, summed, stacks = kind.gradients(
                members, inputs, gradients, counts, parameters, training=work.training, weights=weights
            )
            for one, own in zip(attempts, summed, strict=True):
                one.summed = own
            together.incoming = [*gradients, weights]
            together.are_stacked = stacks is not None
            together.verdicts = _verdicts(together.incoming, summed, stacks)
        if states and have_moved(states):
            raise _NotNow

    def _damp_together(self, together: Together, gradients: Gradients) -> Gradients:
        settings = together.attempts[0].works[0].backend.settings
        if settings.max_staleness is None and not settings.staleness_damping:
            return gradients
        for one in together.attempts:
            try:
                one.scales = _scales(one)
            except ExpertFailed as error:
                one.error = error
        if all(one.scales is None for one in together.attempts):
            return gradients
        together.scales = torch.cat(
            [
                torch.ones(count) if one.scales is None else one.scales
                for one, count in zip(together.attempts, together.counts, strict=True)
            ]
        )
        return [None if x is None else x * per_row(together.scales, x) for x in gradients]

    def complete_together(self, together: Together) -> None:
        """As `complete`, with one step for all experts whose optimizers go by the same rule."""
        if not together.is_each_alone:
            try:
                if together.verdicts is not None:
                    self._judge(together)
            except BaseException as error:  # the device has failed
                for one in together.attempts:
                    one.error = one.error or error
        if together.is_each_alone or any([one.error is not None for one in together.attempts]):
            for one in together.attempts:
                if together.is_each_alone or one.error is not None:
                    self.complete(one)
        if together.is_each_alone:
            return
        left = [one for one in together.attempts if one.error is None]
        try:
            self._step_together([one for one in left if one.works[0].output_gradients is not None])
            download = self.staging.download(_undamped(together.results, together.scales))
            parts = functools.cache(lambda: _divided(download.wait(), together.counts))
            for index, one in enumerate(together.attempts):
                if one.error is None and not one.outcomes:
                    version, wait = one.works[0].backend.version, functools.partial(_part, parts, index)
                    one.downloads.append(Download(one.slices, one.works, wait, version))
        except BaseException as error:  # the thread must live, and its callers must hear of it
            for one in left:
                self._lose(one, error)

    def _judge(self, together: Together) -> None:
        """Give each expert whose gradients no optimizer may see its error, after one wait for the device."""
        assert together.verdicts is not None
        *norms, total = together.verdicts.tolist()
        bounds = list(itertools.accumulate(together.counts, initial=0))
        left = iter(norms)
        for index, one in enumerate(together.attempts):
            num_present = sum([x is not None for x in one.summed or ()])
            own = list(itertools.islice(left, min(1, num_present) if together.are_stacked else num_present))
            if one.error is not None:
                continue
            try:
                if not math.isfinite(total):
                    rows = slice(bounds[index], bounds[index + 1])
                    if not are_finite([None if x is None else x[rows] for x in together.incoming]):
                        raise ExpertFailed(_NOT_FINITE)
                if one.works[0].call_id is not None and one.summed:
                    _limit_norm(one, one.summed, math.hypot(*own))
            except BaseException as error:  # it fails its own batch
                one.error = error

    def _step_together(self, attempts: Sequence[Attempt]) -> None:
        """Take each expert's step; errors are for its requests."""
        by_rule: dict[Hashable, list[tuple[Attempt, Step]]] = {}
        for one in attempts:
            try:
                step = self._due([one])
                if step is not None:
                    optimizer = step.backend.optimizer
                    rule = None if optimizer is None or not step.backend.steps_at_once else rule_of(optimizer)
                    if rule is None or any([x is not None and x.layout is not torch.strided for x in step.summed]):
                        self._take(step, [one])
                    else:
                        by_rule.setdefault(rule, []).append((one, step))
            except BaseException as error:  # an optimizer may raise anything
                one.outcomes |= dict.fromkeys(one.works, error)
        for due in by_rule.values():
            before = [_changes(step) for _, step in due]
            try:
                step_together([(step.backend, step.summed, step.call_ids) for _, step in due])
            except BaseException as error:  # those that it did not reach step alone
                for (one, step), changes in zip(due, before, strict=True):
                    try:
                        if _changes(step) != changes:
                            raise self._undo(step, error)
                        self._take(step, [one])
                    except BaseException as own:  # an optimizer may raise anything
                        one.outcomes |= dict.fromkeys(one.works, own)
                continue
            for one, step in due:
                try:
                    self._check_step(step.backend, [one], step.weights)
                except BaseException as error:  # told to those who asked
                    one.outcomes |= dict.fromkeys(one.works, error)

    def _lose(self, attempt: Attempt, error: BaseException) -> None:
        """Fail all requests of a batch: the device, or this code, has failed."""
        logger.exception("a batch was lost")
        failure = ExpertFailed(f"the expert's device failed: {describe(error)}")
        attempt.downloads, attempt.outcomes = [], dict.fromkeys(attempt.works, failure)

    def keep_good_state(self, backend: ExpertBackend) -> StateDict:
        """Copy the expert's state, and go back to it if a later step fails. Returns the copy."""
        started = self._clock()
        state = backend.state()
        if not backend.trains or backend.settings.lockstep:
            return state  # no step of its own can fail
        now = self._clock()
        self._good_states[backend] = _GoodState(state, now + _MIN_SNAPSHOT_PERIOD)
        self._copy_again_at = now + (now - started) / _MAX_SNAPSHOT_SHARE
        return state

    def _settle(self, attempt: Attempt) -> tuple[list[Attempt], Outcomes]:
        """Return the attempts without errors that this one comes to, in order of rows, and the errors of the rest."""
        error = attempt.error
        if error is None:
            return [attempt], {}
        slices = attempt.slices
        if type(attempt.works[0]) is JointWork:  # each expert is asked again by those who want to know more
            return [], {attempt.works[0]: error}
        # the traceback holds the failed attempt's tensors: let go before computing again
        error.__traceback__ = None
        attempt.results, attempt.summed = (), None
        if isinstance(error, Overloaded):  # the expert is gone: fewer rows fare no better
            return [], dict.fromkeys(attempt.works, error)
        if len(slices) > 1:
            middle = len(slices) // 2
            good, failed = self._again(slices[:middle])
            more_good, more_failed = self._again(slices[middle:])
            return good + more_good, failed | more_failed
        (one,) = slices
        work = attempt.works[0]
        num_rows = one.stop - one.start
        if _is_out_of_memory(error):
            self.staging.release()
            if num_rows > 1 and not attempt.halved and not work.backend.is_stochastic(work.training):
                middle = one.start + num_rows // 2
                good, failed = self._again([one._replace(stop=middle)], halved=True)
                if not failed:
                    more_good, failed = self._again([one._replace(start=middle)], halved=True)
                    good += more_good
                return ([], failed) if failed else (good, {})
        return [], {work: _expert_failed(error)}

    def _again(self, slices: Sequence[RowSlice], *, halved: bool = False) -> tuple[list[Attempt], Outcomes]:
        attempt = self.stage(slices, halved=halved)
        self.launch(attempt)
        return self._settle(attempt)

    def _step(self, good: Sequence[Attempt], version: int) -> int:
        """Take one step on the sum of these attempts, if they end their requests. Returns the version after it.

        Raises: ExpertFailed if no step could be taken; the expert is then as it was, or at its last good state.
        """
        step = self._due(good)
        return version if step is None else self._take(step, good)

    def _due(self, good: Sequence[Attempt]) -> Step | None:
        """Return the step that these attempts come to, if any. Raises: ExpertFailed if none may be taken."""
        work, first, last = good[0].works[0], good[0].slices[0], good[-1].slices[-1]
        backend, summed = work.backend, good[0].summed
        for one in good[1:]:
            summed = backend.add(summed, one.summed)
        if first.request is last.request and not (first.start == 0 and last.is_last):
            # a chunk of a split request, which has a batch of its own
            summed = work.summed = backend.add(work.summed, summed)
            if not last.is_last:
                return None
        works = good[0].works if len(good) == 1 else list(dict.fromkeys(work for one in good for work in one.works))
        call_ids = [one.call_id for one in works if one.call_id is not None]
        if summed is None or len(call_ids) < len(works):
            return None
        if backend.optimizer is None:
            backend.step(summed, call_ids)
            return None
        if (len(good) > 1 or work.summed is not None) and not backend.are_finite(summed):
            raise ExpertFailed("the sum of the gradients is not finite; no step was taken")
        if backend.settings.lockstep:
            backend.step(summed, call_ids)
            return None
        self._refresh_good_state(backend)
        weights = math.inf if backend.norms.is_settled else backend.weights_norm()
        return Step(backend, summed, call_ids, work.peer, weights)

    def _take(self, step: Step, good: Sequence[Attempt]) -> int:
        backend = step.backend
        try:
            version = backend.step(step.summed, step.call_ids, peer=step.peer)
        except Overloaded:
            raise
        except BaseException as error:  # an optimizer may raise anything
            raise self._undo(step, error) from None
        self._check_step(backend, good, step.weights)
        return version

    def _undo(self, step: Step, error: BaseException) -> ExpertFailed:
        logger.error("the optimizer of an expert raised; its last good state is loaded", exc_info=error)
        return self._reload(step.backend, f"the expert's optimizer raised {describe(error)}")

    def _check_step(self, backend: ExpertBackend, good: Sequence[Attempt], weights: float) -> None:
        """Undo a step that broke the expert; `weights`: their norm before. Raises: ExpertFailed, for its senders."""
        norms, usual = backend.norms, backend.norms.usual
        limited = backend.settings.max_gradient_norm is not None
        high = CHECKED_ABOVE * usual if usual is not None and norms.is_settled else 0.0
        if limited and any([one.norm > high * len(one.slices) for one in good]):
            if not backend.is_sound() or backend.weights_norm() > GROWTH * (weights + 1):
                raise self._reload(backend, "this step made the expert's weights or its optimizer's moments overflow")
        settled = any([norms.observe(one.works[0].peer, one.norm / len(one.slices)) for one in good])
        if limited and settled and norms.first > UNDONE_ABOVE * (norms.usual or math.inf):
            raise self._reload(backend, "this expert's first gradient was far larger than all others")

    def _refresh_good_state(self, backend: ExpertBackend) -> None:
        """Keep the state that a failed step goes back to fresh, in a small share of the time.

        Raises: ExpertFailed if the expert is broken already; it has gone back, then.
        """
        good, now = self._good_states.get(backend), self._clock()
        if good is None:
            self.keep_good_state(backend)
        elif now > max(good.renew_at, self._copy_again_at) and backend.norms.is_settled:
            if backend.settings.max_gradient_norm is not None and not backend.is_sound():
                raise self._reload(backend, "the expert's weights or its optimizer's moments overflowed")
            self.keep_good_state(backend)

    def _reload(self, backend: ExpertBackend, reason: str) -> ExpertFailed:
        """Go back to the last good state. Returns the error for the senders."""
        norms = backend.norms  # what was learned about senders holds
        try:
            backend.load_state(self._good_states[backend].state)
        except BaseException as second:  # then only this expert is given up
            self._broken[backend] = f"this expert is broken: {reason}, then its last good state: {describe(second)}"
            logger.exception("an expert could not return to its last good state and answers no more calls")
            return ExpertFailed(self._broken[backend])
        backend.norms = norms
        logger.warning("%s; it went back to version %d", reason, backend.version)
        return ExpertFailed(f"{reason}; the expert went back to version {backend.version}")


class _GoodState(NamedTuple):
    """A state to go back to, and when it should be renewed (time.monotonic)."""

    state: StateDict
    renew_at: float


def _divided(tensors: Sequence[torch.Tensor | None], counts: Sequence[int]) -> list[Sequence[torch.Tensor | None]]:
    """Return each of them in parts of so many rows."""
    columns = [None if x is None else x.split_with_sizes(counts) for x in tensors]
    return [[None if parts is None else parts[i] for parts in columns] for i in range(len(counts))]


def _part(parts: Callable[[], Sequence[Sequence[torch.Tensor | None]]], index: int) -> Sequence[torch.Tensor | None]:
    return parts()[index]


def _columns(slices: Sequence[RowSlice], works: Sequence[Work]) -> Columns:
    """Return the rows of each slice, tensor by tensor: inputs, then output gradients, then weights."""
    first = works[0]
    if (
        len(slices) == 1
        and first.rows is None
        and first.weights is None
        and slices[0].stop - slices[0].start == first.num_rows
    ):
        return [None if x is None else (x,) for x in (*first.inputs, *(first.output_gradients or ()))]
    given = [[*by.inputs, *(by.output_gradients or ())] for by in works]
    columns: list[Sequence[torch.Tensor] | None] = []
    weights = [] if first.weights is None else [_cut(by.weights, one) for one, by in zip(slices, works, strict=True)]
    if first.rows is not None and all([by.inputs is first.inputs and by.rows is not None for by in works]):
        # of one block: every row is copied once, to where it is computed
        parts = [_cut(by.rows, one) for one, by in zip(slices, works, strict=True)]
        index = parts[0] if len(parts) == 1 else torch.cat(parts)
        if all([by.output_gradients is first.output_gradients for by in works]):
            columns = [None if x is None else (x.index_select(0, index),) for x in given[0]]
            return [*columns, weights] if weights else columns
    specs = (*first.backend.input_specs, *(first.backend.output_specs if first.output_gradients is not None else ()))
    for column, spec in zip(zip(*given, strict=True), specs, strict=True):
        if all(x is None for x in column):
            columns.append(None)
            continue
        rows = []
        for x, one, by in zip(column, slices, works, strict=True):
            if x is None:  # next to others that are present, an absent gradient is zero
                rows.append(torch.zeros(one.stop - one.start, *spec.shape, dtype=spec.dtype))
            else:
                if by.rows is not None:
                    x = x.index_select(0, _cut(by.rows, one))
                elif one.stop - one.start < by.num_rows:
                    x = x[one.start : one.stop]
                rows.append(x)
        columns.append(rows)
    return [*columns, weights] if weights else columns


def _cut(x: torch.Tensor | None, one: RowSlice) -> torch.Tensor:
    assert x is not None
    return x if one.stop - one.start == one.request.num_rows else x[one.start : one.stop]


class _NotNow(Exception):
    """Experts are not computed in one pass this time."""


def _presence(works: Sequence[Work]) -> tuple[bool, ...]:
    given = [by.output_gradients for by in works if by.output_gradients is not None]
    return tuple([any(x is not None for x in column) for column in zip(*given, strict=True)])


def _verdicts(incoming: Gradients, summed: Sequence[Gradients], stacks: Gradients | None) -> torch.Tensor:
    """Return the norms of each expert's gradients, and the sum of all incoming ones. A norm is that of one parameter's;
    where gradients are parts of `stacks`, of all of an expert's."""
    present = [for_norm(x) for own in (summed if stacks is None else [stacks]) for x in own if x is not None]
    parts: list[torch.Tensor] = []
    if stacks is None and present:
        norms = torch._foreach_norm(present)
        parts = [torch.stack(norms if len({x.dtype for x in norms}) == 1 else [x.double() for x in norms]).double()]
    elif present:
        each = [torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1).double() for x in present]
        parts = [torch.linalg.vector_norm(torch.stack(each), dim=0)]
    totals = [for_norm(x).sum(dtype=torch.float64) for x in incoming if x is not None]
    total = torch.stack(totals).sum(0, keepdim=True) if totals else torch.zeros(1, dtype=torch.float64)
    return torch.cat([*parts, total])


def _changes(step: Step) -> list[int]:
    """Return figures that grow when a step writes weights or the optimizer's memory: of the first that it writes."""
    for parameter, gradient in zip(step.backend.parameters, step.summed, strict=False):
        if gradient is not None and step.backend.optimizer is not None:
            memory = step.backend.optimizer.state.get(parameter, {}).values()
            return [parameter._version, *[x._version for x in memory if isinstance(x, torch.Tensor)]]
    return []


def _agree(together: Together, found: Sequence[Gradients]) -> bool:
    """Return whether the pass, which `found` these gradients, computed what each expert did alone."""
    row = 0
    for one, own, count in zip(together.attempts, found, together.counts, strict=True):
        ours = [None if x is None else x[row : row + count] for x in together.results]
        row += count
        alone = one.summed or ()
        if one.norm and (norm := one.works[0].backend.norm_of(alone)):
            alone = [None if x is None else x * (one.norm / norm) for x in alone]  # before it was scaled down
        if not (_are_close(ours, one.results) and _are_close(own, alone)):
            return False
    return True


def _are_close(left: Gradients, right: Gradients) -> bool:
    """Return whether two lists of tensors are the same but for rounding, beside the largest value in them."""
    if [x is None for x in left] != [x is None for x in right]:
        return False
    pairs = [(x, y) for x, y in zip(left, right, strict=True) if x is not None and y is not None and y.numel()]
    largest = max([float(y.abs().max()) for _, y in pairs if y.dtype is not torch.bool], default=0.0)
    for x, y in pairs:
        if not (y.is_floating_point() or y.is_complex()):
            if not torch.equal(x, y):
                return False
        elif not float((x - y).abs().max()) <= largest * torch.finfo(y.dtype).eps ** 0.5:
            return False
    return True


class _DrawsAlone(Exception):
    """A batch of several requests turned out to draw random numbers, which are each request's own."""


def _check_alone(work: Work) -> None:
    """Raises: _DrawsAlone, upon which the batch is computed again, request by request."""
    if work.backend.is_stochastic(work.training):
        raise _DrawsAlone


def _joined(part: RowSlice, work: Work, result: WorkResult) -> WorkResult | None:
    work.results.append(result)
    if not part.is_last:
        return None
    columns = zip(*(one.tensors for one in work.results), strict=True)
    return WorkResult([None if None in column else torch.cat(column) for column in columns], result.version)


def _damp(attempt: Attempt, gradients: Gradients) -> Gradients:
    """Weaken stale gradients, row by row. Raises: ExpertFailed for those that are too stale."""
    attempt.scales = _scales(attempt)
    if attempt.scales is None:
        return gradients
    return [None if x is None else x * per_row(attempt.scales, x) for x in gradients]


def _undamped(results: Gradients, scales: torch.Tensor | None) -> Gradients:
    """Return what callers get: damping concerns the step."""
    return results if scales is None else [None if x is None else x / per_row(scales, x) for x in results]


def _scales(attempt: Attempt) -> torch.Tensor | None:
    """Return by how much each row's gradients are weakened. Raises: ExpertFailed for those that are too stale."""
    settings, version = attempt.works[0].backend.settings, attempt.works[0].backend.version
    ages = [0 if one.forward_version is None else max(0, version - one.forward_version) for one in attempt.works]
    if settings.max_staleness is not None and max(ages) > settings.max_staleness:
        raise ExpertFailed(
            f"the forward of this backward was {max(ages)} steps ago; at most {settings.max_staleness} are accepted"
        )
    if not settings.staleness_damping or not any(ages):
        return None
    counts = torch.tensor([one.stop - one.start for one in attempt.slices])
    scales = (1.0 + torch.tensor(ages, dtype=torch.float32)) ** -settings.staleness_damping
    return scales.repeat_interleave(counts)


def _limit_norm(attempt: Attempt, summed: Gradients, norm: float) -> None:
    """Scale down parameter gradients that are unusually large. Raises: ExpertFailed for those no optimizer may see."""
    backend = attempt.works[0].backend
    attempt.norm = norm
    if not math.isfinite(norm) and not backend.are_finite(summed):
        raise ExpertFailed("the gradients of the expert's parameters are not finite; no step was taken")
    limit, usual = backend.settings.max_gradient_norm, backend.norms.usual
    if limit == "adaptive":
        limit = math.sqrt(torch.finfo(torch.float32).max)
        bound = backend.norms.bound(attempt.works[0].peer)
        if len(attempt.slices) > 1 and usual is not None:
            # each may be as large as one alone
            limit, bound = FAR_ABOVE * usual * len(attempt.slices), max(bound, usual) * len(attempt.slices)
        if bound < norm <= limit:
            attempt.summed = backend.scaled(summed, bound / norm)
    if limit is not None and norm > limit:
        raise ExpertFailed(
            f"the gradients of the expert's parameters have norm {norm:.4g}; at most {limit:.4g} is accepted"
        )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _expert_failed(error: BaseException) -> ExpertFailed | Overloaded:
    if isinstance(error, ExpertFailed | Overloaded):
        return error
    logger.warning("an expert's module raised %s", describe(error))
    return ExpertFailed(f"the expert's module raised {describe(error)}")
