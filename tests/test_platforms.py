"""Nothing in the package needs uvloop or POSIX except where it says so: every module imports without them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

CODE = """
import importlib, pkgutil, sys

HIDDEN = {"uvloop", "resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix_ipc", "syslog"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN:
            raise ImportError(f"{name} is hidden")

for name in HIDDEN:
    sys.modules.pop(name, None)
import torch  # what others import is their business
import aiohttp, rich.console, rich.live, psutil, aiortc
for name in HIDDEN:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hide())
import tesseract_async
names = [item.name for item in pkgutil.walk_packages(tesseract_async.__path__, "tesseract_async.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""


def test_every_module_imports_without_uvloop_and_posix() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50
