"""The file that holds a node's key: written once and whole, read by its owner only."""

import contextlib
import logging
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

import tesseract_async as ta
from tests.disks import disk_of_fixed_modes, disk_without_links, full_disk

POSIX = pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")


def start(path: Path, barrier: object, found: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        found.put(str(ta.Identity.load_or_create(path).peer_id))  # type: ignore[attr-defined]
    except Exception as error:
        found.put(repr(error))  # type: ignore[attr-defined]


@POSIX
def test_programs_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(4), context.Queue()
    num_rounds = 5
    for number in range(num_rounds):
        path = tmp_path / f"{number}.pem"
        processes = [context.Process(target=start, args=(path, barrier, found)) for _ in range(4)]
        for process in processes:
            process.start()
        assert {found.get(timeout=60) for _ in processes} == {str(ta.Identity.load(path).peer_id)}
        for process in processes:
            process.join()
    found.close()
    assert len(list(tmp_path.iterdir())) == num_rounds, "no unfinished file is left"


def test_another_one_is_faster(tmp_path: Path) -> None:
    path, first = tmp_path / "node.pem", ta.Identity.generate()

    class Slow(ta.Identity):
        @classmethod
        def generate(cls) -> ta.Identity:
            first.save(path)
            return super().generate()

    assert Slow.load_or_create(path).peer_id == first.peer_id


@pytest.mark.parametrize("links", [True, False])
def test_a_key_is_never_half_written(tmp_path: Path, links: bool) -> None:
    with contextlib.nullcontext() if links else disk_without_links():
        never_half_written(tmp_path)


def never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    with full_disk(), pytest.raises(OSError, match=r"No space left on device: .*node\.pem"):
        ta.Identity.generate().save(path)
    assert not list(tmp_path.iterdir())
    ta.Identity.generate().save(path)
    with pytest.raises(FileExistsError, match=r"node\.pem"):
        ta.Identity.generate().save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["node.pem"]


@pytest.mark.parametrize(("content", "says"), [(b"", "is empty"), (b"-----BEGIN PRIVATE KEY-----\nMC4C", "holds no")])
def test_a_file_without_a_key_is_named_with_the_remedy(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "node.pem"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"node.pem {says}.*move it away"):
        ta.Identity.load_or_create(path)
    assert path.read_bytes() == content


@POSIX
def test_what_is_no_key_keeps_its_mode(tmp_path: Path) -> None:
    (path := tmp_path / "README.md").write_text("# Not a key")
    path.chmod(0o644)
    with pytest.raises(ValueError, match="holds no"):
        ta.Identity.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@POSIX
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_key_that_others_could_read_is_closed_to_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    path = tmp_path / "node.pem"
    ta.Identity.generate().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ta.Identity.load(path)
    assert not caplog.records
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        ta.TesseractNode(identity=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert str(path) in caplog.text and "its owner's alone now" in caplog.text


@POSIX
def test_a_key_whose_mode_cannot_be_changed_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, identity = tmp_path / "node.pem", ta.Identity.generate()
    identity.save(path)
    path.chmod(0o644)

    with disk_of_fixed_modes(), caplog.at_level(logging.WARNING):
        assert ta.Identity.load(path).peer_id == identity.peer_id
    assert "chmod 600" in caplog.text


@POSIX
def test_the_home_folder_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    node = ta.TesseractNode(identity="~/keys/node.pem")
    assert ta.Identity.load(tmp_path / "keys/node.pem").peer_id == node.peer_id
    assert not (tmp_path / "~").exists()
    (tmp_path / "link.pem").symlink_to(tmp_path / "elsewhere.pem")
    made = ta.Identity.load_or_create("link.pem")
    assert ta.Identity.load("elsewhere.pem").peer_id == made.peer_id
