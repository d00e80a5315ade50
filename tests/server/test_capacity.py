"""What a member of a run can give is measured, and said in a sentence."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tesseract_async.server.capacity import Capacity, measure_capacity
from tesseract_async.server.registry import make_backend


def measured(folder: Path, *, room: int | None = 2, hold_bytes: int | None = None) -> Capacity:
    def build() -> object:
        return make_backend("ffn", sizes={"in_features": 64, "hidden_features": 256}, max_batch_size=64)

    return measure_capacity(build, room=room, hold_bytes=hold_bytes, folder=folder)[0]  # type: ignore[arg-type]


def test_it_says_what_this_computer_computes_and_holds(tmp_path: Path) -> None:
    found = measured(tmp_path, hold_bytes=10**9)
    assert found.sentence.startswith("this computer computes up to 2 of the run's experts, about ")
    assert f"and holds up to {found.files - 2} on disk (954 MiB)" in found.sentence and found.files > 100


def test_a_full_disk_is_said_at_the_start_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    for hold_bytes in (None, 10**9):
        found = measured(tmp_path, hold_bytes=hold_bytes)
        assert f"The disk is full: {tmp_path} has 1 MiB free, and the files of one expert take " in found.sentence
        assert "Free some of it, or choose another folder" in found.sentence


def test_too_little_for_one_state_is_said_and_nothing_where_none_is_wanted(tmp_path: Path) -> None:
    found = measured(tmp_path, room=0, hold_bytes=1000)
    assert found.files == 0 and "too little for the files of one expert, which take " in found.sentence
    assert measured(tmp_path, hold_bytes=0).sentence.endswith("holds up to 0 on disk (0 MiB)")
