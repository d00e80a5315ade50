from __future__ import annotations

import pytest

from tesseract_async.client import autograd
from tests.client.fake_node import FakeNode


@pytest.fixture(autouse=True)
def impatient_engine_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine threads end soon after a test, which may leave none."""
    monkeypatch.setattr(autograd, "IDLE_SECONDS", 0.05)


@pytest.fixture
async def node() -> FakeNode:
    return FakeNode()
