"""The volunteer's limits, by function calls: no clock is read, no time passes."""

from datetime import UTC, datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.server.contract import (
    Hours,
    Usage,
    VolunteerContract,
    VolunteerSettings,
)

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: tzinfo = UTC) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


def contract(zone: tzinfo = UTC, usage: Usage | None = None, **limits: object) -> VolunteerContract:
    return VolunteerContract(VolunteerSettings(**limits), timezone=zone, usage=usage or Usage())  # type: ignore[arg-type]


def hours(*texts: str) -> tuple[Hours, ...]:
    return tuple(map(Hours.parse, texts))


def test_without_limits_it_always_serves() -> None:
    verdict = contract().may_serve(0.0, load=1.0)
    assert verdict.serve
    assert verdict.reason == ""
    assert verdict.until is None


def test_hours_past_midnight() -> None:
    machine = contract(hours=hours("22:00-07:00"))
    assert not machine.may_serve(at("2026-03-02 21:59:59")).serve
    assert machine.may_serve(at("2026-03-02 22:00")).serve
    assert machine.may_serve(at("2026-03-03 06:59:59")).serve
    closed = machine.may_serve(at("2026-03-03 07:00"))
    assert not closed.serve
    assert closed.reason == "outside of its hours (22:00-07:00)"
    assert closed.until == at("2026-03-03 22:00")
    assert machine.may_serve(at("2026-03-03 01:00")).until == at("2026-03-03 07:00")


def test_hours_that_touch_are_one_span_and_a_whole_week_never_ends() -> None:
    # 2026-03-06 is a Friday: it opens at 18:00 and stays open until Monday 07:00
    machine = contract(hours=hours("mon-fri 18:00-07:00", "sat,sun 00:00-24:00", "sun 23:00-07:00"))
    assert machine.may_serve(at("2026-03-06 19:00")).until == at("2026-03-09 07:00")
    assert contract(hours=hours("00:00-24:00")).may_serve(at("2026-03-06 19:00")).until is None


def test_hours_on_a_day_count_from_where_they_start() -> None:
    machine = contract(hours=hours("fri 22:00-02:00"))
    assert machine.may_serve(at("2026-03-07 01:00")).serve  # Saturday, but it began on Friday
    assert not machine.may_serve(at("2026-03-06 01:00")).serve
    assert machine.may_serve(at("2026-03-07 02:00")).until == at("2026-03-13 22:00")


def test_days_may_run_over_the_weekend() -> None:
    assert Hours.parse("fri-mon 01:00-02:00").days == {4, 5, 6, 0}


def test_hours_are_the_volunteers_own_also_when_the_clocks_change() -> None:
    machine = contract(BERLIN, hours=hours("22:00-07:00"))
    before = machine.may_serve(at("2026-03-28 23:00", BERLIN))  # the night to summer time
    assert before.until == at("2026-03-29 07:00", BERLIN)
    assert before.until is not None and before.until - at("2026-03-28 22:00", BERLIN) == 8 * 3600
    autumn = machine.may_serve(at("2026-10-24 23:00", BERLIN))
    assert autumn.until is not None and autumn.until - at("2026-10-24 22:00", BERLIN) == 10 * 3600


@pytest.mark.parametrize(
    "text",
    ["", "22:00", "22-7", "25:00-26:00", "10:60-11:00", "10:00-10:00", "24:00-07:00", "xyz 10:00-11:00", "10:00-24:01"],
)
def test_malformed_hours(text: str) -> None:
    with pytest.raises(ValueError, match="hours|time of the day|days"):
        Hours.parse(text)


windows = st.builds(
    lambda start, length, days: Hours(start, (start + length) % 1440, frozenset(days)),
    st.integers(0, 95).map(lambda quarter: quarter * 15),
    st.integers(1, 95).map(lambda quarter: quarter * 15),
    st.sets(st.integers(0, 6), min_size=1),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(windows, min_size=1, max_size=4), st.integers(0, 7 * 1440 - 1))
def test_hours_against_brute_force(some: list[Hours], minute: int) -> None:
    """Every quarter of an hour of a week, by the definition; what changes next, by walking there."""
    zone = timezone(timedelta(hours=-3))
    monday = at("2026-06-01 00:00", zone)

    def is_open(moment: int) -> bool:
        day, inside = divmod(moment % (7 * 1440), 1440)
        for window in some:
            if window.end > window.start:
                if day in window.days and window.start <= inside < window.end:
                    return True
            elif (day in window.days and inside >= window.start) or (
                (day - 1) % 7 in window.days and inside < window.end
            ):
                return True
        return False

    verdict = contract(zone, hours=tuple(some)).may_serve(monday + minute * 60)
    assert verdict.serve == is_open(minute)
    changes = (m for m in range(minute, minute + 7 * 1440 + 1) if is_open(m) != is_open(minute))
    change = next(changes, None)
    assert verdict.until == (None if change is None else monday + change * 60)


