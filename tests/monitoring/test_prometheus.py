"""A node's metrics as Prometheus reads them."""

from prometheus_client.parser import text_string_to_metric_families

from tesseract_async.metrics import Metrics
from tesseract_async.monitoring.prometheus import render


def test_counters_gauges_and_histograms_read_back() -> None:
    metrics = Metrics()
    metrics.count("expert_calls", 3, method="expert.forward")
    metrics.count("expert_calls", 4, method="expert.backward")
    metrics.count("manifests_dropped")
    metrics.set("experts_live", 16, prefix='a "quoted" one')
    for value in (0.0005, 0.003, 100.0):
        metrics.observe("call_seconds", value)
    families = {family.name: family for family in text_string_to_metric_families(render(metrics).decode())}
    calls = families["tesseract_expert_calls"]
    assert calls.type == "counter"
    assert {sample.labels["method"]: sample.value for sample in calls.samples} == {
        "expert.forward": 3,
        "expert.backward": 4,
    }
    assert families["tesseract_manifests_dropped"].samples[0].name == "tesseract_manifests_dropped_total"
    assert families["tesseract_experts_live"].samples[0].labels == {"prefix": 'a "quoted" one'}
    seconds = {
        (sample.name, sample.labels.get("le")): sample.value for sample in families["tesseract_call_seconds"].samples
    }
    assert seconds[("tesseract_call_seconds_bucket", "0.001")] == 1
    assert seconds[("tesseract_call_seconds_bucket", "0.005")] == 2
    assert seconds[("tesseract_call_seconds_bucket", "+Inf")] == 3
    assert seconds[("tesseract_call_seconds_count", None)] == 3
    assert seconds[("tesseract_call_seconds_sum", None)] == 100.0035


def test_no_figures_are_no_text() -> None:
    assert render(Metrics()) == b""
