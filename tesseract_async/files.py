"""Files that appear whole or not at all. Blocking file work."""

import contextlib
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO


def write_whole(path: Path, pieces: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
    """Write a file that is complete and on the disk when this returns, even if the machine loses power afterwards.

    `durable`: False in a folder that goes with the process, where the disk is not waited for. Makes the folder if
    needed. Raises: OSError; then the file is as it was before, and nothing else is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.writelines(pieces)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def mapped(path: Path) -> memoryview:
    """Return a file's bytes, read when looked at; what is changed in there stays in memory. Raises: OSError."""
    with open(path, "rb") as file:
        return mapped_file(file)


def mapped_file(file: IO[bytes]) -> memoryview:
    """Return an open file's bytes, as `mapped`. Raises: OSError."""
    empty = os.fstat(file.fileno()).st_size == 0  # which cannot be mapped
    return memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where folders can be synced (not on Windows)."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
