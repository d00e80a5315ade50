"""Takes the documents' pictures of the dashboard, from a real swarm in a real Chromium: ``tesseract demo``.

    python docs/screenshots.py

Needs Playwright and the system's Chromium (Debian: apt-get install chromium). Three pictures go into docs/images:
dashboard-healthy.png, dashboard-killed.png (the demo kills one of its servers) and dashboard-empty.png.
"""

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
VIEWPORT = {"width": 1280, "height": 1180}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
COMMAND = (sys.executable, "-m", "tesseract_async.cli")


@asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command; told to leave at the end."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
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
async def dashboard(browser: Any, address: str, *patterns: str) -> AsyncIterator[Any]:
    """The page of a dashboard that joined at `address`."""
    async with running("dashboard", *patterns, "-p", address, "--bind-port", "0", "--period", "1") as process:
        url = json.loads(await find(process, r"(\{.*\})"))["url"]
        context = await browser.new_context(viewport=VIEWPORT, device_scale_factor=1)
        page = await context.new_page()
        await page.goto(url)
        await page.wait_for_selector("#connection.live")
        yield page
        await context.close()


async def take(folder: Path, chromium: str, *, steps: int = 600) -> dict[str, str]:
    """Takes the three pictures. Returns what the pages said: picture -> text."""
    from playwright.async_api import async_playwright

    said: dict[str, str] = {}

    async def shoot(page: Any, name: str) -> None:
        await page.mouse.move(0, 0)
        await page.screenshot(path=folder / f"dashboard-{name}.png", full_page=True)
        said[name] = await page.inner_text("body")

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        async with running("dht") as bootstrap:
            address = json.loads(await find(bootstrap, r"(\{.*\})"))["address"].partition("/")[0]
            async with dashboard(browser, address) as page:
                await page.wait_for_timeout(2500)
                await shoot(page, "empty")
        async with running("demo", "--no-plot", "--steps", str(steps)) as demo:
            address = await find(demo, r"dashboard -p (\S+)")
            reading = asyncio.create_task(demo.stdout.read())  # type: ignore[union-attr]
            try:
                async with dashboard(browser, address, "digits.[0:4].[0:4]") as page:
                    await page.wait_for_function(
                        "() => state?.totals.loss !== undefined && state.totals.experts === 16", timeout=120_000
                    )
                    await page.select_option("#colour", "version")
                    await page.wait_for_function(
                        "() => state.history['5 min'].filter((point) => point.loss).length > 8", timeout=120_000
                    )
                    await shoot(page, "healthy")
                    await page.select_option("#colour", "server")
                    await page.wait_for_function("() => state.grids[0].lost.length > 0", timeout=120_000)
                    await page.wait_for_timeout(1500)
                    await shoot(page, "killed")
            finally:
                demo.terminate()
                await reading
        await browser.close()
    return said


def main() -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("there is no chromium: apt-get install chromium", file=sys.stderr)
        return 1
    asyncio.run(take(IMAGES, chromium))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
