"""Several devices in one node: a server with a runtime of its own for each, found and computing side by side."""

from __future__ import annotations

import asyncio
import threading

import torch
from torch import nn

import tesseract_async as ta


class Meeting(nn.Module):
    """Computes only while another one does, too."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier
        self.threads: set[str] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.threads.add(threading.current_thread().name)
        self.barrier.wait(timeout=10)
        return x


def make_backend(barrier: threading.Barrier) -> ta.ExpertBackend:
    spec = ta.TensorSpec((4,))
    return ta.ExpertBackend(Meeting(barrier), args_schema=(spec,), outputs_schema=spec)


async def test_two_servers_of_one_node_compute_at_the_same_time_and_are_both_found() -> None:
    barrier = threading.Barrier(2)
    backends = {f"ffn.{number}": make_backend(barrier) for number in range(2)}
    async with ta.TesseractNode() as node, ta.TesseractNode(initial_peers=[node.address]) as client:
        first = ta.TesseractServer(node, {"ffn.0": backends["ffn.0"]}, device="cpu")
        second = ta.TesseractServer(node, {"ffn.1": backends["ffn.1"]}, device="cpu")
        async with first, second:
            assert first.runtime is not second.runtime
            client.directory.watch("ffn", (2,))
            await client.directory.wait_warm("ffn")
            view = client.directory.live("ffn")
            assert view is not None and [view.uid(row) for row in range(len(view))] == ["ffn.0", "ffn.1"]
            experts = [await client.get_expert(uid) for uid in backends]
            x = torch.ones(2, 4)
            with torch.no_grad():
                for y in await asyncio.gather(*(expert(x) for expert in experts)):
                    torch.testing.assert_close(y, x)
