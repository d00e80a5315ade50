"""How much faster a newcomer has the shared parameters where three trainers host them than where one does.

Real nodes on loopback; each host uploads 25 Mbit/s at most. By default the parameters are an eighth of 100 MB, in as
many pieces as 100 MB have; ``--megabytes 100`` takes eight minutes.
"""

import argparse
import asyncio
import contextlib
import time

import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.server.other_replicas import ReplicaSettings
from tesseract_async.sharing import layout, manifest
from tesseract_async.transport.throttle import Throttle
from tests.benchmarks.figures import emit

RATE = 25e6 / 8
PIECES = 24
QUIET = ReplicaSettings(sync_every=3600.0, check_every=5.0, lease=60.0)
"""Hosts send one another nothing while it is measured."""


async def seconds(megabytes: float, num_hosts: int) -> float:
    """Returns how long entering takes. Hosts come one after another, throttled from the start."""
    torch.manual_seed(0)
    numel = int(megabytes * 1e6 / 4)
    for module in (layout, manifest):
        module.MAX_ELEMENTS = -(-numel // PIECES)  # type: ignore[misc]
    model = nn.ParameterList([nn.Parameter(torch.randn(numel))])
    async with contextlib.AsyncExitStack() as stack:
        seeds: list[str] = []
        for _ in range(num_hosts):
            node = ta.TesseractNode(initial_peers=seeds, throttle=Throttle(upload_rate=RATE))
            await stack.enter_async_context(node)
            shared = ta.SharedParameters(node, model, run="newcomers", host=True, replicas=QUIET)
            await stack.enter_async_context(shared)
            seeds = seeds or [node.address]
        newcomer = await stack.enter_async_context(ta.TesseractNode(initial_peers=seeds))
        await newcomer.network.wait_joined(10.0)
        own = nn.ParameterList([nn.Parameter(torch.zeros(numel))])
        began = time.perf_counter()
        async with ta.SharedParameters(newcomer, own, run="newcomers", host=False):
            took = time.perf_counter() - began
        assert torch.equal(own[0], model[0])
        return took


async def main(megabytes: float) -> None:
    one = await seconds(megabytes, 1)
    three = await seconds(megabytes, 3)
    emit("shared parameters: a newcomer's time, one host / three", one / three, "", ">= 2.5", one=one, three=three)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=12.5)
    asyncio.run(main(parser.parse_args().megabytes))
