"""Skips this folder without Transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.transformers.tiny import make_checkpoint

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
pytest.importorskip("tqdm").tqdm.monitor_interval = 0  # its thread would outlive a test


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what makes a tiny checkpoint of a family, once for all tests."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make
