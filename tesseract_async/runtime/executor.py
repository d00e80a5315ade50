"""Computes batches on one device, for the runtime's thread.

A batch goes through four calls: `stage` gathers its rows and starts their way to the device, `launch` starts the
computation, `complete` judges the results and takes the optimizer's step, `outcomes` waits for the results. On a device
that works in parallel with the CPU, the next batch is staged between `launch` and `complete`. None of the four raises.

Faults stay with their request. A batch that fails before its step (the module raised, a gradient is not finite) is
computed again in halves, until the requests at fault are alone; only they fail, and the others share the step. One
request that runs out of memory is halved once, by rows. The module `steps` deals with a step that fails.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from tesseract_async.errors import ExpertFailed, Overloaded, describe
from tesseract_async.runtime.attempts import NOT_FINITE, Attempt, Download, Outcomes, damp, limit_norm, undamped
from tesseract_async.runtime.batcher import RowSlice
from tesseract_async.runtime.gradients import Gradients, are_finite
from tesseract_async.runtime.rows import columns, divided, encoded, joined
from tesseract_async.runtime.staging import HostStaging, Staging
from tesseract_async.runtime.steps import Steps
from tesseract_async.runtime.work import JointWork, Work, WorkResult

logger = logging.getLogger(__name__)

_NOT_ENCODED: Sequence[Sequence[memoryview] | None] = (None,)


class Executor:
    """Computes batches, each of slices from one queue. Used by one thread."""

    def __init__(self, staging: Staging | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.staging = staging or HostStaging()
        self.steps = Steps(clock)

    def stage(self, slices: Sequence[RowSlice], *, halved: bool = False) -> Attempt:
        attempt = Attempt(slices, [one.request for one in slices], halved)  # type: ignore[misc]
        try:
            attempt.upload = self.staging.upload(columns(slices, attempt.works))
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
            if backend in self.steps.broken:
                raise ExpertFailed(self.steps.broken[backend])
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
                gradients = damp(attempt, gradients)
            attempt.results, attempt.summed = backend.gradients(
                inputs, gradients, training=work.training, seed=seed, weights=weights
            )
            if shared:
                _check_alone(work)
            if not are_finite([*gradients, weights]):
                raise ExpertFailed(NOT_FINITE)
            if work.call_id is not None and attempt.summed:
                limit_norm(attempt, attempt.summed, backend.norm_of(attempt.summed))
        except BaseException as error:  # a module may raise anything: it fails its own batch
            attempt.error = error
        finally:
            attempt.upload = None

    def _compute_joint(
        self, work: JointWork, inputs: Sequence[torch.Tensor], weights: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return the sums that a `JointWork` asks for. Raises what the modules raise, and if it can't be computed in
        one pass."""
        raise TypeError("only a GroupExecutor computes several experts in one pass")

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
                results = one.results if one.scales is None else undamped(one.results, one.scales)
                arriving = self.staging.download(results)
                attempt.downloads.append(Download(one.slices, one.works, arriving.wait, version))
        except BaseException as error:  # the thread must live, and its callers must hear of it
            self._lose(attempt, error)

    def outcomes(self, attempt: Attempt) -> Outcomes:
        """Return the result or error of each request; waits for the results to arrive."""
        try:
            outcomes = dict(attempt.outcomes)
            for slices, works, wait, version in attempt.downloads:
                shares, raw = [wait()], _NOT_ENCODED
                if len(slices) > 1:
                    counts = [stop - start for _, start, stop in slices]
                    if works[0].output_gradients is None and works[0].rows is None:  # most likely each is a reply
                        raw = encoded(shares[0], counts)
                    else:
                        raw = [None] * len(counts)
                    shares = divided(shares[0], counts)
                for one, work, share, buffers in zip(slices, works, shares, raw, strict=True):
                    result = WorkResult(share, version, buffers)
                    if one.stop - one.start == work.num_rows:
                        outcomes[work] = result
                    elif (whole := joined(one, work, result)) is not None:
                        outcomes[work] = whole
            return outcomes
        except BaseException as error:  # the thread must live, and its callers must hear of it
            self._lose(attempt, error)
            return attempt.outcomes

    def _lose(self, attempt: Attempt, error: BaseException) -> None:
        """Fail all requests of a batch: the device, or this code, has failed."""
        logger.exception("a batch was lost")
        failure = ExpertFailed(f"the expert's device failed: {describe(error)}")
        attempt.downloads, attempt.outcomes = [], dict.fromkeys(attempt.works, failure)

    def _settle(self, attempt: Attempt) -> tuple[list[Attempt], Outcomes]:
        """Return the attempts without errors into which this one is split, in order of rows, and the errors of the
        rest."""
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
        step = self.steps.due(good)
        return version if step is None else self.steps.take(step, good)


class _DrawsAlone(Exception):
    """A batch of several requests turned out to draw random numbers, of which each request needs its own."""


def _check_alone(work: Work) -> None:
    """Raises: _DrawsAlone, upon which the batch is computed again, request by request."""
    if work.backend.is_stochastic(work.training):
        raise _DrawsAlone


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _expert_failed(error: BaseException) -> ExpertFailed | Overloaded:
    if isinstance(error, ExpertFailed | Overloaded):
        return error
    logger.warning("an expert's module raised %s", describe(error))
    return ExpertFailed(f"the expert's module raised {describe(error)}")
