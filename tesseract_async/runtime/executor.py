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

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch

from tesseract_async.errors import ExpertFailed, Overloaded, describe
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import RowSlice
from tesseract_async.runtime.gradients import Gradients, are_finite, per_row
from tesseract_async.runtime.norms import CHECKED_ABOVE, FAR_ABOVE, GROWTH, UNDONE_ABOVE
from tesseract_async.runtime.staging import Columns, HostStaging, Staging, Transfer
from tesseract_async.runtime.states import StateDict
from tesseract_async.runtime.work import Work, WorkResult

logger = logging.getLogger(__name__)

_MAX_SNAPSHOT_SHARE: Final = 0.02
"""Share of the thread's time that copies of good states may take."""
_MIN_SNAPSHOT_PERIOD: Final = 5.0
"""Seconds between two copies of one expert's state."""

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
    downloads: list[tuple[Sequence[RowSlice], list[Work], Transfer, int]] = field(default_factory=list)
    """Slices, requests, results and version of each attempt without an error that this one came to."""
    outcomes: Outcomes = field(default_factory=dict)
    """The errors of the requests that failed."""


class Executor:
    """Computes batches, each of slices from one queue. Used by one thread."""

    def __init__(self, staging: Staging | None = None) -> None:
        self.staging = staging or HostStaging()
        self._good_states: weakref.WeakKeyDictionary[ExpertBackend, _GoodState] = weakref.WeakKeyDictionary()
        self._broken: weakref.WeakKeyDictionary[ExpertBackend, str] = weakref.WeakKeyDictionary()
        self._copy_again_at = 0.0  # time.monotonic, before which no good state is renewed: the experts share the time

    def stage(self, slices: Sequence[RowSlice], *, halved: bool = False) -> Attempt:
        """Gather the slices' rows and start copying them to the device."""
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
                raise ExpertFailed("the gradients that came with this call are not finite; no step was taken")
            if work.call_id is not None and attempt.summed:
                _limit_norm(attempt, attempt.summed)
        except BaseException as error:  # a module may raise anything: it fails its own batch
            attempt.error = error
        finally:
            attempt.upload = None

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
                results = one.results
                if one.scales is not None:  # callers get their gradients undamped: damping concerns the step
                    results = [None if x is None else x / per_row(one.scales, x) for x in results]
                attempt.downloads.append((one.slices, one.works, self.staging.download(results), version))
        except BaseException as error:  # the thread must live, and its callers must hear of it
            self._lose(attempt, error)

    def outcomes(self, attempt: Attempt) -> Outcomes:
        """Return the result or error of each request; waits for the results to arrive."""
        try:
            outcomes = dict(attempt.outcomes)
            for slices, works, download, version in attempt.downloads:
                tensors = download.wait()
                row = 0
                for one, work in zip(slices, works, strict=True):
                    stop = row + one.stop - one.start
                    share = tensors if len(slices) == 1 else [None if x is None else x[row:stop] for x in tensors]
                    row = stop
                    result = _joined(one, work, WorkResult(share, version))
                    if result is not None:
                        outcomes[work] = result
            return outcomes
        except BaseException as error:  # the thread must live, and its callers must hear of it
            self._lose(attempt, error)
            return attempt.outcomes

    def _lose(self, attempt: Attempt, error: BaseException) -> None:
        """Fail all requests of a batch: the device, or this code, has failed."""
        logger.exception("a batch was lost")
        failure = ExpertFailed(f"the expert's device failed: {describe(error)}")
        attempt.downloads, attempt.outcomes = [], dict.fromkeys(attempt.works, failure)

    def keep_good_state(self, backend: ExpertBackend) -> StateDict:
        """Copy the expert's state, and go back to it if a later step fails. Returns the copy."""
        started = time.monotonic()
        state = backend.state()
        now = time.monotonic()
        self._good_states[backend] = _GoodState(state, now + _MIN_SNAPSHOT_PERIOD)
        self._copy_again_at = now + (now - started) / _MAX_SNAPSHOT_SHARE
        return state

    def _settle(self, attempt: Attempt) -> tuple[list[Attempt], Outcomes]:
        """Return the attempts without errors that this one comes to, in order of rows, and the errors of the rest."""
        error = attempt.error
        if error is None:
            return [attempt], {}
        slices = attempt.slices
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
        work, first, last = good[0].works[0], good[0].slices[0], good[-1].slices[-1]
        backend, summed = work.backend, good[0].summed
        for one in good[1:]:
            summed = backend.add(summed, one.summed)
        if first.request is last.request and not (first.start == 0 and last.is_last):
            # a chunk of a split request, which has a batch of its own
            summed = work.summed = backend.add(work.summed, summed)
            if not last.is_last:
                return version
        works = good[0].works if len(good) == 1 else list(dict.fromkeys(work for one in good for work in one.works))
        call_ids = [one.call_id for one in works if one.call_id is not None]
        if summed is None or len(call_ids) < len(works):
            return version
        if backend.optimizer is None:
            return backend.step(summed, call_ids)
        if (len(good) > 1 or work.summed is not None) and not backend.are_finite(summed):
            raise ExpertFailed("the sum of the gradients is not finite; no step was taken")
        self._refresh_good_state(backend)
        weights = math.inf if backend.norms.is_settled else backend.weights_norm()
        try:
            version = backend.step(summed, call_ids, peer=work.peer)
        except Overloaded:
            raise
        except BaseException as error:  # an optimizer may raise anything
            logger.exception("the optimizer of an expert raised; its last good state is loaded")
            raise self._reload(backend, f"the expert's optimizer raised {describe(error)}") from None
        self._check_step(backend, good, weights)
        return version

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
        good, now = self._good_states.get(backend), time.monotonic()
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


