"""Computes batches of several experts in one pass, and has those whose optimizers go by one rule step at once."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

import torch

from tesseract_async.errors import ExpertFailed
from tesseract_async.runtime.attempts import NOT_FINITE, Attempt, Outcomes, limit_norm, scales, undamped
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import RowSlice
from tesseract_async.runtime.executor import Executor
from tesseract_async.runtime.gradients import Gradients, are_finite, for_norm, per_row
from tesseract_async.runtime.grouped import Group, Groups, Member
from tesseract_async.runtime.ragged import Unfit
from tesseract_async.runtime.rows import columns, divided, joined, presence
from tesseract_async.runtime.staging import Staging, Transfer
from tesseract_async.runtime.watching import generator_states, have_moved
from tesseract_async.runtime.work import JointWork, WorkResult

_REQUEST: Final = attrgetter("request")


@dataclass(slots=True, eq=False, repr=False)
class Together:
    """Attempts of several experts, computed in one pass."""

    group: Group
    attempts: list[Attempt]
    upload: Transfer | None = None
    error: BaseException | None = None
    """The reason why there was no such pass."""
    is_each_alone: bool = False
    """True if each was computed alone."""
    is_measured: bool = False
    """True if the time that this pass takes says something about others like it."""
    counts: Sequence[int] = ()
    """Rows of each."""
    results: Gradients = ()
    """The results of all rows, as in an `Attempt`."""
    scales: torch.Tensor | None = None
    incoming: Gradients = ()
    """The output gradients, damped, and the rows' weights."""
    verdicts: torch.Tensor | None = None
    """The norms of the gradients: see `_verdicts`."""
    are_stacked: bool = False
    """True if each one's gradients are parts of stacks."""
    download: Transfer | None = None
    """The way back of the results of attempts without errors."""


