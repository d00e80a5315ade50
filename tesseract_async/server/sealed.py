"""The sealed files of a server's experts, byte for byte as they were signed for, and what their `Tenure`s remember.

On disk beside the checkpoints, or in a temporary folder where there are none. Blocking file work.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tesseract_async.experts.merkle import root_of
from tesseract_async.identity import sync_folder
from tesseract_async.server.checkpoint import folder_name

NUM_KEPT: Final = 2
"""Files of each expert: somebody may be fetching the one before."""


@dataclass(frozen=True, slots=True)
class SealedFile:
    """One file, and where it lies."""

    root: bytes
    size: int
    path: Path

    def read(self, offset: int, num_bytes: int) -> bytes:
        """A piece of it. Raises: OSError."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(num_bytes)


class SealedFiles:
    """All of one server."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[str, list[SealedFile]] = {}  # the newest last

    def load(self, uid: str) -> bytes | None:
        """What was remembered of an expert, if anything; its sealed files can be found afterwards."""
        if self._directory is None:
            return None
        folder = self._folder(uid)
        found: list[tuple[float, SealedFile]] = []
        for path in folder.glob("*.sealed"):
            data = path.read_bytes()
            found.append((path.stat().st_mtime, SealedFile(root_of(data), len(data), path)))
        self._files[uid] = [file for _, file in sorted(found, key=lambda item: item[0])]
        try:
            return (folder / "tenure").read_bytes()
        except OSError:
            return None

    def remember(self, uid: str, stored: bytes) -> None:
        """Writes down what a `Tenure` must not forget; it is on the disk afterwards. Raises: OSError."""
        if self._directory is not None:
            self._write(self._folder(uid) / "tenure", stored)

    def keep(self, uid: str, root: bytes, data: bytes) -> None:
        """Keeps a file, and the one before. Raises: OSError."""
        path = self._folder(uid) / f"{root.hex()[:16]}.sealed"
        self._write(path, data)
        files = [file for file in self._files.get(uid, []) if file.root != root]
        files.append(SealedFile(root, len(data), path))
        for old in files[:-NUM_KEPT]:
            old.path.unlink(missing_ok=True)
        self._files[uid] = files[-NUM_KEPT:]

    def find(self, uid: str, start: bytes) -> SealedFile | None:
        """The file whose root begins with these bytes."""
        return next((file for file in self._files.get(uid, []) if file.root.startswith(start)), None)

    def has(self, uid: str, root: bytes) -> bool:
        """Whether it is here."""
        return self.find(uid, root) is not None

    def read(self, uid: str, root: bytes) -> bytes | None:
        """A whole file; None if it is not here. Raises: OSError."""
        file = self.find(uid, root)
        return None if file is None else file.read(0, file.size)

    def close(self) -> None:
        """Removes what was temporary."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _folder(self, uid: str) -> Path:
        if self._directory is None:
            self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="tesseract-")
        folder = (self._directory or Path(self._temporary.name if self._temporary else "")) / folder_name(uid)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        unfinished = path.with_name(path.name + ".unfinished")
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
