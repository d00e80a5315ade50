"""Servers with the experts of a tiny checkpoint, and a node beside them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import nn

import tesseract_async as ta
from tesseract_async.runtime.backend import BackendSettings
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.transformers.serving import CheckpointExperts, CheckpointOptions


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


@contextlib.contextmanager
def serving(
    folder: Path,
    *,
    num_servers: int = 2,
    optimizer: str | None = None,
    lockstep: bool = False,
    checkpoints: Path | None = None,
) -> Iterator[Swarm]:
    """Each server has every `num_servers`-th expert of each layer, ``m.LAYER.EXPERT``."""
    made = CheckpointExperts(
        folder, CheckpointOptions(optimizer=optimizer, optimizer_options={}), BackendSettings(lockstep=lockstep)
    )
    with contextlib.ExitStack() as stack:
        servers: list[ta.BackgroundNode] = []
        for i in range(num_servers):
            peers = [server.address for server in servers[:1]]
            servers.append(node := stack.enter_context(ta.BackgroundNode(initial_peers=peers)))
            layers = made.checkpoint.layers.items()
            uids = [f"m.{layer}.{e}" for layer, one in layers for e in range(i, one.num_experts, num_servers)]
            backends = made.build(uids)
            path = None if checkpoints is None else checkpoints / str(i)
            server = stack.enter_context(node.entered(ta.TesseractServer(node.node, backends, checkpoint_dir=path)))
            stack.enter_context(node.entered(ReplicaKeeper(server)))
        peers = [server.address for server in servers]
        yield Swarm(stack.enter_context(ta.BackgroundNode(initial_peers=peers)), servers)
