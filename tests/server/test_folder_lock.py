"""A checkpoint folder belongs to one server, however many start, and is free however that one ends."""

import contextlib
import errno
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tesseract_async.errors import CheckpointError
from tesseract_async.server import state_files
from tesseract_async.server.state_files import FolderLock
from tests.cli.processes import ENVIRONMENT, ROOT

HOLDS = """
import os, sys, time
from pathlib import Path
from tesseract_async.server.state_files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds ``tmp_path/"x"``, and its forked child's number."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "x")]
    with subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def test_the_second_is_told_who_the_first_is(tmp_path: Path, other: tuple[subprocess.Popen[str], int]) -> None:
    """Until that one is gone, also by SIGKILL, and also where a child of it lives on."""
    process, _ = other
    lock = FolderLock(tmp_path / "x")
    with pytest.raises(CheckpointError) as refused:
        lock.acquire()
    assert f"process {process.pid} on {socket.gethostname()}, since 20" in str(refused.value)
    assert str(tmp_path / "x") in str(refused.value) and "another folder" in str(refused.value)
    process.kill()
    process.wait()
    lock.acquire()
    lock.release()


def test_two_of_one_process(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    first.acquire()
    for again in (first, second, FolderLock(tmp_path / "link")):
        with pytest.raises(CheckpointError, match="another server of this process"):
            again.acquire()
        again is first or again.release()
    first.release()
    first.release()
    second.acquire()
    second.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, None])
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int | None
) -> None:
    """Some network file systems, and Windows. Two servers of this process are kept apart there, too."""

    def refuse(handle: int, how: int) -> None:
        assert number is not None
        raise OSError(number, os.strerror(number))

    kind = FolderLock
    if number is None:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        spec = importlib.util.spec_from_file_location(state_files.__name__, state_files.__file__)
        assert spec is not None and spec.loader is not None
        elsewhere = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(elsewhere)  # as it is where there is no such module
        kind = elsewhere.FolderLock
    else:
        monkeypatch.setattr("fcntl.flock", refuse)
    lock = kind(tmp_path)
    lock.acquire()
    assert "cannot be locked" in caplog.text and "no second server" in caplog.text
    with pytest.raises(CheckpointError, match="another server"):
        kind(tmp_path).acquire()
    lock.release()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file cannot be written"):
        FolderLock(tmp_path / "file").acquire()


def is_open(handle: int, file: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle), file.stat())
    return False


def test_who_releases_frees_it_though_a_child_just_forked_still_has_the_file_open(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    (lock,) = (one for one in tmp_path.iterdir() if one.is_file())
    (handle,) = (handle for handle in range(3, 4096) if is_open(handle, lock))
    copy = os.dup(handle)
    try:
        first.release()
        second.acquire()
        second.release()
    finally:
        os.close(copy)
