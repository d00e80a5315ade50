"""How many messages a gate sends in a pass where nothing fails and nobody is late."""

import torch
from torch import nn

import tesseract_async as ta
from tests.client.fake_node import FakeNode, gate_with
from tests.costs.limits import check

NUM_SERVERS, WIDTH = 4, 8


async def test_messages_of_a_gate_pass() -> None:
    node = FakeNode()
    for index in range(16):
        uid = f"ffn.{index // 4}.{index % 4}"
        node.host(uid, nn.Linear(WIDTH, WIDTH), peers=(f"server {index % NUM_SERVERS}",))
    gate = gate_with(node, "ffn", grid_size=(4, 4), in_features=WIDTH, k_best=4)
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()
    await gate(x)  # the schema is asked for in the first pass
    node.messages.clear()
    y = await gate(x)
    check("messages per gate pass, forward", len(node.messages))
    node.messages.clear()
    await ta.backward(y.sum())
    check("messages per gate pass, backward", len(node.messages))