def _columns(slices: Sequence[RowSlice], works: Sequence[Work]) -> Columns:
    """Return the rows of each slice, tensor by tensor: inputs, then output gradients, then weights."""
    first = works[0]
    given = [[*by.inputs, *(by.output_gradients or ())] for by in works]
    columns: list[Sequence[torch.Tensor] | None] = []
    weights = [] if first.weights is None else [_cut(by.weights, one) for one, by in zip(slices, works, strict=True)]
    if first.rows is not None and all(by.inputs is first.inputs and by.rows is not None for by in works):
        # of one block: every row is copied once, to where it is computed
        parts = [_cut(by.rows, one) for one, by in zip(slices, works, strict=True)]
        index = parts[0] if len(parts) == 1 else torch.cat(parts)
        if all(by.output_gradients is first.output_gradients for by in works):
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
                rows.append(_cut(x, one) if by.rows is None else x.index_select(0, _cut(by.rows, one)))
        columns.append(rows)
    return [*columns, weights] if weights else columns


def _cut(x: torch.Tensor | None, one: RowSlice) -> torch.Tensor:
    assert x is not None
    return x if one.start == 0 and one.is_last else x[one.start : one.stop]


class _DrawsAlone(Exception):
    """A batch of several requests turned out to draw random numbers, which are each request's own."""


def _check_alone(work: Work) -> None:
    """Raises: _DrawsAlone, upon which the batch is computed again, request by request."""
    if work.backend.is_stochastic(work.training):
        raise _DrawsAlone


def _joined(part: RowSlice, work: Work, result: WorkResult) -> WorkResult | None:
    """Return the request's whole result if this was its last slice, or its only one."""
    if part.start == 0 and part.is_last:
        return result
    work.results.append(result)
    if not part.is_last:
        return None
    columns = zip(*(one.tensors for one in work.results), strict=True)
    return WorkResult([None if None in column else torch.cat(column) for column in columns], result.version)


def _damp(attempt: Attempt, gradients: Gradients) -> Gradients:
    """Weaken stale gradients, row by row. Raises: ExpertFailed for those that are too stale."""
    settings, version = attempt.works[0].backend.settings, attempt.works[0].backend.version
    ages = [0 if one.forward_version is None else max(0, version - one.forward_version) for one in attempt.works]
    if settings.max_staleness is not None and max(ages) > settings.max_staleness:
        raise ExpertFailed(
            f"the forward of this backward was {max(ages)} steps ago; at most {settings.max_staleness} are accepted"
        )
    if not settings.staleness_damping or not any(ages):
        return gradients
    counts = torch.tensor([one.stop - one.start for one in attempt.slices])
    scales = (1.0 + torch.tensor(ages, dtype=torch.float32)) ** -settings.staleness_damping
    present = next((x for x in gradients if x is not None), None)
    attempt.scales = scales.repeat_interleave(counts).to("cpu" if present is None else present.device)
    return [None if x is None else x * per_row(attempt.scales, x) for x in gradients]


def _limit_norm(attempt: Attempt, summed: Gradients) -> None:
    """Scale down parameter gradients that are unusually large. Raises: ExpertFailed for those no optimizer may see."""
    backend = attempt.works[0].backend
    norm = attempt.norm = backend.norm_of(summed)
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
