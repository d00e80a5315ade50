"""Trainers that go through one dataset together, on real nodes."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import tesseract_async as ta
from tesseract_async import shared_sampler
from tesseract_async.endpoint.endpoint import Message
from tesseract_async.errors import Overloaded, RemoteError
from tesseract_async.identity import Identity
from tesseract_async.server.other_replicas import ReplicaSettings
from tesseract_async.sharing.samples import Ledger, Report
from tesseract_async.sharing.share import Share
from tesseract_async.sharing.spans import decode_pieces, encode_pieces
from tesseract_async.wire import messages
from tests.watching import watched

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


async def train(sampler: ta.SharedSampler, model: nn.Module, seen: Counter[int], **loading: Any) -> int:
    """Go through an epoch; returns how many steps that took."""
    batches: list[list[int]] = []

    def load(samples: list[torch.Tensor]) -> torch.Tensor:
        batches.append([int(sample) for sample in samples])
        return torch.tensor(batches[-1])

    loader = DataLoader(NUMBERS, batch_size=4, sampler=sampler, collate_fn=load, **loading)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    trainer = ta.AsyncTrainer(model, optimizer, in_flight=3, sampler=sampler, publish=False)
    num = 0
    async for report in trainer.run(loss_of, loader, max_failures=1):
        assert report.batch is not None
        if report.error is None:
            seen.update(batches[report.batch])
            num += 1
            await sampler.shared.step()
    return num


class OneLedger:
    """In the place of `SharedParameters`: a ledger, which answers at once."""

    uids = ("x.0",)
    ledger = Ledger()

    def __init__(self, number: int) -> None:
        self.peer, self.tasks = Identity.from_seed(bytes([number]) * 32).peer_id, list[Any]()

    def attach(self, sampler: ta.SharedSampler) -> None:
        self.sampler = sampler

    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.AbstractEventLoop:
        with contextlib.suppress(RuntimeError):  # in a loader's thread no loop runs
            self.loop = asyncio.get_running_loop()
        loop = self.loop
        loop.call_soon_threadsafe(lambda: self.tasks.append(loop.create_task(work)))
        return loop

    async def step(self) -> None:
        self.sampler.stepped()

    @property
    def pieces(self) -> "OneLedger":
        return self

    async def ask(self, uid: str, method: str, request: messages.SamplesRequest, data: bytes) -> Message:
        _, trainer, turn, epoch, num_samples, wanted, *pieces = request
        report = Report(epoch, num_samples, wanted, *map(decode_pieces, pieces))
        grant = self.ledger.report((self.peer, trainer), turn, report, asyncio.get_running_loop().time())
        granted, gone = encode_pieces(grant.pieces), encode_pieces(grant.gone)
        reply = messages.SamplesReply(bytes(16), [*granted], grant.again, [*gone], grant.first, grant.waits)
        return Message(messages.encode(reply))

    async def leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.sampler.leave()


async def test_trainers_share_epochs_and_a_failed_batch_is_handed_out_again() -> None:
    failed.clear()
    OneLedger.ledger = Ledger()
    shares = [OneLedger(number) for number in range(4)]
    for share in shares:
        share.loop = asyncio.get_running_loop()
    samplers = [ta.SharedSampler(NUMBERS, share, batch_size=4, ahead=1) for share in shares]  # type: ignore[arg-type]
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for sampler in samplers:
            sampler.set_epoch(epoch)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            trainings = [group.create_task(train(sampler, make_model(), seen)) for sampler in samplers]
        assert seen == dict.fromkeys(NUMBERS, 1) and failed == [7]
        assert sum(training.result() for training in trainings) >= NUM / 4
    for share in shares:
        await share.leave()


async def test_an_iterator_that_is_left_is_no_end_of_the_next() -> None:
    OneLedger.ledger = Ledger()
    share = OneLedger(1)
    share.loop = asyncio.get_running_loop()
    sampler = ta.SharedSampler(NUMBERS, share, batch_size=4)  # type: ignore[arg-type]

    def go_through() -> list[int]:
        left = iter(sampler)
        first = [next(left) for _ in range(6)]
        again = iter(sampler)
        first_again = [next(again)]
        left.close()  # type: ignore[attr-defined]
        rest = first_again + list(again)
        assert len(first) == 6
        return rest

    assert sorted(await asyncio.to_thread(go_through)) == NUMBERS
    await share.leave()


@pytest.mark.slow
async def test_on_real_nodes() -> None:
    failed.clear()
    seen: Counter[int] = Counter()
    async with sampling() as (seed, one), sampling(seed.address) as (_, other):
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            some = [group.create_task(train(sampler, sampler.shared.model, seen)) for sampler in (one, other)]
        assert all(training.result() for training in some)
        assert seen == dict.fromkeys(NUMBERS, 1) and failed == [7]
        assert one.state_dict() == {"epoch": 0}
        # the next epoch comes in another order, to one that is alone meanwhile
        one.set_epoch(1)
        order = [sample async for sample in one.feed(one)]
        assert sorted(order) == NUMBERS != order
        with pytest.raises(RuntimeError, match="outside of the event loop"):
            other.set_epoch(2)
            list(other)


@pytest.mark.slow
async def test_what_a_primary_leaves_undone_is_taken_by_others() -> None:
    async with contextlib.AsyncExitStack() as stack:
        bootstrap = await stack.enter_async_context(ta.TesseractNode())
        leaving = contextlib.AsyncExitStack()
        _, one = await leaving.enter_async_context(sampling(bootstrap.address))
        _, other = await stack.enter_async_context(sampling(bootstrap.address))
        feed = one.feed(one)
        first = [await anext(feed) for _ in range(8)]
        with watched(Share.granted) as seen:
            await one.shared.step()  # ends the first four
            await seen.wait(Share.granted, 2)  # the second of these reports began after it
        await one.shared.flush()  # a round closes, with what is done
        await feed.aclose()
        await leaving.aclose()  # the pieces are handed over
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
