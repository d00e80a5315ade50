"""Makes the peers' environments: their own, so that neither side's dependencies bend to the other's.

python tests/benchmarks/peers/install.py [NAME ...]        (default: hivemind, rpc)
"""

import subprocess
import sys
import venv
from pathlib import Path

NAMES = ("hivemind", "rpc")
"""Each has its ``requirements_NAME.txt`` here, its ``NAME_*.py``, and gets its ``.venv-NAME``."""


def python_of(name: str) -> Path:
    """The interpreter of an environment."""
    directory = Path(__file__).parents[3] / f".venv-{name}"
    return directory / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def install(name: str) -> Path:
    """Creates the environment unless it stands and is as new as the requirements. Returns its interpreter.

    Raises: subprocess.CalledProcessError if a package can't be had.
    """
    python = python_of(name)
    directory, requirements = python.parents[1], Path(__file__).parent / f"requirements_{name}.txt"
    stamp, wanted = directory / ".installed", requirements.read_text()
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return python
    print(f"installing {name} into {directory} (some minutes)", file=sys.stderr)
    venv.create(directory, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and pinned: an open range would fetch gigabytes of CUDA libraries onto machines without a GPU
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    subprocess.run([*pip, torch], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "-r", str(requirements)], check=True, stdout=sys.stderr)
    stamp.write_text(wanted)
    return python


def main() -> int:
    """Install what can be had: a peer that cannot is left out of the comparison."""
    failed = []
    for name in sys.argv[1:] or NAMES:
        try:
            print(install(name))
        except subprocess.CalledProcessError as error:
            print(f"{name} can't be installed: {error}", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
