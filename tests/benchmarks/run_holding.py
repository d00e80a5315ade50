"""What it costs four servers that 16 experts of 1 MB outlive them: each state lies at all of them.

Counted are the bytes that the servers send, idle and for one sync of every expert. Beside them stands what Adam's state
makes unavoidable: weights and two moments, sent to three others, once in `sync_every`.
"""

import asyncio
import contextlib
import random

import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.server.checkpoint import encode_state, with_recent_journal
from tesseract_async.server.volunteer import BYTE_COUNTERS
from tests.benchmarks.figures import emit
from tests.server.run_members import Member, joined, make_run, member, standings, until

NUM_EXPERTS = 16
NUM_SERVERS = 4
SYNC_EVERY = 60.0
QUIET_SECONDS = 20.0
"""Until nothing of the first sync is under way any more."""
IDLE_SECONDS = 30.0
WIDTH = 512
X = torch.ones(1, WIDTH)


def build(uid: str) -> ta.ExpertBackend:
    module = nn.Linear(WIDTH, WIDTH)
    return ta.ExpertBackend(
        module, optimizer=torch.optim.Adam(module.parameters(), lr=1e-3), args_schema=(ta.TensorSpec((WIDTH,)),)
    )


def sent(members: list[Member]) -> float:
    return sum(one.node.metrics.total(name) for one in members for name in BYTE_COUNTERS if "sent" in name)


async def measure() -> None:
    """Emits the figures."""
    run = make_run(NUM_EXPERTS, lease=30.0, sync_every=SYNC_EVERY, num_replicas=NUM_SERVERS - 1)
    uids = [f"ffn.{number}" for number in range(NUM_EXPERTS)]
    async with contextlib.AsyncExitStack() as stack:
        seed = await stack.enter_async_context(ta.TesseractNode(public=True))
        members = [
            await stack.enter_async_context(member(run, n, [seed.address], room=4, files=NUM_EXPERTS, build=build))
            for n in range(1, NUM_SERVERS + 1)
        ]
        await until(lambda: all(one.primary and one.losses >= 3 for one in standings(members, NUM_EXPERTS)), 240)
        trainer = await stack.enter_async_context(joined(run, 50, [seed.address]))

        async def train() -> None:
            for uid in uids:
                await ta.backward((await (await trainer.get_expert(uid))(X)).sum())

        def has_all(version: int) -> bool:
            return all(one.version(uid) >= version for one in members for uid in uids)

        await train()  # Adam has its moments from now on
        await until(lambda: has_all(1), 2 * SYNC_EVERY + 60)
        await asyncio.sleep(QUIET_SECONDS)
        before = sent(members)
        await asyncio.sleep(IDLE_SECONDS)
        idle = (sent(members) - before) / IDLE_SECONDS * SYNC_EVERY / NUM_SERVERS
        loop = asyncio.get_running_loop()
        before, began = sent(members), loop.time()
        await train()
        await until(lambda: has_all(2), 2 * SYNC_EVERY + 60)
        states = (sent(members) - before) / NUM_SERVERS - idle * (loop.time() - began) / SYNC_EVERY
    state = build("ffn.0").state()
    least = 3 * sum(one.nbytes for one in state["module"].values()) * 3 * NUM_EXPERTS / NUM_SERVERS
    emit("sent each sync by a server that leads 4 experts of 1 MB: states", states / 1e6, "MB")
    emit("the same: what Adam's state makes unavoidable", least / 1e6, "MB")
    emit("the same: states by what is unavoidable", states / least, "", "<= 1.1")
    emit("the same: all else, with nothing to train", idle / 1e6, "MB", share=idle / (idle + states))
    backend = build("ffn.0")
    for number in range(65536):
        backend.applied[random.randbytes(16)] = number
    full = with_recent_journal(backend.state(), since=65535)
    rest = len(b"".join(encode_state({**full, "applied": {}})))
    emit("a full journal's share of a sealed file", 1 - rest / len(b"".join(encode_state(full))), "", "<= 0.05")


def main() -> None:
    """Prints what is sent."""
    asyncio.run(measure())


if __name__ == "__main__":
    main()
