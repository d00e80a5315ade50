"""What holds for every test: both event loops, no leftovers, no warnings (see pyproject.toml)."""

import asyncio
import gc
import os
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from tests.stem import Stem

# the processes of a test run share the cores: threads of PyTorch that wait for each other there only burn time
os.environ.setdefault("OMP_NUM_THREADS", "1")
# an example takes as long as the machine is busy: 200 ms, hypothesis' own limit, are a matter of chance
settings.register_profile("any machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """asyncio everywhere; uvloop too in tests marked `both_loops` (what touches sockets, streams and threads)."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.get_closest_marker("both_loops") and sys.platform != "win32":
        import uvloop

        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest_asyncio.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    """Fails an async test that ends with tasks other than its own."""
    before = asyncio.all_tasks()
    yield
    # a closed transport calls connection_lost in the next turns of the loop: give it those, not time
    for _ in range(5):
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"tasks left: {left}"


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fails a test that ends with threads it did not find, or with sockets that only the collector would close."""
    if (threads := sys.modules.get("tesseract_async.client.engine_threads")) is not None:
        threads.IDLE_SECONDS = 0.02  # its idle threads end by themselves: don't wait a second for each test's
    before = set(threading.enumerate())
    gc.freeze()  # what the modules hold stays: collecting looks at this test's own objects only, and is quick
    yield
    gc.collect()  # an unclosed socket warns when collected, and warnings are errors
    left = {thread for thread in threading.enumerate() if thread.is_alive()} - before
    # the loop's default executor and torch's own autograd threads belong to their libraries, the codecs' to the process
    lasting = ("asyncio_", "uvloop_", "Dummy", "pt_autograd", "tesseract-codec")
    left = {t for t in left if not t.name.startswith(lasting)}
    for thread in left:
        thread.join(timeout=30)  # on a busy machine
    frames = sys._current_frames()
    where = [(t.name, traceback.format_stack(frames[t.ident])[-2:]) for t in left if t.ident in frames]
    assert not any(thread.is_alive() for thread in left), f"threads left: {where}"


@pytest.fixture(scope="session")
def stem() -> Iterator[Stem]:
    """Starts commands without loading PyTorch for each; one for all tests of this process."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    stem = Stem()
    yield stem
    stem.close()
