"""The dashboard in a real Chromium: what people see, with the swarm healthy, a server killed, nobody there, and large.

Needs Playwright and a Chromium of the system (Debian's package ``chromium``); nothing is downloaded. Where they are
missing these tests are skipped, unless TESSERACT_REQUIRE_BROWSER is set, as continuous integration does.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from tesseract_async.monitoring.dashboard import Dashboard
from tests.monitoring.fake_swarm import FakeObserver

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}
MAX_BYTES = 300_000
MILLISECONDS = 120_000
"""For a browser to start, or to show what it should."""


def chromium() -> str:
    """Chromium's path. Skips where something is missing, and fails instead where continuous integration wants it."""
    path = os.environ.get("TESSERACT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    missing = "" if path else "no chromium (apt-get install chromium)"
    try:
        import playwright  # noqa: F401
    except ImportError:
        missing = "no playwright (pip install playwright)"
    if missing and os.environ.get("TESSERACT_REQUIRE_BROWSER"):
        pytest.fail(missing)
    if missing or path is None:
        pytest.skip(missing)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    """One for all tests of this file."""
    path = chromium()
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"], timeout=MILLISECONDS
        )
        yield browser
        await browser.close()


async def new_context(browser: Any, **options: Any) -> Any:
    """A browser that has never been here, and waits as long as a busy machine takes."""
    context = await browser.new_context(**options)
    context.set_default_timeout(MILLISECONDS)
    return context


