"""Disks that fail, which no test can have otherwise."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def syncing(act: Callable[[], None], folder: Path | None = None, named: str = "*") -> Iterator[None]:
    """Inside, `act` runs, and may raise, when the system is to make sure that a file is on the disk: any file, or one
    in `folder` whose name matches."""
    sync = os.fsync

    def acted(handle: int) -> None:
        there = folder.rglob(named) if folder is not None else ()
        if folder is None or any(os.path.samestat(os.fstat(handle), one.stat()) for one in there):
            act()
        sync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", acted)
        yield


@contextlib.contextmanager
def full_disk(folder: Path | None = None, named: str = "*") -> Iterator[list[str]]:
    """Inside, nothing written stays (see `syncing`): the system says so when it is asked to make sure. Gives a list
    that grows with each refusal."""
    refused: list[str] = []

    def refuse() -> None:
        refused.append(named)
        raise OSError(28, "No space left on device")

    with syncing(refuse, folder, named):
        yield refused


@contextlib.contextmanager
def read_only_disk() -> Iterator[None]:
    """Inside, no file is opened for writing."""
    real = open

    def refuse(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if {*mode} & {*"wax+"}:
            raise OSError(30, "Read-only file system")
        return real(file, mode, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", refuse)
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
