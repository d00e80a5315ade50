"""The limits that a volunteer set, and whether the server may work right now. No I/O: time and load are given to it.

`VolunteerSettings` holds the limits, `VolunteerContract` applies them. Rates are limited where the bytes pass
(`transport.throttle`); everything else is decided here, so that "why does my machine not serve?" has one answer:
`WorkPermission.reason`.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta, tzinfo
from itertools import groupby
from typing import Final, Literal, get_args

Period = Literal["day", "week", "month"]
PERIODS: Final = get_args(Period)
MAX_NAME: Final = 64
"""The most characters of a machine's name, and of other texts about it."""
MAX_MARKS: Final = 4
"""The most marks on one letter of a name: no language has more than three."""

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW: Final = re.compile(r"(?:(?P<days>[a-z,-]+)\s+)?(?P<start>\d{1,2}:\d\d)\s*-\s*(?P<end>\d{1,2}:\d\d)")
_HORIZON_DAYS: Final = 9
"""Days within which a change is looked for: windows repeat weekly, so a state that does not change within a week and a
day never does."""


def is_name(text: str) -> bool:
    """Return whether a machine may be called so: in one short line, without piles of marks on a letter."""
    runs = (len(list(run)) for is_mark, run in groupby(map(unicodedata.combining, text), bool) if is_mark)
    return len(text) <= MAX_NAME and text.isprintable() and max(runs, default=0) <= MAX_MARKS


def check_name(name: str) -> None:
    """Raises: ValueError for text that cannot be a machine's name."""
    if not is_name(name):
        raise ValueError(f"a machine's name is one line of at most {MAX_NAME} characters: {name[:80]!r}")


@dataclass(frozen=True, slots=True)
class Hours:
    """A span of the local day on some days of the week. One that ends before it starts runs past midnight."""

    start: int
    """Minutes after midnight."""
    end: int
    """Minutes after midnight, 1440 for its end; at or before `start`: of the next day."""
    days: frozenset[int] = frozenset(range(7))
    """Days on which it starts, Monday = 0."""

    @classmethod
    def parse(cls, text: str) -> "Hours":
        """Read ``22:00-07:00``, ``sat,sun 00:00-24:00`` or ``mon-fri 18:30-23:00``. Raises: ValueError."""
        match = _WINDOW.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError(f"not hours, such as '22:00-07:00' or 'mon-fri 18:00-23:30': {text!r}")
        start, end = _minutes(match["start"], text), _minutes(match["end"], text)
        if start == end or start == 1440:
            raise ValueError(f"hours that never begin; a whole day is 00:00-24:00: {text!r}")
        days = frozenset(range(7)) if match["days"] is None else _days(match["days"], text)
        return cls(start, end, days)

    def __str__(self) -> str:
        span = f"{self.start // 60:02}:{self.start % 60:02}-{self.end // 60:02}:{self.end % 60:02}"
        return span if len(self.days) == 7 else ",".join(_DAYS[day] for day in sorted(self.days)) + " " + span

    def on(self, day: date, timezone: tzinfo | None) -> tuple[float, float] | None:
        """Return its start and end in wall-clock seconds, if it starts on `day`. `timezone`: None for the machine's."""
        if day.weekday() not in self.days:
            return None
        last = day + timedelta(days=1) if self.end <= self.start else day
        return _at(day, self.start, timezone), _at(last, self.end, timezone)


