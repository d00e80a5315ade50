"""Replicas that failed here lately: hidden for a while, and asked last until they answer again. No I/O.

Kept for each server and replica, not for each manifest: a server that renews its claim every second is not believed
anew each time.
"""

from dataclasses import dataclass

from tesseract_async.identity import PeerID

_FIRST_HOLD_SECONDS = 15.0
_MAX_HOLD_SECONDS = 600.0
_MAX_MASKS = 512


@dataclass(slots=True)
class _Mask:
    sequence: int
    """The sequence of the manifest by which it was known when it failed last."""
    until: float
    """Hidden until then (wall clock), even by a newer manifest."""
    num_failures: int
    num_late: int = 0


class Masks(dict[tuple[PeerID, str], _Mask]):
    """Masks by server and uid, in the order of their last failures."""

    def __init__(self) -> None:
        super().__init__()
        self._silent: dict[PeerID, None] = {}

    def failed(self, owner: PeerID, uid: str, sequence: int, now: float) -> None:
        """Note that the replica, known by a manifest of this sequence, failed. Failures while it is hidden anyway (of
        calls that ran at once, or had nobody else to ask) count as one."""
        mask = self.pop((owner, uid), None)
        if mask is None:
            mask = _Mask(sequence, now, 1)
        elif not self._hides(mask, sequence, now):
            hold = 0.0
            if mask.num_failures:
                hold = min(_MAX_HOLD_SECONDS, _FIRST_HOLD_SECONDS * 2 ** min(mask.num_failures - 1, 10))
            mask = _Mask(sequence, now + hold, mask.num_failures + 1, mask.num_late)
        self._silent[owner] = None
        self._keep(owner, uid, mask)

    def _keep(self, owner: PeerID, uid: str, mask: _Mask) -> None:
        self.pop((owner, uid), None)
        self[owner, uid] = mask
        for kept in (self, self._silent):
            if len(kept) > _MAX_MASKS:
                del kept[next(iter(kept))]  # type: ignore[arg-type]

    def late(self, owner: PeerID, uid: str) -> None:
        """Note that the replica was given up as late. It is not hidden for that."""
        mask = self.get((owner, uid)) or _Mask(-1, 0.0, 0)
        mask.num_late += 1
        self._keep(owner, uid, mask)

    def answered(self, owner: PeerID, uid: str) -> bool:
        """Note that the replica answered a call, and so is no longer in doubt. Returns whether it was."""
        self._silent.pop(owner, None)
        return self.pop((owner, uid), None) is not None

    def hides(self, owner: PeerID, uid: str, sequence: int, now: float) -> bool:
        """Return whether this replica, as a manifest of this sequence names it, is not to be asked now."""
        mask = self.get((owner, uid))
        return mask is not None and self._hides(mask, sequence, now)

    def doubt(self, owner: PeerID, uid: str) -> int:
        """Failures of the replica since its last answer; 1 for another replica of a server that failed since its own
        last answer. The doubtful are asked last."""
        mask = self.get((owner, uid))
        return mask.num_failures + mask.num_late if mask is not None else int(owner in self._silent)

    def hidden(self) -> list[tuple[PeerID, str, int, float]]:
        return [(owner, uid, mask.sequence, mask.until) for (owner, uid), mask in self.items()]

    @staticmethod
    def _hides(mask: _Mask, sequence: int, now: float) -> bool:
        return sequence <= mask.sequence or now < mask.until
