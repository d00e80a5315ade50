"""`MixtureSettings`: how a mixture layer deals with experts that may vanish. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tesseract_async.client.expert_calls import CallOptions, check_audit_share, check_max_staleness, check_priority
from tesseract_async.wire.codecs import AUTO, Codecs


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """How a mixture deals with experts that may vanish. Times in seconds."""

    k_best: int = 4
    """Experts asked for each row."""
    k_min: int = 1
    """Answers that a row needs."""
    spare: int = 1
    """A row is refilled as soon as fewer than ``k_min + spare`` of its experts have answered or still may: a spare one
    under way keeps a row from waiting for one that hangs."""
    forward_timeout: float = 15.0
    """For a row to get its `k_min` answers, refills included. Rows that have tried every live expert wait until then
    for those that come, come back, or were overloaded; not where all that failed said no themselves (`ExpertFailed` and
    the like), and not with a `capacity_factor`."""
    timeout_after_k_min: float | None = None
    """Once every row has `k_min` answers, how much longer the others are waited for at most; None: by `patience`, and
    beyond it for a second, or three in an expert's first pass, as long as that was not in vain lately."""
    backward_timeout: float = 15.0
    """For the experts' gradients. An expert that has not answered by then contributes none."""
    backward_k_min: int = 0
    """Experts whose gradients a row needs, of those that answered it; with fewer, backward raises NotEnoughExperts. All
    are waited for in any case, as in forward; what is left out is counted (``answers_left_out``)."""
    patience: float | None = None
    """An expert counts as hanging when it takes longer than this share (0.02 s at least) beyond what is usual: for most
    others of the batch, for so many rows, and for itself. Then its rows are refilled, and only those wait that must.
    A number is kept to; time in which the loop stood still never counts. None: learnt from how far answers scatter (see
    `Lateness`), between 0.25 and 1.5."""
    refill: bool = True
    """Whether rows short of answers are sent to their next-best experts."""
    rescale_backward: bool = False
    """Whether the survivors' input gradients are divided by their share of the row's weight."""
    on_missing: Literal["raise", "zero"] = "raise"
    """What becomes of a row short of `k_min` answers in the end: NotEnoughExperts, or an output of zeros."""
    capacity_factor: float | None = None
    """An expert takes at most this many times its fair share of the rows, the best-scored first; None: no limit."""
    latency_weight: float = 0.0
    """Score that an expert loses, in choosing only, for each second that it is expected to take."""
    priority: int = 0
    """-1, 0 or 1; higher goes first at the servers."""
    codec: str | Mapping[str, str] = AUTO
    """How floating-point tensors travel, see `CallOptions`."""
    max_staleness: int | None = None
    """Optimizer steps that an answer may lack, see `CallOptions`; 0: only primaries answer."""
    audit_share: float = 0.0
    """Share of the experts' answers that another replica computes, too, see `CallOptions`."""

    def __post_init__(self) -> None:
        Codecs.of(self.codec)
        check_priority(self.priority)
        check_max_staleness(self.max_staleness)
        check_audit_share(self.audit_share)
        for name in ("k_best", "k_min", "spare", "backward_k_min"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} is a whole number, not {getattr(self, name)!r}")
        if self.k_best < 1:
            raise ValueError(f"k_best is at least 1, not {self.k_best}")
        for name in ("k_min", "backward_k_min"):
            if not 0 <= getattr(self, name) <= self.k_best:
                raise ValueError(f"{name} lies between 0 and k_best={self.k_best}, not at {getattr(self, name)}")
        if self.on_missing not in ("raise", "zero"):
            raise ValueError(f"on_missing is 'raise' or 'zero', not {self.on_missing!r}")
        # the other way round, "nan" would pass
        for name in ("forward_timeout", "backward_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is a positive number of seconds, not {getattr(self, name)!r}")
        for name in ("timeout_after_k_min", "spare", "patience", "latency_weight"):
            if (number := getattr(self, name)) is not None and not number >= 0:
                raise ValueError(f"{name} is a number of 0 or more, not {number!r}")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor is a positive number, not {self.capacity_factor!r}")

    @property
    def call_options(self) -> CallOptions:
        """The same for a single expert's calls."""
        return CallOptions(
            timeout=self.forward_timeout,
            backward_timeout=self.backward_timeout,
            max_staleness=self.max_staleness,
            audit_share=self.audit_share,
            priority=self.priority,
            codec=self.codec,
        )
