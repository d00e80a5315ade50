"""What the how-to promises of a mesh whose processes are killed, stopped, and told to leave."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import tesseract_async as ta
from tesseract_async.errors import TesseractError
from tesseract_async.server.answering import journal_key
from tesseract_async.server.other_replicas import ReplicaSettings, adopt_states
from tesseract_async.server.registry import make_backend
from tesseract_async.server.state_files import CheckpointStore
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire
from tests.faults.killed_mesh import LAUNCHER, STALL_TIMEOUT, trial_of
from tests.stem import ROOT, Process, Stem

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


@pytest.mark.timeout(500)
def test_a_mesh_comes_back(tmp_path: Path) -> None:
    found = asyncio.run(trial_of(tmp_path))
    print(json.dumps(found))
    for what in ("follower killed", "idle follower killed"):
        assert found[what]["noticed"] < 1.0
    assert found["follower stopped"]["noticed"] < STALL_TIMEOUT + 5.0 + 1.0
    for what in ("follower killed", "idle follower killed", "leader killed", "follower stopped"):
        assert found[what]["went_on"] < 5.0 and found[what]["restarted"] == 1
    left = found["told to leave"]
    assert left["left"] == 1 and left["seconds"] < 30.0 and left["torchrun"] == 0
    assert int(found["saved"]) == int(found["version"][0])


@contextlib.contextmanager
def launched(script: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Two shells under the launcher, which say that they run."""
    command = [*LAUNCHER, "--standalone", "--nproc-per-node=2", *options, "--no-python", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            assert [process.stdout.readline() for _ in range(2)] == ["runs\n"] * 2
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("at_signal", "succeeds"), [("exit 0", True), ('exit "$LOCAL_RANK"', False), ("echo stays", False)]
)
def test_the_launcher_succeeds_if_all_leave_when_told_to(at_signal: str, succeeds: bool) -> None:
    script = f"trap '{at_signal}' TERM; echo runs; while :; do sleep 0.1; done"
    with launched(script, "--max-restarts=3", "--shutdown-timeout=2") as process:
        process.terminate()
        out, _ = process.communicate(timeout=20.0)
        assert "runs" not in out, "nobody was started again"
        assert (process.returncode == 0) == succeeds


