"""The Grafana file asks for metrics that the endpoint has, and their names follow Prometheus' conventions."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tesseract_async.metrics import Metrics
from tesseract_async.monitoring.catalogue import METRICS, SWARM_COUNTERS, SWARM_METRICS
from tesseract_async.monitoring.prometheus import render

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "dashboard.json"
PACKAGE = Path(__file__).parents[2] / "tesseract_async"
KINDS = {"count": "counter", "set": "gauge", "observe": "histogram", "histogram": "histogram"}


def kinds() -> dict[str, str]:
    """Metric -> counter, gauge or histogram, as the package uses it."""
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    used = re.findall(r'metrics\.(count|set|observe|histogram)\(\s*"(\w+)"', code)
    return {name: KINDS[verb] for verb, name in used if name in METRICS}


def exposed() -> set[str]:
    """The names that ``/metrics`` would show if everything had happened once."""
    metrics = Metrics()
    for name, kind in kinds().items():
        if kind == "counter":
            metrics.count(name)
        elif kind == "gauge":
            metrics.set(name, 1.0)
        else:
            metrics.observe(name, 1.0)
    for name in SWARM_METRICS:
        (metrics.count if name in SWARM_COUNTERS else partial(metrics.set, value=1.0))(name)
    families = text_string_to_metric_families(render(metrics).decode())
    return {sample.name for family in families for sample in family.samples}


def expressions() -> list[str]:
    """Every query of the dashboard."""
    found: list[str] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            found.extend(value for key, value in node.items() if key == "expr")
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(json.loads(DASHBOARD.read_text()))
    return found


def test_every_metric_that_grafana_asks_for_exists() -> None:
    names = exposed()
    asked = expressions()
    assert len(asked) >= 6
    for expression in asked:
        patterns = re.findall(r'__name__=~"([^"]+)"', expression)
        plain = re.findall(r"\btesseract_\w+", re.sub(r'"[^"]*"', "", expression))
        assert patterns or plain, expression
        for name in plain:
            assert name in names, f"{expression}: there is no {name}"
        for pattern in patterns:
            alternatives = re.fullmatch(r"(\w*)\(([\w|]+)\)(\w*)", pattern)
            for one in alternatives[2].split("|") if alternatives else ():
                name = f"{alternatives[1]}{one}{alternatives[3]}" if alternatives else ""
                assert name in names, f"{expression}: there is no {name}"
            assert any(re.fullmatch(pattern, name) for name in names), expression


@pytest.mark.parametrize("name", sorted(METRICS | SWARM_METRICS))
def test_names_follow_the_conventions(name: str) -> None:
    """What promtool would say: base units, spelled out, and no suffix that the type adds."""
    unit, sentence = (METRICS | SWARM_METRICS)[name]
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
    assert not re.search(r"_(total|count|sum|bucket|ms|millis|milliseconds|us|kb|mb|minutes|percent)($|_)", name)
    if unit in ("seconds", "bytes"):
        assert unit in name.split("_"), f"{name} says its unit"
    assert sentence.endswith(".")
    assert name in SWARM_METRICS or kinds().get(name) in KINDS.values(), "it is used, and as one kind"
