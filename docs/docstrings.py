"""Docstrings as Markdown wants them: this package writes `::` before an indented block, as its source reads best."""

import re
from typing import Any

import griffe

_ALONE = re.compile(r"^::\n", flags=re.M)
_AT_THE_END = re.compile(r"::$", flags=re.M)
_TWO_TICKS = re.compile(r"``([^`]+)``")


class Docstrings(griffe.Extension):
    """Sees every documented object once."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """griffe's hook."""
        if obj.docstring is not None:
            text = _AT_THE_END.sub(":", _ALONE.sub("", obj.docstring.value))
            obj.docstring.value = _TWO_TICKS.sub(r"`\1`", text)
