"""The live experts of one grid as arrays: what a beam search runs on. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tesseract_async.experts.manifest import Coordinates, Manifest, join_uid
from tesseract_async.identity import PeerID
from tesseract_async.transport.base import PeerAddress


@dataclass(frozen=True, slots=True)
class ExpertReplica:
    """One expert at one server."""

    uid: str
    peer: PeerAddress
    sequence: int
    """Of the manifest that names it; grows with every renewal."""
    expiration: float
    """Wall-clock seconds (`time.time`) until which that manifest holds."""
    primary: bool
    """Whether this server trains the expert; others answer from pulled state."""


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A manifest and what the network says about it: `owner` hosts these experts until `expiration`."""

    owner: PeerID
    expiration: float
    manifest: Manifest

    def rows_of(self, coords: tuple[int, ...]) -> list[int]:
        """The rows of the manifest that hold these coordinates: one, none, or more if its owner repeats itself."""
        if len(coords) != self.manifest.num_dims:
            return []
        return np.flatnonzero((self.manifest.coords == np.array(coords)).all(axis=1)).tolist()

    def replica(self, prefix: str, row: int) -> ExpertReplica:
        """The expert in this row of the manifest."""
        uid = join_uid(prefix, self.manifest.coords[row].tolist())
        peer = PeerAddress(self.owner, self.manifest.addresses, self.manifest.rendezvous)
        return ExpertReplica(uid, peer, self.manifest.sequence, self.expiration, bool(self.manifest.primary[row]))


def rank_replicas(replicas: Iterable[ExpertReplica]) -> list[ExpertReplica]:
    """The replicas of one uid: each server once (by its newest manifest), the primary first, then the newest."""
    newest: dict[PeerID | None, ExpertReplica] = {}
    for replica in sorted(replicas, key=lambda replica: replica.sequence):
        newest[replica.peer.peer_id] = replica
    return sorted(newest.values(), key=lambda replica: (not replica.primary, -replica.sequence))


class GridView:
    """A snapshot of a grid's live experts. Never changes; a later state of the grid is another view."""

    def __init__(
        self,
        prefix: str,
        grid_size: tuple[int, ...],
        claims: Sequence[Claim],
        *,
        masked: Mapping[tuple[PeerID, tuple[int, ...]], int],
        version: int,
    ) -> None:
        """Builds the view of what `claims` say, vectorised: 4,096 experts take some milliseconds.

        `masked` maps (owner, coordinates) to the last sequence that is left out. Coordinates outside of `grid_size` and
        claims with another number of dimensions are left out and counted in `num_foreign`.
        """
        self.prefix = prefix
        self.grid_size = grid_size
        self.version = version
        """Grows whenever the live experts may have changed: compare it to know whether anything cached holds."""
        fitting = [claim for claim in claims if claim.manifest.num_dims == len(grid_size)]
        self._claims = fitting
        self.num_foreign = sum(len(claim.manifest.coords) for claim in claims) - sum(
            len(claim.manifest.coords) for claim in fitting
        )
        self.expiration = min((claim.expiration for claim in fitting), default=float("inf"))
        """The earliest expiration of any claim in it (wall clock): from then on the view shows the dead."""
        if not fitting:
            self.coords: Coordinates = np.empty((0, len(grid_size)), dtype=np.int64)
            """``[num_live, dims]``, ascending, each live expert once."""
            self._rows: npt.NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)
            self._starts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
            return
        coords = np.concatenate([claim.manifest.coords for claim in fitting])
        sizes = [len(claim.manifest.coords) for claim in fitting]
        # which claim, and which row of its manifest, each expert comes from
        rows = np.stack([np.repeat(np.arange(len(fitting)), sizes), np.concatenate([np.arange(n) for n in sizes])], 1)
        keep = (coords < np.array(grid_size, dtype=np.int64)).all(axis=1)
        self.num_foreign += int((~keep).sum())
        for (owner, at), last in masked.items():
            theirs = np.array([claim.owner == owner and claim.manifest.sequence <= last for claim in fitting])
            keep &= ~(theirs[rows[:, 0]] & (coords == np.array(at, dtype=np.int64)).all(axis=1))
        coords, rows = coords[keep], rows[keep]
        order = np.lexsort(tuple(reversed(coords.T)))
        coords, self._rows = coords[order], rows[order]
        first = np.ones(len(coords), dtype=bool)
        first[1:] = (coords[1:] != coords[:-1]).any(axis=1)
        self.coords = coords[first]
        self._starts = np.flatnonzero(first)

    def __len__(self) -> int:
        return len(self.coords)

    def uid(self, row: int) -> str:
        """The uid of the expert in this row of `coords`."""
        return join_uid(self.prefix, self.coords[row].tolist())

    def replicas_at(self, row: int) -> list[ExpertReplica]:
        """Who hosts the expert in this row of `coords`: the primary first, then the newest manifest; never empty."""
        start = self._starts[row]
        stop = self._starts[row + 1] if row + 1 < len(self._starts) else len(self._rows)
        rows = self._rows[start:stop].tolist()
        return rank_replicas(self._claims[claim].replica(self.prefix, claim_row) for claim, claim_row in rows)

    @cached_property
    def replicas(self) -> Mapping[tuple[int, ...], list[ExpertReplica]]:
        """Coordinates -> `replicas_at`. Made on first use, its values when they are asked for."""
        return _Replicas(self)


class _Replicas(Mapping[tuple[int, ...], list[ExpertReplica]]):
    def __init__(self, view: GridView) -> None:
        self._view = view
        self._row = {tuple(coords): row for row, coords in enumerate(view.coords.tolist())}
        self._made: dict[tuple[int, ...], list[ExpertReplica]] = {}

    def __getitem__(self, coords: tuple[int, ...]) -> list[ExpertReplica]:
        made = self._made.get(coords)
        if made is None:
            made = self._made[coords] = self._view.replicas_at(self._row[coords])
        return made

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)
