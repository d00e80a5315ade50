"""Options about how much of this computer a volunteer lends, and when."""

import click

from tesseract_async.cli.options import FIRST, grouped, several_option
from tesseract_async.cli.types import HOURS, RATE, SECONDS, SHARE, SIZE
from tesseract_async.server.contract import PERIODS, VolunteerSettings

volunteer_options = grouped(
    "limits",
    VolunteerSettings,
    FIRST,
    click.option("--max-memory", "max_memory_bytes", type=SIZE, help="Use at most this much memory, such as '4 GiB'."),
    "Limits",
    click.option("--max-upload", "max_upload_rate", type=RATE, help="Send at most this fast, such as '10 Mbit/s'."),
    click.option(
        "--max-download", "max_download_rate", type=RATE, help="Receive at most this fast, such as '50 Mbit/s'."
    ),
    click.option(
        "--data-quota", "data_quota_bytes", type=SIZE, help="Rest after this much traffic in a --quota-period."
    ),
    click.option(
        "--quota-period", type=click.Choice(PERIODS), default="month", help="Count --data-quota over this time."
    ),
    several_option(
        "--hours", type=HOURS, help="Serve only at these local times, such as '22:00-07:00' or 'sat,sun 00:00-24:00'."
    ),
    click.option(
        "--pause-above-load",
        type=SHARE,
        help="Pause while other programs use more than this share of the processors, such as '30 %'.",
    ),
    click.option("--pause-after", type=SECONDS, default=5.0, help="Pause once they have been that busy for this long."),
    click.option(
        "--resume-after", type=SECONDS, default=60.0, help="Resume once they have been less busy for this long."
    ),
)
"""For commands of volunteers: a `VolunteerSettings` as the argument `limits`."""
