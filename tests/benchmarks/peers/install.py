"""Makes hivemind's environment: its own, so that neither side's dependencies bend to the other's.

python tests/benchmarks/peers/install.py [DIRECTORY]        (default: .venv-hivemind)
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
DEFAULT = Path(__file__).parents[3] / ".venv-hivemind"


def python_of(directory: Path) -> Path:
    """The interpreter of an environment."""
    return directory / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def install(directory: Path = DEFAULT) -> Path:
    """Creates the environment unless it stands and is as new as the requirements. Returns its interpreter.

    Raises: subprocess.CalledProcessError if a package can't be had.
    """
    stamp, python = directory / ".installed", python_of(directory)
    wanted = REQUIREMENTS.read_text()
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return python
    print(f"installing hivemind into {directory} (some minutes)", file=sys.stderr)
    venv.create(directory, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and pinned: an open range would fetch gigabytes of CUDA libraries onto machines without a GPU
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    subprocess.run([*pip, torch], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True, stdout=sys.stderr)
    stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    print(install(*(Path(each) for each in sys.argv[1:2])))
