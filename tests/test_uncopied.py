import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tesseract_async as ta


class Holder(nn.Module):
    """A model that keeps what it was made with, as models do."""

    def __init__(self, **held: object) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.held = held

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


async def test_a_copy_of_a_module_shares_what_exists_once() -> None:
    backend = ta.ExpertBackend(nn.Linear(4, 4), args_schema=(ta.TensorSpec((4,)),))
    async with ta.TesseractNode() as node, ta.TesseractServer(node, {"f.0": backend}) as server:
        held = {
            "node": node,
            "network": node.network,
            "directory": node.directory,
            "endpoint": node.endpoint,
            "metrics": node.metrics,
            "server": server,
            "identity": node.identity,
            "background": ta.BackgroundNode(),
            "runtime": ta.TesseractRuntime(),
            "expert": await node.get_expert("f.0"),
            "gate": ta.GatingFunction(node, uid_prefix="f", grid_size=(1,), in_features=4),
        }
        model = Holder(**held)
        for twin in (copy.deepcopy(model), copy.copy(model)):
            for name in set(held) - {"expert", "gate"}:
                assert twin.held[name] is held[name], name
        assert copy.deepcopy(model).held["expert"].audits is model.held["expert"].audits  # which are the node's
        trainer = ta.AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1), in_flight=2)

        async def loss_of(replica: Holder, x: torch.Tensor) -> torch.Tensor:
            return (await replica(x)).sum()

        assert [report.error async for report in trainer.run(loss_of, [torch.ones(1, 4)] * 3)] == [None] * 3
        for name, value in held.items():
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                with pytest.raises(TypeError, match=r"state_dict\(\)"):
                    pickle.dumps(value, protocol)
            with pytest.raises(TypeError, match="cannot be pickled"):
                torch.save(Holder(**{name: value}), io.BytesIO())