@dataclass(frozen=True, slots=True)
class VolunteerSettings:
    """The limits of one volunteer. None and an empty tuple mean no limit."""

    max_memory_bytes: int | None = None
    """Use at most this much memory, such as '4 GiB'. Only as many experts are hosted as fit (`server.footprint`), and
    while the process has more, no new work is taken."""
    max_upload_rate: float | None = None
    """Send at most this fast, such as '10 Mbit/s'. In bytes per second, to all peers together."""
    max_download_rate: float | None = None
    """Receive at most this fast, such as '50 Mbit/s'. In bytes per second, from all peers together."""
    data_quota_bytes: int | None = None
    """Rest after this much traffic in a --quota-period, such as '200 GB'. In bytes, sent and received together; the
    server rests until the next period begins."""
    quota_period: Period = "month"
    """Count --data-quota over this time. A week begins on Monday; days are those of local time."""
    hours: tuple[Hours, ...] = ()
    """Serve only at these local times, such as '22:00-07:00' or 'sat,sun 00:00-24:00'. Any of them will do."""
    pause_above_load: float | None = None
    """Pause while other programs use more than this share of the processors, such as '30 %'. From 0 to 1, of all
    processors together, while somebody is at the machine."""
    pause_after: float = 5.0
    """Pause once other programs have used more than --pause-above-load for this long. In seconds: opening a file
    is no reason."""
    resume_after: float = 60.0
    """Resume once other programs have used less than --pause-above-load for this long. In seconds."""

    def __post_init__(self) -> None:
        for name in ("max_memory_bytes", "max_upload_rate", "max_download_rate", "data_quota_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is more than 0, or absent for no limit; not {value}")
        if self.quota_period not in PERIODS:
            raise ValueError(f"quota_period is one of {', '.join(PERIODS)}; not {self.quota_period!r}")
        if self.pause_above_load is not None and not 0 <= self.pause_above_load < 1:
            raise ValueError(f"pause_above_load is a share of all processors, from 0 to 1; not {self.pause_above_load}")
        if self.pause_after < 0 or self.resume_after < 0:
            raise ValueError("pause_after and resume_after are seconds, 0 or more")


@dataclass(frozen=True, slots=True)
class WorkPermission:
    """The decision whether the server may work, and how long it holds if nothing else is observed."""

    serve: bool
    reason: str
    """The reason for the log and for refused callers: one clause, such as ``outside of its hours (22:00-07:00)``."""
    until: float | None
    """Wall-clock seconds when time alone changes it; None if only an observation can."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The bytes used in the present quota period, which must outlive a restart."""

    period_start: float = 0.0
    """Wall-clock seconds at which the period of these bytes began."""
    num_bytes: int = 0


class VolunteerContract:
    """Applies `VolunteerSettings` to what it observes. Time is wall-clock seconds and may jump."""

    def __init__(self, settings: VolunteerSettings, *, timezone: tzinfo | None = None, usage: Usage = Usage()) -> None:
        """`timezone`: for hours and midnights, None for the machine's; `usage`: from before a restart."""
        self.settings, self._timezone, self._usage = settings, timezone, usage
        # since when the load has been above the threshold, or below it again
        self._busy_since: float | None = None
        self._calm_since: float | None = None
        self._paused = self._memory_short = False

    def usage(self, now: float) -> Usage:
        start, _ = _period(now, self.settings.quota_period, self._timezone)
        # a clock that was set back does not give the quota a second time
        if start > self._usage.period_start:
            self._usage = Usage(start, 0)
        return self._usage

    def count_bytes(self, num_bytes: int, now: float) -> None:
        usage = self.usage(now)
        self._usage = Usage(usage.period_start, usage.num_bytes + num_bytes)

    def observe_memory(self, num_bytes: int) -> None:
        """Note the memory that the process holds now. Once over the limit, it counts as short until 5 % below."""
        limit = self.settings.max_memory_bytes
        if limit is not None:
            self._memory_short = num_bytes > (0.95 * limit if self._memory_short else limit)

    def observe_load(self, load: float, now: float) -> None:
        """Note the share of all processors that other programs use now."""
        limit = self.settings.pause_above_load
        if limit is None:
            return
        if load > limit:
            self._calm_since = None
            if self._busy_since is None or self._busy_since > now:
                self._busy_since = now
            self._paused = self._paused or now - self._busy_since >= self.settings.pause_after
        else:
            self._busy_since = None
            if self._calm_since is None or self._calm_since > now:
                self._calm_since = now

    def may_serve(self, now: float, load: float | None = None) -> WorkPermission:
        """Decide whether the server may work at `now`; `load` is observed first, where given."""
        if load is not None:
            self.observe_load(load, now)
        closed: list[tuple[str, float | None]] = []
        changes_at: float | None = None
        if self.settings.hours:
            is_open, changes_at = _hours_at(self.settings.hours, now, self._timezone)
            if not is_open:
                closed.append((f"outside of its hours ({'; '.join(map(str, self.settings.hours))})", changes_at))
        if self.settings.data_quota_bytes is not None and self.usage(now).num_bytes >= self.settings.data_quota_bytes:
            _, end = _period(now, self.settings.quota_period, self._timezone)
            closed.append((f"its data quota of this {self.settings.quota_period} is used up", end))
        if self._paused and self._calm_since is not None and now - self._calm_since >= self.settings.resume_after:
            self._paused = False
        if self._paused:
            calm = None if self._calm_since is None else self._calm_since + self.settings.resume_after
            closed.append(("its owner uses the machine", calm))
        if self._memory_short:
            closed.append(("its memory limit is reached", None))
        if not closed:
            return WorkPermission(True, "", changes_at)
        known = [end for _, end in closed if end is not None]
        until = max(known) if len(known) == len(closed) else None
        return WorkPermission(False, ", and ".join(reason for reason, _ in closed), until)


