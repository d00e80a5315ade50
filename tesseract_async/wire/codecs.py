"""The codecs in which tensors travel: those that an expert accepts, those that a caller prefers, and how the two are
matched. No torch.

Three things travel between a caller and an expert, each with codecs of its own: ``inputs`` towards the expert,
``outputs`` back, and ``gradients``, of the outputs towards it and of the inputs back. `wire.compression` encodes.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tesseract_async.errors import ProtocolError, SchemaMismatch

CODECS: Final = ("none", "bf16", "fp16", "uint8", "uint8_blockwise", "int4_blockwise")
AUTO: Final = "auto"
"""The default preference: ``none`` where the expert accepts it, else the codec that the expert names first."""
FALLBACKS: Final[Mapping[str, tuple[str, ...]]] = {
    "none": (),
    "bf16": ("none",),
    "fp16": ("none",),
    "uint8": ("uint8_blockwise", "none"),
    "uint8_blockwise": ("none",),
    "int4_blockwise": ("uint8_blockwise", "none"),
}
"""The codecs that replace a preferred one where the expert does not accept it: none of them loses more."""


class Codecs(NamedTuple):
    """One codec for each of the three, or `AUTO`."""

    inputs: str = AUTO
    outputs: str = AUTO
    gradients: str = AUTO

    @classmethod
    def of(cls, preference: str | Mapping[str, str]) -> "Codecs":
        """Read a preference as callers write it: one name for all three, or a name for some of them; the others are
        `AUTO`.

        Raises: ValueError for a name that is not known.
        """
        preferences = dict.fromkeys(cls._fields, preference) if isinstance(preference, str) else dict(preference)
        if unknown := preferences.keys() - set(cls._fields):
            raise ValueError(f"codecs are for {', '.join(cls._fields)}; not for {', '.join(map(repr, unknown))}")
        for codec in preferences.values():
            if codec != AUTO and codec not in CODECS:
                raise ValueError(f"unknown codec {codec!r}; known: {AUTO}, {', '.join(CODECS)}")
        return cls(**preferences)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecPolicy:
    """The codecs that an expert accepts and answers with, the preferred ones first. All of them by default.

    Raises: ValueError for an unknown codec, or none at all.
    """

    inputs: tuple[str, ...] = CODECS
    outputs: tuple[str, ...] = CODECS
    gradients: tuple[str, ...] = CODECS

    def __post_init__(self) -> None:
        for name in Codecs._fields:
            names: Sequence[str] = getattr(self, name)
            if isinstance(names, str) or not names or any(codec not in CODECS for codec in names):
                raise ValueError(f"an expert's {name} travel in some of {', '.join(CODECS)}; got {names!r}")
            object.__setattr__(self, name, tuple(names))

    @classmethod
    def only(cls, codecs: Mapping[str, str]) -> "CodecPolicy":
        """One codec for each of the three that is named; the others may travel in any. Raises: ValueError."""
        if unknown := codecs.keys() - set(Codecs._fields):
            raise ValueError(f"codecs are for {', '.join(Codecs._fields)}; not for {', '.join(map(repr, unknown))}")
        return cls(**{name: (codec,) for name, codec in codecs.items()})

    def check(self, what: str, codec: str, *, expert: str) -> None:
        """Raises: SchemaMismatch if `what` (one of the three) must not travel to or from this expert in `codec`."""
        accepted: tuple[str, ...] = getattr(self, what)
        if codec not in accepted:
            known = "is not known here" if codec not in CODECS else f"is not for its {what}"
            raise SchemaMismatch(f"{expert}: codec {codec[:40]!r} {known}; accepted: {', '.join(accepted)}")

    def encode(self) -> dict[str, list[str]]:
        return {name: list(getattr(self, name)) for name in Codecs._fields}

    @classmethod
    def decode(cls, value: object) -> "CodecPolicy":
        """Untrusted. Codecs of later versions are left out. Raises: ProtocolError."""
        accepted: dict[str, tuple[str, ...]] = {}
        for name in Codecs._fields:
            names = value.get(name) if type(value) is dict else None
            if type(names) is not list or len(names) > 64:
                raise ProtocolError(f"malformed codecs of an expert's {name}")
            accepted[name] = tuple(codec for codec in names if type(codec) is str and codec in CODECS)
            if not accepted[name]:
                raise ProtocolError(f"an expert's {name} travel in no codec that is known here: upgrade this node")
        return cls(**accepted)


@functools.lru_cache(maxsize=256)
def settle(policy: CodecPolicy, preference: Codecs) -> Codecs:
    """Return the codecs between a caller of this preference and an expert of this policy.

    A codec that the expert does not accept gives way to one that loses no more (`FALLBACKS`).

    Raises: SchemaMismatch if there is none.
    """
    return Codecs(*(_settle(name, getattr(policy, name), getattr(preference, name)) for name in Codecs._fields))


def _settle(name: str, accepted: tuple[str, ...], preference: str) -> str:
    if preference == AUTO:
        return "none" if "none" in accepted else accepted[0]
    for codec in (preference, *FALLBACKS[preference]):
        if codec in accepted:
            return codec
    raise SchemaMismatch(
        f"this expert's {name} travel in {', '.join(accepted)}, not in {preference}: use one of these, or {AUTO!r}"
    )
