"""Try the wheel in a folder as somebody who installs it: a clean environment, no checkout, an expert that is called.

python tests/newcomer/wheel.py dist
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
MAX_ARCHIVE_BYTES = 1 << 20
"""The source archive holds the package and its texts: no pictures, no measured data."""


def main(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = files.getnames()
    assert archive.stat().st_size < MAX_ARCHIVE_BYTES, f"{archive.name} has {archive.stat().st_size} bytes"
    assert any(name.endswith("tesseract_async/py.typed") for name in names), "types would not be found"
    assert not [name for name in names if name.endswith((".png", ".csv", ".safetensors"))], "bulk"
    with zipfile.ZipFile(wheel) as packed:
        (about,) = (packed.read(name).decode() for name in packed.namelist() if name.endswith("/METADATA"))
    assert not re.search(r"\]\((?!https?://)", about), "a link of the README leads nowhere outside of the repository"
    with tempfile.TemporaryDirectory(prefix="tesseract-wheel-") as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        python = Path(folder) / "venv" / "bin" / "python"
        # torch first and pinned, as everywhere: an open range would fetch gigabytes of CUDA libraries
        torch = next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for words in ([torch], ["-c", str(ROOT / "constraints.txt"), str(wheel.resolve())]):
            subprocess.run([*install, *words], check=True, env=ENVIRONMENT)
        tries = [
            ["-m", "tesseract_async", "--version"],
            ["-c", "import tesseract_async as ta; [getattr(ta, name) for name in ta.__all__]; print(ta.__file__)"],
            [str(ROOT / "examples" / "quickstart.py")],
        ]
        for words in tries:
            ran = subprocess.run(
                [str(python), *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
            )
            print(ran.stdout.strip())
            assert ran.returncode == 0, ran.stderr
            assert str(ROOT / "tesseract_async") not in ran.stdout, "that was the checkout, not the wheel"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
