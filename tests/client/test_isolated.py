import asyncio

import pytest
import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.client.isolated import DEFAULT, Modes, isolated
from tesseract_async.client.remote_expert import RemoteExpert
from tests.client.fake_node import FakeNode


async def observe(turns: int) -> set[Modes]:
    seen = set()
    for _ in range(turns):
        seen.add(Modes.current())
        await asyncio.sleep(0)
    return seen


async def switching(context: object, turns: int) -> set[Modes]:
    seen = set()
    with context:  # type: ignore[attr-defined]
        for _ in range(turns):
            seen.add(Modes.current())
            await asyncio.sleep(0)
    assert Modes.current() == DEFAULT
    return seen


@pytest.mark.both_loops
async def test_modes_stay_with_their_coroutine() -> None:
    results = await asyncio.gather(
        observe(8),
        isolated(switching(torch.no_grad(), 5)),
        isolated(switching(torch.inference_mode(), 7)),
        isolated(switching(torch.autocast("cpu", dtype=torch.bfloat16), 6)),
        isolated(switching(torch.autocast("cpu", dtype=torch.float16), 4)),
        isolated(observe(3)),
    )
    plain, no_grad, inference, bf16, fp16, alone = results
    assert plain == alone == {DEFAULT}
    assert no_grad == {DEFAULT._replace(grad=False)}
    assert {modes.inference for modes in inference} == {True}
    assert bf16 == {DEFAULT._replace(autocast=(("cpu", torch.bfloat16),))}
    assert fp16 == {DEFAULT._replace(autocast=(("cpu", torch.float16),))}
    assert Modes.current() == DEFAULT


async def test_it_starts_in_the_modes_of_the_moment() -> None:
    with torch.no_grad():
        task = asyncio.create_task(isolated(observe(2)))
    assert await task == {DEFAULT._replace(grad=False)}


async def test_awaited_inside_a_block_the_block_goes_on() -> None:
    async def evaluate() -> None:
        with torch.no_grad():
            await isolated(asyncio.sleep(0))
            assert not torch.is_grad_enabled()
            with torch.inference_mode():
                await isolated(asyncio.sleep(0))
                assert torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()

    _, seen = await asyncio.gather(evaluate(), observe(4))
    assert seen == {DEFAULT}


async def test_errors_and_cancellation_pass_through() -> None:
    async def fail() -> None:
        with torch.no_grad():
            await asyncio.sleep(0)
            raise KeyError("x")

    with pytest.raises(KeyError):
        await isolated(fail())
    ended = asyncio.Event()

    async def hang() -> None:
        try:
            with torch.inference_mode():
                await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(isolated(hang()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set() and Modes.current() == DEFAULT


@pytest.mark.both_loops
async def test_evaluation_beside_training_changes_nothing_in_either(node: FakeNode) -> None:
    node.host("ffn.0.0", nn.Linear(8, 8))
    node.delay = 0.002
    expert = RemoteExpert(node, "ffn.0.0")
    linear = nn.Linear(8, 8)
    stop = False
    num_evaluations = 0

    async def evaluate() -> None:
        nonlocal num_evaluations
        while not stop:
            with torch.no_grad():
                y = await expert(linear(torch.ones(2, 8)))
                assert not y.requires_grad and not linear(y).requires_grad
            with torch.inference_mode():
                assert (await expert(torch.ones(2, 8))).is_inference() or True
                assert torch.is_inference_mode_enabled()
            num_evaluations += 1

    async def train() -> None:
        nonlocal stop
        for _ in range(10):
            y = linear(await expert(linear(torch.ones(2, 8))))
            assert y.requires_grad
            linear.zero_grad()
            await backward(y.sum())
            assert linear.weight.grad is not None
        stop = True

    await asyncio.gather(evaluate(), train())
    assert num_evaluations > 5
