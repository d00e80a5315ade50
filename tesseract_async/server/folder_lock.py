"""One server per checkpoint folder: a lock that the system frees however its holder ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from pathlib import Path
from typing import Final

from tesseract_async.errors import CheckpointError, describe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME: Final = ".lock"

_held: Final[dict[tuple[int, int], int]] = {}
"""Device and inode of each folder that this process holds -> the open lock file. Some network file systems' locks are a
process's, not an open file's, and would not keep two servers of one process apart."""


class FolderLock:
    """Holds a folder from `acquire` to `release`, or to the end of the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Take the folder, made if there is none. Blocking file work, but it never waits.

        Raises: CheckpointError if another server, here or on another computer, holds it, or if it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = os.stat(self.folder)
            key = found.st_dev, found.st_ino
            if key in _held:
                raise self._refusal("another server of this process")
            handle = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"the folder {self.folder} cannot be written: {describe(error)}") from error
        try:
            self._lock(handle)
        except BaseException:
            os.close(handle)
            raise
        self._key, _held[key] = key, handle

    def _lock(self, handle: int) -> None:
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "no such locks on this system")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.pread(handle, 300, 0).decode(errors="replace").strip()
                raise self._refusal(holder or "another process") from None
            logger.warning(
                "the folder %s cannot be locked (%s): see to it that no second server keeps its checkpoints there",
                self.folder,
                error.strerror,
            )
        with contextlib.suppress(OSError):  # the disk may be full: then it is locked without a name
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())

    def _refusal(self, holder: str) -> CheckpointError:
        return CheckpointError(
            f"the folder {self.folder} is used by {holder}: stop that one, or give this server another folder for its "
            "checkpoints"
        )

    def release(self) -> None:
        """Let others have the folder. Releasing twice is harmless."""
        if self._key is not None:
            handle = _held.pop(self._key, None)
            self._key = None
            if handle is not None:
                if fcntl is not None:
                    with contextlib.suppress(OSError):
                        fcntl.flock(handle, fcntl.LOCK_UN)  # a child just forked may hold it open for a moment
                os.close(handle)


def _close_all() -> None:
    """Close them in a forked child, which must not hold its parent's folders when the parent is gone."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)
