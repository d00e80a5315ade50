"""Large lossy tensors are encoded and decoded while the loop goes on; everything else at once."""

import asyncio
import threading

import pytest
import torch

from tesseract_async.errors import ProtocolError
from tesseract_async.runtime.encoding import pack, unpack
from tesseract_async.wire.tensors import pack_tensors


@pytest.mark.parametrize(
    ("codec", "rows", "goes_on"),
    [("uint8_blockwise", 4096, True), ("none", 4096, False), ("uint8_blockwise", 1, False)],
)
async def test_the_loop_goes_on_exactly_where_encoding_takes_time(codec: str, rows: int, goes_on: bool) -> None:
    tensors = [torch.randn(rows, 1024), None, torch.arange(rows)]
    went_on = asyncio.Event()  # in the next turn of the loop, which none of this waits for if it is done at once
    asyncio.get_running_loop().call_soon(went_on.set)
    metas, buffers = await pack(tensors, codec)
    assert went_on.is_set() is goes_on
    assert (metas, [bytes(b) for b in buffers]) == (lambda m, b: (m, [bytes(x) for x in b]))(
        *pack_tensors(tensors, codec)
    )
    received = [memoryview(bytearray(b)) for b in buffers]
    await went_on.wait()
    went_on.clear()
    asyncio.get_running_loop().call_soon(went_on.set)
    decoded = await unpack(metas, received)
    assert went_on.is_set() is goes_on
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
