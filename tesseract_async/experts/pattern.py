"""Patterns of uids, as a volunteer writes them: ``ffn.[0:4].[0:16].7``. No I/O."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tesseract_async.experts.manifest import MAX_DIMS, is_prefix, join_uid, split_uid

_RANGE = re.compile(r"\[(\d{1,9}):(\d{1,9})\]")


@dataclass(frozen=True, slots=True)
class ExpertPattern:
    """All uids with this prefix whose coordinates lie in these ranges."""

    prefix: str
    ranges: tuple[range, ...]

    @classmethod
    def parse(cls, text: str) -> "ExpertPattern":
        """Read ``ffn.[0:4].7``: a prefix, then per dimension a number or ``[first:after last]``.

        Raises: ValueError with a sentence that names the pattern.
        """
        # a uid is the pattern of itself, and says best what is wrong with it
        if "[" not in text:
            prefix, coords = split_uid(text)
            return cls(prefix, tuple(range(number, number + 1) for number in coords))
        parts = text.split(".")
        first = next(number for number, part in enumerate(parts) if "[" in part or part.isdigit())
        ranges = []
        for part in parts[first:]:
            match = _RANGE.fullmatch(part)
            if match:
                ranges.append(range(int(match[1]), int(match[2])))
            elif part.isascii() and part.isdigit():
                ranges.append(range(int(part), int(part) + 1))
            else:
                raise ValueError(f"not a pattern of uids, such as 'ffn.[0:4].[0:16]': {text!r}")
        prefix = ".".join(parts[:first])
        if not is_prefix(prefix) or len(ranges) > MAX_DIMS or any(len(one) == 0 for one in ranges):
            raise ValueError(f"not a pattern of uids, such as 'ffn.[0:4].[0:16]': {text!r}")
        return cls(prefix, tuple(ranges))

    @property
    def grid_size(self) -> tuple[int, ...]:
        """The smallest grid, from the origin, that holds the pattern."""
        return tuple(one.stop for one in self.ranges)

    @property
    def num_uids(self) -> int:
        """The number of uids that the pattern names; ``len`` has a limit, and a pattern can name more."""
        return math.prod(len(one) for one in self.ranges)

    def __len__(self) -> int:
        return self.num_uids

    def coords_at(self, rank: int) -> tuple[int, ...]:
        """The coordinates of this rank, in the order of iteration. Raises: IndexError."""
        if not 0 <= rank < self.num_uids:
            raise IndexError(f"{self} has {self.num_uids} members; none has the rank {rank}")
        found = []
        for one in reversed(self.ranges):
            rank, offset = divmod(rank, len(one))
            found.append(one[offset])
        return tuple(reversed(found))

    def rank_of(self, coords: tuple[int, ...]) -> int | None:
        """The inverse of `coords_at`; None for what is no member."""
        if len(coords) != len(self.ranges) or any(at not in one for one, at in zip(self.ranges, coords, strict=True)):
            return None
        rank = 0
        for one, at in zip(self.ranges, coords, strict=True):
            rank = rank * len(one) + one.index(at)
        return rank

    def __iter__(self) -> Iterator[str]:
        return (join_uid(self.prefix, coords) for coords in itertools.product(*self.ranges))

    def __contains__(self, uid: object) -> bool:
        if not isinstance(uid, str):
            return False
        try:
            prefix, coords = split_uid(uid)
        except ValueError:
            return False
        return prefix == self.prefix and self.rank_of(coords) is not None

    def __str__(self) -> str:
        def part(one: range) -> str:
            return str(one.start) if len(one) == 1 else f"[{one.start}:{one.stop}]"

        return ".".join((self.prefix, *map(part, self.ranges)))
