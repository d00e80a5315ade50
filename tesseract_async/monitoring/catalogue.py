"""The metrics of a node, and those that a viewer adds: name -> (unit, sentence), as `metrics.toml` has them."""

import tomllib
from pathlib import Path
from typing import Final

_TABLES: Final = tomllib.loads((Path(__file__).parent / "metrics.toml").read_text("utf-8"))
METRICS: Final[dict[str, tuple[str, str]]] = {name: tuple(said) for name, said in _TABLES["node"].items()}
SWARM_COUNTERS: Final = frozenset(_TABLES["swarm_counters"])
SWARM_METRICS: Final[dict[str, tuple[str, str]]] = {
    name: tuple(said) for table in ("swarm_counters", "swarm_gauges") for name, said in _TABLES[table].items()
}