def test_the_quota_ends_the_work_until_the_next_period() -> None:
    machine = contract(data_quota_bytes=1000, quota_period="month")
    now = at("2026-01-31 10:00")
    machine.count_bytes(999, now)
    assert machine.may_serve(now).serve
    machine.count_bytes(1, now)
    verdict = machine.may_serve(now)
    assert not verdict.serve
    assert verdict.reason == "its data quota of this month is used up"
    assert verdict.until == at("2026-02-01 00:00")
    assert machine.may_serve(at("2026-02-01 00:00")).serve
    assert machine.usage(at("2026-02-01 00:00")).num_bytes == 0


@pytest.mark.parametrize(
    ("period", "end"), [("day", "2026-03-05 00:00"), ("week", "2026-03-09 00:00"), ("month", "2026-04-01 00:00")]
)
def test_periods_end_at_local_midnight(period: str, end: str) -> None:
    machine = contract(BERLIN, data_quota_bytes=1, quota_period=period)
    now = at("2026-03-04 12:00", BERLIN)  # a Wednesday
    machine.count_bytes(1, now)
    assert machine.may_serve(now).until == at(end, BERLIN)


def test_usage_outlives_a_restart_and_a_clock_that_is_set_back() -> None:
    now = at("2026-05-10 12:00")
    first = contract(data_quota_bytes=100, quota_period="day")
    first.count_bytes(100, now)
    second = contract(data_quota_bytes=100, quota_period="day", usage=first.usage(now))
    assert not second.may_serve(now).serve
    assert not second.may_serve(now - 3 * 86400).serve
    assert second.may_serve(now + 86400).serve


def test_it_pauses_while_the_machine_is_in_use() -> None:
    machine = contract(pause_above_load=0.3, pause_after=5.0, resume_after=60.0)
    assert machine.may_serve(100.0, load=0.9).serve  # a short peak is nothing
    assert machine.may_serve(104.0, load=0.9).serve
    paused = machine.may_serve(105.0, load=0.9)
    assert not paused.serve
    assert paused.reason == "its owner uses the machine"
    assert paused.until is None
    assert machine.may_serve(110.0, load=0.1).until == 170.0
    assert not machine.may_serve(169.0).serve
    assert machine.may_serve(170.0).serve


def test_short_peaks_do_not_add_up_and_a_pause_is_prolonged_by_new_load() -> None:
    machine = contract(pause_above_load=0.3, pause_after=5.0, resume_after=60.0)
    for now in range(0, 100, 4):
        machine.observe_load(0.9, float(now))
        assert machine.may_serve(now + 2.0, load=0.0).serve
    machine.observe_load(0.9, 200.0)
    assert not machine.may_serve(206.0, load=0.9).serve
    machine.observe_load(0.0, 210.0)
    machine.observe_load(0.9, 260.0)
    assert not machine.may_serve(271.0).serve
    assert machine.may_serve(272.0, load=0.0).until == 332.0


def test_load_after_a_clock_that_was_set_back() -> None:
    machine = contract(pause_above_load=0.3, pause_after=5.0, resume_after=60.0)
    machine.observe_load(0.9, 1000.0)
    assert not machine.may_serve(1005.0, load=0.9).serve
    machine.observe_load(0.0, 1006.0)
    assert not machine.may_serve(10.0, load=0.0).serve
    assert machine.may_serve(70.0, load=0.0).serve


def test_memory_over_its_limit_stops_new_work_until_clearly_below() -> None:
    machine = contract(max_memory_bytes=1000)
    machine.observe_memory(1000)
    assert machine.may_serve(0.0).serve
    machine.observe_memory(1001)
    assert machine.may_serve(0.0).reason == "its memory limit is reached"
    machine.observe_memory(960)
    assert not machine.may_serve(0.0).serve
    machine.observe_memory(950)
    assert machine.may_serve(0.0).serve


def test_several_reasons_are_all_told_and_the_last_one_decides_when() -> None:
    now = at("2026-03-02 12:00")
    machine = contract(hours=hours("22:00-07:00"), data_quota_bytes=1, quota_period="day", pause_above_load=0.5)
    machine.count_bytes(5, now)
    verdict = machine.may_serve(now)
    assert verdict.reason == "outside of its hours (22:00-07:00), and its data quota of this day is used up"
    assert verdict.until == at("2026-03-03 00:00")
    machine.observe_load(0.9, now - 10)
    assert machine.may_serve(now, load=0.9).until is None


@pytest.mark.parametrize(
    "limits",
    [
        {"max_memory_bytes": 0},
        {"max_upload_rate": -1.0},
        {"data_quota_bytes": 0},
        {"quota_period": "year"},
        {"pause_above_load": 30},
        {"resume_after": -1.0},
    ],
)
def test_senseless_limits_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        VolunteerSettings(**limits)  # type: ignore[arg-type]
