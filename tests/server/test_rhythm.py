"""Rounds of work that keep what they promise: nothing older than a period is lost."""

import asyncio
from collections.abc import Sequence

import pytest

from tesseract_async.server.rhythm import Rhythm
from tesseract_async.server.server import TesseractServer
from tests.client.virtual_time import in_made_up_time
from tests.server.serving_node import ServingNode

PERIOD = 10.0


class SlowServer(TesseractServer):
    """Saves in made-up time. Knows how old the oldest step was that a kill would have lost."""

    def __init__(self, saves: Sequence[float]) -> None:
        super().__init__(ServingNode(), {}, checkpoint_period=PERIOD)  # type: ignore[arg-type]
        self.left = list(saves)
        self.oldest = self.safe_until = 0.0
        self.num_rounds = 0

    async def save_checkpoints(self) -> int:
        loop, took = asyncio.get_running_loop(), self.left.pop(0)
        began = loop.time()
        await asyncio.sleep(took)
        self.oldest = max(self.oldest, loop.time() - self.safe_until)
        self.safe_until = began
        self.num_rounds += 1
        return int(took > 0)


@pytest.mark.parametrize(
    ("saves", "oldest"),
    [
        ([3.0] * 8, PERIOD),
        ([3.3, 0.0, 0.0, 3.3, 1.0, 2.9, 2.7], PERIOD),
        ([0.0, 0.0, 4.0, 1.0, 2.0], PERIOD),
        ([8.0] * 4, 24.0),  # it rests half of the time, and breaks the promise
    ],
    ids=str,
)
@in_made_up_time
async def test_a_killed_server_falls_back_a_period_at_most(saves: Sequence[float], oldest: float) -> None:
    server, loop = SlowServer(saves), asyncio.get_running_loop()
    started = server.safe_until = loop.time()
    with pytest.raises(IndexError):  # there are no more
        await server._save_periodically()
    assert server.num_rounds == len(saves)
    assert server.oldest <= oldest + 1e-6
    assert loop.time() - started >= 0.5 * PERIOD * len(saves), "not more often than need be"


def test_rounds_that_take_longer_than_a_period_do_not_follow_at_once_where_nothing_is_to_be_done() -> None:
    rhythm = Rhythm(10.0, 0.0, rest=1.0)
    rhythm.note(5.0, 25.0)
    assert rhythm.next_at == 45.0
    rhythm.note(45.0, 45.0, worked=False)
    assert rhythm.next_at == 46.0, "the loop is left alone"


def test_a_pull_counts_from_the_look_that_it_is_part_of() -> None:
    rhythm = Rhythm(30.0, 0.0)
    assert rhythm.next_at == 15.0
    rhythm.note(2.0, 5.0, woken=1.0)
    assert rhythm.next_at == 2.0 + 30.0 - 4.0
    rhythm.note(28.0, 28.1, woken=28.0, worked=False)
    assert rhythm.next_at == 28.0 + 30.0 - 4.0, "that there was nothing to pull says nothing"