class GroupExecutor(Executor):
    """See the module's docstring. `stage`, `launch`, `complete` and `outcomes` compute one expert's batch alone."""

    def __init__(self, staging: Staging | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(staging, clock=clock)
        self.groups = Groups()

    # -- Several experts in one pass -------------------------------------------------------------------------------

    def stage_together(self, group: Group, batches: Sequence[Sequence[RowSlice]]) -> Together:
        """As `stage`, for batches of different experts of one group."""
        attempts = [Attempt(slices, [*map(_REQUEST, slices)]) for slices in batches]
        together = Together(group, attempts)
        try:
            works = [work for one in attempts for work in one.works]
            of_one_block = len({id(by.output_gradients) for by in works}) == 1
            if not of_one_block and len({presence(one.works) for one in attempts}) > 1:
                raise Unfit("some gradients are absent for some experts")  # no gradient is not one of zeros
            together.upload = self.staging.upload(columns([one for slices in batches for one in slices], works))
        except BaseException as error:  # told to those who asked, by `complete`
            together.error = error
        return together

    def _compute_joint(
        self, work: JointWork, inputs: Sequence[torch.Tensor], weights: torch.Tensor | None
    ) -> list[torch.Tensor]:
        members = self._members(work.backends, work.training)
        kind, group = members[0].kind, work.queue.name[-1]  # type: ignore[index]
        if kind is not group.kind or not kind.is_ragged:  # it never was, or is not any more
            raise _NotNow
        assert weights is not None and work.rows is not None
        states = generator_states() if work.training else ()
        outputs = kind.forward(members, inputs, work.counts, training=work.training)
        if states and have_moved(states):
            raise _NotNow
        work.versions = [backend.version for backend in work.backends]
        sums, rows = [], work.rows.to(weights.device)
        assert work.inputs[0] is not None
        num_rows = len(work.inputs[0])
        for y in outputs:
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            y = y * per_row(weights, y).to(y.dtype)
            sums.append(
                y.sum(0, keepdim=True) if num_rows == 1 else y.new_zeros(num_rows, *y.shape[1:]).index_add_(0, rows, y)
            )
        return sums

    def _members(self, backends: Sequence[ExpertBackend], training: bool) -> list[Member]:
        """Return these experts' tensors. Raises: _NotNow unless all are of one kind now, and may be computed so."""
        if self.steps.broken and any([backend in self.steps.broken for backend in backends]):
            raise _NotNow
        members = self.groups.members_of(backends, training)
        if members is None:
            raise _NotNow
        return members

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
        kind.num_extra_rows = 0
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
            if _agree(together, found):
                group.checked = kind.way
            else:
                kind.misfits(None)

    def _compute_together(self, together: Together) -> None:
        attempts, kind = together.attempts, together.group.kind
        assert together.upload is not None
        work = attempts[0].works[0]
        members = self._members([one.works[0].backend for one in attempts], work.training)
        if members[0].kind is not kind:
            raise _NotNow
        states = generator_states() if work.training else ()
        staged, num_inputs = together.upload.wait(), len(work.backend.input_specs)
        counts = []
        for one in attempts:
            count = 0
            for _, start, stop in one.slices:
                count += stop - start
            counts.append(count)
        together.counts = counts
        inputs: list[torch.Tensor] = staged[:num_inputs]  # type: ignore[assignment]
        if work.output_gradients is None:
            together.results = kind.forward(members, inputs, counts, training=work.training)
        else:
            weights = None if work.weights is None else staged.pop()
            gradients = self._damp_together(together, staged[num_inputs:])
            parameters = []
            for one in attempts:
                backend = one.works[0].backend
                if backend.optimizer is None:
                    backend.prepare()
                own_parameters: list[torch.nn.Parameter] = []  # as `backend.parameters`, without a call for each
                for each in () if backend.optimizer is None else backend.optimizer.param_groups:
                    own_parameters += each["params"]
                parameters.append(own_parameters)
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
                one.scales = scales(one)
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
            self.steps.take_together([one for one in left if one.works[0].output_gradients is not None])
            together.download = self.staging.download(undamped(together.results, together.scales))
        except BaseException as error:  # the thread must live, and its callers must hear of it
            for one in left:
                self._lose(one, error)

    def outcomes_together(self, together: Together) -> Outcomes:
        """As `outcomes`."""
        found: Outcomes = {}
        attempts = together.attempts
        if together.download is None:
            for one in attempts:
                found |= self.outcomes(one)
            return found
        try:
            slices = [x for one in attempts for x in one.slices]
            shares = iter(divided(together.download.wait(), [stop - start for _, start, stop in slices]))
            for one in attempts:
                mine = list(itertools.islice(shares, len(one.slices)))
                if one.error is not None or one.outcomes:
                    found |= self.outcomes(one)
                    continue
                version = one.works[0].backend.version
                for part, work, share in zip(one.slices, one.works, mine, strict=True):
                    result = WorkResult(share, version)
                    if part.stop - part.start == work.num_rows:
                        found[work] = result
                    elif (whole := joined(part, work, result)) is not None:
                        found[work] = whole
        except BaseException as error:  # the thread must live, and its callers must hear of it
            for one in attempts:
                self._lose(one, error)
                found |= one.outcomes
        return found

    def _judge(self, together: Together) -> None:
        """Give each expert whose gradients no optimizer may see its error, after one wait for the device."""
        assert together.verdicts is not None
        *norms, total = together.verdicts.tolist()
        bounds = list(itertools.accumulate(together.counts, initial=0))
        left = iter(norms)
        for index, one in enumerate(together.attempts):
            num_present = 0
            for x in one.summed or ():
                if x is not None:
                    num_present += 1
            own = list(itertools.islice(left, min(1, num_present) if together.are_stacked else num_present))
            if one.error is not None:
                continue
            try:
                if not math.isfinite(total):
                    rows = slice(bounds[index], bounds[index + 1])
                    if not are_finite([None if x is None else x[rows] for x in together.incoming]):
                        raise ExpertFailed(NOT_FINITE)
                if one.works[0].call_id is not None and one.summed:
                    limit_norm(one, one.summed, math.hypot(*own))
            except BaseException as error:  # it fails its own batch
                one.error = error


class _NotNow(Exception):
    """Experts are not computed in one pass this time."""


def _verdicts(incoming: Gradients, summed: Sequence[Gradients], stacks: Gradients | None) -> torch.Tensor:
    """Return the norms of each expert's gradients, and the sum of all incoming ones. There is a norm for each parameter
    or, where gradients are parts of `stacks`, one for all of an expert's."""
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
    """Return whether two lists of tensors are the same but for rounding, compared with the largest value in them."""
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
