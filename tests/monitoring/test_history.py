"""Figures over 5 minutes, an hour and a day: bounded, and means of what was measured."""

from tesseract_async.monitoring.history import NUM_POINTS, SPANS, History


def test_each_span_is_covered_by_a_bounded_number_of_means() -> None:
    history, told = History(), dict.fromkeys(SPANS, 0)
    kept: dict[str, list[float]] = {name: [] for name in SPANS}
    for n in range(43_200):  # a day, a look every 2 s
        history.add({"time": 2.0 * n, "rows": float(n)} | ({"loss a": 1.0} if n % 2 else {}))
        if n % 100 == 0:  # a visitor is told now and then
            for name, points in history.since(told).items():
                kept[name] += [point["time"] for point in points]
            told = dict(history.num_points)
    assert history.last["rows"] == 43_199
    for name, span in SPANS.items():
        points = list(history.points[name])
        assert len(points) == NUM_POINTS
        covered = points[-1]["time"] - points[0]["time"]
        assert 0.6 * span <= covered <= 2 * span, (name, covered)
        assert all(point["rows"] <= point["time"] / 2 for point in points) and points[-1]["loss a"] == 1.0
        assert kept[name] == sorted(set(kept[name])), "nothing twice, nothing out of order"
    assert kept["1 day"][:3] == [0.0, kept["1 day"][1], kept["1 day"][2]] and len(kept["1 day"]) >= NUM_POINTS - 1
