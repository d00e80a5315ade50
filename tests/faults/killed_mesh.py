"""A mesh of two processes under torchrun whose processes are killed while somebody trains on it.

``python -m tests.faults.killed_mesh FOLDER``: prints what was measured as a line of JSON.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import tesseract_async as ta
from tesseract_async.errors import TesseractError

STALL_TIMEOUT = 10.0
LAUNCHER = (sys.executable, "-m", "tesseract_async.cli.torchrun")


def start(folder: Path, seed: str) -> subprocess.Popen[bytes]:
    """`tesseract serve --shard fsdp`, as the how-to says; what it writes is in ``log``."""
    command = [*LAUNCHER, "--standalone", "--nproc-per-node=2", "--max-restarts=100", "-m", "--"]
    command += ["tesseract_async.cli", "serve", "--shard", "fsdp", "--experts", "big.0"]
    command += ["--size", "in_features=16", "--size", "hidden_features=32", "--optimizer", "sgd"]
    command += ["--learning-rate", "0.05", "--checkpoint-dir", str(folder), "--checkpoint-period", "1"]
    command += ["--stall-timeout", str(STALL_TIMEOUT), "--identity", str(folder / "identity.pem"), "-p", seed]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


class Trial:
    """The job, and a trainer that never gives up."""

    def __init__(self, folder: Path, node: ta.TesseractNode) -> None:
        self.folder, self.node = folder, node
        self.job = start(folder, str(node.peer_address))
        self.answers: list[float] = []
        self.errors: list[tuple[float, str]] = []
        self.trains = True
        self.versions: list[int] = []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    async def until(self, what: Callable[[], bool], seconds: float) -> float:
        """Wait for something. Returns the seconds that it took."""
        started = time.monotonic()
        while not what():
            if time.monotonic() - started > seconds or self.job.poll() is not None:
                raise TimeoutError(self.log[-6000:])
            await asyncio.sleep(0.02)
        return time.monotonic() - started

    def num_ready(self) -> int:
        return len(re.findall(r'"event": "ready"', self.log))

    def pids(self) -> dict[int, int]:
        """The pids of the processes that run now, by rank."""
        ranks = {}
        for one in psutil.Process(self.job.pid).children():
            with contextlib.suppress(psutil.Error):
                ranks[int(one.environ()["RANK"])] = one.pid
        return ranks

    async def train(self) -> None:
        expert, number = None, 0
        while True:
            await asyncio.sleep(0.02)
            if not self.trains:
                continue
            number += 1
            try:
                if expert is None:
                    expert = await self.node.get_expert("big.0")
                y = await expert(torch.randn(1 + number % 5, 16))
                await ta.backward(y.square().mean())
                self.answers.append(time.monotonic())
            except (TesseractError, TimeoutError) as error:
                self.errors.append((time.monotonic(), f"{type(error).__name__}: {error}"))
                expert = None
                await asyncio.sleep(0.1)

    async def strike(self, rank: int, number: signal.Signals, *, idle: bool = False) -> dict[str, float]:
        """Send a signal to a process. Returns when that was noticed, and when training went on."""
        self.trains = not idle
        if not idle:
            answered = len(self.answers)
            await self.until(lambda: len(self.answers) > answered + 20, 60)
        ready, lost, restarted = self.num_ready(), self.log.count('"event": "lost"'), self.log.count("follows")
        os.kill(self.pids()[rank], number)
        struck = time.monotonic()
        found = {}
        if rank:
            found["noticed"] = await self.until(lambda: self.log.count('"event": "lost"') > lost, STALL_TIMEOUT + 20)
        await self.until(lambda: self.num_ready() > ready, 90)
        found["ready"] = time.monotonic() - struck
        answered, self.trains = len(self.answers), True
        await self.until(lambda: len(self.answers) > answered + 3, 60)
        found["went_on"] = next(one for one in self.answers if one > struck + found["ready"]) - struck - found["ready"]
        found["restarted"] = self.log.count("follows") - restarted
        return found


async def trial_of(folder: Path) -> dict[str, Any]:
    """Kill, stop, and tell to leave. Returns what was measured."""
    found: dict[str, Any] = {}
    async with ta.TesseractNode() as node:
        trial = Trial(folder, node)
        training = asyncio.create_task(trial.train())
        try:
            found["first"] = await trial.until(lambda: trial.num_ready() > 0, 90)
            found["follower killed"] = await trial.strike(1, signal.SIGKILL)
            found["leader killed"] = await trial.strike(0, signal.SIGKILL)
            found["idle follower killed"] = await trial.strike(1, signal.SIGKILL, idle=True)
            found["follower stopped"] = await trial.strike(1, signal.SIGSTOP)
            num_answers = len(trial.answers)
            await trial.until(lambda: len(trial.answers) > num_answers + 5, 30)
            trial.trains = False
            trial.job.terminate()
            started = time.monotonic()
            status = await asyncio.to_thread(trial.job.wait, 60)
            left = re.findall(r'"event": "left", "versions": {"big.0": (\d+)}', trial.log)
            found["told to leave"] = {"seconds": time.monotonic() - started, "torchrun": status, "left": len(left)}
            saved = sorted((folder / "big.0").glob("*.safetensors"))
            found["saved"] = saved[-1].stem if saved else None
            found["errors"] = sorted({text for _, text in trial.errors})[:8]
            found["version"] = left
        finally:
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)
            if trial.job.poll() is None:
                os.killpg(trial.job.pid, signal.SIGKILL)
                trial.job.wait()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(trial_of(Path(sys.argv[1])))), flush=True)
