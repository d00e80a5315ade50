import pytest

from tests.client.fake_node import FakeNode


@pytest.fixture
async def node() -> FakeNode:
    return FakeNode()
