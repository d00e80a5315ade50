"""One call of an expert on a runtime, as a server makes it: queued, awaited, and withdrawn if nobody waits any more."""

import asyncio
from typing import Any

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.runtime.work import WorkResult


async def computed(
    runtime: TesseractRuntime, backend: ExpertBackend, inputs: Any, *rest: Any, **more: Any
) -> WorkResult:
    """`rest` and `more`: what else `submit` takes; with output gradients it is a backward."""
    work = runtime.submit(backend, inputs, *rest, **more)
    try:
        return await work.answer
    except asyncio.CancelledError:
        runtime.withdraw(work)
        raise
