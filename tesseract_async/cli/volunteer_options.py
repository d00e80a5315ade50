"""Options about how much of this computer a volunteer lends, and when."""

from tesseract_async.cli.flags import FIRST, grouped
from tesseract_async.server.contract import VolunteerSettings

volunteer_options = grouped(
    "limits", VolunteerSettings, sections={"max_memory_bytes": FIRST, "max_upload_rate": "Limits"}
)
"""Options of commands of volunteers: a `VolunteerSettings` as the argument `limits`."""
