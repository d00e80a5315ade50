import asyncio
import concurrent.futures
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.errors import ExpertNotFound
from tesseract_async.network.entries import StoreItem
from tests.client.forked import told_by_a_child
from tests.stem import ROOT, Stem


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


@pytest.fixture
def node(module: nn.Module) -> Iterator[ta.BackgroundNode]:
    backends = {
        f"ffn.{i}.{i}": ta.ExpertBackend(module if not i else nn.Linear(8, 8), args_schema=(ta.TensorSpec((8,)),))
        for i in range(2)
    }
    with ta.BackgroundNode() as node, node.entered(ta.TesseractServer(node.node, backends)):
        yield node


def test_plain_calls_and_a_plain_backward(node: ta.BackgroundNode, module: nn.Module) -> None:
    expert = node.get_expert("ffn.0.0")
    x = torch.randn(3, 8, requires_grad=True)
    y = expert(x)
    torch.testing.assert_close(y, module(x))
    y.sum().backward()
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)
    with torch.no_grad():
        assert not expert(x).requires_grad
    assert expert.info().args[0].shape == (8,)
    with pytest.raises(ExpertNotFound, match="ffn.1.9"):
        node.get_expert("ffn.1.9")
    gate = ta.GatingFunction(node, uid_prefix="ffn", grid_size=(2, 2), in_features=8, k_best=2, k_min=2)
    optimizer = torch.optim.Adam(gate.parameters(), 1e-2)
    assert gate.choose(x)[0][0].uid in ("ffn.0.0", "ffn.1.1")
    for _ in range(3):
        optimizer.zero_grad()
        gate(x).square().sum().backward()
        optimizer.step()
    with torch.no_grad():  # a server that leaves waits for the backwards of what it answered
        assert gate.mix(x).num_answers.tolist() == [2, 2, 2]
    network = node.network
    assert network.store("key", 1, ttl=60.0) >= 1 and network.get("key") == 1
    assert network.store_many([StoreItem("a", 1, 60.0), StoreItem("b", 2, 60.0)]) == [1, 1]
    assert network.get_many(["a", "b", "c"]) == [1, 2, None] and network.get_entries("a")[0].owner == node.peer_id
    assert network.withdraw("a") >= 1 and network.get("a") is None
    assert network.wait_joined() and network.num_contacts == 0 and node.wait_reachable()
    assert node.identity.peer_id == node.peer_id and node.metrics.snapshot()

    def step() -> None:
        gate(expert(torch.randn(3, 8))).sum().backward()

    async def in_a_running_loop() -> None:
        y = await asyncio.to_thread(expert, x)
        await asyncio.to_thread(y.sum().backward)
        expert(x).sum().backward()  # as in a notebook's cell, which the kernel's loop runs
        await ta.backward(expert(x).sum())  # awaited on this loop, carried by the node's
        loop = asyncio.get_running_loop()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:  # more steps than threads
            await asyncio.gather(*(loop.run_in_executor(pool, step) for _ in range(6)))

    asyncio.run(in_a_running_loop())
    results = []

    def call() -> None:
        with torch.no_grad():
            results.append(expert(x))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4

    async def on_the_nodes_thread() -> None:
        expert(x)

    with pytest.raises(RuntimeError, match="own thread"):
        node.run(on_the_nodes_thread())

    async def close_it() -> None:
        node.close()

    with pytest.raises(RuntimeError, match="own thread"):
        node.run(close_it())


def test_a_forked_process_is_told_that_the_node_is_not_there(node: ta.BackgroundNode) -> None:
    """As in a DataLoader's workers: its thread is not copied, and waiting for it would have no end."""
    expert = node.get_expert("ffn.0.0")
    y = expert(torch.randn(2, 8))

    def child(say: Callable[[str], None]) -> None:
        for use in (lambda: expert(y), lambda: node.network.get("key"), y.sum().backward):
            with pytest.raises(RuntimeError, match="process") as told:
                use()
            say(f"{told.value}; ")
        node.close()
        say("closed")

    said = told_by_a_child(child)
    assert said.count("forked") == 2 and said.endswith("; closed")
    y.sum().backward()  # all is well here


async def test_misuse_says_so() -> None:
    node = ta.BackgroundNode()
    with pytest.raises(RuntimeError, match="not running"):
        node.get_expert("ffn.0.0")
    with pytest.raises(RuntimeError, match="without a loop"):
        async with node:
            pass
    node.start()
    with pytest.raises(RuntimeError, match="started before"):
        node.start()
    gate = ta.GatingFunction(node, uid_prefix="ffn", grid_size=(2, 2), in_features=8)
    node.close()
    node.close()
    for late in (lambda: node.run(asyncio.sleep(0)), lambda: gate(torch.zeros(1, 8)), lambda: node.node):
        with pytest.raises(RuntimeError, match="not running"):
            late()


def test_waiting_ends_with_its_caller_and_with_the_node() -> None:
    cancelled = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    node = ta.BackgroundNode().start()
    try:
        with pytest.raises(KeyboardInterrupt):
            main = threading.main_thread().ident or 0
            node.wait(lambda done: signal.pthread_kill(main, signal.SIGINT), cancelled.set)
        assert cancelled.wait(60)
        closing = threading.Thread(target=node.close)
        with pytest.raises(RuntimeError, match="not running"):
            node.wait(lambda done: closing.start(), lambda: None)
        closing.join()
        with pytest.raises(RuntimeError, match="not running"):
            node.wait(lambda done: None, lambda: None)
    finally:
        node.close()
        signal.signal(signal.SIGINT, before)


COMPILED = """
import torch, tesseract_async as ta
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
        self.expert = node.get_expert("ffn.0.0")
        self.gate = ta.GatingFunction(node, uid_prefix="ffn", grid_size=(2, 2), in_features=8, k_best=2, k_min=2)

    def forward(self, x):
        h = torch.tanh(self.expert(torch.relu(self.before(x)))) * 2
        h = h + self.gate.mix(h).output
        return self.after(self.gate(h) + h)

experts = {f"ffn.{i}.{i}": ta.ExpertBackend(nn.Linear(8, 8), args_schema=(ta.TensorSpec((8,)),)) for i in range(2)}
with ta.BackgroundNode() as node, node.entered(ta.TesseractServer(node.node, experts)):
    model = Model()
    compiled = torch.compile(model, backend="eager")
    x, results = torch.randn(3, 8), []
    for run in (model, compiled):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
    assert len(results[0]) == 7
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), y)
    torch.compile(model.gate, backend="eager")(x).sum().backward()
"""


@pytest.mark.slow
async def test_a_compiled_model_trains_as_it_does_uncompiled(stem: Stem, tmp_path: Path) -> None:
    (tmp_path / "compiled.py").write_text(COMPILED)
    ended = await stem.start(str(tmp_path / "compiled.py"), folder=ROOT, environment=dict(os.environ))
    _, err = await ended.communicate()
    assert ended.returncode == 0, err.decode()
