"""The garbage collector is the program's: commands spare it, the package leaves it alone. And how commands import."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tesseract_async.cli.running import importing
from tests.cli.processes import ENVIRONMENT, ROOT
from tests.stem import Stem

LOOK = "import gc, json; print(json.dumps([gc.get_freeze_count(), gc.get_threshold(), gc.isenabled()]))"


def collector_after(code: str) -> list[object]:
    """Frozen objects, thresholds, and whether it is on, in a fresh process that has run `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LOOK}"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    result: list[object] = json.loads(done.stdout)
    return result


@pytest.mark.slow
def test_importing_the_package_leaves_the_collector_as_it_was() -> None:
    everything = (
        "import tesseract_async as ta\nfor name in ta.__all__: getattr(ta, name)\nimport tesseract_async.cli.hosting"
    )
    assert collector_after(everything) == collector_after("")


def test_a_program_may_spare_it() -> None:
    frozen, thresholds, is_enabled = collector_after(
        "from tesseract_async.cli.running import spare_the_collector\nspare_the_collector()"
    )
    assert isinstance(frozen, int) and frozen > 1000 and thresholds == [10_000, 10, 10] and is_enabled is True


async def test_a_server_spares_it_before_it_says_that_it_is_ready(stem: Stem, tmp_path: Path) -> None:
    serve = (
        "import gc, tesseract_async.cli.hosting as hosting\n"
        "say = hosting.say\n"
        "def look(event, *_, **facts):\n"
        "    if event == 'ready': print(gc.get_freeze_count() > 100_000, gc.get_threshold())\n"
        "async def leave(tell_ready, **_):\n    tell_ready()\n    return 'seen'\n"
        "hosting.say, hosting.until_told_to_leave = look, leave\n"
        "from tesseract_async.cli.main import main\n"
        "main(['serve', '--experts', 'ffn.0', '--size', 'in_features=8'])"
    )
    (tmp_path / "serve.py").write_text(serve)
    process = await stem.start(str(tmp_path / "serve.py"), folder=ROOT, environment=ENVIRONMENT)
    out, err = await process.communicate()
    assert out.startswith(b"True (10000, 10, 10)\n"), err.decode()
    assert process.returncode == 0


def test_what_is_to_be_imported_without_looks_absent_meanwhile() -> None:
    assert "this" not in sys.modules
    with importing(without=["this", "json"]):
        assert importlib.util.find_spec("this") is None
        with pytest.raises(ImportError):
            importlib.import_module("this")
        assert importlib.import_module("json") is json, "it was here before"
    assert "this" not in sys.modules and importlib.util.find_spec("this") is not None
