"""The live experts of a grid, for the gates that choose among them: the directory's view, or what a search finds."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tesseract_async.client.beam_search import BeamSearch, LiveGrid
from tesseract_async.client.expert_calls import CallOptions, ExpertSchema, fetch_schema
from tesseract_async.client.mixture import MixtureCall
from tesseract_async.client.ports import View
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.client.replicas import REPLICA_FAULTS, Shared, cancel_all
from tesseract_async.errors import NotEnoughExperts, SchemaMismatch, TesseractError
from tesseract_async.experts.manifest import split_uid

_NUM_WITNESSES = 3
_MOMENT_SECONDS = 1.0
_MAX_STRIKES = 3
_STRIKE_SECONDS = 1.0
_SMOOTHING = 0.2
_SEARCH_AGAIN_SECONDS = 1.0


class FoundView:
    """What a beam search found: a `View` of those live experts that matter to the rows it was made for."""

    def __init__(
        self,
        replicas: Mapping[tuple[int, ...], list[Any]],
        num_dims: int,
        *,
        is_exact: bool,
        trouble: dict[str, BaseException],
    ) -> None:
        self.is_exact = is_exact
        """Whether these are the best that live of every row: the search came to its end."""
        self.trouble = trouble
        """What the network did not tell, by uid, and why."""
        self.replicas = dict(sorted(replicas.items()))
        self.coords = np.array(list(self.replicas), dtype=np.int64).reshape(len(self.replicas), num_dims)
        self.version = -1


class GridSearch(Shared):
    """What the copies of a gate share: the node, the grid's schema, and what was learnt about its experts."""

    def __init__(self, node: Any, prefix: str, grid_size: tuple[int, ...], *, k_best: int, timeout: float) -> None:
        super().__init__(node)
        self.prefix = prefix
        self.grid_size = grid_size
        self._k_best = k_best
        self._timeout = timeout
        self._is_sparse = False
        self._schema: ExpertSchema | None = None
        self._asking: asyncio.Lock | None = None
        self._prepared: tuple[View, LiveGrid] | None = None
        self._experts: dict[tuple[tuple[int, ...], bool], RemoteExpert] = {}
        self._in_view: tuple[View, bool, CallOptions, npt.NDArray[np.object_]] | None = None
        self._strikes: dict[tuple[int, ...], tuple[int, float]] = {}
        """How often, and for how long together, experts were waited for in vain since their last answer."""
        self._seconds: dict[tuple[int, ...], float] = {}  # beyond the way there and back
        self._num_bytes = 0.0  # of one forward to one expert, both ways

    # ------------------------------------------------------------------------------------------------ who lives

    async def view(self, scores_RS: torch.Tensor, *, beam: bool = False) -> View:
        """The live experts: all of them, as soon as the directory knows them.

        While it does not, a beam search looks for the best ones of these rows; the first that is done counts. With
        `beam` there is only the search, for grids too large to hold, until it meets one so sparse that reading it is
        less work; what it found in time counts. While nobody lives, somebody is waited for; in the end the view is
        empty.

        Raises: NotEnoughExperts if the directory could not be read in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        directory = self.node.directory
        while self._searches(beam):
            found = await self._search(scores_RS, deadline)
            if self._searches(beam):
                if len(found.coords) or not len(scores_RS):
                    return found
                if loop.time() + _SEARCH_AGAIN_SECONDS >= deadline:
                    if found.trouble:
                        raise NotEnoughExperts(1, len(scores_RS), found.trouble)
                    return found
                await asyncio.sleep(_SEARCH_AGAIN_SECONDS)
        view: View | None = directory.live(self.prefix, self.grid_size)
        if view is None:
            directory.watch(self.prefix, self.grid_size)
            view = directory.live(self.prefix, self.grid_size)
        if view is None:
            view = await self._first_view(scores_RS, deadline, search=not beam)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while len(scores_RS) and not len(view.coords):
                    await directory.wait_read(self.prefix)
                    view = directory.live(self.prefix, self.grid_size)
        return view

    def _searches(self, beam: bool) -> bool:
        """Whether experts are searched for cell by cell: with `beam`, unless the grid turned out too sparse for it."""
        return beam and not self._is_sparse

    async def _first_view(self, scores_RS: torch.Tensor, deadline: float, *, search: bool) -> View:
        """The first view of a watched grid, or what a search finds sooner.

        Raises: NotEnoughExperts if there is neither in time.
        """
        loop = asyncio.get_running_loop()
        warm = loop.create_task(self.node.directory.wait_warm(self.prefix))
        searching = loop.create_task(self._search(scores_RS, deadline)) if search else None
        try:
            tasks = [warm] if searching is None else [warm, searching]
            await asyncio.wait(tasks, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            found = searching.result() if searching is not None and searching.done() else None
            if not warm.done() and found is not None:
                if found.is_exact and len(found.coords) >= self._k_best:
                    return found
                await asyncio.wait([warm], timeout=max(0.0, deadline - loop.time()))
            if warm.done():
                warm.result()
                view: View | None = self.node.directory.live(self.prefix, self.grid_size)
                if view is not None:
                    return view
            if found is not None and len(found.coords):
                return found
        finally:
            await cancel_all([warm, *filter(None, [searching])])
        cold = TimeoutError(self.node.directory.trouble or "the grid's directory could not be read in time")
        raise NotEnoughExperts(1, len(scores_RS), {self.prefix: cold})

    async def newcomers(
        self, view: View, scores_RS: torch.Tensor, *, num_tried: int, wait: bool, beam: bool
    ) -> dict[tuple[int, ...], list[Any]]:
        """The experts that `view` lacks, or whose servers have said something since, with their replicas.

        `scores_RS` are of the rows that need them, each of which has tried up to `num_tried`: so many more a beam
        search looks for. Returns as soon as there are any; without `wait`, also when there are none.
        """
        directory = self.node.directory
        while True:
            live: View | None
            if self._searches(beam):
                live = await self._search(scores_RS, math.inf, k=self._k_best + num_tried)
            else:
                directory.watch(self.prefix, self.grid_size)
                live = directory.live(self.prefix, self.grid_size)
            if live is not None:
                came = {}
                for number, (coords, replicas) in enumerate(() if live is view else live.replicas.items()):
                    if number % 256 == 255:
                        await asyncio.sleep(0)
                    if any(replica not in view.replicas.get(coords, ()) for replica in replicas):
                        came[coords] = replicas
                if came or not wait:
                    return came
            if self._searches(beam):
                await asyncio.sleep(_SEARCH_AGAIN_SECONDS)
            else:
                await directory.wait_read(self.prefix)

    async def _search(self, scores_RS: torch.Tensor, deadline: float, *, k: int | None = None) -> FoundView:
        """The `k` (`k_best`) best of each row, or what was found of them by then. A cell that the network says nothing
        about counts as empty."""
        machine = BeamSearch(scores_RS, self.grid_size, k=k or self._k_best)
        found: dict[tuple[int, ...], list[Any]] = {}
        trouble: dict[str, BaseException] = {}

        async def ask(cell: tuple[int, ...]) -> None:
            replicas: list[Any] = []
            try:
                replicas = await self.node.directory.find(self.uid(cell))
            except (TesseractError, TimeoutError) as error:
                trouble[self.uid(cell)] = error
            machine.learn(cell, bool(replicas))
            if replicas:
                found[cell] = list(replicas)

        is_exact = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(None if deadline == math.inf else deadline):
                while cells := machine.wanted():
                    async with asyncio.TaskGroup() as group:
                        for cell in cells:
                            group.create_task(ask(cell))
                is_exact = machine.is_exact
                self._is_sparse |= not is_exact and not trouble
        return FoundView(found, len(self.grid_size), is_exact=is_exact, trouble=trouble)

    def grid(self, view: View) -> LiveGrid:
        """The view prepared for choosing; the same object as long as the view is."""
        if self._prepared is None or self._prepared[0] is not view:
            self._prepared = (view, LiveGrid(view.coords, self.grid_size))
        return self._prepared[1]

    # ------------------------------------------------------------------------------------------------ experts

    def uid(self, coords: Sequence[int]) -> str:
        """The uid at these coordinates."""
        return ".".join((self.prefix, *map(str, coords)))

    def experts(
        self, view: View, chosen_RK: npt.NDArray[np.int64], *, options: CallOptions, training: bool
    ) -> list[list[RemoteExpert]]:
        """The experts at these rows of the view's coordinates, in the gate's mode and with its options.

        In one mode, a uid is always the same object, as long as nobody gives that another mode or options.
        """
        if self._in_view is None or self._in_view[:2] != (view, training) or self._in_view[2] != options:
            self._in_view = (view, training, options, np.empty(len(view.coords), dtype=object))
        _, _, options, experts = self._in_view  # the same options are the same object
        for index in np.unique(chosen_RK).tolist():
            known = experts[index]
            if known is not None and known.training is training and known.options is options:
                continue
            coords = tuple(view.coords[index].tolist())
            known = self._experts.get((coords, training))
            if known is None or known.training is not training or known.options != options:
                known = RemoteExpert(
                    self._plain or self.node, self.uid(coords), schema=self._schema, options=options
                ).train(training)
                self._experts[(coords, training)] = known
            known.options = options
            experts[index] = known
        result: list[list[RemoteExpert]] = experts[chosen_RK].tolist()
        return result

    async def schema(self, scores_RS: torch.Tensor, view: View, fitting: Callable[[ExpertSchema], Any]) -> ExpertSchema:
        """What the experts of this grid take and give: the word of most of the first few that answer, among schemas
        that the inputs fit (`fitting` raises SchemaMismatch for others). If they fit none, the word of most, this once.

        Raises: NotEnoughExperts if nobody answers in time, or nobody lives who could.
        """
        if self._schema is not None:
            return self._schema
        if not len(view.coords):
            raise NotEnoughExperts(1, len(scores_RS), {})
        self._asking = self._asking or asyncio.Lock()
        async with self._asking:
            if self._schema is None:
                best = self.grid(view).top_k(scores_RS[:1], len(view.coords)).reshape(-1).tolist()
                schema, fits = await self._ask_for_schema(view, best or list(range(len(view.coords))), fitting)
                if not fits:
                    return schema
                self._schema = schema
        return self._schema

    async def _ask_for_schema(
        self, view: View, experts: list[int], fitting: Callable[[ExpertSchema], Any]
    ) -> tuple[ExpertSchema, bool]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        errors: dict[str, BaseException] = {}
        unfit: list[ExpertSchema] = []
        for start in range(0, len(experts), _NUM_WITNESSES):
            left = deadline - loop.time()
            if left <= 0:
                break
            asked = [tuple(view.coords[i].tolist()) for i in experts[start : start + _NUM_WITNESSES]]
            # half of the time is kept for the next ones, should these be silent
            told = await self._witnesses(asked, view, left / 2, errors)
            fit = []
            for schema in told:
                try:
                    fitting(schema)
                except SchemaMismatch:
                    unfit.append(schema)
                else:
                    fit.append(schema)
            if fit:
                return _most(fit), True
            if unfit and start:
                break  # two rounds that agree that it does not fit
        if unfit:
            return _most(unfit), False
        raise NotEnoughExperts(1, 0, errors, num_live=len(experts))

    async def _witnesses(
        self, asked: Sequence[tuple[int, ...]], view: View, timeout: float, errors: dict[str, BaseException]
    ) -> list[ExpertSchema]:
        """What the primaries of these experts say (others where there is none), one after the other; once somebody has
        answered, the silent ones are waited for a moment only."""
        loop = asyncio.get_running_loop()
        tasks: dict[asyncio.Task[ExpertSchema], str] = {}
        told: list[ExpertSchema] = []
        until = loop.time() + timeout
        try:
            for coords in asked:
                replicas = view.replicas[coords]
                primaries = [replica for replica in replicas if replica.primary] or replicas
                for replica in primaries[:_NUM_WITNESSES]:
                    tasks[loop.create_task(self._ask_one(coords, replica, timeout))] = self.uid(coords)
            waiting = set(tasks)
            while waiting and loop.time() < until:
                done, waiting = await asyncio.wait(
                    waiting, timeout=until - loop.time(), return_when=asyncio.FIRST_COMPLETED
                )
                for task in [task for task in tasks if task in done]:
                    error = task.exception()
                    if error is None:
                        told.append(task.result())
                        until = min(until, loop.time() + _MOMENT_SECONDS)
                    elif isinstance(error, TesseractError | TimeoutError):
                        errors[tasks[task]] = error
                    else:
                        raise error
        finally:
            await cancel_all(tasks)
        return told

    async def _ask_one(self, coords: tuple[int, ...], replica: Any, timeout: float) -> ExpertSchema:
        try:
            async with asyncio.timeout(timeout):
                return await fetch_schema(self.node, self.uid(coords), replica.peer, timeout=timeout)
        except REPLICA_FAULTS:
            self.node.directory.report_failure(replica)
            raise

    # ------------------------------------------------------------------------------------------------ experience

    def bias(self, view: View, weight: float) -> torch.Tensor | None:
        """What to add to the live experts' scores: ``-weight`` for every second that each is expected to take."""
        if not weight:
            return None
        ways: dict[Any, float] = {}  # many experts share a peer

        def way(replica: Any) -> float:
            if replica.peer not in ways:
                ways[replica.peer] = self.path_seconds(replica, self._num_bytes)
            return ways[replica.peer]

        seconds = [
            self._seconds.get(coords, 0.0) + min(map(way, view.replicas[coords]))
            for coords in map(tuple, view.coords.tolist())
        ]
        return torch.tensor(seconds, device="cpu") * -weight

    def learn(self, call: MixtureCall) -> None:
        """Takes in how a forward went: latencies, and experts that never answer, which are masked in the end."""
        view = call.view
        for part in (*call.answered, *call.given_up):
            coords = tuple(view.coords[part.expert].tolist())
            way = min(self.path_seconds(replica, part.num_bytes) for replica in part.replicas)
            beyond = max(0.0, call.seconds[part.expert] - way)
            known = self._seconds.get(coords, beyond)
            if part.answer is None:
                beyond = max(beyond, known)  # it takes longer than that
            self._seconds[coords] = known + _SMOOTHING * (beyond - known)
            self._num_bytes += _SMOOTHING * (part.num_bytes - self._num_bytes)
        mismatches = {uid: error for uid, error in call.errors.items() if isinstance(error, SchemaMismatch)}
        for uid, mismatch in mismatches.items() if call.answered else ():
            for replica in view.replicas[split_uid(uid)[1]]:
                self.ignore(replica, mismatch)
        if mismatches and not call.answered:
            self._schema = None  # nobody takes what the schema says: they are other experts now
        for part in call.answered:
            self._strikes.pop(tuple(view.coords[part.expert].tolist()), None)
        for part in call.given_up:
            if not part.slow:
                continue  # not waited for, but not late either
            coords = tuple(view.coords[part.expert].tolist())
            num, seconds = self._strikes.get(coords, (0, 0.0))
            num, seconds = self._strikes[coords] = num + 1, seconds + call.seconds[part.expert]
            if num >= _MAX_STRIKES and seconds >= _STRIKE_SECONDS:
                del self._strikes[coords]
                for replica in part.replicas:
                    self.node.directory.report_failure(replica)


def _most(schemas: Sequence[ExpertSchema]) -> ExpertSchema:
    """The one that is there most often; of equals the first."""
    votes = Counter(repr((schema.inputs, schema.outputs)) for schema in schemas)
    return max(schemas, key=lambda schema: votes[repr((schema.inputs, schema.outputs))])
