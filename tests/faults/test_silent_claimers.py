"""Strangers that claim an expert as its primary, accept connections, and never answer: one stall, then none."""

import asyncio
import contextlib
import logging

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.experts.node_calls import EXPERT_METHODS
from tesseract_async.experts.publisher import ExpertPublisher
from tesseract_async.metrics import Metrics

UID = "ffn.0.0"


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


class Claimer:
    """A node that says that it is the primary of some experts."""

    def __init__(self, node: ta.TesseractNode, *uids: str) -> None:
        self.num_asked = 0
        self.uids = dict.fromkeys(uids, True)
        self.publisher = ExpertPublisher(node.network, addresses=[node.address], metrics=Metrics())
        for uid in uids:
            node.host_expert(uid, dict.fromkeys(EXPERT_METHODS, self._keep_silent))
        node.host_together(self._keep_silent)

    async def _keep_silent(self, call: object) -> None:
        self.num_asked += 1
        await asyncio.Event().wait()

    async def claim(self) -> None:
        """Again, under a newer sequence."""
        await self.publisher.declare(self.uids)


@pytest.mark.parametrize("how", ["expert", pytest.param("gate", marks=pytest.mark.slow)])
async def test_silent_claimers_cost_one_stall(how: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(ta.TesseractNode())
        seeds = [first.address]
        module = nn.Linear(8, 8)
        backend = ta.ExpertBackend(
            module, optimizer=torch.optim.SGD(module.parameters(), lr=0.01), args_schema=(ta.TensorSpec((8,)),)
        )
        await stack.enter_async_context(ta.TesseractServer(first, {UID: backend}))
        trainer = await stack.enter_async_context(ta.TesseractNode(initial_peers=seeds, refresh_period=0.05))
        if how == "expert":
            module_of_trainer: nn.Module = (await trainer.get_expert(UID)).with_options(timeout=20.0)
        else:
            module_of_trainer = GatingFunction(
                trainer,
                uid_prefix="ffn",
                grid_size=(1, 1),
                in_features=8,
                k_best=1,
                settings=MixtureSettings(forward_timeout=20.0, backward_timeout=20.0),
            )
        num_failed = 0

        async def step() -> None:
            nonlocal num_failed
            try:
                await ta.backward((await module_of_trainer(torch.ones(2, 8))).sum())
            except (ta.TesseractError, TimeoutError):
                num_failed += 1

        for _ in range(3):
            await step()
        nodes = [
            await stack.enter_async_context(ta.TesseractNode(initial_peers=seeds, refresh_period=60.0))
            for _ in range(4)
        ]
        claimers = [Claimer(node, UID) for node in nodes]
        for claimer in claimers:
            await claimer.claim()
            stack.push_async_callback(claimer.publisher.aclose)
        async with asyncio.timeout(60):
            while not all(claimer.num_asked for claimer in claimers):
                await step()
                await asyncio.sleep(0.05)
        asked = [claimer.num_asked for claimer in claimers]
        version = backend.version
        for _ in range(10):
            for claimer in claimers:
                await claimer.claim()
            await step()
        assert num_failed == 0 and backend.version == version + 10
        assert sum(claimer.num_asked for claimer in claimers) <= sum(asked) + 4, "each at most once more"
