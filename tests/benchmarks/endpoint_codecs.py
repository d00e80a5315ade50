"""The uint8 codecs: bytes on the wire, and float32 bytes encoded and decoded per second on one core."""

import time

import torch

from tesseract_async.wire.compression import CODECS, decode, encode
from tests.benchmarks.figures import emit

ROWS, COLUMNS = 2048, 1024
ROUNDS = 15


def seconds(codec: str, tensor: torch.Tensor) -> float:
    """The best of some rounds of encoding and decoding."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        buffer = encode(tensor, codec)
        decode(buffer, tensor.dtype, tuple(tensor.shape), codec)
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    torch.set_num_threads(1)
    tensor = torch.randn(ROWS, COLUMNS)
    num_bytes = tensor.numel() * 4
    for codec in CODECS[1:]:
        asked = {"uint8_blockwise": ("<= 0.27", ">= 0.7")}.get(codec, (None, None))
        emit(f"{codec}: bytes, share of float32", len(encode(tensor, codec)) / num_bytes, "", asked[0])
        emit(f"{codec}: encode + decode on one core", num_bytes / seconds(codec, tensor) / 1e9, "GB/s", asked[1])


if __name__ == "__main__":
    main()
