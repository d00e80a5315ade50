"""Trainers that go through one dataset together, on real nodes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import tesseract_async as ta
from tesseract_async import shared_sampler
from tesseract_async.errors import Overloaded, RemoteError
from tesseract_async.server.other_replicas import ReplicaSettings

REPLICAS = ReplicaSettings(sync_every=0.3, check_every=0.3, lease=1.0, call_timeout=2.0)
NUM = 50
NUMBERS = list(range(NUM))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_sampler, "SHORT_PERIOD", 0.02)


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(1, 1)


@contextlib.asynccontextmanager
async def sampling(*seeds: str) -> AsyncIterator[tuple[ta.TesseractNode, ta.SharedSampler]]:
    async with (
        ta.TesseractNode(initial_peers=seeds) as node,
        ta.SharedParameters(node, make_model(), run="tiny", every=4, replicas=REPLICAS) as shared,
    ):
        yield node, ta.SharedSampler(NUMBERS, shared, batch_size=4, ahead=1)


async def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    await asyncio.sleep(0)
    if 7 in batch and not failed:
        failed.append(7)
        raise Overloaded("just this once", retry_after=0.0)
    loss: torch.Tensor = model(batch.float()[:, None]).square().mean() * 1e-6
    return loss


failed: list[int] = []


async def test_trainers_share_an_epoch_and_a_failed_batch_is_handed_out_again() -> None:
    failed.clear()
    seen: Counter[int] = Counter()
    async with sampling() as (seed, one), sampling(seed.address) as (_, other):

        async def train(sampler: ta.SharedSampler) -> int:
            batches: list[list[int]] = []

            def load(samples: list[torch.Tensor]) -> torch.Tensor:
                batches.append([int(sample) for sample in samples])
                return torch.tensor(batches[-1])

            loader = DataLoader(NUMBERS, batch_size=4, sampler=sampler, collate_fn=load)
            model = sampler._shared.model
            trainer = ta.AsyncTrainer(
                model, torch.optim.SGD(model.parameters(), 1e-6), in_flight=3, sampler=sampler, publish=False
            )
            num = 0
            async for report in trainer.run(loss_of, loader, max_failures=1):
                assert report.batch is not None
                if report.error is None:
                    seen.update(batches[report.batch])
                    num += 1
                    await sampler._shared.step()
            return num

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            trainings = [group.create_task(train(sampler)) for sampler in (one, other)]
        assert all(training.result() for training in trainings)
        assert seen == dict.fromkeys(NUMBERS, 1) and failed == [7]
        assert one.state_dict() == {"epoch": 0}
        # the next epoch comes in another order, to one that is alone meanwhile
        one.set_epoch(1)
        order = [sample async for sample in one.feed(one)]
        assert sorted(order) == NUMBERS != order
        with pytest.raises(RuntimeError, match="outside of the event loop"):
            other.set_epoch(2)
            list(other)


async def test_what_a_trainer_leaves_undone_is_taken_by_others_also_after_a_takeover() -> None:
    async with sampling() as (seed, one), sampling(seed.address) as (node, other):
        await asyncio.sleep(0)
        feed = one.feed(one)
        first = [await anext(feed) for _ in range(8)]
        await one._shared.step()
        await one._shared.flush()
        await other._shared.flush()
        await feed.aclose()
        one._share.give_back()
        # `one` has left: the fragments are the other's
        second = [sample async for sample in other.feed(other)]
        assert sorted(second) == sorted(set(NUMBERS) - set(first[:4]))


def test_in_a_plain_loop_each_step_ends_a_batch() -> None:
    with (
        ta.BackgroundNode() as node,
        ta.SharedParameters(node, make_model(), run="tiny", every=4, replicas=REPLICAS) as shared,
    ):
        sampler = ta.SharedSampler(NUMBERS, shared, batch_size=4, shuffle=False)
        assert len(sampler) == NUM and repr(sampler) == "SharedSampler(50 samples, batch_size=4, epoch=0)"
        loader = DataLoader(NUMBERS, batch_size=4, sampler=sampler)
        seen: list[int] = []
        for batch in loader:
            seen += batch.tolist()
            shared.step()
        assert seen == NUMBERS
        assert list(sampler) == []  # the epoch is over
        sampler.set_epoch(2)
        with pytest.raises(RemoteError, match="epoch 2 does not follow epoch 0"):
            list(sampler)
