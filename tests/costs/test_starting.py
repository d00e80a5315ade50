"""What each expert of a checkpoint costs before it is asked for the first time, and what it costs then."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

import tesseract_async as ta
from tests.costs.counting import Calls, ServerThread
from tests.costs.limits import check

NUM_EXPERTS, NUM_ASKED = 64, 8


@pytest.mark.slow
def test_python_calls_per_expert_until_its_first_answer(tmp_path: Path) -> None:
    """Of a model with two layers: the second one's costs, once the first one paid for what is paid once."""
    pytest.importorskip("transformers")
    pytest.importorskip("tqdm").tqdm.monitor_interval = 0  # its thread would outlive the test
    from tesseract_async.transformers.shards import Checkpoint
    from tests.transformers.swarm import build
    from tests.transformers.tiny import make_checkpoint

    checkpoint = Checkpoint(make_checkpoint("qwen3_moe", tmp_path / "m", num_experts=NUM_EXPERTS, max_shard_size="1GB"))
    uids = [[f"m.{layer}.{number}" for number in range(NUM_EXPERTS)] for layer in (0, 1)]
    x, weights = torch.randn(NUM_ASKED, 32), torch.ones(NUM_ASKED, 1)
    index = torch.arange(NUM_ASKED)[:, None]
    build(checkpoint, uids[0])

    def calls_to_build(wanted: list[str]) -> int:
        calls = Calls()
        sys.setprofile(calls)
        try:
            build(checkpoint, wanted)
        finally:
            sys.setprofile(None)
        return sum(calls.python.values())

    each = calls_to_build([*uids[0], *uids[1]]) - calls_to_build(uids[0])
    check("checkpoint: Python calls per expert that is made", each / NUM_EXPERTS)

    thread, ending = ServerThread(), contextlib.AsyncExitStack()
    on_device, at_loop = Calls(), Calls()

    async def start(wanted: list[str]) -> ta.TesseractServer:
        node = await ending.enter_async_context(ta.TesseractNode())
        return await ending.enter_async_context(ta.TesseractServer(node, build(checkpoint, wanted)))

    async def profiled(calls: Calls | None) -> None:
        sys.setprofile(calls)

    def profile(calls: Calls | None) -> None:
        sys.setprofile(calls)

    with thread.running():
        try:
            server = thread.run_plainly(start([*uids[0], *uids[1]]))
            peers = [str(server.node.peer_address)]
            # the grid is not read again meanwhile
            with ta.BackgroundNode(initial_peers=peers, refresh_period=600.0) as node, torch.no_grad():
                first, second = (ta.ExpertPool(node, f"m.{layer}", num_experts=NUM_EXPERTS).eval() for layer in (0, 1))
                for _ in range(3):  # until the kind was checked, and the grid is known
                    first.answer(x, index, weights)
                node.run(profiled(at_loop))
                thread.run_plainly(server.runtimes[0].call(lambda: profile(on_device)))
                second.answer(x, index, weights)
                thread.run_plainly(server.runtimes[0].call(lambda: profile(None)))
                node.run(profiled(None))
        finally:
            thread.run_plainly(ending.aclose())
    check("caller's loop: Python calls per expert of a layer, first pass", sum(at_loop.python.values()) / NUM_EXPERTS)
    check("device: Python calls per expert, first pass", sum(on_device.python.values()) / NUM_ASKED)
