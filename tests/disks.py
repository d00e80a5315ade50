"""Disks that fail, which no test can have otherwise."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tesseract_async import files


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Inside, nothing written stays: the system says so when it is asked to make sure."""

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield


@contextlib.contextmanager
def read_only_disk() -> Iterator[None]:
    """Inside, the package opens no file for writing."""

    def refuse(*_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "open", refuse, raising=False)
        yield


@contextlib.contextmanager
def disk_without_links() -> Iterator[None]:
    """Inside, no file gets a second name."""

    def refuse(old: object, new: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", refuse)
        yield


@contextlib.contextmanager
def disk_of_fixed_modes() -> Iterator[None]:
    """Inside, no file's mode can be changed."""

    def refuse(path: Path, mode: int) -> None:
        raise OSError(30, "Read-only file system")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "chmod", refuse)
        yield


class SlowDisk:
    """What is written waits until it is let go on."""

    def __init__(self) -> None:
        self.release, self.writing = threading.Event(), threading.Event()

    def wait(self, _: int) -> None:
        self.writing.set()
        assert self.release.wait(timeout=60)


@contextlib.contextmanager
def slow_disk() -> Iterator[SlowDisk]:
    with pytest.MonkeyPatch.context() as patch:
        disk = SlowDisk()
        patch.setattr(os, "fsync", disk.wait)
        yield disk
