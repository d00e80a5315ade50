"""Settings of calls to experts, and of a mixture whose experts may vanish. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tesseract_async.wire.codecs import AUTO, Codecs
from tesseract_async.wire.messages import HIGHEST_PRIORITY, LOWEST_PRIORITY


def check_max_staleness(max_staleness: int | None) -> None:
    """Raises: ValueError unless it is None or a number of steps."""
    if max_staleness is not None and (type(max_staleness) is not int or max_staleness < 0):
        raise ValueError(f"max_staleness is a number of optimizer steps, 0 or more, or None; not {max_staleness!r}")


def check_timeout(name: str, timeout: float) -> None:
    """Raises: ValueError unless it is a positive number."""
    if not timeout > 0:  # the other way round, "nan" would pass
        raise ValueError(f"{name} is a positive number of seconds, not {timeout!r}")


@dataclass(frozen=True, slots=True)
class CallOptions:
    """Options of a call to an expert. Raises ValueError for options that make no sense."""

    max_staleness: int | None = None
    """A forward's answer lacks at most this many of the steps that the primary has taken; 0: the primary answers. None:
    any replica answers, from weights that followers pulled up to `sync_every` seconds ago."""
    audit_share: float = 0.0
    """Share of forwards that another replica answers, too, so that wrong answers are noticed (see `client.audits`)."""
    priority: int = 0
    """-1, 0 or 1; higher goes first at the server."""
    codec: str | Mapping[str, str] = AUTO
    """The codec of floating-point tensors: a name, or names by ``inputs``, ``outputs``, ``gradients``. One that is
    not accepted gives way to one that loses no more, see `wire.codecs`."""
    codecs: Codecs = field(init=False)
    """The codecs of `codec`, checked."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "codecs", Codecs.of(self.codec))
        if type(self.priority) is not int or not LOWEST_PRIORITY <= self.priority <= HIGHEST_PRIORITY:
            raise ValueError(
                f"a priority is {LOWEST_PRIORITY}, 0 or {HIGHEST_PRIORITY} (goes first), not {self.priority!r}"
            )
        check_max_staleness(self.max_staleness)
        if not 0 <= self.audit_share <= 1:
            raise ValueError(f"audit_share lies between 0 and 1, not at {self.audit_share!r}")


DEFAULT_OPTIONS = CallOptions()


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """Settings of a mixture whose experts may vanish; times in seconds. Raises ValueError for impossible numbers."""

    spare: int = 1
    """A row is refilled as soon as fewer than ``k_min + spare`` of its experts have answered or still may: a spare one
    under way keeps a row from waiting for one that hangs. 0: fewer calls, for swarms where hardly any hang. One that
    was asked instead of another is not waited for once its rows have `k_best` answers."""
    forward_timeout: float = 15.0
    """Limit for a row to get its `k_min` answers, refills included. Rows that have tried every live expert wait until
    then for experts that appear, come back, or were overloaded, unless all said themselves that they failed
    (`ExpertFailed` and the like), or there is a `capacity_factor`."""
    timeout_after_k_min: float | None = None
    """Limit of the wait for the other answers once every row has `k_min`. None: as long as `patience` allows, and then
    another second (three in an expert's first pass), unless that was in vain lately."""
    backward_timeout: float = 15.0
    """Limit for the experts' gradients. An expert that has not answered by then contributes none."""
    backward_k_min: int = 0
    """Experts whose gradients a row needs, of those that answered it; with fewer, backward raises NotEnoughExperts. All
    are waited for in any case, as in forward; what is left out is counted (``answers_left_out``)."""
    patience: float | None = None
    """An expert counts as hanging once it takes longer than usual by more than this share (at least 0.02 s): than most
    others of the batch, than that many rows, and than itself. Its rows are then refilled, and only rows that still
    need it wait. Time in which the loop stood still never counts. None: learned from how far answers scatter (see
    `Lateness`), between 0.25 and 1.5; up to 4 while fewer than half of the batch's experts have answered, since
    answers that wait in one queue are late together."""
    refill: bool = True
    """Rows short of answers are sent to their next-best experts."""
    rescale_backward: bool = False
    """Input gradients are divided by the share of the row's weight whose gradients arrived, so that their size does not
    depend on who was left out."""
    on_missing: Literal["raise", "zero"] = "raise"
    """A row short of `k_min` answers in the end raises NotEnoughExperts, or gets an output of zeros."""
    capacity_factor: float | None = None
    """An expert takes at most this many times its fair share of the rows, the best-scored first; None: no limit."""
    latency_weight: float = 0.0
    """Score that an expert loses, in choosing only, for each second that it is expected to take."""
    search: Literal["exact", "beam"] = "exact"
    """``"exact"`` reads the whole grid and keeps it fresh; ``"beam"`` asks the network about the best cells of each
    batch, for grids too large to hold, and does as ``"exact"`` where few of these cells are hosted."""
    load_balancing: bool = False
    """Each pass computes a load-balancing loss, see `GatingFunction.load_balancing_loss`."""
    jitter: float = 0.0
    """In training mode, what is scored is multiplied by a random factor in ``[1 - jitter, 1 + jitter]``."""
    calls: CallOptions = DEFAULT_OPTIONS
    """Options of each call."""

    def __post_init__(self) -> None:
        for name, number in (("spare", self.spare), ("backward_k_min", self.backward_k_min)):
            if type(number) is not int:
                raise ValueError(f"{name} is a whole number, not {number!r}")
        if self.on_missing not in ("raise", "zero"):
            raise ValueError(f"on_missing is 'raise' or 'zero', not {self.on_missing!r}")
        if self.search not in ("exact", "beam"):
            raise ValueError(f"search is 'exact' or 'beam', not {self.search!r}")
        check_timeout("forward_timeout", self.forward_timeout)
        check_timeout("backward_timeout", self.backward_timeout)
        for name in ("timeout_after_k_min", "spare", "backward_k_min", "patience", "latency_weight"):
            if (number := getattr(self, name)) is not None and not number >= 0:
                raise ValueError(f"{name} is a number of 0 or more, not {number!r}")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor is a positive number, not {self.capacity_factor!r}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter lies in [0, 1), not at {self.jitter}")
