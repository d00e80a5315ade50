"""Volunteers that leave for good, one after the other, while others come and trainers go on."""

import asyncio
import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from random import Random

import pytest
import torch

import tesseract_async as ta
from tesseract_async.errors import TesseractError
from tesseract_async.experts.terms import TermKind
from tesseract_async.tasks import end
from tests.server.run_members import Member, joined, make_run, member, standings, until

X = torch.ones(2, 4)
SYNC_EVERY = 2.0
TRANSFER = 2.0
"""Seconds for a state of a few KB to arrive, on a machine that does much else."""


@dataclass
class Watch:
    """Who leads each expert, and how far it is, looked at ten times a second."""

    num_experts: int
    led_at: dict[str, float] = field(default_factory=dict)
    """When each was led last."""
    gaps: list[tuple[float, str]] = field(default_factory=list)
    """Seconds for which an expert was led by nobody, where it was more than one."""
    stood_still: float = 0.0
    """Seconds between two looks, at most: so long the whole process did something else."""
    doubles: int = 0
    """Looks at which two would take a step."""
    acknowledged: defaultdict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    furthest_back: float = 0.0
    """Seconds of acknowledged steps that an expert fell back."""
    epochs: dict[str, int] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    """Experts that began anew, or at the end are not led, or lack copies."""
    num_steps: int = 0
    doomed: list[str] = field(default_factory=list)
    """Experts of the member that dies next: these are trained most, so that what falls back is seen."""
    stops: list[tuple[float, str]] = field(default_factory=list)
    """Seconds from each death of an expert's primary to the next step that was acknowledged to a trainer."""
    period: float = 0.0
    """Seconds between two Seals of an expert that moves, at most: longer where upload rates are short."""

    def look(self, members: list[Member], now: float) -> None:
        self.period = max(self.period, *(one.keeper.tenures.sync_every(one.authority) for one in members))
        for uid in self.uids:
            leading = [one for one in members if one.leads(uid)]
            self.doubles += len(leading) > 1
            if not leading:
                continue
            until = self.led_at.get(uid, now)
            if (gap := now - until) > 1.0:
                self.gaps.append((round(gap, 1), uid))
            self.led_at[uid] = now
            tenure, version = leading[0].keeper.tenures.tenure(uid), leading[0].version(uid)
            epoch = tenure.epoch
            if epoch != self.epochs.get(uid, epoch):
                if tenure.term is not None and tenure.term.kind is TermKind.GENESIS:
                    self.lost.add(uid)
                lost = [until - at for at, acknowledged in self.acknowledged[uid] if acknowledged > version]
                self.furthest_back = max(self.furthest_back, *lost, 0.0)
                self.acknowledged[uid] = []
            self.epochs[uid] = epoch

    @property
    def uids(self) -> list[str]:
        return [f"ffn.{n}" for n in range(self.num_experts)]

    async def run(self, members: list[Member]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            self.look(members, before)
            await asyncio.sleep(0.1)
            self.stood_still = max(self.stood_still, loop.time() - before - 0.1)

    @property
    def longest(self) -> float:
        return max((gap for gap, _ in self.gaps), default=0.0)

    @property
    def longest_stop(self) -> float:
        return max((stop for stop, _ in self.stops), default=0.0)


async def step(trainer: ta.TesseractNode, watch: Watch, members: list[Member], uid: str) -> bool:
    """Take a step with one expert. Whether it was acknowledged."""
    try:
        expert = await trainer.get_expert(uid)
        async with asyncio.timeout(5.0):
            await ta.backward((await expert(X)).sum())
    except (TesseractError, TimeoutError):
        return False
    leading = [one.version(uid) for one in members if one.leads(uid)]
    if len(leading) == 1:
        watch.acknowledged[uid].append((asyncio.get_running_loop().time(), leading[0]))
        watch.num_steps += 1
    return True


async def train(trainer: ta.TesseractNode, watch: Watch, members: list[Member], random: Random) -> None:
    """Take steps, one after the other: every other one with an expert whose primary dies next."""
    while True:
        for some in (watch.doomed, watch.uids):
            if some:
                await step(trainer, watch, members, random.choice(some))
                await asyncio.sleep(0.1)


async def train_again(trainer: ta.TesseractNode, watch: Watch, members: list[Member], uid: str, died: float) -> None:
    """Train an expert, whose primary has just died, until a step is acknowledged."""
    try:
        while not await step(trainer, watch, members, uid):  # noqa: ASYNC110  (nothing tells of it)
            await asyncio.sleep(0.1)
    finally:
        watch.stops.append((round(asyncio.get_running_loop().time() - died, 1), uid))


async def churn(num_servers: int, per_server: int, seconds: float, *, lease: float, kill_every: float) -> Watch:
    """Run so many servers, of which one is killed for good now and then, and another comes."""
    num_experts, random, loop = num_servers * per_server, Random(7), asyncio.get_running_loop()
    run = make_run(num_experts, lease=lease, sync_every=SYNC_EVERY)
    members: list[Member] = []
    stacks: dict[Member, contextlib.AsyncExitStack] = {}
    watch = Watch(num_experts)
    async with contextlib.AsyncExitStack() as stack:
        seeds = [await stack.enter_async_context(ta.TesseractNode(public=True)) for _ in range(1)]
        addresses = [one.address for one in seeds]

        async def start(number: int) -> None:
            own = await stack.enter_async_context(contextlib.AsyncExitStack())
            one = await own.enter_async_context(
                member(run, number, addresses, room=3 * per_server, files=8 * per_server)
            )
            stacks[one] = own
            members.append(one)

        for number in range(1, num_servers + 1):
            await start(number)

        def is_ready() -> bool:
            found = standings(members, num_experts)
            return all(one.primary is not None and one.losses >= 3 for one in found)

        await until(is_ready, 240)
        trainer = await stack.enter_async_context(joined(run, 5000, addresses))

        async def clean_up(one: Member) -> None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(stacks.pop(one).aclose(), 10.0)

        tasks = [asyncio.create_task(watch.run(members)), asyncio.create_task(train(trainer, watch, members, random))]
        waiting: list[asyncio.Task[None]] = []
        began, number = loop.time(), 100
        try:
            while loop.time() - began < seconds:
                victim = random.choice(members)
                watch.doomed = [uid for uid in watch.uids if victim.leads(uid)]
                await asyncio.sleep(kill_every)
                members.remove(victim)
                orphans, died = [uid for uid in watch.uids if victim.leads(uid)], loop.time()
                await victim.kill()
                waiting += [asyncio.create_task(train_again(trainer, watch, members, uid, died)) for uid in orphans]
                tasks.append(asyncio.create_task(clean_up(victim)))
                number += 1
                await start(number)
            with contextlib.suppress(TimeoutError):
                await until(lambda: all(one.done() for one in waiting), 6 * lease)
            with contextlib.suppress(TimeoutError):
                await until(is_ready, 120)
            watch.look(members, loop.time())
            found = zip(watch.uids, standings(members, num_experts), strict=True)
            watch.lost |= {uid for uid, one in found if one.primary is None or one.losses < 3}
        finally:
            await end(*tasks, *waiting)
    return watch


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("num_servers", "per_server", "seconds"), [(5, 2, 40.0), (12, 4, 1200.0)])
async def test_volunteers_leave_for_good_every_ten_seconds(num_servers: int, per_server: int, seconds: float) -> None:
    """Takes most of two cores, all to itself: a lease of five seconds is no lease where the process stands still."""
    lease = 5.0
    watch = await churn(num_servers, per_server, seconds, lease=lease, kill_every=10.0)
    assert not watch.lost and watch.num_steps
    assert max(watch.longest, watch.longest_stop) <= 2 * lease and not watch.doubles
    assert watch.furthest_back <= watch.period + TRANSFER
