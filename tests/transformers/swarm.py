"""Servers with the experts of a tiny checkpoint, and a node next to them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import tesseract_async as ta
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.server.registry import Built, backend_of
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.transformers.serving import CheckpointExperts
from tesseract_async.transformers.shards import Checkpoint


class Swarm(NamedTuple):
    """What `serving` gives."""

    node: ta.BackgroundNode
    servers: list[ta.BackgroundNode]

    def num_calls(self) -> int:
        """Messages to experts that the client has sent."""
        return int(self.node.metrics.snapshot().get("expert_calls{method=expert.apply}", 0))


def local(folder: Path, **kwargs: object) -> nn.Module:
    """The model, whole."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **kwargs)
    return model


def build(
    checkpoint: Checkpoint,
    uids: list[str],
    *,
    optimizer: str | None = None,
    lockstep: bool = False,
    dtype: str | None = None,
    master: str | None = None,
) -> dict[str, ExpertBackend]:
    """Experts as `tesseract serve` makes them."""
    experts = CheckpointExperts(checkpoint, dtype=dtype, master=master)

    def make(_: str, build: Callable[[], Built], like: ExpertBackend | None) -> ExpertBackend:
        return backend_of(
            build,
            optimizer=None if optimizer is None else (optimizer, {"learning_rate": 1e-3}),
            max_batch_size=4096,
            settings=BackendSettings(stochastic=False, lockstep=lockstep),
            spread=None,
            like=like,
        )

    return experts.build(uids, make, trains=optimizer is not None)


@contextlib.contextmanager
def serving(
    folder: Path,
    *,
    num_servers: int = 2,
    optimizer: str | None = None,
    checkpoints: Path | None = None,
    **more: Any,
) -> Iterator[Swarm]:
    """Each server has every `num_servers`-th expert of each layer, ``m.LAYER.EXPERT``. `more`: as for `build`."""
    checkpoint = Checkpoint(folder)
    with contextlib.ExitStack() as stack:
        servers: list[ta.BackgroundNode] = []
        for i in range(num_servers):
            peers = [server.address for server in servers[:1]]
            servers.append(node := stack.enter_context(ta.BackgroundNode(initial_peers=peers)))
            layers = checkpoint.layers.items()
            uids = [f"m.{layer}.{e}" for layer, one in layers for e in range(i, one.num_experts, num_servers)]
            backends = build(checkpoint, uids, optimizer=optimizer, **more)
            path = None if checkpoints is None else checkpoints / str(i)
            server = stack.enter_context(node.entered(ta.TesseractServer(node.node, backends, checkpoint_dir=path)))
            stack.enter_context(node.entered(ReplicaKeeper(server)))
        peers = [server.address for server in servers]
        yield Swarm(stack.enter_context(ta.BackgroundNode(initial_peers=peers)), servers)
