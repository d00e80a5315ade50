"""Amounts as people write them: ``4 GiB``, ``20 Mbit/s``, ``30 %``, ``10 min``. No I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Final

import click

_AMOUNT: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/%]*)")

_PREFIXES: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZES: Final = {f"{prefix}b": float(factor) for prefix, factor in (_PREFIXES | _BINARY).items()} | {"": 1.0}
_RATES: Final = (
    {f"{unit}/s": factor for unit, factor in _SIZES.items() if unit}
    | {f"{prefix}bit/s": factor / 8 for prefix, factor in _PREFIXES.items()}
    | {"": 1.0}
)
_SECONDS: Final = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SHARES: Final = {"": 1.0, "%": 0.01}


def counted(number: int, noun: str) -> str:
    """``1 server``, ``2 servers``, ``4,096 experts``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def parse_size(text: str | int | float) -> int:
    """Bytes: ``4 GiB``, ``500 MB`` or a plain number. Raises: ValueError."""
    return round(_parse(text, _SIZES, "a size, such as 4 GiB or 500 MB"))


def parse_rate(text: str | int | float) -> float:
    """Bytes per second: ``20 Mbit/s``, ``2 MB/s`` or a plain number of bytes. Raises: ValueError."""
    return _parse(text, _RATES, "a rate, such as 20 Mbit/s or 2 MB/s")


def parse_seconds(text: str | int | float) -> float:
    """Seconds: ``90 s``, ``10 min``, ``1 h`` or a plain number. Raises: ValueError."""
    return _parse(text, _SECONDS, "a time, such as 90 s or 10 min")


def parse_share(text: str | int | float) -> float:
    """A share of one: ``30 %`` or ``0.3``. Raises: ValueError."""
    return _parse(text, _SHARES, "a share, such as 30 % or 0.3")


def _parse(text: Any, units: dict[str, float], what: str) -> float:
    if isinstance(text, int | float) and not isinstance(text, bool):
        if not math.isfinite(text) or text < 0:
            raise ValueError(f"not {what}: {text}")
        return float(text)
    match = _AMOUNT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2].lower() not in units:
        raise ValueError(f"not {what}: {text!r}")
    amount = float(match[1]) * units[match[2].lower()]
    if not math.isfinite(amount):
        raise ValueError(f"not {what}: {text[:40]}...")
    return amount


class Amount(click.ParamType):  # type: ignore[type-arg]  # older versions are not generic
    """A command-line option's type that one of the parsers above reads."""

    def __init__(self, name: str, parse: Callable[[Any], Any], *, above_zero: bool = False) -> None:
        self.name = name
        self._parse = parse
        self._above_zero = above_zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            found = self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self._above_zero and found <= 0:
            self.fail(f"{value} is not above 0", param, ctx)
        return found


class Number(click.FloatRange):
    """A finite number in a range: "nan" and "inf" are numbers to Python, but no amount of anything."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


LEARNING_RATE: Final = Number(0)
PERIOD: Final = Number(0, 10**9, min_open=True)
"""Seconds above 0."""
MANY: Final = 2**31 - 1
"""The most that a count of rows may be."""
MAX_THREADS: Final = 1024
SIZE: Final = Amount("size", parse_size)
RATE: Final = Amount("rate", parse_rate)
SECONDS: Final = Amount("time", parse_seconds)
SECONDS_ABOVE_ZERO: Final = Amount("time", parse_seconds, above_zero=True)
SHARE: Final = Amount("share", parse_share)
