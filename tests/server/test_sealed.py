"""Sealed files: found by the beginning of their root, two of each expert, on disk or in a folder that goes away."""

from __future__ import annotations

from pathlib import Path

from tesseract_async.experts.merkle import root_of
from tesseract_async.server.sealed import SealedFiles


def test_the_last_two_files_are_kept_and_found_again(tmp_path: Path) -> None:
    files = SealedFiles(tmp_path)
    states = [bytes([n]) * 1000 for n in range(3)]
    for data in states:
        files.keep("ffn.0", root_of(data), data)
    files.remember("ffn.0", b"promised")
    assert files.find("ffn.0", root_of(states[0])[:16]) is None
    for data in states[1:]:
        found = files.find("ffn.0", root_of(data)[:16])
        assert found is not None and found.size == 1000 and found.read(990, 100) == data[990:]
    again = SealedFiles(tmp_path)
    assert again.load("ffn.0") == b"promised" and again.load("ffn.1") is None
    assert again.read("ffn.0", root_of(states[2])) == states[2] and again.read("ffn.0", bytes(32)) is None


def test_a_damaged_file_is_not_taken_for_the_one_that_was_sealed(tmp_path: Path) -> None:
    files = SealedFiles(tmp_path)
    files.keep("ffn.0", root := root_of(b"state"), b"state")
    (path,) = tmp_path.rglob("*.sealed")
    path.write_bytes(b"stale")
    again = SealedFiles(tmp_path)
    again.load("ffn.0")
    assert not again.has("ffn.0", root)


def test_without_a_folder_nothing_stays() -> None:
    files = SealedFiles(None)
    assert files.load("ffn.0") is None
    files.remember("ffn.0", b"promised")
    files.keep("ffn.0", root := root_of(b"state"), b"state")
    found = files.find("ffn.0", root)
    assert found is not None and found.path.exists() and files.read("ffn.0", root) == b"state"
    files.close()
    assert not found.path.exists()
