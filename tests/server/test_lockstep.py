"""One trainer's experts gather gradients, and step when it says so."""

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.errors import NotAllowed, RemoteError
from tesseract_async.identity import Identity
from tesseract_async.runtime.backend import BackendSettings
from tesseract_async.wire import messages
from tests.server.serving_node import ServingNode


def make(*, lockstep: bool = True) -> ta.ExpertBackend:
    module = nn.Linear(4, 4, bias=False)
    nn.init.ones_(module.weight)
    return ta.ExpertBackend(
        module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        args_schema=(ta.TensorSpec((4,)),),
        settings=BackendSettings(lockstep=lockstep),
    )


async def ask(node: ServingNode, action: str, uid: str = "ffn.0.0", **fields: object) -> messages.LockstepReply:
    body = messages.encode(messages.LockstepRequest(uid, action)._replace(**fields))
    return messages.decode(messages.LockstepReply, (await node.call(uid, messages.LOCKSTEP, body)).body)


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")])
async def test_a_backward_only_gathers_until_all_step(devices: tuple[str, ...]) -> None:
    node, x, ones = ServingNode(), torch.ones(1, 4), torch.ones(1, 4)
    backends = {"ffn.0.0": make(), "ffn.0.1": make(), "gate.0": make(), "ffn.1.0": make(lockstep=False)}
    async with ta.TesseractServer(node, backends, device=devices):  # type: ignore[arg-type]
        for _ in range(2):
            assert (await node.backward("ffn.0.1", [x], [ones]))[1] == 0
        assert await ask(node, "status") == (0, 2, 64.0)
        assert await ask(node, "step", options={"lr": 0.5, "scale": 0.5}) == (1, 2, 0.0)
        assert await ask(node, "step", options={"lr": 0.5, "scale": 0.5}) == (1, 2, 0.0)
        assert torch.equal(backends["ffn.0.1"].module.weight, torch.full((4, 4), 0.5))
        assert [one.version for one in backends.values()] == [1, 1, 0, 0]
        with pytest.raises(RemoteError, match="steps"):  # of a forward before the step
            await node.backward("ffn.0.1", [x], [ones])
        await node.backward("ffn.0.1", [x], [ones], version=1)
        await ask(node, "clear")
        assert await ask(node, "status") == (1, 2, 0.0)


async def test_a_step_is_on_the_gradients_that_its_trainer_knows_of() -> None:
    node, x, ones = ServingNode(), torch.ones(1, 4), torch.ones(1, 4)
    backends = {"ffn.0.0": make(), "ffn.0.1": make()}
    async with ta.TesseractServer(node, backends):  # type: ignore[arg-type]
        await node.backward("ffn.0.1", [x], [ones])
        told = (await ask(node, "status"))._asdict() | {"action": "step"}
        await node.backward("ffn.0.0", [x], [ones])  # another trainer's
        for known in (told, told | {"num_experts": 1, "squared_norm": 32.0}):
            with pytest.raises(RemoteError, match="hold other gradients"):
                await ask(node, **known)  # type: ignore[arg-type]
        with pytest.raises(RemoteError, match="no folder"):
            await ask(node, "save")
        told = (await ask(node, "status"))._asdict() | {"action": "step"}
        assert (await ask(node, **told)).round == 1  # type: ignore[arg-type]
        other = messages.encode(messages.LockstepRequest("ffn.0.0", "step"))
        with pytest.raises(RemoteError, match="another trainer had"):
            await node.call("ffn.0.0", messages.LOCKSTEP, other, peer_id=Identity.generate().peer_id)
        assert (await ask(node, **told)).round == 1  # type: ignore[arg-type]


async def test_others_are_told_why_not() -> None:
    node = ServingNode()
    backends = {"ffn.0.0": make(), "ffn.1.0": make(lockstep=False)}
    async with ta.TesseractServer(node, backends):  # type: ignore[arg-type]
        for fields, reason in (
            ({"action": "step", "round": 3}, "its trainer 3"),
            ({"action": "step", "optimizer": "adam"}, "with SGD and the rest of the model with adam"),
            ({"action": "step", "options": {"lr": "1"}}, "numbers"),
            ({"action": "jump"}, "jump"),
            ({"action": "step", "uid": "ffn.1.0"}, "--step lockstep"),
        ):
            with pytest.raises(RemoteError, match=reason):
                await ask(node, **fields)  # type: ignore[arg-type]
        assert await ask(node, "status", "ffn.1.0") == (0, 0, 0.0)
        node.trust.may_ask = lambda peer, role, uid: False  # type: ignore[method-assign]
        with pytest.raises(NotAllowed, match="ffn.0.0"):
            await ask(node, "step")
        assert backends["ffn.0.0"].version == 0
