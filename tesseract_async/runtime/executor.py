"""Computes one batch on the device: what the runtime's thread does, without the thread.

A batch goes through four calls: `stage` gathers its rows and starts their way to the device, `launch` lets the device
compute, `complete` judges the results and takes the optimizer's step, `outcomes` waits for the answers. On a device
that works beside the CPU, the next batch is staged between `launch` and `complete`. None of the four raises.

Faults stay with their request. A batch that fails before its step (the module raised, a gradient is not finite) is
computed again in halves, until the requests at fault are alone; only they fail, and the others share the step. One
request that runs out of memory is halved once, by rows. If the optimizer itself raises, or leaves weights or a memory
that are not finite, the expert's last good state is loaded, journal included: for everybody it is as if the steps since
then had not happened.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from tesseract_async.errors import ExpertFailed, describe
from tesseract_async.runtime.backend import ExpertBackend, add_gradients
from tesseract_async.runtime.batcher import Part
from tesseract_async.runtime.finite import are_finite, norm_of
from tesseract_async.runtime.merging import Gradients
from tesseract_async.runtime.norms import CHECKED_ABOVE, FAR_ABOVE, GROWTH, UNDONE_ABOVE
from tesseract_async.runtime.staging import Columns, Download, HostStaging, Staging, Upload
from tesseract_async.runtime.work import Answer, Outcome, Work

logger = logging.getLogger(__name__)

_MAX_SNAPSHOT_SHARE = 0.02
_MIN_SNAPSHOT_PERIOD = 5.0


class Attempt:
    """Some parts of requests, computed together once."""

    __slots__ = (
        "parts",
        "work",
        "upload",
        "results",
        "summed",
        "norm",
        "downloads",
        "scales",
        "error",
        "outcomes",
        "stop_halving",
    )

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.work: Work = parts[0].request.payload
        """The first part's."""
        self.upload: Upload | None = None
        self.results: Sequence[torch.Tensor | None] = ()
        """Outputs, or gradients of the inputs, on the device."""
        self.summed: Gradients | None = None
        """Gradients of the parameters."""
        self.norm = 0.0
        """Of those, as they came."""
        self.downloads: list[tuple[Sequence[Part], Download, int]] = []
        """Of the attempts that came well out of this one: their parts, results and version."""
        self.scales: torch.Tensor | None = None
        self.error: BaseException | None = None
        self.outcomes: list[Outcome] = []
        self.stop_halving = False