def test_no_other_machine_reaches_the_store_of_one_machine() -> None:
    with launched("trap 'exit 0' TERM; echo runs; while :; do sleep 0.1; done") as process:
        found = psutil.Process(process.pid).net_connections()
        process.terminate()
        assert process.wait(20.0) == 0
        assert {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


UID = "big.0"
PERIOD = 1.0
TIMES = ReplicaSettings(sync_every=PERIOD, check_every=0.25, lease=2.0)
SLACK = 1.0
"""Seconds more that what was lost may be old: a look, and the transfer."""


class Trainer:
    """Sends backwards of gradient 1, half of them twice, to whom leads; knows what was answered when."""

    def __init__(self, node: ta.TesseractNode, server: ta.TesseractServer | None) -> None:
        """`server`: the follower's."""
        self.node, self.server = node, server
        self.mesh: PeerAddress | None = None
        """Where the mesh is, while it serves."""
        self.answered: dict[bytes, float] = {}
        """When, by the journal's key."""
        self.news = asyncio.Event()

    async def train(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            call_id = number.to_bytes(16, "big")
            times = 1 + number % 2
            while times:
                if not await self.ask(call_id):
                    await asyncio.sleep(0.05)
                    continue
                times -= 1
                self.answered.setdefault(journal_key(self.node.peer_id, call_id), time.monotonic())
            self.news.set()
            await asyncio.sleep(0.005)

    @property
    def follower_leads(self) -> bool:
        return self.server is not None and self.server.is_primary(UID)

    async def wait_answers(self, number: int) -> None:
        """Return after so many more."""
        for _ in range(number):
            self.news.clear()
            await self.news.wait()

    async def ask(self, call_id: bytes) -> bool:
        place = self.server.node.peer_address if self.server and self.follower_leads else self.mesh
        if place is None:
            return False
        metas, buffers = wire.pack_tensors([torch.ones(1, 1), torch.ones(1, 1)])
        request = messages.BackwardRequest(
            uid=UID, call_id=call_id, tensors=metas, num_inputs=1, training=False, seed=0, version=0, reply_codec="none"
        )
        try:
            await self.node.call_expert(place, messages.BACKWARD, messages.encode(request), buffers, timeout=2.0)
        except (TesseractError, TimeoutError):
            return False
        return True


class Mesh:
    """A mesh that is started again whenever it ends, and what it says."""

    process: Process

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.pids: list[int] = []
        self.lives: list[list[int]] = []
        """Exit statuses."""
        self.ready = asyncio.Event()

    async def start(self, stem: Stem, folder: Path, peer: str) -> None:
        self.process = await stem.start(
            *("tests.faults.forked_mesh", "2", "--experts", UID, "--expert-class", "linear", "--size", "in_features=1"),
            *("--optimizer", "sgd", "--learning-rate", "1", "--initial-peers", peer, "--stall-timeout", "20"),
            *("--identity", str(folder / "identity.pem"), "--checkpoint-dir", str(folder / "experts")),
            *("--checkpoint-period", str(PERIOD), "--sync-every", str(PERIOD), "--ttl", "3"),
            module=True,
            folder=ROOT,
            environment={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stderr is not None
        self.hearing = asyncio.gather(self.hear(), self.process.stderr.read())

    async def hear(self) -> None:
        while line := await self.process.stdout.readline():
            said: dict[str, Any] = json.loads(line) if line.startswith(b"{") else {"event": line}
            if "pids" in said:
                self.pids = said["pids"]
            elif "statuses" in said:
                self.lives.append(said["statuses"])
            elif said["event"] == "ready":
                self.trainer.mesh = PeerAddress.parse(said["address"])
                self.ready.set()

    async def end(self) -> int:
        """Tell it to leave. Returns its exit status."""
        self.process.terminate()
        try:
            async with asyncio.timeout(40):
                _, errors = await self.hearing
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        status = await self.process.wait()
        assert not status, errors.decode()[-4000:]
        return status


@pytest.mark.timeout(900)
@pytest.mark.parametrize("has_follower", [True, False])
async def test_twenty_kills_lose_no_more_than_a_period(stem: Stem, tmp_path: Path, has_follower: bool) -> None:
    choice, kills, gaps = random.Random(5), list[float](), list[float]()
    backend = make_backend("linear", optimizer="sgd", learning_rate=1.0, sizes={"in_features": 1})
    weight = next(iter(backend.module.parameters()))
    async with contextlib.AsyncExitStack() as stack:
        seed = await stack.enter_async_context(ta.TesseractNode())
        node = await stack.enter_async_context(ta.TesseractNode(initial_peers=[seed.address]))
        trainer = Trainer(seed, ta.TesseractServer(node, {UID: backend}, followers=[UID]) if has_follower else None)
        mesh = Mesh(trainer)
        await mesh.start(stem, tmp_path, seed.address)
        stack.push_async_callback(mesh.end)
        await asyncio.wait_for(mesh.ready.wait(), 60)
        assert set(await adopt_states(node, {UID: backend})) == {UID}
        first, keeper = weight.item(), None
        if trainer.server is not None:
            await stack.enter_async_context(trainer.server)
            keeper = await stack.enter_async_context(ReplicaKeeper(trainer.server, settings=TIMES))
        training = asyncio.gather(*(trainer.train(range(begin, 60_000, 2)) for begin in (1, 2)))
        try:
            for _ in range(20):
                async with asyncio.timeout(60):
                    await mesh.ready.wait()
                    while keeper is not None and trainer.follower_leads:
                        await keeper.hand_over()
                        await asyncio.sleep(0.1)
                    await trainer.wait_answers(5)
                    await asyncio.sleep(2.0 * choice.random())
                    mesh.ready.clear()
                    os.kill(choice.choice(mesh.pids), signal.SIGKILL)
                    kills.append(time.monotonic())
                    await trainer.wait_answers(3)  # two may have been on their way
                    gaps.append(time.monotonic() - kills[-1])
        finally:
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)
        async with asyncio.timeout(60):
            await mesh.ready.wait()
            assert await mesh.end() == 0
            while keeper is not None and not trainer.follower_leads:
                await keeper.look()
    if keeper is None:
        state = CheckpointStore(tmp_path / "experts").load(UID)
        assert state is not None
        backend.load_state(state)
    assert weight.item() == pytest.approx(first - len(backend.applied), abs=0.01), "each step was taken once"
    lost = [when for key, when in trainer.answered.items() if key not in backend.applied]
    ages = [min(kill - when for kill in kills if kill > when - 0.5) for when in lost]
    print(len(trainer.answered), "answers;", len(lost), "lost, of", max(ages, default=0), "s; gaps:", gaps)
    assert max(ages, default=0.0) <= PERIOD + SLACK
    assert max(gaps) <= (TIMES.lease if has_follower else 0.0) + 10.0
    assert all(set(statuses) == {-9, 75} for statuses in mesh.lives[:-1]) and mesh.lives[-1] == [0, 0]
