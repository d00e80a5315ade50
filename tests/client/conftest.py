from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.client.fake_node import FakeNode


@pytest.fixture
async def node() -> FakeNode:
    return FakeNode()


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The tensors here are tiny: torch's other threads would only spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
