"""Racing paths: head starts, failures, the loser's end."""

import asyncio

import pytest

from tesseract_async.endpoint.dialing import race
from tesseract_async.errors import ConnectionLost
from tesseract_async.transport.base import DialPath, Pipe
from tests.client.virtual_time import in_made_up_time


async def no_pipe() -> Pipe:
    raise AssertionError


class Track:
    """Attempts that take as long as they are told, and what became of them."""

    def __init__(self, **seconds: float | Exception) -> None:
        self.seconds = seconds
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.finished: list[str] = []

    async def attempt(self, path: DialPath) -> str:
        self.begun.append(path.name)
        outcome = self.seconds[path.name]
        if isinstance(outcome, Exception):
            raise outcome
        try:
            await asyncio.sleep(outcome)
        except asyncio.CancelledError:
            self.cancelled.append(path.name)
            raise
        return path.name

    async def race(self, *paths: tuple[str, float]) -> tuple[str | None, dict[str, BaseException]]:
        return await race(
            [DialPath(name, delay, no_pipe) for name, delay in paths],
            self.attempt,
            finished=lambda path, error: self.finished.append(path.name),
        )


@in_made_up_time
async def test_the_first_to_succeed_wins_and_the_rest_is_cancelled() -> None:
    track = Track(slow=10.0, fast=0.02, late=0.0)
    assert await track.race(("slow", 0.0), ("fast", 0.0), ("late", 5.0)) == ("fast", {})
    assert track.begun == ["slow", "fast"] and track.cancelled == ["slow"] and track.finished == ["fast"]


@in_made_up_time
async def test_a_failure_starts_the_next_path_at_once() -> None:
    track = Track(dead=ConnectionLost("x", "cut"), second=0.0)
    begun = asyncio.get_running_loop().time()
    winner, errors = await track.race(("dead", 0.0), ("second", 60.0))
    assert winner == "second" and list(errors) == ["dead"] and asyncio.get_running_loop().time() == begun


async def test_all_failures_are_told_and_no_paths_are_no_winner() -> None:
    track = Track(a=OSError("no"), b=TimeoutError("late"))
    winner, errors = await track.race(("a", 0.0), ("b", 0.1))
    assert winner is None and set(errors) == {"a", "b"} == set(track.finished)
    assert await Track().race() == (None, {})


@in_made_up_time
async def test_a_head_start_is_kept_and_mistakes_are_not_swallowed() -> None:
    track = Track(first=0.01, second=0.0)
    assert (await track.race(("second", 0.5), ("first", 0.0)))[0] == "first" and track.begun == ["first"]
    with pytest.raises(ZeroDivisionError):
        await Track(bad=ZeroDivisionError()).race(("bad", 0.0))


async def test_cancelling_the_race_cancels_its_attempts() -> None:
    track = Track(a=60.0, b=60.0)
    task = asyncio.create_task(track.race(("a", 0.0), ("b", 0.0)))
    while len(track.begun) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(track.cancelled) == ["a", "b"]
