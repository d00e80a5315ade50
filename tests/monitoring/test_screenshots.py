"""The whole of it: a run with volunteers and trainers, the dashboard's command, a real browser, a server killed."""

import importlib.util
from pathlib import Path

import pytest

from tests.monitoring.test_browser import chromium

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(420)
async def test_the_documents_pictures_show_a_real_run(tmp_path: Path) -> None:
    path = chromium()
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "screenshots.py")
    assert spec is not None and spec.loader is not None
    screenshots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(screenshots)
    said = await screenshots.take(tmp_path, path)
    assert "No expert is alive yet" in said["empty"]
    for wanted in ("Run digits@", "survives the loss of any", "16 of 16 experts alive", "trainer 1", "attic"):
        assert wanted in said["healthy"], wanted
    assert "did not answer any more" in said["killed"]
    for name in ("empty", "healthy", "killed"):
        assert (tmp_path / f"dashboard-{name}.png").stat().st_size < 400_000
