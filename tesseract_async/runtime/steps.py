"""The steps that experts take, on the runtime's thread, and the return to a good state after a step that broke an
expert.

If an optimizer raises, or leaves weights or moments that are not finite, the expert's last good state is loaded,
journal included, as if the steps since then had not happened.
"""

import itertools
import logging
import math
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

import torch

from tesseract_async.errors import ExpertFailed, Overloaded, describe
from tesseract_async.runtime.attempts import Attempt
from tesseract_async.runtime.backend import ExpertBackend, step_together, trained_norms, weights_norms
from tesseract_async.runtime.gradients import Gradients
from tesseract_async.runtime.norms import CHECKED_ABOVE, GROWTH, UNDONE_ABOVE
from tesseract_async.runtime.states import StateDict
from tesseract_async.runtime.stepping import rule_of

logger = logging.getLogger(__name__)

_MAX_SNAPSHOT_SHARE: Final = 0.02
"""Share of the thread's time that copies of good states may take."""
_MIN_SNAPSHOT_PERIOD: Final = 5.0
"""Seconds between two copies of one expert's state."""
_PARAMETERS: Final = itemgetter("params")


class Step(NamedTuple):
    backend: ExpertBackend
    summed: Gradients
    call_ids: list[bytes]
    peer: Hashable


class _GoodState(NamedTuple):
    """A state to go back to, and when it should be renewed (time.monotonic)."""

    state: StateDict
    renew_at: float


