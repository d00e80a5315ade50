"""A server that is killed again and again, for test_sigkill.py: ``python killed_server.py DIRECTORY NUM_KILLS SEED``.

This process imports PyTorch once and forks a server for each life. A server trains one weight w from 0 by SGD with a
learning rate of 1, on backwards whose gradient is the number in their call id; so w is minus the sum over the journal,
exactly, or something was applied twice, lost or torn. Prints one JSON line in the end; exits with 1 at a contradiction.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from typing import Any

import torch
from torch import nn

from tesseract_async.errors import Overloaded
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.server.answering import journal_key
from tesseract_async.server.server import TesseractServer
from tesseract_async.server.state_files import CheckpointStore
from tesseract_async.wire.tensors import TensorSpec
from tests.server.serving_node import PEER, ServingNode

NUM_CLIENTS = 4
NUMBERS = {journal_key(PEER, number.to_bytes(16, "big")): number for number in range(100_000)}
"""What the journal calls each backward."""


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.ballast = nn.Parameter(torch.zeros(20_000), requires_grad=False)  # makes saving take a moment

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def make_backend() -> ExpertBackend:
    module = Scale()
    return ExpertBackend(
        module,
        optimizer=torch.optim.SGD([module.weight], lr=1.0, momentum=0.0),
        args_schema=(TensorSpec((1,)),),
        settings=BackendSettings(max_gradient_norm=None),  # the sum is to be exact, whatever the numbers
        outputs_schema=TensorSpec((1,)),
    )


def weight_of(backend: ExpertBackend) -> float:
    return float(backend.state()["module"]["weight"])


async def backward(node: ServingNode, number: int) -> int:
    """Sends backward `number`; returns the version that it led to."""
    inputs, gradients = [torch.ones(1, 1)], [torch.full((1, 1), float(number % 1000))]
    call_id = number.to_bytes(16, "big")
    _, version = await node.backward("x.0", inputs, gradients, call_id=call_id, training=True)
    return version


async def live(directory: str, pipe: int, numbers: list[int], last: bool) -> None:
    """One life: restores, says what it restored, then trains on `numbers` until it is killed."""

    def say(*words: object) -> None:
        os.write(pipe, (" ".join(map(str, words)) + "\n").encode())

    class Watched(TesseractServer):
        async def save_checkpoints(self) -> int:
            num_saved = await super().save_checkpoints()
            if num_saved:
                state = CheckpointStore(directory).load("x.0")
                assert state is not None
                say("saved", state["version"])
            return num_saved

    node, backend = ServingNode(), make_backend()
    async with Watched(node, {"x.0": backend}, checkpoint_dir=directory, checkpoint_period=0.003):  # type: ignore[arg-type]
        journal = [NUMBERS[key] for key in backend.applied]
        say("restored", json.dumps({"version": backend.version, "w": weight_of(backend), "journal": journal}))
        left = iter(numbers)

        async def client() -> None:
            for number in left:
                for _ in range(1 + number % 2):  # half of them ask twice
                    say("answered", number, await backward(node, number))

        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
        if not last:
            await asyncio.sleep(3600)


def run_life(directory: str, numbers: list[int], *, kill_after: float | None) -> list[str]:
    """Forks a server, kills it `kill_after` seconds after it is up (None: lets it end). Returns what it said."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            asyncio.run(live(directory, writer, numbers, kill_after is None))
            status = 0
        except Overloaded:
            pass
        finally:
            os._exit(status)
    os.close(writer)
    said = b""
    with os.fdopen(reader, "rb", buffering=0) as lines:
        while b"restored" not in said:
            piece = lines.read(65536)
            if not piece:
                break
            said += piece
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        while piece := lines.read(65536):
            said += piece
    _, status = os.waitpid(child, 0)
    if kill_after is None or not os.WIFSIGNALED(status):
        assert status == 0, f"a server ended by itself with {status}: {said[-2000:]!r}"
    return said.decode().splitlines()[: None if said.endswith(b"\n") else -1]


def main() -> None:
    directory, num_kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    backend = make_backend()  # what PyTorch loads on first use is loaded once, before the forks
    backend.step(backend.gradients([torch.ones(1, 1)], [torch.ones(1, 1)])[1])
    choice = random.Random(seed)
    saved, sent, answered = 0, 0, {}
    unsure: list[int] = []
    num_lost = 0
    for life in range(num_kills + 1):
        last = life == num_kills
        fresh = list(range(sent + 1, sent + (1 if last else 2000)))
        said = run_life(directory, unsure + fresh, kill_after=None if last else choice.random() * 0.06)
        restored: dict[str, Any] = json.loads(next(line for line in said if line.startswith("restored"))[9:])
        journal = set(restored["journal"])
        assert restored["version"] >= saved, f"version {restored['version']} is older than the checkpoint of {saved}"
        assert len(journal) == len(restored["journal"])
        assert restored["w"] == -sum(number % 1000 for number in journal), "the weight contradicts the journal"
        for number, version in answered.items():
            if version <= restored["version"]:
                assert number in journal, f"backward {number} led to version {version} and is not in the journal"
            else:
                num_lost += 1
        answers = [tuple(map(int, line.split()[1:])) for line in said if line.startswith("answered")]
        answered = dict(answers)  # the first answer's version is the one that a second one repeats
        for number, version in answers:
            assert answered[number] == version, f"backward {number} was applied twice"
        saved = max([saved, *(int(line.split()[1]) for line in said if line.startswith("saved"))])
        sent = max([sent, *answered])
        # like a client that was answered or not, but can't know what the crash took: it asks again
        unsure = [number for number in range(1, sent + NUM_CLIENTS + 1) if number not in journal]
        sent += NUM_CLIENTS
    final = run_life(directory, [], kill_after=None)
    state = json.loads(next(line for line in final if line.startswith("restored"))[9:])
    everything = set(state["journal"])
    assert everything >= set(range(1, sent - NUM_CLIENTS + 1)), "something was never applied"
    assert state["w"] == -sum(number % 1000 for number in everything)
    print(json.dumps({"kills": num_kills, "steps": state["version"], "applied": len(everything), "redone": num_lost}))


if __name__ == "__main__":
    main()
