"""Modules that do what PyTorch lets them do: a remote one is still the function that it is locally."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async import errors
from tesseract_async.runtime.backend import BackendSettings
from tesseract_async.server.server import ServerSettings


@asynccontextmanager
async def hosted(backend: ta.ExpertBackend) -> AsyncIterator[ta.RemoteExpert]:
    """The backend as another node sees it."""
    async with (
        ta.TesseractNode() as host,
        ta.TesseractServer(host, {"e.0": backend}, settings=ServerSettings(drain_timeout=0.1)),
        ta.TesseractNode(initial_peers=[host.address]) as guest,
    ):
        yield await guest.get_expert("e.0")


class Speechless(nn.Module):
    """Raises errors that can hardly be told."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = int(x.abs().sum())
        if kind:
            raise (ValueError("\\ud800 is no text"), Mute(), ValueError("x" * 1_000_000))[kind - 1]
        return x


class Mute(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


async def test_an_exception_that_cannot_be_told_is_still_an_answer() -> None:
    backend = ta.ExpertBackend(Speechless(), args_schema=(ta.TensorSpec(()),))
    async with hosted(backend) as expert:
        for kind, name in ((1, "ValueError"), (2, "Mute"), (3, "ValueError")):
            with pytest.raises(errors.ExpertFailed, match=name) as caught:
                await expert(torch.full((1,), float(kind)))
            assert len(str(caught.value)) < 800


class Pair(NamedTuple):
    left: Any
    right: Any


class Swap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, pair: Pair) -> Pair:
        return Pair(self.linear(pair.right), pair.left * 2)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
async def test_named_tuples_are_tuples_that_keep_their_names(autocast: torch.dtype | None) -> None:
    module, spec = Swap(), ta.TensorSpec((3,))
    settings = BackendSettings(autocast=autocast)
    backend = ta.ExpertBackend(module, args_schema=(Pair(spec, spec),), settings=settings)
    values = Pair(torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True))
    async with hosted(backend) as expert:
        left, right = await expert(values)
        tolerance = {} if autocast is None else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(left, module(values)[0], **tolerance)
        torch.testing.assert_close(right, 2 * values.left)
        await ta.backward(left.sum() + right.sum())
    torch.testing.assert_close(values.left.grad, torch.full((2, 3), 2.0))
