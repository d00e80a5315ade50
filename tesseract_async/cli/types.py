"""Types of the commands' arguments and options: amounts with units, peers, patterns of uids, and the like."""

import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import click

from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import Scalar
from tesseract_async.identity import PeerID
from tesseract_async.server.contract import Hours
from tesseract_async.transport.base import split_host_port

OPTIMIZERS: Final = click.Choice(["adam", "adamw", "sgd", "none"])
ROWS: Final = click.IntRange(1, 2**31 - 1)
PORT: Final = click.IntRange(0, 65535)
THREADS: Final = click.IntRange(1, 1024)

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
_AMOUNT: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/%]*)")
_GRID: Final = re.compile(r"[1-9]\d{0,8}(x[1-9]\d{0,8}){0,7}")


def counted(number: int, noun: str) -> str:
    """Return ``1 server``, ``2 servers``, ``4,096 experts``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rate_text(rate: float) -> str:
    """Return bytes per second as ``0.51 Mbit/s`` or ``20 Mbit/s``: text that `RATE` takes."""
    megabits = 8e-6 * rate
    return f"{megabits:.0f} Mbit/s" if megabits >= 10 else f"{megabits:.2g} Mbit/s"


class Parsed(click.ParamType):  # type: ignore[type-arg]  # older versions are not generic
    """A click type: the value that `parse` returns for a text. Its ValueError is a usage error."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str | int | float | Path):
            return value
        try:
            return self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _amount(text: str, units: Mapping[str, float], what: str, *, least: float = 0.0, most: float = math.inf) -> float:
    match = _AMOUNT.fullmatch(text.strip())
    factor = None if match is None else units.get(match[2].lower())
    if match is None or factor is None or not math.isfinite(amount := float(match[1]) * factor):
        raise ValueError(f"not {what}: {text[:40]!r}")
    if not least <= amount <= most:
        raise ValueError(f"{text} is not between {least:g} and {most:g}")
    return amount


def seconds(least: float = 0.0, most: float = 1e9) -> Parsed:
    """Return the type of a time of `least` to `most` seconds, such as ``90``, ``90 s`` or ``10 min``."""
    what = "a time, such as 90 s or 10 min"
    return Parsed("time", partial(_amount, units=_SECONDS, what=what, least=least, most=most))


def _address(text: str) -> str:
    split_host_port(text)
    return text


def _peer_file(text: str) -> frozenset[PeerID]:
    path = Path(text).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None
    texts = [found for line in lines if (found := line.partition("#")[0].strip())]
    if not texts:
        raise ValueError(f"{path} lists nobody; leave the option out to let everybody in")
    try:
        return frozenset(map(PeerID.parse, texts))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _text_or_file(text: str) -> str:
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError):  # too long for a name, for one
        return text


def _grid(text: str) -> tuple[int, ...]:
    if not _GRID.fullmatch(text):
        raise ValueError(f"{text!r} is not like 32x32")
    return tuple(map(int, text.split("x")))


def _pair(text: str) -> tuple[str, Scalar]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise ValueError(f"{text!r} is not like name=value, such as in_features=1024")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


SIZE: Final = Parsed("size", lambda text: round(_amount(text, _SIZES, "a size, such as 4 GiB or 500 MB")))
"""Bytes: ``4 GiB``, ``500 MB`` or a plain number."""
RATE: Final = Parsed("rate", partial(_amount, units=_RATES, what="a rate, such as 20 Mbit/s or 2 MB/s"))
"""Bytes per second: ``20 Mbit/s``, ``2 MB/s`` or a plain number of bytes."""
SHARE: Final = Parsed("share", partial(_amount, units=_SHARES, what="a share, such as 30 % or 0.3"))
"""A share of one: ``30 %`` or ``0.3``."""
SECONDS: Final = seconds()
PERIOD: Final = seconds(least=0.001)
"""Seconds from one time to the next: a period is at least 1 ms."""
ADDRESS: Final = Parsed("address", _address)
METRICS_ADDRESS: Final = Parsed("address", lambda text: _address(text if ":" in text else f"127.0.0.1:{text}"))
"""``HOST:PORT``; a port alone is one of this computer's loopback."""
PEER: Final = Parsed("peer", PeerID.parse)
PEERS: Final = Parsed("peers", lambda text: frozenset(PeerID.parse(part.strip()) for part in text.split(",")))
"""A set of peer ids, written with commas between them."""
PEER_FILE: Final = Parsed("file", _peer_file)
"""The set of peer ids that a file lists, one a line; ``#`` begins a comment."""
TEXT_OR_FILE: Final = Parsed("text", _text_or_file)
"""Text, or the name of a file that holds it."""
PATTERN: Final = Parsed("pattern", ExpertPattern.parse)
HOURS: Final = Parsed("hours", Hours.parse)
GRID: Final = Parsed("grid", _grid)
PAIR: Final = Parsed("pair", _pair)
"""A name and its value: a number, true, false, none, or else text."""


class Number(click.FloatRange):
    """A finite number in a range: "nan" and "inf" are numbers to Python, but no amounts."""

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


LEARNING_RATE: Final = Number(0)


class UserPath(click.Path):
    """A path in which ``~`` means the user's folder even where no shell has expanded it, as in a file of options."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        return super().convert(os.path.expanduser(value), param, ctx)


FILE: Final = UserPath(dir_okay=False, path_type=Path)
EXISTING_FILE: Final = UserPath(exists=True, dir_okay=False, path_type=Path)
FOLDER: Final = UserPath(file_okay=False, path_type=Path)
