"""The volunteer's limits as options of a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from tesseract_async.cli.units import RATE, SECONDS, SHARE, SIZE, Amount
from tesseract_async.server.contract import PERIODS, Hours, VolunteerSettings

Command = TypeVar("Command", bound=Callable[..., Any])


def _hours(text: Any) -> Hours:
    if isinstance(text, Hours):
        return text
    return Hours.parse(str(text))


OPTIONS = {
    "max_memory": click.option("--max-memory", type=SIZE, help="Memory of the whole process, such as '4 GiB'."),
    "max_upload": click.option("--max-upload", type=RATE, help="Such as '10 Mbit/s'; to all peers together."),
    "max_download": click.option("--max-download", type=RATE, help="Such as '50 Mbit/s'; from all peers together."),
    "data_quota": click.option("--data-quota", type=SIZE, help="Bytes sent and received in one period; then rest."),
    "quota_period": click.option(
        "--quota-period", type=click.Choice(PERIODS), default="month", show_default=True, help="Of --data-quota."
    ),
    "hours": click.option(
        "--hours",
        multiple=True,
        type=Amount("hours", _hours),
        help="Serve only then, local time: '22:00-07:00', 'sat,sun 00:00-24:00'; may be given several times.",
    ),
    "pause_above_load": click.option(
        "--pause-above-load",
        type=SHARE,
        help="Pause while other programs use more than this share of the processors, such as '30 %'.",
    ),
    "pause_after": click.option(
        "--pause-after", type=SECONDS, default=5.0, show_default=True, help="How long they must, before it pauses."
    ),
    "resume_after": click.option(
        "--resume-after",
        type=SECONDS,
        default=60.0,
        show_default=True,
        help="How long they must not, before it goes on.",
    ),
}


def limit_options(command: Command) -> Command:
    """Adds every limit as a flag; `volunteer_settings` makes the settings of their values."""
    for option in reversed(OPTIONS.values()):
        command = option(command)
    return command


def volunteer_settings(values: dict[str, Any]) -> VolunteerSettings:
    """Takes the limits out of a command's `values`. Raises: click.UsageError for one that makes no sense."""
    found = {name: values.pop(name) for name in OPTIONS}
    try:
        return VolunteerSettings(
            max_memory_bytes=found["max_memory"],
            max_upload_rate=found["max_upload"],
            max_download_rate=found["max_download"],
            data_quota_bytes=found["data_quota"],
            quota_period=found["quota_period"],
            hours=tuple(found["hours"]),
            pause_above_load=found["pause_above_load"],
            pause_after=found["pause_after"],
            resume_after=found["resume_after"],
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
