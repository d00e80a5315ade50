"""The files of a server's experts: ``directory/UID/``, with checkpoints, sealed states and what a `Tenure` remembers,
and a lock.

All of this is blocking file work: call it off the event loop.
"""

import contextlib
import errno
import itertools
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import quote, unquote

from tesseract_async.errors import CheckpointError, describe
from tesseract_async.experts.pieces import LEAF_BYTES, leaves_of, root_from, root_of
from tesseract_async.files import mapped, sync_folder, write_whole
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.checkpoint import EncodedState, decode_state, encode_state

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SUFFIX: Final = ".safetensors"
NUM_CHECKPOINTS: Final = 3
"""Checkpoints kept of each expert: the newest may be damaged, or its owner wants an older one back."""
NUM_SEALED: Final = 2
"""Sealed files kept of each expert: somebody may be fetching the one before the newest."""


LOCK_NAME: Final = ".lock"

_held: Final[dict[tuple[int, int], int]] = {}
"""Device and inode of each folder that this process holds -> the open lock file. Some network file systems' locks are a
process's, not an open file's, and would not keep two servers of one process apart."""


def expert_folder(directory: Path, uid: str) -> Path:
    """Return an expert's folder: its uid, with what is not plain ASCII as in a URL. `stored_uids` inverts the name.

    Raises: CheckpointError for a uid that cannot name a folder.
    """
    name = quote(uid, safe="")
    if not re.fullmatch(r"[A-Za-z0-9_~%-]+(\.[A-Za-z0-9_~%-]+)*", name):
        raise CheckpointError(f"{uid!r} cannot name a folder")
    return directory / name


def stored_uids(directory: Path | None) -> list[str]:
    """Return the uids of the experts that have a folder in `directory`."""
    if directory is None or not directory.is_dir():
        return []
    return sorted(unquote(path.name) for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


class CheckpointStore:
    """Checkpoints: ``UID/VERSION.safetensors``, the newest `keep` of each expert."""

    def __init__(self, directory: str | Path, *, keep: int = NUM_CHECKPOINTS) -> None:
        if keep < 1:
            raise ValueError(f"at least one checkpoint is kept, not {keep}")
        self.directory = Path(directory)
        self.keep = keep

    def save(self, uid: str, state: Mapping[str, object], *, version: int) -> Path:
        """Write `state` (nested dicts and lists of CPU tensors and plain values) and drop files beyond `keep`.

        It is the newest from now on: files of later versions, from before this server took over another one's state,
        are set aside as ``.superseded``, at most `keep` of them.

        The file appears whole or not at all, even when the machine loses power. Where the disk is full, the expert's
        oldest files give way, except for its newest. Raises: CheckpointError.
        """
        path = expert_folder(self.directory, uid) / f"{version:012d}{SUFFIX}"
        try:
            pieces = encode_state(state)
            while True:
                try:
                    write_whole(path, pieces)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_room(uid, path):
                        raise
            self._drop(uid, path)
        except (OSError, TypeError) as error:
            raise CheckpointError(f"{path} could not be written: {describe(error)}") from error
        return path

    def set_aside(self, uid: str, state: Mapping[str, object], *, version: int) -> Path:
        """Write a file that is neither restored nor ever dropped: ``VERSION.aside``, or with a number if there is one.

        Raises: CheckpointError.
        """
        path = self.save(uid, state, version=version)
        suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(1)))
        target = next(one for suffix in suffixes if not (one := path.with_suffix(f"{suffix}.aside")).exists())
        try:
            os.replace(path, target)
        except OSError as error:
            raise CheckpointError(f"{target} could not be written: {describe(error)}") from error
        return target

    def load(self, uid: str) -> StateDict | None:
        """Return the newest state that is whole; None where there is no checkpoint. Damaged files are renamed, and an
        error is logged.

        Raises: CheckpointError if files exist but none can be read.
        """
        files = self.files(uid)
        for path in files:
            try:
                return decode_state(mapped(path))
            except (OSError, CheckpointError) as error:
                logger.error("checkpoint %s is damaged (%s); trying the one before", path, describe(error))
                # out of the way: it must neither be tried again nor count among those that are kept
                with contextlib.suppress(OSError):
                    os.replace(path, path.with_suffix(".damaged"))
        if files:
            raise CheckpointError(f"none of the {len(files)} checkpoints in {files[0].parent} can be read")
        return None

    def files(self, uid: str) -> list[Path]:
        return sorted(expert_folder(self.directory, uid).glob(f"*{SUFFIX}"), reverse=True)

    def _drop(self, uid: str, newest: Path) -> None:
        files = self.files(uid)
        for late in (path for path in files if path > newest):
            os.replace(late, late.with_suffix(".superseded"))
        superseded = sorted(newest.parent.glob("*.superseded"), reverse=True)
        for old in [path for path in files if path <= newest][self.keep :] + superseded[self.keep :]:
            old.unlink(missing_ok=True)

    def _make_room(self, uid: str, newest: Path) -> bool:
        """Drop the oldest of an expert's checkpoints, but for the last one before `newest`. False if there is none."""
        before = [path for path in self.files(uid) if path < newest]
        if len(before) < 2:
            return False
        logger.warning("the disk is full: %s gives way to a newer checkpoint", before[-1])
        before[-1].unlink(missing_ok=True)
        return True


