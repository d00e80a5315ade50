"""The live experts of one grid as arrays: what a beam search runs on. No I/O."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tesseract_async.experts.manifest import Coordinates, Manifest, join_uid, split_uid
from tesseract_async.experts.masks import Masks
from tesseract_async.identity import PeerID
from tesseract_async.transport.base import PeerAddress

MAX_REPLICAS = 16
"""The most replicas of one uid that are used; `in_order_of_trust` says which."""
MAX_ROWS = 65_536
"""Rows of manifests that a view holds: sorting them takes about 5 ms."""
MAX_ROWS_OF_OWNER = 8_192


@dataclass(frozen=True, slots=True)
class ExpertReplica:
    """One expert at one server."""

    uid: str
    peer: PeerAddress
    sequence: int
    """The sequence of the manifest that names it; grows with every renewal."""
    expiration: float
    """Wall-clock seconds (`time.time`) until which that manifest holds."""
    primary: bool
    """True if this server trains the expert; others answer from pulled state."""
    doubt: int = field(default=0, compare=False)
    """Failures of this replica here since its last answer: the doubtful are asked last."""
    epoch: int = 0
    """The epoch of the expert's lineage, as its server says; of two primaries the one with the higher is believed."""


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A manifest and what the network says about it: `owner` hosts these experts until `expiration`."""

    owner: PeerID
    expiration: float
    manifest: Manifest
    peer: PeerAddress = field(init=False)
    """The owner, where the manifest says."""

    def __post_init__(self) -> None:
        peer = PeerAddress(self.owner, self.manifest.addresses, self.manifest.rendezvous)
        object.__setattr__(self, "peer", peer)

    def rows_of(self, coords: tuple[int, ...]) -> list[int]:
        """The row of the manifest that holds these coordinates, in a list; empty if none does."""
        if len(coords) != self.manifest.num_dims:
            return []
        return np.flatnonzero((self.manifest.coords == np.array(coords)).all(axis=1)).tolist()

    def replica(self, prefix: str, row: int, *, masks: Masks | None = None) -> ExpertReplica:
        uid = join_uid(prefix, self.manifest.coords[row].tolist())
        doubt = masks.doubt(self.owner, uid) if masks else 0
        epoch = 0 if self.manifest.epochs is None else int(self.manifest.epochs[row])
        return ExpertReplica(
            uid, self.peer, self.manifest.sequence, self.expiration, bool(self.manifest.primary[row]), doubt, epoch
        )


def rank_replicas(replicas: Iterable[ExpertReplica]) -> list[ExpertReplica]:
    """The replicas of one uid: each server once (by its newest manifest), the primary of the highest epoch first, then
    those that failed least, then the newest."""
    newest: dict[PeerID | None, ExpertReplica] = {}
    for replica in sorted(replicas, key=lambda replica: replica.sequence):
        newest[replica.peer.peer_id] = replica
    return sorted(newest.values(), key=_rank)


def _rank(replica: ExpertReplica) -> tuple[bool, int, int, int]:
    return not replica.primary, -replica.epoch * replica.primary, replica.doubt, -replica.sequence


def in_order_of_trust(claims: Iterable[Claim], known: Collection[PeerID] = ()) -> list[Claim]:
    """Return the claims in the order in which they get room where it is short: owners in `known` first, then those that
    claim the least."""
    of_owner: dict[PeerID, list[Claim]] = {}
    for claim in claims:
        of_owner.setdefault(claim.owner, []).append(claim)
    kept: list[tuple[bool, int, list[Claim]]] = []
    for owner, theirs in of_owner.items():
        theirs.sort(key=lambda claim: -claim.manifest.sequence)
        num_rows, some = 0, []
        for claim in theirs:
            num_rows += len(claim.manifest.coords)
            if num_rows > MAX_ROWS_OF_OWNER:
                break
            some.append(claim)
        kept.append((owner not in known, num_rows, some))
    kept.sort(key=lambda item: item[:2])
    return [claim for _, _, some in kept for claim in some]


class GridTable:
    """The rows of many claims that lie in a grid, sorted once: views of it are cheap. Empty before `fill`."""

    def __init__(self, prefix: str, grid_size: tuple[int, ...]) -> None:
        self.prefix = prefix
        self.grid_size = grid_size
        self.num_foreign = 0
        """Coordinates left out because they lie outside of the grid, or have another number of dimensions."""
        self.num_crowded_out = 0
        """Coordinates left out because there was no room."""
        self.claims: list[Claim] = []
        self.owner_of: list[int] = []
        """The number in `owners` of each claim's owner."""
        self.owners: dict[PeerID, int] = {}
        self.coords: Coordinates = np.empty((0, len(grid_size)), dtype=np.int64)
        """Ascending; once for each replica."""
        self.rows: npt.NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)
        """``[rows, 2]``: the claim, and the row of its manifest, that each comes from."""
        self.expirations = np.empty(0)

    def fill(self, claims: Sequence[Claim]) -> Iterator[None]:
        """Take in `claims`, in the order in which they get room: `MAX_ROWS` in all, `MAX_REPLICAS` (primaries first)
        for each uid. Iterate to the end; each step takes at most some 5 ms."""
        parts = [self.coords]
        rows = [self.rows]
        primary = [np.empty(0, dtype=bool)]
        bounds = np.array(self.grid_size, dtype=np.int64)
        room = MAX_ROWS
        for number, claim in enumerate(claims):
            if number % 64 == 63:
                yield
            coords = claim.manifest.coords
            fits = coords.shape[1] == len(bounds)
            inside = np.flatnonzero((coords < bounds).all(axis=1)) if fits else np.empty(0, dtype=np.int64)
            self.num_foreign += len(coords) - len(inside)
            if len(inside) > room:
                self.num_crowded_out += len(inside)
            elif len(inside):
                room -= len(inside)
                parts.append(coords[inside])
                primary.append(claim.manifest.primary[inside])
                rows.append(np.stack([np.full(len(inside), len(self.claims)), inside], axis=1))
                self.claims.append(claim)
                self.owner_of.append(self.owners.setdefault(claim.owner, len(self.owners)))
        self.expirations = np.array([claim.expiration for claim in self.claims])
        yield
        self.coords, self.rows = np.concatenate(parts), np.concatenate(rows)
        order = self._order(np.concatenate(primary))
        yield
        coords = self.coords[order]
        first = _firsts(coords)
        starts = np.flatnonzero(first)
        rank = np.arange(len(coords)) - np.repeat(starts, np.diff(np.append(starts, len(coords))))
        kept = rank < MAX_REPLICAS
        self.num_crowded_out += int((~kept).sum())
        self.coords, self.rows = coords[kept], self.rows[order[kept]]

    def _order(self, primary: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Sorts by coordinates; among a uid's replicas primaries first, then as the claims came."""
        if math.prod(self.grid_size) < 2**62:
            strides = [math.prod(self.grid_size[dim + 1 :]) for dim in range(len(self.grid_size))]
            return np.argsort((self.coords @ np.array(strides, dtype=np.int64)) * 2 + ~primary, kind="stable")
        return np.lexsort((~primary, *reversed(self.coords.T)))


class GridView:
    """A snapshot of a grid's live experts. Never changes; a later state of the grid is another view."""

    def __init__(self, table: GridTable, *, masks: Masks, now: float, version: int) -> None:
        """Takes what lives in `table` at `now` (wall clock) and is not hidden by `masks`."""
        self.prefix = table.prefix
        self.grid_size = table.grid_size
        self.version = version
        """Grows whenever the live experts may have changed: compare it to know whether anything cached holds."""
        self._table = table
        self._masks = masks
        live = table.expirations > now
        self.expiration = float(table.expirations[live].min(initial=math.inf))
        """The earliest expiration of any claim in it (wall clock): from then on the view shows the dead."""
        keep = live[table.rows[:, 0]]
        for owner, uid, sequence, until in masks.hidden():
            prefix, at = split_uid(uid)
            number = table.owners.get(owner)
            if number is None or prefix != table.prefix or len(at) != len(table.grid_size):
                continue
            for row in _rows_at(table.coords, at):
                claim = int(table.rows[row, 0])
                old = now < until or table.claims[claim].manifest.sequence <= sequence
                if table.owner_of[claim] == number and old:
                    keep[row] = False
        coords, self._rows = table.coords[keep], table.rows[keep]
        first = _firsts(coords)
        self.coords: Coordinates = coords[first]
        """``[num_live, dims]``, ascending, each live expert once."""
        self._starts = np.flatnonzero(first)
        self.replicas: Mapping[tuple[int, ...], list[ExpertReplica]] = _Replicas(self)
        """Coordinates -> `replicas_at`, made when they are asked for."""

    def __len__(self) -> int:
        return len(self.coords)

    def uid(self, row: int) -> str:
        return join_uid(self.prefix, self.coords[row].tolist())

    def row_of(self, coords: Sequence[int]) -> int | None:
        """The row of `coords` that holds these coordinates; None if nobody lives there."""
        if len(coords) != len(self.grid_size):
            return None
        rows = _rows_at(self.coords, coords)
        return rows[0] if rows else None

    def replicas_at(self, row: int) -> list[ExpertReplica]:
        """The replicas of the expert in this row of `coords`, best first (`rank_replicas`); never empty."""
        return self._replicas_in(range(row, row + 1))[0]

    def replicas_under(self, first: Sequence[int]) -> dict[int, list[ExpertReplica]]:
        """Return `replicas_at` of all experts whose coordinates are `first` and one more, by that one: a layer's."""
        if len(first) != len(self.grid_size) - 1:
            return {}
        rows = _rows_at(self.coords, first)
        numbers = self.coords[rows.start : rows.stop, -1].tolist()
        return dict(zip(numbers, self._replicas_in(rows), strict=True))

    def _replicas_in(self, rows: range) -> list[list[ExpertReplica]]:
        """Return the replicas of the experts in these rows of `coords`, which are not empty."""
        bounds = [*self._starts[rows.start : rows.stop + 1].tolist(), len(self._rows)]
        found, claims = self._rows[bounds[0] : bounds[len(rows)]].tolist(), self._table.claims
        each = [claims[claim].replica(self.prefix, at, masks=self._masks) for claim, at in found]
        parts = [each[bounds[i] - bounds[0] : bounds[i + 1] - bounds[0]] for i in range(len(rows))]
        return [part if len(part) == 1 else rank_replicas(part) for part in parts]


class _Replicas(Mapping[tuple[int, ...], list[ExpertReplica]]):
    def __init__(self, view: GridView) -> None:
        self._view = view
        self._made: dict[tuple[int, ...], list[ExpertReplica]] = {}

    def __getitem__(self, coords: tuple[int, ...]) -> list[ExpertReplica]:
        made = self._made.get(coords)
        if made is None:
            row = self._view.row_of(coords)
            if row is None:
                raise KeyError(coords)
            made = self._made[coords] = self._view.replicas_at(row)
        return made

    def __contains__(self, coords: object) -> bool:
        return isinstance(coords, tuple) and self._view.row_of(coords) is not None

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return map(tuple, self._view.coords.tolist())

    def __len__(self) -> int:
        return len(self._view.coords)


def _firsts(ascending: Coordinates) -> npt.NDArray[np.bool_]:
    first = np.ones(len(ascending), dtype=bool)
    first[1:] = (ascending[1:] != ascending[:-1]).any(axis=1)
    return first


def _rows_at(ascending: Coordinates, coords: Sequence[int]) -> range:
    low, high = 0, len(ascending)
    for dim, value in enumerate(coords):
        column = ascending[low:high, dim]
        start, stop = np.searchsorted(column, value), np.searchsorted(column, value, side="right")
        low, high = low + int(start), low + int(stop)
    return range(low, high)
