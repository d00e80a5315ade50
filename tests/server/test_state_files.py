"""Files of experts: checkpoints whole or not at all, damaged ones passed over; sealed states found by their root."""

import gc
import os
from pathlib import Path

import pytest

from tesseract_async.errors import CheckpointError
from tesseract_async.experts.pieces import root_of
from tesseract_async.server.checkpoint import EncodedState
from tesseract_async.server.state_files import CheckpointStore, SealedFiles, stored_uids
from tests.disks import full_disk
from tests.server.test_checkpoint import same, state


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.load("ffn.0") is None
    path = store.save("ffn.0", state(), version=7)
    assert path == tmp_path / "ffn.0" / "000000000007.safetensors"
    loaded = store.load("ffn.0")
    assert loaded is not None and same(loaded, state())
    loaded["module"]["weight"] += 1  # writable


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for version in (9, 10, 100):
        store.save("ffn.0", state(version), version=version)
    assert [path.stem for path in store.files("ffn.0")] == ["000000000100", "000000000010"]
    loaded = store.load("ffn.0")
    assert loaded is not None and loaded["version"] == 100


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "header"])
def test_a_damaged_file_falls_back_to_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    store.save("ffn.0", state(1), version=1)
    newest = store.save("ffn.0", state(2), version=2)
    data = bytearray(newest.read_bytes())
    if damage == "cut":
        data = data[:-3]
    elif damage == "flip":
        data[-5] ^= 1
    elif damage == "empty":
        data = bytearray()
    else:
        data[20] ^= 0xFF
    newest.write_bytes(data)
    loaded = store.load("ffn.0")
    assert loaded is not None and loaded["version"] == 1
    assert "is damaged" in caplog.text
    assert [path.name for path in store.files("ffn.0")] == ["000000000001.safetensors"]
    assert newest.with_suffix(".damaged").exists(), "out of the way, but not lost"
    store.files("ffn.0")[0].write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="none of the 1"):
        store.load("ffn.0")


def test_an_earlier_version_taken_over_from_another_server_is_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for version in (98, 99, 100, 97, 98):
        store.save("ffn.0", state(version), version=version)
        loaded = store.load("ffn.0")
        assert loaded is not None and loaded["version"] == version
    assert sorted(path.name for path in (tmp_path / "ffn.0").iterdir()) == [
        "000000000097.safetensors",
        "000000000098.safetensors",
        "000000000099.superseded",
        "000000000100.superseded",
    ]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save("ffn.0", state(1), version=1)
    with full_disk(), pytest.raises(CheckpointError, match="No space left"):
        store.save("ffn.0", state(2), version=2)
    assert [path.name for path in (tmp_path / "ffn.0").iterdir()] == ["000000000001.safetensors"]
    loaded = store.load("ffn.0")
    assert loaded is not None and loaded["version"] == 1


def test_where_the_disk_is_full_the_oldest_gives_way_but_never_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, fsync = CheckpointStore(tmp_path, keep=5), os.fsync
    for version in (1, 2, 3):
        store.save("ffn.0", state(version), version=version)
    room = 2

    def full(handle: int) -> None:
        if len(list((tmp_path / "ffn.0").iterdir())) > room:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    store.save("ffn.0", state(4), version=4)
    names = [f"{version:012d}.safetensors" for version in (3, 4)]
    assert sorted(path.name for path in (tmp_path / "ffn.0").iterdir()) == names
    assert caplog.text.count("gives way") == 2
    room = 1
    with pytest.raises(CheckpointError, match="No space left"):
        store.save("ffn.0", state(5), version=5)
    loaded = store.load("ffn.0")
    assert loaded is not None and loaded["version"] == 4


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="optimizer/thing: a object"):
        CheckpointStore(tmp_path).save("ffn.0", {"optimizer": {"thing": object()}}, version=1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("uid", ["../ffn.0", "", ".", "..", "ffn..0"])
def test_a_uid_never_leaves_the_directory(tmp_path: Path, uid: str) -> None:
    with pytest.raises(CheckpointError, match="cannot name a folder"):
        CheckpointStore(tmp_path).save(uid, state(), version=1)


def test_the_last_two_files_are_kept_and_found_again(tmp_path: Path) -> None:
    files = SealedFiles(tmp_path)
    states = [bytes([n]) * 1000 for n in range(3)]
    for data in states:
        files.keep("ffn.0", EncodedState(data, []))
    files.remember("ffn.0", b"promised")
    assert files.find("ffn.0", root_of(states[0])) is None
    for data in states[1:]:
        found = files.find("ffn.0", root_of(data))
        assert found is not None and found.size == 1000 and found.read(990, 100) == data[990:]
    assert files.newest("ffn.0") == files.find("ffn.0", root_of(states[2])) and files.newest("ffn.1") is None
    again = SealedFiles(tmp_path)
    assert again.load("ffn.0") == b"promised" and again.load("ffn.1") is None
    newest = again.find("ffn.0", root_of(states[2]))
    assert newest is not None and newest.map() == states[2] and again.find("ffn.0", bytes(32)) is None


def test_a_damaged_file_is_not_taken_for_the_one_that_was_sealed(tmp_path: Path) -> None:
    files = SealedFiles(tmp_path)
    root = files.keep("ffn.0", EncodedState(b"state", [])).root
    (path,) = tmp_path.rglob("*.sealed")
    path.write_bytes(b"stale")
    again = SealedFiles(tmp_path)
    again.load("ffn.0")
    assert again.find("ffn.0", root) is None


def test_without_a_folder_nothing_stays() -> None:
    files = SealedFiles(None)
    assert files.load("ffn.0") is None
    files.remember("ffn.0", b"promised")
    root = files.keep("ffn.0", EncodedState(b"state", [])).root
    found = files.find("ffn.0", root)
    assert found is not None and found.path.exists() and found.map() == b"state"
    files.close()
    assert not found.path.exists()


def test_stored_experts_are_those_with_a_folder(tmp_path: Path) -> None:
    for name in ("ffn.1.1", "ffn.0.1", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "ffn.0.0").write_text("a file")
    assert stored_uids(tmp_path) == ["ffn.0.1", "ffn.1.1", "other"]
    assert stored_uids(tmp_path / "none") == stored_uids(None) == []


@pytest.mark.parametrize("is_temporary", [True, False])
def test_files_that_go_with_the_process_do_not_wait_for_the_disk(
    is_temporary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(os, "fsync", waits.append)
    files = SealedFiles(None if is_temporary else tmp_path)
    files.keep("ffn.0", EncodedState(b"a state", []))
    assert bool(waits) != is_temporary
    files.close()


def test_a_folder_that_is_asked_for_after_the_end_goes_with_its_owner_and_warns_of_nothing() -> None:
    files = SealedFiles(None)
    files.close()
    path = files.keep("ffn.0", EncodedState(b"state", [])).path
    assert path.exists()
    del files
    gc.collect()
    assert not path.exists()
