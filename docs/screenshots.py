"""Takes the documents' pictures of the dashboard, from a real run in a real Chromium.

    python docs/screenshots.py

Needs Playwright and the system's Chromium (Debian: apt-get install chromium). Three pictures go into docs/images:
dashboard-healthy.png (three volunteers who joined by an invite, and two trainers), dashboard-killed.png (one of the
volunteers was killed) and dashboard-empty.png.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a script, this one's folder is there instead
    sys.path.insert(0, str(ROOT))

from tesseract_async.cli.demo import plan  # noqa: E402

IMAGES = ROOT / "docs" / "images"
VIEWPORT = {"width": 1280, "height": 1180}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
COMMAND = (sys.executable, "-m", "tesseract_async.cli")


@asynccontextmanager
async def running(*arguments: str, command: Sequence[str] = COMMAND) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command; told to leave at the end."""
    process = await asyncio.create_subprocess_exec(
        *command,
        *arguments,
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def find(process: asyncio.subprocess.Process, pattern: str) -> str:
    """What the first line that matches holds in the pattern's group. Raises: RuntimeError if none does."""
    assert process.stdout is not None
    async for line in process.stdout:
        if found := re.search(pattern, line.decode()):
            return found[1]
    raise RuntimeError(f"no line matches {pattern}")


@asynccontextmanager
async def dashboard(browser: Any, address: str, *words: str) -> AsyncIterator[Any]:
    """The page of a dashboard that joined at `address`."""
    async with running("dashboard", *words, "-p", address, "--bind-port", "0", "--period", "1") as process:
        url = json.loads(await find(process, r"(\{.*\})"))["url"]
        context = await browser.new_context(viewport=VIEWPORT, device_scale_factor=1)
        page = await context.new_page()
        await page.goto(url)
        await page.wait_for_selector("#connection.live")
        yield page
        await context.close()


@asynccontextmanager
async def run_of_digits(folder: Path) -> AsyncIterator[dict[str, str]]:
    """A run that reads handwritten digits, whose owner's node is the seed: what `tesseract run create` says of it."""
    sizes = (word for name, size in plan.SIZES.items() for word in ("--size", f"{name}={size}"))
    times = ("--lease", "5", "--sync-every", "2")
    what = ("--prefix", plan.PREFIX, "--grid", "4x4", *sizes, "--learning-rate", str(plan.EXPERT_LEARNING_RATE))
    async with running("run", "create", "digits", *what, *times, "--identity", str(folder / "owner.pem")) as owner:
        yield json.loads(await find(owner, r"(\{.*\})"))


@asynccontextmanager
async def volunteers(folder: Path, invite: str) -> AsyncIterator[dict[str, asyncio.subprocess.Process]]:
    """Three who join by the invite, by name: each computes about a third of the experts, and keeps copies of others."""
    async with AsyncExitStack() as stack:
        found = {}
        for name in ("attic", "cellar", "office"):
            more = ("--num-experts", "6", "--hold", "1 GB", "--ttl", "6", "--name", name, "--threads", "1")
            joining = running("join", invite, "--yes", "--folder", str(folder / name), *more)
            found[name] = await stack.enter_async_context(joining)
            await find(found[name], r"(\{.*ready.*\})")
        yield found


async def train(number: int, address: str, run: str, invite: str) -> None:
    """One of the run's trainers, until it is ended."""
    import torch
    from torch.nn import functional as F

    import tesseract_async as ta
    from tesseract_async.cli.demo.trainer import load_digits
    from tesseract_async.client.progress import ProgressOf

    torch.manual_seed(number)
    torch.set_num_threads(1)
    x_train, y_train, *_ = load_digits()
    async with ta.TesseractNode(initial_peers=[address], refresh_period=plan.REFRESH_PERIOD) as node:
        await node.join_run(run, grant=invite)
        size = {"uid_prefix": plan.PREFIX, "grid_size": plan.GRID_SIZE, "in_features": plan.NUM_PIXELS}
        gate = ta.GatingFunction(node, k_best=plan.K_BEST, **size)
        optimizer = torch.optim.Adam(gate.parameters(), lr=plan.GATE_LEARNING_RATE)

        progress = ProgressOf(gate, trainer=f"trainer {number}", period=1.0)
        async with contextlib.aclosing(progress):
            for step in itertools.count(1):
                batch = torch.randint(0, len(x_train), (plan.ROWS,))
                x = x_train[batch] + plan.NOISE * torch.randn(plan.ROWS, plan.NUM_PIXELS)
                with contextlib.suppress(ta.errors.TesseractError, TimeoutError):  # while a server is being replaced
                    loss = F.cross_entropy(await gate(x), y_train[batch])
                    optimizer.zero_grad()
                    await ta.backward(loss)
                    optimizer.step()
                    progress.add(step, loss.item(), {"samples": step * plan.ROWS})
                await asyncio.sleep(0.1)  # others want the processor, too


async def take(folder: Path, chromium: str) -> dict[str, str]:
    """Takes the three pictures. Returns what the pages said: picture -> text."""
    from playwright.async_api import async_playwright

    said: dict[str, str] = {}

    async def shoot(page: Any, name: str) -> None:
        await page.mouse.move(0, 0)
        await page.screenshot(path=folder / f"dashboard-{name}.png", full_page=True)
        said[name] = await page.inner_text("body")

    async with AsyncExitStack() as stack:
        playwright = await stack.enter_async_context(async_playwright())
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        stack.push_async_callback(browser.close)
        async with running("dht") as bootstrap:
            address = json.loads(await find(bootstrap, r"(\{.*\})"))["address"].partition("/")[0]
            async with dashboard(browser, address) as page:
                await page.wait_for_timeout(2500)
                await shoot(page, "empty")
        kept = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        facts = await stack.enter_async_context(run_of_digits(kept))
        servers = await stack.enter_async_context(volunteers(kept, facts["invite"]))
        for number in ("1", "2"):
            words = ("trainer", number, facts["address"], facts["run"], facts["invite"])
            await stack.enter_async_context(running(*words, command=(sys.executable, __file__)))
        page = await stack.enter_async_context(dashboard(browser, facts["address"], "--run", facts["run"]))
        # trained for a while, thanked for, and with copies of everything
        await page.wait_for_function(
            "() => state?.totals.experts === 16 && state.contributors.length === 3 && state.run.losses > 0"
            " && state.history['5 min'].filter((point) => point.loss).length > 40",
            timeout=240_000,
        )
        await shoot(page, "healthy")
        servers["cellar"].kill()
        await page.wait_for_function("() => state.peers.some((peer) => peer.left_ago !== null)", timeout=120_000)
        await page.wait_for_function("() => state.totals.experts === 16", timeout=120_000)  # others took them over
        await page.wait_for_timeout(1500)
        await shoot(page, "killed")
    return said


def main() -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("there is no chromium: apt-get install chromium", file=sys.stderr)
        return 1
    asyncio.run(take(IMAGES, chromium))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["trainer"]:
        asyncio.run(train(int(sys.argv[2]), *sys.argv[3:]))
    raise SystemExit(main())
