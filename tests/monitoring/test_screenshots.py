"""The whole of it: `tesseract demo` in its processes, the dashboard's command, a real browser, a server killed."""

import importlib.util
from pathlib import Path

import pytest

from tests.monitoring.test_browser import chromium

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(420)
async def test_the_documents_pictures_show_a_real_swarm(tmp_path: Path) -> None:
    path = chromium()
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "screenshots.py")
    assert spec is not None and spec.loader is not None
    screenshots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(screenshots)
    said = await screenshots.take(tmp_path, path)
    assert "No expert is alive yet" in said["empty"]
    assert "digits: 16 of 16 experts alive" in said["healthy"] and "trainer 1" in said["healthy"]
    assert "lost" in said["killed"] and "did not answer any more" in said["killed"]
    for name in ("empty", "healthy", "killed"):
        assert (tmp_path / f"dashboard-{name}.png").stat().st_size < 400_000