class Visit:
    """A page that is open: the page itself, what it loaded, what it complained about."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.urls: list[str] = []
        page.on("console", lambda message: self._heard(message))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.urls.append(request.url))

    def _heard(self, message: Any) -> None:
        # the one about reading canvases is about these tests, not about the page
        if message.type in ("error", "warning") and "willReadFrequently" not in message.text:
            self.complaints.append(message.text)

    async def text(self, selector: str) -> str:
        text: str = await self.page.inner_text(selector)
        return text

    async def wait_text(self, selector: str, text: str) -> None:
        """Until the element says `text`."""
        await self.page.wait_for_function(
            "([selector, text]) => document.querySelector(selector)?.textContent.includes(text)", arg=[selector, text]
        )


@asynccontextmanager
async def visiting(
    browser: Any, observer: FakeObserver, *, viewport: dict[str, int] = DESKTOP, scheme: str = "light"
) -> AsyncIterator[Visit]:
    """The dashboard of `observer`, opened in a browser that has never been here; complaints fail the test."""
    async with Dashboard(observer) as dashboard:  # type: ignore[arg-type]
        context = await new_context(browser, viewport=viewport, color_scheme=scheme)
        visit = Visit(await context.new_page())
        try:
            await visit.page.goto(dashboard.url)
            await visit.wait_text("#connection", "live")
            yield visit
            assert all(url.startswith(dashboard.url) for url in visit.urls), "nothing comes from elsewhere"
            assert visit.complaints == []
        finally:
            await context.close()


PIXELS = """(wanted) => {
  const canvas = document.querySelector('.grid canvas'), draw = canvas.getContext('2d');
  const scale = canvas.width / canvas.clientWidth, cell = Number(canvas.dataset.cell);
  return wanted.map(([row, column]) =>
    [...draw.getImageData((column + .5) * cell * scale, (row + .5) * cell * scale, 1, 1).data].slice(0, 3).join());
}"""


async def colours(visit: Visit, *cells: tuple[int, int]) -> list[str]:
    """What stands in the middle of these cells of the first grid."""
    found: list[str] = await visit.page.evaluate(PIXELS, [list(cell) for cell in cells])
    return found


async def test_a_healthy_swarm(browser: Any) -> None:
    observer = FakeObserver(num_servers=3, num_points=60)
    observer.losses = {"0000000a one": [60, 0.1234, 0, 3840, "samples"]}
    observer.seen = {"samples": 1_234_567}
    async with visiting(browser, observer) as visit:
        totals = await visit.text("#totals")
        assert "16 of 16" in totals and "live experts" in totals and "3\nservers" in totals
        assert "ffn: 16 of 16 experts alive" in await visit.text("#grids")
        servers = await visit.text("#peers")
        assert "0000000b" in servers and "direct" in servers and "relay through 0a1b2c3d" in servers
        assert "24.6 ms" in servers and "12.5" in servers and "41 %" in servers and "machine 1 (0000000b)" in servers
        assert "0000000a one" in await visit.text("#losses") and "1.2M\nsamples seen" in totals
        assert await visit.page.locator("#losses .swatch").count() == 1, "in the color of its curve"
        assert "joined with 16 experts" in await visit.text("#log")
        label = await visit.page.get_attribute("canvas[data-series=loss]", "aria-label")
        assert label.startswith("Loss, mean: now ") and "between" in label
        await visit.page.select_option("#colour", "server")
        one, two, three, again = await colours(visit, (0, 0), (0, 1), (0, 2), (0, 3))
        assert len({one, two, three}) == 3 and one == again, "each server has a colour"
        await visit.page.select_option("#colour", "version")
        first, last = await colours(visit, (0, 0), (3, 3))
        assert first != last and "0 to 150" in await visit.text("#legend")


async def test_a_server_was_killed(browser: Any) -> None:
    observer = FakeObserver(num_servers=3, num_points=30)
    async with visiting(browser, observer) as visit:
        await visit.page.select_option("#colour", "server")
        alive = (await colours(visit, (0, 1)))[0]
        observer.peers[1]["error"] = "nobody listens at 192.0.2.2:31337"
        observer.note("0000000b does not answer: nobody listens at 192.0.2.2:31337", "failed")
        observer.changed()
        await visit.wait_text("#log", "does not answer")
        assert "1 silent" in await visit.text("#totals")
        assert "does not answer: nobody listens" in await visit.text("#peers tr.silent")
        assert (await colours(visit, (0, 1)))[0] != alive
        # and later, when what it published has expired
        [grid] = observer.grids
        lost = [expert for expert in grid["experts"] if expert[1] == 1]
        grid["experts"] = [expert for expert in grid["experts"] if expert[1] != 1]
        grid["lost"] = [expert[0] for expert in lost]
        observer.changed()
        await visit.wait_text("#grids", f"{16 - len(lost)} of 16 experts alive, {len(lost)} lost")
        await visit.page.hover(".grid canvas", position={"x": 120, "y": 10})
        assert "ffn.0.1: lost." in await visit.text("#detail")


async def test_nobody_is_there_yet(browser: Any) -> None:
    observer = FakeObserver()
    async with visiting(browser, observer) as visit:
        assert "No expert is alive yet" in await visit.text("#grids")
        assert "--initial-peers 127.0.0.1:31337" in await visit.text("#grids code"), "it says what to do"
        assert "None is known yet" in await visit.text("#servers")
        later = FakeObserver(num_servers=1)
        observer.grids, observer.peers = later.grids, later.peers
        observer.changed()
        await visit.wait_text("#grids", "16 of 16 experts alive")
        assert not await visit.page.is_visible("#grids code")


async def test_a_page_lives_by_events_and_is_told_only_what_is_new(browser: Any) -> None:
    observer = FakeObserver(num_servers=2, num_points=600)
    async with visiting(browser, observer) as visit:
        await visit.page.evaluate("window.stays = true")
        sizes = "performance.getEntriesByType('resource').length"
        before = 0
        for step in range(3):
            if step == 1:  # with the first change, all that the page consists of has come
                before = await visit.page.evaluate(sizes)
            observer.add_point()
            observer.note(f"something happened {step}", "changed")
            observer.grids[0] = {**observer.grids[0], "experts": observer.grids[0]["experts"][: 9 - step]}
            observer.changed()
            await visit.wait_text("#log", f"something happened {step}")
            await visit.wait_text("#grids", f"{9 - step} of 16")
        assert await visit.page.evaluate("state.history['5 min'].length") == 300, "bounded, and complete"
        assert await visit.page.evaluate("state.history['5 min'].at(-1).time") == observer.history.last["time"]
        assert await visit.page.evaluate("state.log.length") == observer.num_log_lines
        assert await visit.page.evaluate("state.whole") is False
        assert await visit.page.evaluate("window.stays"), "without loading the page again"
        assert await visit.page.evaluate(sizes) == before


async def test_a_lost_node_is_said_so(browser: Any) -> None:
    observer = FakeObserver(num_servers=1)
    async with Dashboard(observer) as dashboard:  # type: ignore[arg-type]
        context = await new_context(browser)
        page = await context.new_page()
        await page.goto(dashboard.url)
        await page.wait_for_selector("#connection.live")
    await page.wait_for_selector("#connection.lost")
    assert "does not answer" in await page.inner_text("#connection")
    await context.close()


async def test_4096_experts_are_drawn_and_weigh_less_than_300_kb(browser: Any) -> None:
    observer = FakeObserver(size=(64, 64), num_servers=64, num_points=600)
    for number in range(200):
        observer.note(f"0000000a joined with {number} experts", "joined")
    async with visiting(browser, observer) as visit:
        assert "4,096 of 4,096" in await visit.text("#totals")
        client = await visit.page.context.new_cdp_session(visit.page)
        await client.send("Network.enable")
        loaded = {"bytes": 0}
        client.on("Network.dataReceived", lambda event: loaded.update(bytes=loaded["bytes"] + event["dataLength"]))
        await visit.page.reload()
        await visit.wait_text("#connection", "live")
        assert 30_000 < loaded["bytes"] < MAX_BYTES
        seconds = await visit.page.evaluate(
            "(() => { const taken = []; for (let n = 0; n < 5; n++) { const begin = performance.now(); draw();"
            " document.querySelector('.grid canvas').getContext('2d').getImageData(0, 0, 1, 1);"
            " taken.push((performance.now() - begin) / 1000); } return Math.min(...taken); })()"
        )
        assert seconds < 1.0, "drawing takes a small part of a period"
        await visit.page.focus(".grid canvas")
        for key in ("End", "PageDown"):
            await visit.page.keyboard.press(key)
        assert "ffn.63.63:" in await visit.text("#detail")


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("num_servers", [0, 5])
async def test_nothing_is_wider_than_the_screen(browser: Any, viewport: dict[str, int], num_servers: int) -> None:
    observer = FakeObserver(size=(16, 32), num_servers=num_servers, num_points=20, prefix="a_very_long_prefix" * 2)
    if observer.peers:
        observer.peers[0]["error"] = "x" * 240
        observer.losses = {"0000000a " + "y" * 55: [1_234_567, 0.1234, 12_345, 123_456_789, "samples"]}
        observer.thanks = [{"peer_id": "ab" * 32, "short": "abababab", "name": "z" * 64, "hours": 24, "trainers": 99}]
        observer.thanks[0] |= {"rows": 1_234_567, "steps": 123_456}
    observer.note("z" * 240, "failed")
    async with visiting(browser, observer, viewport=viewport) as visit:
        width = await visit.page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"]
        wide = await visit.page.evaluate(
            "[...document.querySelectorAll('main *')]"
            ".filter((one) => one.getBoundingClientRect().right > innerWidth + 1)"
            ".map((one) => one.outerHTML.slice(0, 80))"
        )
        assert wide == []


@pytest.mark.parametrize("width", [320, 600, 1000, 1280])
async def test_pointing_at_a_plot_moves_nothing(browser: Any, width: int) -> None:
    observer = FakeObserver(size=(4, 4), num_servers=2, num_points=20)
    where = "[...document.querySelectorAll('figure canvas')].map((one) => JSON.stringify(one.getBoundingClientRect()))"
    async with visiting(browser, observer, viewport={"width": width, "height": 900}) as visit:
        for canvas in await visit.page.query_selector_all("figure canvas"):
            await canvas.scroll_into_view_if_needed()
            before = await visit.page.evaluate(where)
            box = await canvas.bounding_box()
            await visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            assert await visit.page.evaluate(where) == before


async def test_experts_of_a_dead_server_are_not_called_live(browser: Any) -> None:
    observer = FakeObserver(size=(4, 4), num_servers=2, num_points=20)
    async with visiting(browser, observer) as visit:
        head = "document.querySelector('#totals').innerText.match(/\\d+/)[0]"
        assert await visit.page.evaluate(head) == "16"
        observer.peers[1]["error"], observer.peers[1]["gone"] = "it cannot be reached", True
        observer.note("0000000b does not answer: it cannot be reached", "failed")
        observer.changed()
        await visit.wait_text("#log", "does not answer")
        assert await visit.page.evaluate(head) == "8"


CONTRASTS = """() => {
  const luminance = (rgb) => rgb.map((c) => c / 255).map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = numbers(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > .99) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const one of document.querySelectorAll('body *')) {
    const says = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!says || !one.checkVisibility()) continue;
    const front = numbers(getComputedStyle(one).color).slice(0, 3);
    const [a, b] = [luminance(front), luminance(behind(one))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), one.tagName + ' ' + one.textContent.slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_dark_and_light_can_be_read(browser: Any, scheme: str) -> None:
    observer = FakeObserver(num_servers=3, num_points=20)
    observer.peers[1]["error"] = "it was closed"
    async with visiting(browser, observer, scheme=scheme) as visit:
        back = await visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(int(part) for part in back[4:-1].split(",")) / 3
        assert lightness < 60 if scheme == "dark" else lightness > 200
        contrasts = await visit.page.evaluate(CONTRASTS)
        assert len(contrasts) > 40
        assert contrasts[0][0] >= 4.5, f"WCAG AA: {contrasts[0]}"
        # the heat map's ends stand out from each other and from cells that nobody hosts
        await visit.page.select_option("#colour", "version")
        low, high = await colours(visit, (0, 0), (3, 3))
        assert sum(abs(int(a) - int(b)) for a, b in zip(low.split(","), high.split(","), strict=True)) > 150
        # changing the system's scheme changes the page at once, canvases included
        await visit.page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        async with asyncio.timeout(60):
            while (await colours(visit, (0, 0)))[0] == low:
                await visit.page.evaluate("new Promise(requestAnimationFrame)")


