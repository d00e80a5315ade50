"""What each expert of a checkpoint costs before it is asked for the first time, and what it costs then."""

import contextlib
import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch

import tesseract_async as ta
from tesseract_async.experts.manifest import grid_key, shard_key
from tests.client.fake_node import until
from tests.costs.counting import Calls, ServerThread
from tests.costs.limits import check

NUM_EXPERTS, NUM_ASKED, NUM_LAYERS = 64, 8, 4


@pytest.mark.slow
def test_python_calls_per_expert_until_its_first_answer(tmp_path: Path) -> None:
    """Of a model's layers after the first one, which paid for what is paid once."""
    pytest.importorskip("transformers")
    pytest.importorskip("tqdm").tqdm.monitor_interval = 0  # its thread would outlive the test
    from tesseract_async.transformers.shards import Checkpoint
    from tests.transformers.swarm import build
    from tests.transformers.tiny import make_checkpoint

    sizes = {"num_experts": NUM_EXPERTS, "num_hidden_layers": NUM_LAYERS}
    checkpoint = Checkpoint(make_checkpoint("qwen3_moe", tmp_path / "m", max_shard_size="1GB", **sizes))
    uids = [[f"m.{layer}.{number}" for number in range(NUM_EXPERTS)] for layer in range(NUM_LAYERS)]
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
    found: list[tuple[Calls, Calls]] = []

    async def start(wanted: list[str]) -> ta.TesseractServer:
        node = await ending.enter_async_context(ta.TesseractNode())
        return await ending.enter_async_context(ta.TesseractServer(node, build(checkpoint, wanted)))

    async def profiled(calls: Calls | None) -> None:
        sys.setprofile(calls)

    def profile(calls: Calls | None) -> None:
        sys.setprofile(calls)

    def was_handed_over() -> bool:
        """The network hands a newcomer the records that others hold: the manifest, once for each of its keys."""
        keys = {grid_key("m"), *map(shard_key, itertools.chain(*uids))}
        return server.node.metrics.snapshot().get("network_records_copied", 0) >= len(keys)

    with thread.running():
        try:
            server = thread.run_plainly(start([*itertools.chain(*uids)]))
            peers = [str(server.node.peer_address)]
            # the grid is not read again meanwhile
            with ta.BackgroundNode(initial_peers=peers, refresh_period=600.0) as node, torch.no_grad():
                pools = [ta.ExpertPool(node, f"m.{i}", num_experts=NUM_EXPERTS).eval() for i in range(NUM_LAYERS)]
                node.run(until(was_handed_over))
                for _ in range(3):  # until the kind was checked, and the grid is known
                    pools[0].answer(x, index, weights)
                for one in pools[1:]:
                    at_loop, on_device = Calls(), Calls()
                    node.run(profiled(at_loop))
                    thread.run_plainly(server.runtimes[0].call(functools.partial(profile, on_device)))
                    one.answer(x, index, weights)
                    thread.run_plainly(server.runtimes[0].call(functools.partial(profile, None)))
                    node.run(profiled(None))
                    found.append((at_loop, on_device))
        finally:
            thread.run_plainly(ending.aclose())
    # a datagram may be lost, and come again when it likes
    least = [min(sum(calls.python.values()) for calls in each) for each in zip(*found, strict=True)]
    check("caller's loop: Python calls per expert of a layer, first pass", least[0] / NUM_EXPERTS)
    check("device: Python calls per expert, first pass", least[1] / NUM_ASKED)