class Steps:
    """See the module's docstring."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.broken: weakref.WeakKeyDictionary[ExpertBackend, str] = weakref.WeakKeyDictionary()
        """Experts that could not return to a good state, and why."""
        self._clock = clock
        self._good_states: weakref.WeakKeyDictionary[ExpertBackend, _GoodState] = weakref.WeakKeyDictionary()
        self._copy_again_at = 0.0  # time.monotonic, before which no good state is renewed: the experts share the time

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

    def due(self, good: Sequence[Attempt]) -> Step | None:
        """Return the step that these attempts make due, if any. Raises: ExpertFailed if none may be taken."""
        work, first, last = good[0].works[0], good[0].slices[0], good[-1].slices[-1]
        backend, summed = work.backend, good[0].summed
        for one in good[1:]:
            summed = backend.add(summed, one.summed)
        if first.request is last.request and not (first.start == 0 and last.stop == work.num_rows):
            # a chunk of a split request, which has a batch of its own
            summed = work.summed = backend.add(work.summed, summed)
            if not last.is_last:
                return None
        works = good[0].works if len(good) == 1 else list(dict.fromkeys(work for one in good for work in one.works))
        call_ids: list[bytes] = []
        for each in works:  # no comprehension: it is a call more for each expert
            if each.call_id is not None:
                call_ids.append(each.call_id)
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
        return Step(backend, summed, call_ids, work.peer)

    def take(self, step: Step, good: Sequence[Attempt]) -> int:
        backend = step.backend
        weights = math.inf if backend.norms.is_settled else backend.weights_norm()
        try:
            version = backend.step(step.summed, step.call_ids, peer=step.peer)
        except Overloaded:
            raise
        except BaseException as error:  # an optimizer may raise anything
            raise self._undo(step, error) from None
        is_sound = not _doubtful([(backend, good)]) or (
            backend.is_sound() and backend.weights_norm() <= GROWTH * (weights + 1)
        )
        self._check_step(backend, good, is_sound)
        return version

    def take_together(self, attempts: Sequence[Attempt]) -> None:
        """Take the step of each expert, together where their optimizers follow one rule. An expert's error goes to its
        requests."""
        by_rule: dict[Hashable, list[tuple[Attempt, Step]]] = {}
        for one in attempts:
            try:
                step = self.due([one])
                if step is not None:
                    optimizer = step.backend.optimizer
                    rule = None if optimizer is None or not step.backend.steps_at_once else rule_of(optimizer)
                    for x in step.summed if rule is not None else ():
                        if x is not None and x.layout is not torch.strided:
                            rule = None
                    if rule is None:
                        self.take(step, [one])
                    else:
                        by_rule.setdefault(rule, []).append((one, step))
            except BaseException as error:  # an optimizer may raise anything
                one.outcomes |= dict.fromkeys(one.works, error)
        for due in by_rule.values():
            before = _changes([step for _, step in due])
            new = [step.backend for _, step in due if not step.backend.norms.is_settled]
            weights = dict(zip(new, weights_norms(new), strict=True))
            try:
                step_together([(step.backend, step.summed, step.call_ids) for _, step in due])
            except BaseException as error:  # those that it did not reach step alone
                for (one, step), changes in zip(due, before, strict=True):
                    try:
                        if _changes([step]) != [changes]:
                            raise self._undo(step, error)
                        self.take(step, [one])
                    except BaseException as own:  # an optimizer may raise anything
                        one.outcomes |= dict.fromkeys(one.works, own)
                continue
            large = _doubtful([(step.backend, [one]) for one, step in due])
            broken = set()
            for backend, (norm, is_sound) in zip(large, trained_norms(large), strict=True):
                if not is_sound or norm > GROWTH * (weights.get(backend, math.inf) + 1):
                    broken.add(backend)
            for one, step in due:
                try:
                    self._check_step(step.backend, [one], step.backend not in broken)
                except BaseException as error:  # told to those who asked
                    one.outcomes |= dict.fromkeys(one.works, error)

    def _undo(self, step: Step, error: BaseException) -> ExpertFailed:
        logger.error("the optimizer of an expert raised; its last good state is loaded", exc_info=error)
        return self._reload(step.backend, f"the expert's optimizer raised {describe(error)}")

    def _check_step(self, backend: ExpertBackend, good: Sequence[Attempt], is_sound: bool) -> None:
        """Undo a step unless the expert `is_sound` after it. Raises: ExpertFailed, for its senders."""
        norms = backend.norms
        if not is_sound:
            raise self._reload(backend, "this step made the expert's weights or its optimizer's moments overflow")
        settled = False
        for one in good:
            settled = norms.observe(one.works[0].peer, one.norm / len(one.slices)) or settled
        limited = backend.settings.max_gradient_norm is not None
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
            self.broken[backend] = f"this expert is broken: {reason}, then its last good state: {describe(second)}"
            logger.exception("an expert could not return to its last good state and answers no more calls")
            return ExpertFailed(self.broken[backend])
        backend.norms = norms
        logger.warning("%s; it went back to version %d", reason, backend.version)
        return ExpertFailed(f"{reason}; the expert went back to version {backend.version}")


def _doubtful(steps: Sequence[tuple[ExpertBackend, Sequence[Attempt]]]) -> list[ExpertBackend]:
    """Return the experts that a step on these gradients may have broken: any of an expert's first steps may."""
    found = []
    for backend, good in steps:  # no call for each expert
        norms, usual = backend.norms, backend.norms.usual
        if backend.settings.max_gradient_norm is None:
            continue
        high = CHECKED_ABOVE * usual if usual is not None and norms.is_settled else 0.0
        for one in good:
            if one.norm > high * len(one.slices):
                found.append(backend)
                break
    return found


def _changes(steps: Sequence[Step]) -> list[list[int]]:
    """Return, for each, figures that grow when a step writes weights or the optimizer's memory: of the first that it
    writes."""
    changes = []
    for step in steps:
        optimizer = step.backend.optimizer
        groups = () if optimizer is None else optimizer.param_groups
        found: list[int] = []
        gradients = iter(step.summed)
        for parameter in itertools.chain.from_iterable(map(_PARAMETERS, groups)):
            if next(gradients, None) is not None:
                found.append(parameter._version)
                for x in optimizer.state.get(parameter, {}).values():  # type: ignore[union-attr]
                    if isinstance(x, torch.Tensor):
                        found.append(x._version)
                break
        changes.append(found)
    return changes
