"""The live experts of a grid, for the gates that choose among them: the directory's view, or what a search finds."""

import asyncio
import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from tesseract_async.client.beam_search import BeamSearch
from tesseract_async.client.dispatch import ForwardDispatch
from tesseract_async.client.experience import Experience, GridExperience
from tesseract_async.client.routing import Candidates, LiveGrid, uid_at
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import NotEnoughExperts, TesseractError
from tesseract_async.experts.grid import ExpertReplica, GridView
from tesseract_async.tasks import end
from tesseract_async.uncopied import Uncopied

_SEARCH_AGAIN_SECONDS: Final = 1.0


@dataclass(slots=True, eq=False)
class FoundView:
    """A beam search's counterpart of a `GridView`: those live experts that matter to the rows it was made for."""

    coords: npt.NDArray[np.int64]
    replicas: Mapping[tuple[int, ...], Sequence[ExpertReplica]]
    is_exact: bool
    """True if these are the best live ones of every row: the search came to its end."""
    trouble: dict[str, BaseException]
    """The errors, by uid, of the experts that could not be looked up."""


class GridSearch(Uncopied):
    """Finds the live experts of one grid, and prepares them for choosing. Copies of a gate share it."""

    def __init__(
        self,
        experience: Experience,
        prefix: str,
        grid_size: tuple[int, ...],
        *,
        k_best: int,
        settings: MixtureSettings,
    ) -> None:
        """See `GatingFunction`. Waits for experts as long as a forward may take."""
        self.experience = experience
        self.prefix = prefix
        self.grid_size = grid_size
        self.learned = GridExperience(experience)
        self._k_best = k_best
        self._timeout = settings.forward_timeout
        self._latency_weight = settings.latency_weight
        self._cell_by_cell = settings.search == "beam"
        """True while experts are searched for cell by cell, until the grid turns out to be too sparse for that."""
        self._prepared: tuple[GridView | FoundView, LiveGrid] | None = None

    async def candidates(self, scores_RS: torch.Tensor) -> Candidates:
        """Return the live experts: all of them or, while the directory does not know them yet, the best for these rows
        by a search.

        With ``search="beam"`` there is only the search, until it meets a grid so sparse that reading it is less work.
        While no expert lives, this waits for one; in the end there may be none.

        Raises: NotEnoughExperts if the directory could not be read in time.
        """
        view = await self._view(scores_RS)
        if self._prepared is None or self._prepared[0] is not view:
            self._prepared = view, LiveGrid(view.coords, self.grid_size)
        bias_N = self.learned.bias(view.coords, view.replicas, self._latency_weight)
        return Candidates(self.prefix, self._prepared[1], view.replicas, bias_N)

    async def more(self, dispatch: ForwardDispatch, rows: torch.Tensor, *, wait: bool) -> tuple[Candidates, list[int]]:
        """Return the candidates of `dispatch` with those that have come since, and the numbers of those that came or
        whose servers have said something since. A beam search looks for what is best for `rows` (``bool[rows]``).

        Returns as soon as there are any; without `wait`, also when there are none.
        """
        known = dispatch.candidates
        while True:
            came = await self._newcomers(dispatch, rows)
            if came or not wait:
                break
            if self._cell_by_cell:
                await asyncio.sleep(_SEARCH_AGAIN_SECONDS)
            else:
                await self.experience.node.directory.wait_read(self.prefix)
        if not came:
            return known, []
        number = {coords: i for i, coords in enumerate(map(tuple, known.grid.coords_ND.tolist()))}
        new = [coords for coords in came if coords not in number]
        number |= {coords: i for i, coords in enumerate(new, len(number))}
        coords_ND = np.concatenate(
            [known.grid.coords_ND, np.array(new, dtype=np.int64).reshape(-1, len(self.grid_size))]
        )
        replicas = {**known.replicas, **came}
        grid = LiveGrid(coords_ND, self.grid_size) if new else known.grid
        bias_N = self.learned.bias(coords_ND, replicas, self._latency_weight)
        return replace(known, grid=grid, replicas=replicas, bias_N=bias_N), [number[coords] for coords in came]

    async def _newcomers(
        self, dispatch: ForwardDispatch, rows: torch.Tensor
    ) -> dict[tuple[int, ...], Sequence[ExpertReplica]]:
        known = dispatch.candidates.replicas
        view: GridView | FoundView | None
        if self._cell_by_cell:
            view = await self._search(dispatch.scores_RS[rows], math.inf, k=self._k_best + dispatch.num_tried)
        else:
            self.experience.node.directory.watch(self.prefix, self.grid_size)
            view = self.experience.node.directory.live(self.prefix, self.grid_size)
        came: dict[tuple[int, ...], Sequence[ExpertReplica]] = {}
        if view is None or view.replicas is known:
            return came
        for number, (coords, replicas) in enumerate(view.replicas.items()):
            if number % 256 == 255:
                await asyncio.sleep(0)
            if any(replica not in known.get(coords, ()) for replica in replicas):
                came[coords] = replicas
        return came

    async def _view(self, scores_RS: torch.Tensor) -> GridView | FoundView:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        directory = self.experience.node.directory
        may_read = not self._cell_by_cell
        while self._cell_by_cell:
            found = await self._search(scores_RS, deadline)
            if self._cell_by_cell:
                if len(found.coords) or not len(scores_RS):
                    return found
                if loop.time() + _SEARCH_AGAIN_SECONDS >= deadline:
                    if found.trouble:
                        raise NotEnoughExperts(1, len(scores_RS), found.trouble)
                    return found
                await asyncio.sleep(_SEARCH_AGAIN_SECONDS)
        view: GridView | FoundView | None = directory.live(self.prefix, self.grid_size)
        if view is None:
            directory.watch(self.prefix, self.grid_size)
            view = directory.live(self.prefix, self.grid_size)
        if view is None:
            view = await self._first_view(scores_RS, deadline, search=may_read)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while len(scores_RS) and not len(view.coords):
                    await directory.wait_read(self.prefix)
                    view = directory.live(self.prefix, self.grid_size) or view
        return view

    async def _first_view(self, scores_RS: torch.Tensor, deadline: float, *, search: bool) -> GridView | FoundView:
        """Return the first view of a watched grid, or what a search finds sooner.

        Raises: NotEnoughExperts if there is neither in time.
        """
        loop = asyncio.get_running_loop()
        directory = self.experience.node.directory
        warm = loop.create_task(directory.wait_warm(self.prefix))
        searching = loop.create_task(self._search(scores_RS, deadline)) if search else None
        tasks: list[asyncio.Task[None] | asyncio.Task[FoundView]] = [warm]
        if searching is not None:
            tasks.append(searching)
        try:
            await asyncio.wait(tasks, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            found = searching.result() if searching is not None and searching.done() else None
            if not warm.done() and found is not None:
                if found.is_exact and len(found.coords) >= self._k_best:
                    return found
                await asyncio.wait([warm], timeout=max(0.0, deadline - loop.time()))
            if warm.done():
                warm.result()
                view = directory.live(self.prefix, self.grid_size)
                if view is not None:
                    return view
            if found is not None and len(found.coords):
                return found
        finally:
            await end(*tasks)
        cold = TimeoutError(directory.trouble or "the grid's directory could not be read in time")
        raise NotEnoughExperts(1, len(scores_RS), {self.prefix: cold})

    async def _search(self, scores_RS: torch.Tensor, deadline: float, *, k: int | None = None) -> FoundView:
        """Return the `k` (`k_best`) best of each row, or those found by the deadline. A cell that the network says
        nothing about counts as empty."""
        machine = BeamSearch(scores_RS, self.grid_size, k=k or self._k_best)
        found: dict[tuple[int, ...], Sequence[ExpertReplica]] = {}
        trouble: dict[str, BaseException] = {}
        is_exact = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(None if deadline == math.inf else deadline):
                while cells := machine.wanted():
                    async with asyncio.TaskGroup() as group:
                        for cell in cells:
                            group.create_task(self._look(cell, machine, found, trouble))
                is_exact = machine.is_exact
                if not is_exact and not trouble:
                    self._cell_by_cell = False
        coords = np.array(sorted(found), dtype=np.int64).reshape(len(found), len(self.grid_size))
        return FoundView(coords, dict(sorted(found.items())), is_exact, trouble)

    async def _look(
        self,
        cell: tuple[int, ...],
        machine: BeamSearch,
        found: dict[tuple[int, ...], Sequence[ExpertReplica]],
        trouble: dict[str, BaseException],
    ) -> None:
        uid, replicas = uid_at(self.prefix, cell), []
        try:
            replicas = list(await self.experience.node.directory.find(uid))
        except (TesseractError, TimeoutError) as error:
            trouble[uid] = error
        machine.learn(cell, bool(replicas))
        if replicas:
            found[cell] = replicas
