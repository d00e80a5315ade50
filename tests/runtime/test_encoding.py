"""Large lossy tensors are encoded and decoded while the loop goes on; everything else at once."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tesseract_async.errors import ProtocolError
from tesseract_async.runtime import encoding
from tesseract_async.runtime.encoding import pack, unpack
from tesseract_async.wire.tensors import pack_tensors


@pytest.mark.parametrize(
    ("codec", "rows", "goes_on"),
    [("uint8_blockwise", 4096, True), ("none", 4096, False), ("uint8_blockwise", 1, False)],
)
async def test_the_loop_goes_on_exactly_where_encoding_takes_time(
    codec: str, rows: int, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: list[bool] = []

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            beside.append(threading.current_thread() is not threading.main_thread())
            return work(*args)

        return noted

    for name in ("pack_tensors", "unpack_tensors"):
        monkeypatch.setattr(encoding, name, watched(getattr(encoding, name)))
    tensors = [torch.randn(rows, 1024), None, torch.arange(rows)]
    metas, buffers = await pack(tensors, codec)
    assert beside == [goes_on]
    assert (metas, [bytes(b) for b in buffers]) == (lambda m, b: (m, [bytes(x) for x in b]))(
        *pack_tensors(tensors, codec)
    )
    decoded = await unpack(metas, [memoryview(bytearray(b)) for b in buffers])
    assert beside == [goes_on] * 2
    assert decoded[1] is None and torch.equal(decoded[2], tensors[2])
    torch.testing.assert_close(decoded[0], tensors[0], rtol=0, atol=0.05 if codec != "none" else 0)


@pytest.mark.parametrize("metas", [None, 7, [7], [["float32", [8, 8], "unknown"]], [["float32", [8], "none"], []]])
async def test_nonsense_is_a_protocol_error(metas: object) -> None:
    with pytest.raises(ProtocolError):
        await unpack(metas, [memoryview(bytearray(1 << 20))])


async def test_it_needs_no_thread_of_the_programs_own() -> None:
    """As when all of the loop's default executor runs `loss.backward`, which waits for what is packed here."""
    tensors = [torch.randn(1024, 1024)]
    go = threading.Event()
    waiting = [asyncio.create_task(asyncio.to_thread(go.wait, 30)) for _ in range(64)]
    try:
        async with asyncio.timeout(20):
            metas, buffers = await pack(tensors, "bf16")
            (decoded,) = await unpack(metas, [memoryview(bytearray(b)) for b in buffers])
    finally:
        go.set()
        await asyncio.gather(*waiting)
    assert decoded is not None and decoded.shape == (1024, 1024)
