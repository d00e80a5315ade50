"""Runs the command `tesseract` as a user does, in a process of its own."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.stem import Process, Stem

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@asynccontextmanager
async def tesseract(stem: Stem, *arguments: str, fresh: bool = False) -> AsyncIterator[Process]:
    """A running command; killed at the end if it still runs. `fresh`: by a Python that has to load all it wants."""
    process = await stem.start(
        "tesseract_async.cli", *arguments, folder=ROOT, environment=ENVIRONMENT, module=True, fresh=fresh
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def event(process: Process, name: str) -> dict[str, Any]:
    """The next line of JSON with this event."""
    assert process.stderr is not None
    async for line in process.stdout:
        facts: dict[str, Any] = json.loads(line)
        if facts["event"] == name:
            return facts
    raise AssertionError((await process.stderr.read()).decode())


async def finish(stem: Stem, *arguments: str, fresh: bool = False) -> tuple[int | None, str, str]:
    """Runs a command to its end: status, standard output, standard error."""
    async with tesseract(stem, *arguments, fresh=fresh) as process:
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()


def family_of(pid: int) -> list[psutil.Process]:
    """The processes that descend from `pid`."""
    return list(psutil.Process(pid).children(recursive=True))