@dataclass(frozen=True, slots=True)
class SealedFile:
    """The bytes of a state as its primary signed for them."""

    root: bytes
    size: int
    leaves: Sequence[bytes]
    """`pieces.leaves_of` it."""
    path: Path

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return a part of it. Raises: OSError."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(num_bytes)

    def map(self) -> memoryview:
        """Return all of it, read when it is looked at; what is changed in there stays in memory. Raises: OSError."""
        return mapped(self.path)


class SealedFiles:
    """Sealed states, ``UID/ROOT.sealed``, those on their way here, ``UID/ROOT.part``, and what `Tenure`s must remember,
    ``UID/tenure``.

    Without a directory the files are in a temporary folder, and nothing is remembered.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._temporary: Path | None = None
        self._files: dict[str, list[SealedFile]] = {}  # the newest last
        self._open: set[Path] = set()  # parts being written

    def _folder(self, uid: str) -> Path:
        if self._directory is not None:
            return expert_folder(self._directory, uid)
        if self._temporary is None:  # a transfer that was cut off may ask for it after `close`: it goes with this, too
            self._temporary = Path(tempfile.mkdtemp(prefix="tesseract-"))
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        return expert_folder(self._temporary, uid)

    def load(self, uid: str) -> bytes | None:
        """Find an expert's sealed files, and return what was remembered of it, if anything."""
        if self._directory is None:
            return None
        folder = expert_folder(self._directory, uid)
        paths = sorted(folder.glob("*.sealed"), key=lambda path: path.stat().st_mtime)
        self._files[uid] = list(map(read_sealed, paths))
        try:
            return (folder / "tenure").read_bytes()
        except OSError:
            return None

    def remember(self, uid: str, stored: bytes) -> None:
        """Write down what a `Tenure` must not forget; it is on the disk afterwards. Raises: OSError."""
        if self._directory is not None:
            write_whole(expert_folder(self._directory, uid) / "tenure", [stored])

    def keep(self, uid: str, state: EncodedState) -> SealedFile:
        """Write a file, and keep it and the one before. Raises: OSError."""
        file = SealedFile(state.root, state.size, state.leaves, self._path(uid, state.root))
        write_whole(file.path, state, durable=self.is_durable)
        return self._list(uid, file)

    def take_in(self, uid: str, file: SealedFile) -> SealedFile:
        """Keep a file that has arrived whole (`open_part`), and the one before. Raises: OSError."""
        path = self._path(uid, file.root)
        if file.path != path:
            os.replace(file.path, path)
            if self.is_durable:
                sync_folder(path.parent)
        return self._list(uid, replace(file, path=path))

    def _path(self, uid: str, root: bytes) -> Path:
        return self._folder(uid) / f"{root.hex()[:16]}.sealed"

    def _list(self, uid: str, file: SealedFile) -> SealedFile:
        files = [other for other in self._files.get(uid, []) if other.root != file.root]
        files.append(file)
        for old in files[:-NUM_SEALED]:
            old.path.unlink(missing_ok=True)
        self._files[uid] = files[-NUM_SEALED:]
        return file

    @contextlib.contextmanager
    def open_part(self, uid: str, root: bytes) -> Iterator[BinaryIO]:
        """Open a file that arrives in pieces, maybe with some from before. Of an expert there is one besides those that
        are open now; after an error of the disk it is removed.

        Raises: OSError.
        """
        path = self._folder(uid) / f"{root.hex()[:16]}.part"
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in set(path.parent.glob("*.part")) - self._open - {path}:
            old.unlink(missing_ok=True)
        self._open.add(path)
        try:
            path.touch()
            with open(path, "r+b") as part:
                yield part
        except OSError as error:
            if not isinstance(error, TimeoutError):
                path.unlink(missing_ok=True)
            raise
        finally:
            self._open.discard(path)

    def forget(self, uid: str) -> None:
        """Delete an expert's sealed files and parts. Its checkpoints, and what a `Tenure` promised, stay."""
        for file in self._files.pop(uid, []):
            file.path.unlink(missing_ok=True)
        self.forget_parts(uid)

    def forget_parts(self, uid: str) -> None:
        """Delete what arrived of files that nobody is fetching now."""
        for path in set(self._folder(uid).glob("*.part")) - self._open:
            path.unlink(missing_ok=True)

    def find(self, uid: str, root: bytes) -> SealedFile | None:
        return next((file for file in self._files.get(uid, []) if file.root == root), None)

    def put_aside(self, uid: str, root: bytes) -> bytes | None:
        """Keep the newest file where nothing drops it, unless it has this root: another line is followed. Returns its
        root, if it was kept. Raises: OSError."""
        if (file := self.newest(uid)) is None or file.root == root:
            return None
        os.replace(file.path, file.path.with_suffix(".aside"))
        self._files[uid].remove(file)
        return file.root

    def lay_aside(self, uid: str, data: memoryview) -> Path | None:
        """Write a state where `find_aside` finds it; None without a directory. Raises: OSError."""
        if self._directory is None:
            return None
        path = self._folder(uid) / f"{root_of(data).hex()[:16]}.aside"
        write_whole(path, [data])
        return path

    def find_aside(self, uid: str, root: bytes) -> SealedFile | None:
        """Find a state with this root among those that were put aside, too: all of them are read. Raises: OSError."""
        paths = () if self._directory is None else self._folder(uid).glob("*.aside*")
        return self.find(uid, root) or next((file for file in map(read_sealed, paths) if file.root == root), None)

    def newest(self, uid: str) -> SealedFile | None:
        return next(reversed(self._files.get(uid, [])), None)

    @property
    def is_durable(self) -> bool:
        """False if the files vanish with the process: nothing waits for the disk then."""
        return self._directory is not None

    @property
    def is_temporary(self) -> bool:
        """True if there are files in a folder that `close` removes."""
        return self._temporary is not None

    def close(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


def read_sealed(path: Path) -> SealedFile:
    """Return a file with its root and leaves, which are computed. Raises: OSError."""
    with open(path, "rb") as file:
        leaves, size = leaves_of(iter(partial(file.read, LEAF_BYTES), b"")), file.tell()
    return SealedFile(root_from(leaves, size), size, leaves, path)


class FolderLock:
    """Holds a folder from `acquire` to `release`, or to the end of the process, however that ends: each folder has one
    server."""

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
            handle = os.open(self.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"the folder {self.folder} cannot be written: {describe(error)}") from error
        try:
            self._lock(handle)
        except BaseException:  # cancelled or refused: the handle is nobody's
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
        handle = None if self._key is None else _held.pop(self._key, None)
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
