"""States as files: readable by others, checked, never unpickled."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async import ExpertBackend, TensorSpec
from tesseract_async.errors import CheckpointError
from tesseract_async.experts.pieces import root_of
from tesseract_async.server import checkpoint
from tesseract_async.server.state_files import CheckpointStore


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


def test_any_safetensors_reader_finds_the_weights(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = CheckpointStore(tmp_path).save("ffn.0", state(), version=1)
    tensors = safetensors.load_file(path)
    torch.testing.assert_close(tensors["module/weight"], state()["module"]["weight"])


@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_no_flipped_byte_goes_unnoticed(position: int, flip: int) -> None:
    data = bytearray(b"".join(checkpoint.encode_state(state())))
    position %= len(data)
    data[position] ^= flip
    try:
        loaded = checkpoint.decode_state(bytes(data))
    except CheckpointError:
        return
    assert same(loaded, state()), "a change that the header's JSON does not mean, such as of white space"


def test_nothing_is_unpickled() -> None:
    data = b"".join(checkpoint.encode_state(state()))
    length = int.from_bytes(data[:8], "little")
    json.loads(data[8 : 8 + length])
    with pytest.raises(CheckpointError):
        checkpoint.decode_state(b"\x80\x04N.")


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
            checkpoint.decode_state(data, max_values=checkpoint.MAX_HEADER_VALUES)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data)
    finally:
        tracemalloc.stop()
    applied = {"versions": {f"{number:032x}": number for number in range(65536)}}
    whole = b"".join(checkpoint.encode_state({"version": 1, "applied": applied}))
    state = checkpoint.decode_state(whole, max_values=checkpoint.MAX_HEADER_VALUES)
    assert len(state["applied"]["versions"]) == 65536


@pytest.mark.parametrize(("since", "least"), [(10**6, 0), (900, 100), (-1, 1000)])
def test_a_sealed_journal_has_the_calls_of_the_last_minutes_and_else_a_small_part_of_the_file(
    since: int, least: int
) -> None:
    backend = ExpertBackend(torch.nn.Linear(50, 50), args_schema=(TensorSpec((50,)),))
    keys = [number.to_bytes(16, "big") for number in range(1000)]
    for number, key in enumerate(keys, 1):
        backend.applied[key] = number
    backend.num_bare = 990
    whole = backend.state()
    sealed = checkpoint.with_recent_journal(whole, since=since)
    backend.load_state(sealed)
    num = len(backend.applied)
    assert num >= least and list(backend.applied.items()) == list(zip(keys, range(1, 1001), strict=True))[-num:]
    assert backend.num_bare == max(0, num - 10) and len(whole["applied"]["versions"]) == 1000
    if not least:
        rest = len(b"".join(checkpoint.encode_state({**sealed, "applied": {}})))
        assert 0 < 24 * num <= 0.05 * (rest + 24 * num)
    assert checkpoint.with_recent_journal(sealed, since=since)["applied"] is sealed["applied"]


def test_a_files_name_is_found_once() -> None:
    file = checkpoint.encode_state(state())
    # each piece that is sent names it: hashing all leaves again for each would take the square of a large file's time
    assert file.root == root_of(b"".join(file)) and file.root is file.root