class Executor:
    """Computes batches, one pool's parts at a time. Used by one thread."""

    def __init__(self, staging: Staging | None = None) -> None:
        self.staging = staging or HostStaging()
        self._good_states: weakref.WeakKeyDictionary[ExpertBackend, _GoodState] = weakref.WeakKeyDictionary()
        self._broken: weakref.WeakKeyDictionary[ExpertBackend, str] = weakref.WeakKeyDictionary()
        self._copy_again_at = 0.0  # time.monotonic, before which no good state is renewed: the experts share the time

    def stage(self, parts: Sequence[Part]) -> Attempt:
        """Gathers the parts' rows and starts copying them to the device."""
        attempt = Attempt(parts)
        try:
            attempt.upload = self.staging.upload(_columns(parts))
        except BaseException as error:  # a module may raise anything: it fails its own batch
            attempt.error = error
        return attempt

    def launch(self, attempt: Attempt) -> None:
        """Lets the device compute. What fails is kept for `complete`."""
        if attempt.error is not None:
            return
        assert attempt.upload is not None
        work = attempt.work
        backend = work.backend
        try:
            if backend in self._broken:
                raise ExpertFailed(self._broken[backend])
            staged = attempt.upload.wait()
            num_inputs = len(backend.input_specs)
            inputs: list[Any] = staged[:num_inputs]
            seed = _chunk_seed(attempt.parts[0])
            shared = len(attempt.parts) > 1
            if shared:
                _check_alone(work)
            if work.output_gradients is None:
                attempt.results = backend.forward(inputs, training=work.training, seed=seed)
                if shared:
                    _check_alone(work)
                return
            gradients = self._damp(attempt, staged[num_inputs:])
            attempt.results, attempt.summed = backend.gradients(inputs, gradients, training=work.training, seed=seed)
            if shared:
                _check_alone(work)
            if not are_finite(gradients):
                raise ExpertFailed("the gradients that came with this call are not finite; no step was taken")
            if work.call_id is not None and attempt.summed:
                self._limit_norm(attempt)
        except BaseException as error:  # a module may raise anything: it fails its own batch
            attempt.error = error
        finally:
            attempt.upload = None

    def complete(self, attempt: Attempt) -> None:
        """Retries what failed, takes the step, and starts the answers' way back."""
        try:
            self._complete(attempt)
        except BaseException as error:  # the thread must live: whoever waits is told
            self._lose(attempt, error)

    def _complete(self, attempt: Attempt) -> None:
        good, failed = self._settle(attempt)
        attempt.outcomes = failed
        version = attempt.work.backend.version
        if good and attempt.work.output_gradients is not None:
            try:
                version = self._step(good, version)
            except BaseException as error:  # an optimizer may raise anything
                attempt.outcomes += [Outcome(work, None, error) for work in _works(good)]
                return
        for one in good:
            attempt.downloads.append((one.parts, self.staging.download(_unscaled(one)), version))

    def outcomes(self, attempt: Attempt) -> list[Outcome]:
        """What to tell each request; waits for the answers to arrive."""
        try:
            return self._collect(attempt)
        except BaseException as error:  # the thread must live: whoever waits is told
            self._lose(attempt, error)
            return attempt.outcomes

    def _lose(self, attempt: Attempt, error: BaseException) -> None:
        """The device itself failed, or we did: the callers must not wait for ever."""
        logger.exception("a batch was lost")
        failure = ExpertFailed(f"the expert's device failed: {describe(error)}")
        attempt.downloads = []
        attempt.outcomes = [Outcome(part.request.payload, None, failure) for part in attempt.parts]

    def _collect(self, attempt: Attempt) -> list[Outcome]:
        outcomes = list(attempt.outcomes)
        for parts, download, version in attempt.downloads:
            tensors = download.wait()
            row = 0
            for part in parts:
                stop = row + part.stop - part.start
                whole = len(parts) == 1
                share = tensors if whole else [None if x is None else x[row:stop] for x in tensors]
                outcomes.append(_join(part, Answer(share, version)))
                row = stop
        return outcomes

    def keep_good_state(self, backend: ExpertBackend, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Copies the expert's state (unless `state` is a copy just made) and returns to it if a step fails."""
        started = time.monotonic()
        state = backend.state() if state is None else state
        now = time.monotonic()
        self._good_states[backend] = _GoodState(state, now + _MIN_SNAPSHOT_PERIOD)
        self._copy_again_at = now + (now - started) / _MAX_SNAPSHOT_SHARE
        return state

    def _damp(self, attempt: Attempt, gradients: Gradients) -> Gradients:
        """Refuses what is too stale, and weakens what is somewhat stale, row by row."""
        settings, version = attempt.work.backend.settings, attempt.work.backend.version
        if settings.max_staleness is None and not settings.staleness_damping:
            return gradients
        ages = [_staleness(part.request.payload, version) for part in attempt.parts]
        if settings.max_staleness is not None and max(ages) > settings.max_staleness:
            raise ExpertFailed(
                f"the forward of this backward was {max(ages)} steps ago; at most {settings.max_staleness} are accepted"
            )
        if not settings.staleness_damping or not any(ages):
            return gradients
        counts = torch.tensor([part.stop - part.start for part in attempt.parts])
        scales = (1.0 + torch.tensor(ages, dtype=torch.float32)) ** -settings.staleness_damping
        present = next((x for x in gradients if x is not None), None)
        attempt.scales = scales.repeat_interleave(counts).to("cpu" if present is None else present.device)
        return [None if x is None else x * _beside(attempt.scales, x) for x in gradients]

    @staticmethod
    def _limit_norm(attempt: Attempt) -> None:
        """Refuses parameter gradients that no optimizer may see, and scales down those that are unusually large."""
        backend, summed = attempt.work.backend, attempt.summed
        assert summed is not None
        norm = attempt.norm = norm_of(summed)
        if not math.isfinite(norm) and not are_finite(summed):
            raise ExpertFailed("the gradients of the expert's parameters are not finite; no step was taken")
        limit, usual = backend.settings.max_gradient_norm, backend.norms.usual
        if limit == "adaptive":
            limit = math.sqrt(torch.finfo(torch.float32).max)
            bound = backend.norms.bound(_account(attempt))
            if len(attempt.parts) > 1 and usual is not None:
                # each may be as large as one alone
                limit, bound = FAR_ABOVE * usual * len(attempt.parts), max(bound, usual) * len(attempt.parts)
            if bound < norm <= limit:
                attempt.summed = [None if x is None else x * (bound / norm) for x in summed]
        if limit is not None and norm > limit:
            raise ExpertFailed(
                f"the gradients of the expert's parameters have norm {norm:.4g}; at most {limit:.4g} is accepted"
            )

    def _settle(self, attempt: Attempt) -> tuple[list[Attempt], list[Outcome]]:
        """The attempts that came well out of this one, in order of rows, and what failed."""
        error = attempt.error
        if error is None:
            return [attempt], []
        parts = attempt.parts
        # the traceback holds the failed attempt's tensors: let go before computing again
        error.__traceback__ = None
        attempt.results, attempt.summed = (), None
        if len(parts) > 1:
            middle = len(parts) // 2
            good, failed = self._again(parts[:middle])
            more_good, more_failed = self._again(parts[middle:])
            return good + more_good, failed + more_failed
        (part,) = parts
        work = attempt.work
        num_rows = part.stop - part.start
        if _is_out_of_memory(error):
            self.staging.release()
            if num_rows > 1 and not attempt.stop_halving and not work.backend.is_stochastic(work.training):
                middle = part.start + num_rows // 2
                good, failed = self._again([part._replace(stop=middle)], stop_halving=True)
                if not failed:
                    more_good, failed = self._again([part._replace(start=middle)], stop_halving=True)
                    good += more_good
                return ([], failed) if failed else (good, [])
        return [], [Outcome(work, None, _expert_failed(error))]

    def _again(self, parts: Sequence[Part], *, stop_halving: bool = False) -> tuple[list[Attempt], list[Outcome]]:
        attempt = self.stage(parts)
        attempt.stop_halving = stop_halving
        self.launch(attempt)
        return self._settle(attempt)

    def _step(self, good: Sequence[Attempt], version: int) -> int:
        """One step on the sum of these attempts, if they end their requests. Returns the version that it led to.

        Raises: ExpertFailed if no step could be taken; the expert then stands where it was, or at its last good state.
        """
        summed = good[0].summed
        for one in good[1:]:
            summed = add_gradients(summed, one.summed)
        first, last = good[0].parts[0], good[-1].parts[-1]
        work = good[0].work
        if first.request is last.request and not (first.start == 0 and last.is_last):
            # a chunk of a split request, which has its pool's batch for itself
            summed = work.summed = add_gradients(work.summed, summed)
            if not last.is_last:
                return version
        call_ids = [one.call_id for one in _works(good)]
        if summed is None or None in call_ids:
            return version
        backend = work.backend
        if backend.optimizer is not None and (len(good) > 1 or work.summed is not None) and not are_finite(summed):
            raise ExpertFailed("the sum of the gradients is not finite; no step was taken")
        self._refresh_good_state(backend)
        weights = norm_of([x.detach() for x in backend.parameters]) if not backend.norms.is_settled else math.inf
        try:
            version = backend.step(
                summed, [call_id for call_id in call_ids if call_id is not None], peer=_account(good[0])
            )
        except BaseException as error:  # an optimizer may raise anything
            logger.exception("the optimizer of an expert raised; its last good state is loaded")
            raise self._reload(backend, f"the expert's optimizer raised {describe(error)}") from None
        self._check_step(backend, good, weights)
        return version

    def _check_step(self, backend: ExpertBackend, good: Sequence[Attempt], weights: float) -> None:
        """Undoes a step that broke the expert, whose weights had that norm. Raises: ExpertFailed, for its senders."""
        norms, usual = backend.norms, backend.norms.usual
        looks = backend.optimizer is not None and backend.settings.max_gradient_norm is not None
        high = CHECKED_ABOVE * usual if usual is not None and norms.is_settled else 0.0
        if looks and any(one.norm > high * len(one.parts) for one in good):
            grown = norm_of([x.detach() for x in backend.parameters])
            if not backend.is_sound() or grown > GROWTH * (weights + 1):
                raise self._reload(backend, "this step made the expert's weights or its optimizer's memory overflow")
        settled = any([norms.observe(_account(one), one.norm / len(one.parts)) for one in good])
        if looks and settled and norms.first > UNDONE_ABOVE * (norms.usual or math.inf):
            raise self._reload(backend, "this expert's first gradient was far larger than all others")

    def _refresh_good_state(self, backend: ExpertBackend) -> None:
        """Keeps the copy that a failed step returns to fresh, but spends little time on it.

        Raises: ExpertFailed if the expert is broken already; it went back, then.
        """
        if backend.optimizer is None:
            return
        good, now = self._good_states.get(backend), time.monotonic()
        if good is None:
            self.keep_good_state(backend)
        elif now > max(good.renew_at, self._copy_again_at) and backend.norms.is_settled:
            if backend.settings.max_gradient_norm is not None and not backend.is_sound():
                raise self._reload(backend, "the expert's weights or its optimizer's memory overflowed")
            self.keep_good_state(backend)

    def _reload(self, backend: ExpertBackend, reason: str) -> ExpertFailed:
        norms = backend.norms  # what was learnt about senders holds
        try:
            backend.load_state(self._good_states[backend].state)
        except BaseException as second:  # then only this expert is given up
            self._broken[backend] = f"this expert is broken: {reason}, then its last good state: {describe(second)}"
            logger.exception("an expert could not return to its last good state and answers no more calls")
            return ExpertFailed(self._broken[backend])
        backend.norms = norms
        logger.warning("%s; it went back to version %d", reason, backend.version)
        return ExpertFailed(f"{reason}; the expert went back to version {backend.version}")


class _GoodState:
    """A state to go back to, and when it should be renewed (time.monotonic)."""

    __slots__ = ("state", "renew_at")

    def __init__(self, state: dict[str, Any], renew_at: float) -> None:
        self.state = state
        self.renew_at = renew_at


def _columns(parts: Sequence[Part]) -> Columns:
    """The rows that each part brings, tensor by tensor: inputs, then output gradients."""
    if len(parts) == 1 and parts[0].start == 0 and parts[0].is_last:
        work: Work = parts[0].request.payload
        tensors = [*work.inputs, *(work.output_gradients or ())]
        return [None if x is None else (x,) for x in tensors]
    columns: list[list[torch.Tensor] | None] = []
    works: list[Work] = [part.request.payload for part in parts]
    for index in range(len(works[0].inputs)):
        columns.append([work.inputs[index][part.start : part.stop] for part, work in zip(parts, works, strict=True)])
    if works[0].output_gradients is None:
        return columns
    for index, spec in enumerate(works[0].backend.output_specs):
        rows: list[torch.Tensor] = []
        present = False
        for part, work in zip(parts, works, strict=True):
            gradient = (work.output_gradients or ())[index]
            if gradient is None:  # beside others that have one, an absent gradient is zero
                rows.append(torch.zeros(part.stop - part.start, *spec.shape, dtype=spec.dtype))
            else:
                present = True
                rows.append(gradient[part.start : part.stop])
        columns.append(rows if present else None)
    return columns


class _DrawsAlone(Exception):
    """A batch of several requests turned out to draw random numbers, which are each request's own."""


def _check_alone(work: Work) -> None:
    """Raises: _DrawsAlone, upon which the batch is computed again, request by request."""
    if work.backend.is_stochastic(work.training):
        raise _DrawsAlone


def _works(attempts: Sequence[Attempt]) -> list[Work]:
    """The requests of these attempts, each once."""
    return list(dict.fromkeys(part.request.payload for one in attempts for part in one.parts))


def _join(part: Part, answer: Answer) -> Outcome:
    """The whole answer, if this was the last part of the request, or the only one."""
    work: Work = part.request.payload
    if part.start == 0 and part.is_last:
        return Outcome(work, answer)
    work.parts.append(answer)
    if not part.is_last:
        return Outcome(work)
    columns = zip(*(one.tensors for one in work.parts), strict=True)
    return Outcome(work, Answer([None if None in column else torch.cat(column) for column in columns], answer.version))


def _chunk_seed(part: Part) -> int:
    """Chunks of a split request draw differently, and the same in forward and backward."""
    work: Work = part.request.payload
    return (work.seed + part.start * 0x9E3779B1) & 0x7FFF_FFFF_FFFF_FFFF


def _staleness(work: Work, version: int) -> int:
    return 0 if work.forward_version is None else max(0, version - work.forward_version)


def _unscaled(attempt: Attempt) -> Gradients:
    """Callers get their gradients as if nothing had been damped: damping concerns the expert's own step."""
    if attempt.scales is None:
        return attempt.results
    return [None if x is None else x / _beside(attempt.scales, x) for x in attempt.results]


def _beside(scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    real = x.real.dtype if x.is_complex() else x.dtype
    return scales.to(x.device, real).view(-1, *(1 for _ in x.shape[1:]))


def _account(attempt: Attempt) -> Hashable:
    """Whom the gradients of an attempt count for: of several peers, the first."""
    request = attempt.work.request
    return None if request is None else request.peer


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _expert_failed(error: BaseException) -> ExpertFailed:
    if isinstance(error, ExpertFailed):
        return error
    logger.warning("an expert's module raised %s", describe(error))
    return ExpertFailed(f"the expert's module raised {describe(error)}")
