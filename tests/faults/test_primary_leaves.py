"""A server gets told to leave while trainers use its experts; another server follows them. Nobody notices."""

import asyncio

import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.errors import describe
from tesseract_async.server.other_replicas import ReplicaSettings
from tesseract_async.server.succession import ReplicaKeeper

UIDS = ("ffn.0", "ffn.1")
SETTINGS = ReplicaSettings(check_every=0.5, sync_every=0.5)


def make_backend() -> ta.ExpertBackend:
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    return ta.ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-3), args_schema=(ta.TensorSpec((8,)),)
    )


async def test_no_call_fails_and_no_step_is_lost_when_the_primary_leaves_under_load() -> None:
    failures: list[str] = []
    num_steps = [0, 0]
    both_ran, has_left = asyncio.Event(), asyncio.Event()
    async with ta.TesseractNode() as first:
        seeds = [first.address]
        async with ta.TesseractNode(initial_peers=seeds) as second, ta.TesseractNode(initial_peers=seeds) as trainer:
            leaving = ta.TesseractServer(first, {uid: make_backend() for uid in UIDS})
            await leaving.start()
            keeper = await ReplicaKeeper(leaving, settings=SETTINGS).__aenter__()
            staying = ta.TesseractServer(second, {uid: make_backend() for uid in UIDS}, followers=UIDS)
            async with staying, ReplicaKeeper(staying, settings=SETTINGS):

                async def train(index: int) -> None:
                    expert = await trainer.get_expert(UIDS[index])
                    after = 0
                    while after < 10 and not failures:
                        after += has_left.is_set()
                        try:
                            x = torch.randn(4, 8, requires_grad=True)
                            await ta.backward((await expert(x)).square().mean())
                        except Exception as error:
                            failures.append(describe(error))
                            return
                        num_steps[index] += 1
                        if min(num_steps) >= 10:
                            both_ran.set()

                trainers = [asyncio.create_task(train(index)) for index in range(2)]
                async with asyncio.timeout(50):
                    await both_ran.wait()
                    # what `tesseract serve` does at SIGTERM
                    assert await keeper.hand_over() == 2
                    await keeper.aclose()
                    await leaving.aclose()
                    has_left.set()
                    await asyncio.gather(*trainers)
                assert not failures
                assert [staying.experts[uid].version for uid in UIDS] == num_steps
