"""A server of a checkpoint's experts that is killed in the midst of a text."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tesseract_async as ta
from tests.cli.processes import event, tesseract
from tests.stem import Stem
from tests.transformers.swarm import local
from tests.transformers.test_remote import IDS, load_with

NUM_TOKENS = 40


class Killing:
    """Kills a server when the text has so many tokens."""

    def __init__(self, server: Any, at: int) -> None:
        self._server, self._left = server, at

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._server.kill()

    def end(self) -> None:
        pass


def written(model: Any, streamer: Killing | None = None) -> list[int]:
    given = dict(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False)
    tokens: list[int] = model.generate(IDS[:1], streamer=streamer, **given)[0].tolist()
    return tokens


@pytest.mark.slow
async def test_a_frozen_replica_goes_on_with_the_same_text_and_without_one_the_lost_experts_are_named(
    checkpoint: Callable[[str], Path], stem: Stem
) -> None:
    folder = checkpoint("qwen3_moe")
    expected = written(local(folder))
    arguments = ("serve", "--hf-checkpoint", str(folder), "--experts", "m.[0:2].[0:8]", "--optimizer", "none")
    async with tesseract(stem, *arguments) as first:
        seed = (await event(first, "ready"))["address"]
        async with tesseract(stem, *arguments, "-p", seed) as second:
            peers = [seed, (await event(second, "ready"))["address"]]
            with ta.BackgroundNode(initial_peers=peers) as node:
                remote = await asyncio.to_thread(load_with, folder, node)
                assert await asyncio.to_thread(written, remote) == expected
                assert await asyncio.to_thread(written, remote, Killing(first, 10)) == expected
                started: list[float] = []

                def lost() -> None:
                    second.kill()
                    started.append(time.monotonic())
                    written(remote)

                with pytest.raises(ta.errors.NotEnoughExperts, match=r"m\.\d\.\d"):
                    await asyncio.to_thread(lost)
                assert time.monotonic() - started[0] < 5, "1 s where nothing else runs"
