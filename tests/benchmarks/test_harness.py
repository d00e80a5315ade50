"""The benchmarks' own bookkeeping: figures, goals and comparisons."""

import pytest

from tests.benchmarks.comparisons import COMPARISONS, compare, comparison_table
from tests.benchmarks.figures import Figure, number, percentile, read_figure, table
from tests.benchmarks.loads import COMPARED, SMALL, DhtLoad, MixtureLoad


@pytest.mark.parametrize(
    ("value", "asked", "met"),
    [
        (20.0, ">= 20", True),
        (19.9, ">= 20 x hivemind", False),
        (10.0, "< 10 ms", False),
        (9.9, "<10", True),
        (100_000.0, ">= 100,000", True),
        (1.0, "> 1", False),
        (1.0, "flat", None),
        (1.0, None, None),
    ],
)
def test_a_goal_is_judged_by_its_sign_and_number(value: float, asked: str | None, met: bool | None) -> None:
    assert Figure("x", value, "", asked).met is met


def test_a_figure_is_read_back_from_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    figure = Figure("nop", 1.5, "calls/s", ">= 1", {"rows": 3}).emit()
    assert read_figure(capsys.readouterr().out) == figure


@pytest.mark.parametrize("line", ["", "hello", "{", '{"name": "x"}', '{"name": "x", "value": "much"}', "[1]"])
def test_other_lines_are_no_figures(line: str) -> None:
    assert read_figure(line) is None


def test_a_bare_number_asks_for_at_least_it_and_for_at_most_it_where_small_is_good() -> None:
    assert read_figure('{"name": "x", "value": 1, "unit": "calls/s", "asked": 2}').asked == ">= 2"  # type: ignore[union-attr]
    assert read_figure('{"name": "x", "value": 1, "unit": "ms", "asked": 2}').asked == "<= 2"  # type: ignore[union-attr]


def test_ratios_need_both_sides_and_the_same_unit() -> None:
    ours = {each.ours: Figure(each.ours, 1000.0, "rows/s") for each in COMPARISONS}
    assert [each.against for each, _ in compare({"ours": ours})] == []
    theirs = {each.theirs: Figure(each.theirs, 50.0, "rows/s") for each in COMPARISONS if each.against == "hivemind"}
    ours["ceiling: echo 8 MiB, tls"] = Figure("ceiling: echo 8 MiB, tls", 8.192, "MB/s")
    sides = {"ours": ours, "hivemind": theirs}
    ratios = {figure.name: figure.value for _, figure in compare(sides)}
    assert ratios["dht 16 nodes / hivemind"] == 20.0
    assert ratios["nop 2048x1024, 4 clients, tls / ceiling"] == pytest.approx(0.5)  # 4.096 MB/s of rows
    assert "**no**" in comparison_table(compare(sides))


def test_every_compared_load_is_one_that_is_measured() -> None:
    measured = {load.name for load in COMPARED} | {"dht 16 nodes", "mixture 2048x1024, 64x64 grid"}
    assert {each.theirs for each in COMPARISONS if each.against == "hivemind"} <= measured
    small = {load.name for load in SMALL}
    assert {each.theirs for each in COMPARISONS if each.against not in ("hivemind", "ceiling")} == small


def test_loads() -> None:
    assert DhtLoad().num_operations == 1024
    uids = MixtureLoad().uids()
    assert len(set(uids)) == 64
    assert {uid.split(".")[1] for uid in uids} == {uid.split(".")[2] for uid in uids} == {str(i) for i in range(64)}


def test_numbers_for_people() -> None:
    assert [number(value) for value in (12345.6, 123.4, 12.34, 0.01234)] == ["12,346", "123", "12.3", "0.01234"]
    assert percentile([3, 1, 2], 0.5) == 2
    with pytest.raises(ValueError):
        percentile([], 0.5)
    assert "| x | 2 s | < 1 | **no** |" in table([Figure("x", 2.0, "s", "< 1")])
