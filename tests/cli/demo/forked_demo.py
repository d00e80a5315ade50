"""`tesseract demo`, whose processes are all forks: they need not load PyTorch. Run by `test_demo` through a `Stem`."""

import asyncio
import os
import sys
from typing import IO, Any

from tests.stem import Process, Stem, reader, writer


async def start(program: str, *arguments: str, stderr: IO[bytes], env: dict[str, str], **_: Any) -> Process:
    """Stands for `asyncio.create_subprocess_exec`: ``python -m MODULE ...`` without a Python of its own."""
    assert program == sys.executable and arguments[0] == "-m"
    stdin, out, told = os.pipe(), os.pipe(), os.pipe()
    files = (stdin[0], out[1], stderr.fileno(), told[1])
    number = stem.fork(*arguments[1:], files=files, folder=os.getcwd(), environment=env, module=True)
    for descriptor in (stdin[0], out[1], told[1]):
        os.close(descriptor)
    return Process(number, await writer(stdin[1]), await reader(out[0]), None, await reader(told[0]))


if __name__ == "__main__":
    stem = Stem.forked()
    asyncio.create_subprocess_exec = start  # type: ignore[assignment]
    from tesseract_async.cli.main import main

    try:
        main(["demo", *sys.argv[1:]])
    finally:
        stem.close()
