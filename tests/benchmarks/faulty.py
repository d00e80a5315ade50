"""A node whose expert calls are delayed, fail or hang as a script says: distant and unreliable peers in one process."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import torch

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import Message
from tesseract_async.errors import ExpertFailed
from tesseract_async.wire.apply import ApplyPart, decode_part, decode_request, encode_part, encode_request
from tesseract_async.wire.messages import BACKWARD, FORWARD
from tests.benchmarks.modules import KINDS

Fate = Callable[[str, str], float | None]
"""``fate(method, uid)``: seconds by which a call is late; infinity for one that hangs, None for one that fails."""


class FaultyNode(ta.TesseractNode):
    """Calls to experts meet their `fate` before they are made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fate: Fate = lambda method, uid: 0.0
        self.num_calls = 0

    async def call_expert(self, peer: Any, method: str, body: Any = None, *args: Any, **options: Any) -> Message:
        if method in (FORWARD, BACKWARD):
            await self._meet(method, body[0], options["timeout"])
        return await super().call_expert(peer, method, body, *args, **options)

    async def _meet(self, method: str, uid: str, timeout: float) -> None:
        """Wait as long as it is late. Raises: ExpertFailed if it fails; TimeoutError if it hangs."""
        self.num_calls += 1
        seconds = self.fate(method, uid)
        if seconds is None:
            raise ExpertFailed("the script says so")
        async with asyncio.timeout(timeout):
            await (asyncio.Event().wait() if seconds == float("inf") else asyncio.sleep(seconds))

    async def apply_experts(
        self, peer: Any, uids: Any, body: Any, buffers: Any, *, timeout: float, priority: int = 0
    ) -> AsyncGenerator[Message, None]:
        """Each expert by itself, so that each meets its own fate; what answers first comes first."""
        request, tensors = decode_request(body, [memoryview(buffer) for buffer in buffers])
        apply, parts = super().apply_experts, asyncio.Queue[Message]()

        async def ask(place: int, uid: str) -> None:
            start, stop = request.offsets[place : place + 2].tolist()
            alone = request._replace(
                experts=request.experts[place : place + 1],
                ids=request.ids[place : place + 1],
                versions=request.versions[place : place + 1],
                offsets=np.array([0, stop - start]),
                rows=request.rows[start:stop],
                weights=request.weights[start:stop],
                keep=False,
            )
            body, first = encode_request(alone)
            async for message in apply(peer, [uid], body, (*first, *tensors), timeout=timeout, priority=priority):
                part, sums = decode_part(message.body, message.buffers, alone)
                failures = [(place, error) for _, error in part.failures]
                await put(part._replace(experts=part.experts + place, failures=failures), sums)

        async def meet(place: int, uid: str) -> None:
            try:
                await self._meet(BACKWARD if request.backward else FORWARD, uid, timeout)
            except ExpertFailed as error:
                none = np.empty(0, dtype=np.int64)
                await put(ApplyPart(none, none, none, [(place, error)], [], none.astype(np.float32)), ())
                return
            await ask(place, uid)

        async def put(part: ApplyPart, sums: Sequence[memoryview]) -> None:
            body, first = encode_part(part, backward=request.backward)
            await parts.put(Message(body, (*first, *sums)))

        async with asyncio.timeout(timeout):
            tasks = [asyncio.create_task(meet(place, uid)) for place, uid in enumerate(uids)]
            try:
                for _ in tasks:
                    yield await parts.get()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def hosting(uids: list[str], *, kind: str, width: int, train: bool = False) -> AsyncIterator[FaultyNode]:
    """A node that hosts these experts itself; calls to them are local once the script lets them through."""
    backends = {}
    for uid in uids:
        module = KINDS[kind](width)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3) if train else None
        backends[uid] = ta.ExpertBackend(
            module, optimizer=optimizer, args_schema=(ta.TensorSpec((width,)),), max_batch_size=8192
        )
    async with FaultyNode() as node, ta.TesseractServer(node, backends):
        yield node
