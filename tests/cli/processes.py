"""Runs the command `tesseract` as a user does, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@asynccontextmanager
async def tesseract(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running command; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tesseract_async.cli", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def event(process: asyncio.subprocess.Process, name: str) -> dict[str, Any]:
    """The next line of JSON with this event."""
    assert process.stdout is not None and process.stderr is not None
    async for line in process.stdout:
        facts: dict[str, Any] = json.loads(line)
        if facts["event"] == name:
            return facts
    raise AssertionError((await process.stderr.read()).decode())


async def finish(*arguments: str) -> tuple[int | None, str, str]:
    """Runs a command to its end: status, standard output, standard error."""
    async with tesseract(*arguments) as process:
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()


def family_of(pid: int) -> list[psutil.Process]:
    """The processes that descend from `pid`."""
    return list(psutil.Process(pid).children(recursive=True))
