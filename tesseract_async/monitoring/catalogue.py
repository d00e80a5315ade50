"""The metrics of a node, and those that a viewer adds: name -> (unit, sentence), as `metrics.toml` has them."""

import tomllib
from pathlib import Path
from typing import Final

_TABLES: Final = tomllib.loads((Path(__file__).parent / "metrics.toml").read_text("utf-8"))
METRICS: Final[dict[str, tuple[str, str]]] = {name: (unit, said) for name, (unit, said) in _TABLES["node"].items()}
SWARM_METRICS: Final[dict[str, tuple[str, str]]] = {
    name: (unit, said) for name, (unit, said) in _TABLES["swarm"].items()
}
