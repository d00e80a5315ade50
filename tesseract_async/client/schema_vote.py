"""The schema of a grid's experts, as most of the first few that answer state it."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch

from tesseract_async.client.arguments import Arguments
from tesseract_async.client.exchanges import SchemaExchange
from tesseract_async.client.experience import Experience
from tesseract_async.client.expert_rpc import ExpertSchema
from tesseract_async.client.failover import ask_best
from tesseract_async.client.routing import Candidates
from tesseract_async.errors import NotEnoughExperts, TesseractError
from tesseract_async.tasks import end
from tesseract_async.uncopied import Uncopied

_NUM_WITNESSES: Final = 3
_MOMENT_SECONDS: Final = 1.0


class SchemaVote(Uncopied):
    """The schema of one grid, asked for once. Copies of a gate share it."""

    def __init__(self, experience: Experience, *, timeout: float) -> None:
        """`timeout`: seconds for all that is asked."""
        self.known: ExpertSchema | None = None
        """The schema that won; None before the first call, and again once no expert took what it says: they are other
        experts then."""
        self._experience = experience
        self._timeout = timeout
        self._asking: asyncio.Lock | None = None

    async def schema(self, candidates: Candidates, scores_RS: torch.Tensor, arguments: Arguments) -> ExpertSchema:
        """Return the most frequent schema among those that the arguments fit. If they fit none, the most frequent of
        all, this once.

        Raises: NotEnoughExperts if no expert lives, or none answers in time.
        """
        if self.known is not None:
            return self.known
        if not len(candidates):
            raise NotEnoughExperts(1, len(scores_RS), {})
        self._asking = self._asking or asyncio.Lock()
        async with self._asking:
            if self.known is None:
                best = candidates.grid.top_k(scores_RS[:1], len(candidates)).reshape(-1).tolist()
                schema, fits = await self._ask(candidates, best or list(range(len(candidates))), arguments)
                if not fits:
                    return schema
                self.known = schema
        return self.known

    async def _ask(self, candidates: Candidates, experts: list[int], arguments: Arguments) -> tuple[ExpertSchema, bool]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        errors: dict[str, BaseException] = {}
        unfit: list[ExpertSchema] = []
        for start in range(0, len(experts), _NUM_WITNESSES):
            time_left = deadline - loop.time()
            if time_left <= 0:
                break
            # half of the time is kept for the next ones, should these be silent
            told = await self._witnesses(candidates, experts[start : start + _NUM_WITNESSES], time_left / 2, errors)
            fit = [schema for schema in told if arguments.fits(schema)]
            if fit:
                return _most(fit), True
            unfit += told
            if unfit and start:
                break  # two rounds that agree that it does not fit
        if unfit:
            return _most(unfit), False
        raise NotEnoughExperts(1, 0, errors, num_live=len(experts))

    async def _witnesses(
        self, candidates: Candidates, experts: Sequence[int], timeout: float, errors: dict[str, BaseException]
    ) -> list[ExpertSchema]:
        """Return the answers of the primaries of these experts (of followers where there is none); once one has
        answered, it waits for the others only a moment."""
        loop = asyncio.get_running_loop()
        tasks: dict[asyncio.Task[ExpertSchema], str] = {}
        told: list[ExpertSchema] = []
        deadline = loop.time() + timeout
        try:
            for expert in experts:
                replicas = candidates.replicas_of(expert)
                primaries = [replica for replica in replicas if replica.primary] or replicas
                for replica in primaries[:_NUM_WITNESSES]:
                    exchange = SchemaExchange(self._experience, replica.uid)
                    asking = ask_best(self._experience, [replica], exchange, timeout=timeout)
                    tasks[loop.create_task(asking)] = replica.uid
            waiting = set(tasks)
            while waiting and loop.time() < deadline:
                done, waiting = await asyncio.wait(
                    waiting, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED
                )
                for task in [task for task in tasks if task in done]:
                    error = task.exception()
                    if error is None:
                        told.append(task.result())
                        deadline = min(deadline, loop.time() + _MOMENT_SECONDS)
                    elif isinstance(error, TesseractError | TimeoutError):
                        errors[tasks[task]] = error
                    else:
                        raise error
        finally:
            await end(*tasks)
        return told


def _most(schemas: Sequence[ExpertSchema]) -> ExpertSchema:
    """Return the most frequent schema, with the codecs that most of these accept; among equally frequent ones, the
    first."""
    keys = [(repr((schema.inputs, schema.outputs)), schema.codecs) for schema in schemas]
    votes: Counter[object] = Counter([*keys, *(shapes for shapes, _ in keys)])
    return max(zip(keys, schemas, strict=True), key=lambda one: (votes[one[0][0]], votes[one[0]]))[1]
