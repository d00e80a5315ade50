"""Checkpoints: whole or not at all, readable by others, damaged ones passed over."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.errors import CheckpointError
from tesseract_async.server import checkpoint
from tesseract_async.server.checkpoint import CheckpointStore


def state(version: int = 1) -> dict[str, Any]:
    return {
        "module": {"weight": torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "empty": torch.zeros(0, 4)}}, "groups": [{"lr": 0.1}]},
        "version": version,
        "applied": {"00ff": 1},
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) and type(left) is type(right)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.load("ffn.0") is None
    path = store.save("ffn.0", state(), version=7)
    assert path == tmp_path / "ffn.0" / "000000000007.safetensors"
    loaded = store.load("ffn.0")
    assert loaded is not None and same(loaded, state())
    loaded["module"]["weight"] += 1  # writable


def test_any_safetensors_reader_finds_the_weights(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = CheckpointStore(tmp_path).save("ffn.0", state(), version=1)
    tensors = safetensors.load_file(path)
    torch.testing.assert_close(tensors["module/weight"], state()["module"]["weight"])


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


@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_no_flipped_byte_goes_unnoticed(position: int, flip: int) -> None:
    data = bytearray(b"".join(checkpoint.encode(state())))
    position %= len(data)
    data[position] ^= flip
    try:
        loaded = checkpoint.decode(bytes(data))
    except CheckpointError:
        return
    assert same(loaded, state()), "a change that the header's JSON does not mean, such as of white space"


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


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save("ffn.0", state(1), version=1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
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
    assert not list((tmp_path / "ffn.0").iterdir())


@pytest.mark.parametrize("uid", ["../ffn.0", "", ".", "..", "ffn..0"])
def test_a_uid_never_leaves_the_directory(tmp_path: Path, uid: str) -> None:
    with pytest.raises(CheckpointError, match="cannot name a folder"):
        CheckpointStore(tmp_path).save(uid, state(), version=1)


def test_nothing_is_unpickled() -> None:
    data = b"".join(checkpoint.encode(state()))
    length = int.from_bytes(data[:8], "little")
    json.loads(data[8 : 8 + length])
    with pytest.raises(CheckpointError):
        checkpoint.decode(b"\x80\x04N.")


def test_parameters_lie_in_memory_as_they_like(tmp_path: Path) -> None:
    row = torch.randn(1, 5)
    views = {"one": row[:, 1], "half": row.bfloat16()[:, 2:3], "conjugate": row.to(torch.complex64).conj()}
    store = CheckpointStore(tmp_path)
    store.save("ffn.0", {"module": views | {"transposed": torch.randn(3, 4).T}}, version=1)
    loaded = store.load("ffn.0")
    assert loaded is not None and all(torch.equal(loaded["module"][name], value) for name, value in views.items())


def test_a_strangers_header_makes_no_more_than_a_journal_does() -> None:
    bomb = b"[" + b"[]," * 2_000_000 + b"0]"
    data = len(bomb).to_bytes(8, "little") + bomb
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="too many values"):
            checkpoint.decode(data, max_values=checkpoint.MAX_HEADER_VALUES)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data)
    finally:
        tracemalloc.stop()
    applied = {"versions": {f"{number:032x}": number for number in range(65536)}}
    whole = b"".join(checkpoint.encode({"version": 1, "applied": applied}))
    state = checkpoint.decode(whole, max_values=checkpoint.MAX_HEADER_VALUES)
    assert len(state["applied"]["versions"]) == 65536
