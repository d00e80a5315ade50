"""Trainers that share one model, on real nodes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.server.other_replicas import ReplicaSettings
from tesseract_async.shared_parameters import SharedParameters

REPLICAS = ReplicaSettings(sync_every=0.3, check_every=0.3, lease=1.0, call_timeout=2.0)


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 6, generator=generator)
    loss = nn.functional.mse_loss(model(x), x[:, :3].sin())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@contextlib.asynccontextmanager
async def sharing(
    model: nn.Module, *seeds: str, every: int = 4, **more: object
) -> AsyncIterator[tuple[ta.TesseractNode, SharedParameters[nn.Module]]]:
    async with ta.TesseractNode(initial_peers=seeds) as node:
        shared = SharedParameters(node, model, run="tiny", every=every, replicas=REPLICAS, **more)  # type: ignore[arg-type]
        async with shared:
            yield node, shared


async def steps(shared: SharedParameters[nn.Module], num: int, seed: int) -> None:
    optimizer = torch.optim.Adam(shared.model.parameters(), 0.01)
    for step in range(num):
        train(shared.model, optimizer, 1000 * seed + step)
        await shared.step()
        await asyncio.sleep(0.001)


async def test_two_trainers_end_with_one_model() -> None:
    one, other = make_model(1), make_model(2)
    async with sharing(one) as (seed, first), sharing(other, seed.address) as (_, second):
        assert same(one, other)
        await asyncio.gather(steps(first, 20, 1), steps(second, 20, 2))
        await asyncio.gather(first.flush(), second.flush())
        await first.flush()
        assert same(first.merged(), second.merged())
        assert first.steps == second.steps == 40
