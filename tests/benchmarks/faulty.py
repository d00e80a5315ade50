"""A node whose expert calls are delayed, fail or hang as a script says: distant and unreliable peers in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import Message
from tesseract_async.errors import ExpertFailed
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
            self.num_calls += 1
            seconds = self.fate(method, body[0])
            if seconds is None:
                raise ExpertFailed("the script says so")
            if seconds == float("inf"):
                async with asyncio.timeout(options["timeout"]):
                    await asyncio.Event().wait()
            if seconds:
                await asyncio.sleep(seconds)
        return await super().call_expert(peer, method, body, *args, **options)


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
