"""Several devices in one node: a runtime for each, in one server or in several, computing side by side."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.monitoring import StatusService


class Meeting(nn.Module):
    """Computes only while another one does, too."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier
        self.threads: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.threads.add(threading.get_ident())
        self.barrier.wait(timeout=60)
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
            assert {*first.runtimes}.isdisjoint(second.runtimes)
            client.directory.watch("ffn", (2,))
            await client.directory.wait_warm("ffn")
            view = client.directory.live("ffn")
            assert view is not None and [view.uid(row) for row in range(len(view))] == ["ffn.0", "ffn.1"]
            experts = [await client.get_expert(uid) for uid in backends]
            x = torch.ones(2, 4)
            with torch.no_grad():
                for y in await asyncio.gather(*(expert(x) for expert in experts)):
                    torch.testing.assert_close(y, x)


async def test_one_server_spreads_its_experts_over_its_devices(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    backends = {f"ffn.{number}": make_backend(barrier) for number in range(4)}
    x = torch.ones(2, 4)
    async with ta.TesseractNode() as node:
        async with ta.TesseractServer(node, backends, device=["cpu", "cpu"], checkpoint_dir=tmp_path) as server:
            experts = [await node.get_expert(uid) for uid in backends]
            with torch.no_grad():
                # each pair meets only if its two experts have threads of their own
                for pair in (experts[:2], experts[1:3], experts[2:]):
                    await asyncio.gather(*(expert(x) for expert in pair))
            for backend in backends.values():
                assert isinstance(backend.module, Meeting) and len(backend.module.threads) == 1, "it stays where it is"
            busy = [runtime.busy_seconds for runtime in server.runtimes]
            assert len(busy) == 2 and all(busy)
            status = StatusService(node, server).status()
            assert status.num_rows == 12 and status.busy_seconds == sum(busy)
        assert sorted(name for name in os.listdir(tmp_path) if not name.startswith(".")) == sorted(backends)
        with pytest.raises(ValueError, match="at least one device"):
            ta.TesseractServer(node, backends, device=[])


async def test_a_second_device_that_is_not_here_leaves_no_thread_of_the_first() -> None:
    backends = {"ffn.0": make_backend(threading.Barrier(1))}
    async with ta.TesseractNode() as node:
        with pytest.raises(ValueError, match="cuda:99"):
            await ta.TesseractServer(node, backends, device=["cpu", "cuda:99"]).start()
        assert not [one for one in threading.enumerate() if one.name.startswith("tesseract-runtime")]
