"""What version 0.1 left behind, and a living swarm that is upgraded node by node."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tesseract_async as ta
from tesseract_async import node as node_module
from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.server.registry import make_backend
from tesseract_async.wire import heads

OLD_CHECKPOINT = Path(__file__).parent / "server" / "checkpoint_0_1"
"""Written by a server of version 0.1.0, after three steps of Adam."""
SIZES = {"in_features": 4, "hidden_features": 8}
OLD = heads.FEATURES
"""All nodes of this wire version name these: experts are applied with replies in parts."""
NEW = OLD | {"of_the_next_version"}


async def test_a_checkpoint_of_0_1_goes_on(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD_CHECKPOINT, tmp_path / "kept")
    backend = make_backend("ffn", sizes=SIZES)
    async with ta.TesseractNode() as node, ta.TesseractServer(node, {"ffn.0.1": backend}, checkpoint_dir=folder):
        expert = await node.get_expert("ffn.0.1")
        assert backend.version == 3
        with torch.no_grad():
            (y,) = await expert(torch.ones(1, 4))
        # as the old server answered; AdamW's and Adam's moments came along
        assert torch.allclose(y, torch.tensor([1.27887285, -0.90737122, 0.65810966, -1.02940452]), atol=1e-5)
        assert backend.optimizer is not None and len(backend.optimizer.state) > 0
        await ta.backward((await expert(torch.ones(3, 4))).square().sum())
        assert backend.version == 4


async def test_a_living_swarm_is_upgraded_node_by_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers and a trainer; one after the other starts again with features that the others do not have."""

    def speaking(features: frozenset[str]) -> None:
        monkeypatch.setattr(node_module, "Endpoint", partial(Endpoint, features=features))

    @contextlib.asynccontextmanager
    async def server(number: int, features: frozenset[str]) -> AsyncIterator[Any]:
        speaking(features)
        backend, kept = make_backend("ffn", sizes=SIZES), tmp_path / f"server-{number}"
        async with (
            ta.TesseractNode(initial_peers=[seed.address], identity=tmp_path / f"{number}.pem") as node,
            ta.TesseractServer(node, {f"ffn.0.{number}": backend}, checkpoint_dir=kept),
        ):
            yield backend

    async def train() -> None:
        gate = ta.GatingFunction(trainer, uid_prefix="ffn", grid_size=(1, 2), in_features=4, k_best=2)
        trainer.directory.watch("ffn", (1, 2))
        await trainer.directory.wait_warm("ffn")
        await trainer.directory.refresh("ffn")
        await ta.backward((await gate(torch.randn(8, 4))).sum())

    versions = []
    speaking(OLD)
    async with ta.TesseractNode() as seed:
        for trains_with, servers in ((OLD, [(OLD, OLD), (NEW, OLD)]), (NEW, [(NEW, OLD), (NEW, NEW)])):
            speaking(trains_with)
            async with ta.TesseractNode(initial_peers=[seed.address], refresh_period=0.1) as trainer:
                for first, second in servers:
                    async with server(0, first) as one, server(1, second) as two:
                        await train()
                        versions.append((one.version, two.version))
    assert versions == [(n, n) for n in range(1, 5)], "every step was taken, and none was lost"