async def test_everything_can_be_reached_by_keyboard(browser: Any) -> None:
    async with visiting(browser, FakeObserver(num_servers=2, num_points=5)) as visit:
        reached = []
        for _ in range(3):
            await visit.page.keyboard.press("Tab")
            reached.append(await visit.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
            outline = await visit.page.evaluate(
                "(({outlineStyle, outlineWidth}) => [outlineStyle, parseFloat(outlineWidth)])"
                "(getComputedStyle(document.activeElement))"
            )
            assert outline[0] == "solid" and outline[1] >= 2, f"the focus is seen: {reached}"
        assert reached == ["colour", "CANVAS", "log"]
        await visit.page.focus(".grid canvas")
        assert (await visit.text("#detail")).startswith("ffn.0.0: on server 0000000a, 1 replica, version 0")
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowUp"):
            await visit.page.keyboard.press(key)
        assert (await visit.text("#detail")).startswith("ffn.0.1: on server 0000000b, 2 replicas, version 10")
        await visit.page.focus("#colour")
        await visit.page.keyboard.press("ArrowDown")
        assert await visit.page.input_value("#colour") == "server"


async def test_a_run_comes_first_and_each_expert_and_server_has_a_page(browser: Any) -> None:
    observer = FakeObserver(num_servers=3, num_points=5)
    observer.run = {"name": "digits@" + "ab" * 32, "mode": "granted", "num_experts": 16, "expert": "ffn"}
    observer.run |= {"sizes": {}, "losses": 2, "at_risk": 0, "parameters": 16_000}
    peer = observer.peers[2]
    peer |= {"left_ago": 60, "error": "no answer in time", "gone": True}
    observer.thanks = [{"peer_id": peer["peer_id"], "short": peer["short"], "name": "attic"}]
    observer.thanks[0] |= {"rows": 1_234_567, "steps": 89, "hours": 3, "trainers": 2}
    async with visiting(browser, observer) as visit:
        assert await visit.text("#title") == "digits" and "2\nservers" in await visit.text("#totals")
        run = await visit.text("#run")
        assert (
            "digits@abababab…, granted: 16 experts (ffn), 16K parameters in total" in run
            and "survives the loss of any 2 members" in run
        )
        assert "attic (0000000c)" in await visit.text("#thanks") and "1,234,567" in await visit.text("#thanks")
        assert "left 1 min ago" in await visit.text("#peers tr.left"), "greyed for an hour"
        first = "#peers tr:first-child td:first-child"
        for words in ("machine 1", "machine 0"):  # the most failures first, then the fewest
            await visit.page.click("#servers th:nth-child(10) button")
            if words == "machine 1":
                assert "machine 2" in await visit.text(first), "sorted by failures"
        await visit.page.select_option("#span", "1 day")
        where = await visit.page.evaluate("document.querySelector('#legend').offsetTop")
        await visit.page.focus(".grid canvas")
        await visit.page.keyboard.press("ArrowRight")
        moved = await visit.page.evaluate("document.querySelector('#legend').offsetTop")
        assert moved == where, "nothing shifts"
        await visit.page.keyboard.press("Enter")
        await visit.wait_text("#one", "trains it")
        page = await visit.text("#one")
        assert "Expert ffn.0.1" in page and "0.5 %" in page and "90 ms" in page and "survives 2 more" in page
        assert not await visit.page.is_visible("#servers")
        await visit.page.click("#one-rows a")
        await visit.wait_text("#one", "8 cores, 16 GiB")
        assert "Server machine 0 (0000000a)" in await visit.text("#one") and "ffn.0.3" in await visit.text("#one")
        await visit.page.keyboard.press("Escape")
        await visit.page.wait_for_selector("#servers")
        assert not await visit.page.is_visible("#one")


async def test_what_strangers_say_stays_text(browser: Any) -> None:
    evil = "<img src=x onerror='window.owned = 1'><script>window.owned = 1</script>"
    observer = FakeObserver(num_servers=1, num_points=2, prefix=evil)
    observer.peers[0] |= {"short": evil, "path": evil, "software": evil, "addresses": [evil], "peer_id": evil}
    observer.losses = {evil: [1, 2.0, 0, 0, evil], "__proto__": [2, 3.0, 0, 0, "samples"]}
    observer.note(evil, "failed")
    observer.log[-1][2] = evil
    async with visiting(browser, observer) as visit:
        await visit.page.focus(".grid canvas")
        for selector in ("#log", "#peers", "#grids", "#losses", "#detail"):
            assert evil in await visit.text(selector)
        await visit.page.wait_for_timeout(50)  # an image that does not load would say so in a task of its own
        assert await visit.page.evaluate("window.owned") is None
        assert await visit.page.evaluate("document.querySelectorAll('main img, main script').length") == 0


async def test_beyond_loopback_a_browser_needs_the_token(browser: Any) -> None:
    async with Dashboard(FakeObserver(num_servers=1), host="0.0.0.0") as dashboard:  # type: ignore[arg-type]
        url = dashboard.url.replace("0.0.0.0", "127.0.0.1")
        context = await new_context(browser)
        page = await context.new_page()
        refused = await page.goto(url.partition("?")[0])
        assert refused.status == 403 and "a token is needed" in await page.inner_text("body")
        await page.goto(url)
        await page.wait_for_selector("#connection.live")  # events, style and script came by the cookie
        assert "token" not in await page.evaluate("location.href"), "it stays out of the address bar and bookmarks"
        again = await page.goto(url.partition("?")[0])
        assert again.status == 200
        await context.close()


async def test_many_pages_are_left_at_once(browser: Any) -> None:
    """Closing the dashboard does not wait for visitors."""
    observer = FakeObserver(num_servers=1)
    dashboard = Dashboard(observer)  # type: ignore[arg-type]
    await dashboard.__aenter__()
    context = await new_context(browser)
    for _ in range(3):
        page = await context.new_page()
        await page.goto(dashboard.url)
        await page.wait_for_selector("#connection.live")
    async with asyncio.timeout(30):  # a page's stream of events never ends by itself
        await dashboard.__aexit__(None, None, None)
    await context.close()