def _hours_at(hours: Sequence[Hours], now: float, timezone: tzinfo | None) -> tuple[bool, float | None]:
    """Return whether `now` lies in any of `hours`, and when that changes; None if it never does."""
    today = datetime.fromtimestamp(now, timezone).date()
    days = [today + timedelta(days=offset) for offset in range(-1, _HORIZON_DAYS)]
    spans = [span for day in days for window in hours if (span := window.on(day, timezone)) is not None]
    horizon = _at(today + timedelta(days=_HORIZON_DAYS - 1), 0, timezone)
    end = now
    is_open = False
    for start, stop in sorted(spans):
        if start > end:
            if is_open:
                break  # a gap follows
            return False, start
        if stop > end:
            is_open, end = True, stop
    return is_open, end if is_open and end < horizon else None


def _period(now: float, period: str, timezone: tzinfo | None) -> tuple[float, float]:
    """Return the wall-clock seconds of the start and the end of the period that `now` lies in."""
    first = datetime.fromtimestamp(now, timezone).date()
    if period == "week":
        first -= timedelta(days=first.weekday())
        last = first + timedelta(days=7)
    elif period == "month":
        first = first.replace(day=1)
        last = (first + timedelta(days=31)).replace(day=1)
    else:
        last = first + timedelta(days=1)
    return _at(first, 0, timezone), _at(last, 0, timezone)


def _at(day: date, minutes: int, timezone: tzinfo | None) -> float:
    midnight = datetime(day.year, day.month, day.day, tzinfo=timezone)
    # wall-clock arithmetic: 07:00 is 07:00 in the night of the clock change, too
    return (midnight + timedelta(minutes=minutes)).timestamp()


def _minutes(text: str, whole: str) -> int:
    hour, minute = map(int, text.split(":"))
    if minute > 59 or hour * 60 + minute > 1440:
        raise ValueError(f"{text} is no time of the day: {whole!r}")
    return hour * 60 + minute


def _days(text: str, whole: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in _DAYS or (last or first) not in _DAYS:
            raise ValueError(f"days are {', '.join(_DAYS)}, or spans of them such as mon-fri: {whole!r}")
        start, stop = _DAYS.index(first), _DAYS.index(last or first)
        # fri-mon runs over the weekend
        found |= {day % 7 for day in range(start, stop + 1 + (7 if stop < start else 0))}
    return frozenset(found)
