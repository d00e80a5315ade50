"""Bounds on bytes that all connections of a node share, so that no peer can use up what others need. No I/O.

Only memory that is really in use counts: a large message counts as it arrives, however much it announced, since
untouched memory costs nothing. So no peer waits because a stranger announces bytes and never sends them. When the bound
is reached, a message is dropped to make room: one of the largest peer in the address range that holds most.

A grant or a message given up is noted in `NodeBudgets.changed`; the driver whose cycle caused it calls `deliver`.
"""

from collections import deque
from collections.abc import Hashable
from typing import Final, NamedTuple, Protocol

from tesseract_async.endpoint.lanes import Pace

FLOOR: Final = 2 * 2**20
"""Bytes that a message counts from its start on, if it has that many: pages of memory may be as large as this."""
SHARE: Final = 1 / 8
"""Share of a budget that one peer may announce, or leave waiting, at once. One message may always be larger."""


class RoomHolder(Protocol):
    """The driver of the connection that a reservation belongs to."""

    def room_changed(self, room: "Reservation") -> None:
        """`room` was granted after waiting, or (`released`) is wanted for others and was taken back."""


class Owner(NamedTuple):
    group: Hashable
    """The peer's address range, or the peer itself where the range tells nothing (loopback)."""
    peer: Hashable
    holder: RoomHolder | None = None
    """Hears of changes of this owner's reservations."""


class Reservation:
    """Room for one message of `size` bytes, until `release`. It may be filled once `granted`."""

    __slots__ = ("size", "num_bytes", "granted", "released", "owner", "use", "call", "asked", "_budget")

    def __init__(self, budget: "Budget", owner: Owner, use: "_Use", size: int, call: object, *, asked: bool) -> None:
        self.size = size
        self.num_bytes = 0
        """The bytes of this message that count."""
        self.granted = not asked
        self.released = False
        """True once `release` was called, or the room was taken back."""
        self.owner = owner
        self.use = use
        self.call = call
        """The call that it is for, as its holder knows it."""
        self.asked = asked
        self._budget = budget

    def fill(self, num_bytes: int) -> bool:
        """Take that many bytes of the message, which are here or about to come. False: no room, and it is given up."""
        more = min(self.size, max(num_bytes, FLOOR)) - self.num_bytes
        if self.released or more <= 0 or self._budget.add(self, more):
            return not self.released
        self.give_up()
        return False

    def keep(self) -> None:
        """Note that all of the message is here and in use: it is no longer given up."""
        self.use.taken.pop(self, None)

    def give_up(self) -> None:
        if not self.released:
            self.release()
            self._budget.changed.append(self)

    def release(self) -> None:
        if not self.released:
            self.released = True
            self._budget.leave(self)


class _Use:
    __slots__ = ("num_bytes", "announced", "windows", "line", "taken", "num_reservations")

    def __init__(self) -> None:
        self.num_bytes = 0
        self.announced = 0  # by reservations that were granted to `ask`
        self.windows = 0
        self.line: deque[Reservation] = deque()
        self.taken: dict[Reservation, None] = {}  # what counts and may be given up, the newest last
        self.num_reservations = 0


class Budget:
    """At most `total` bytes, not counting messages that came in one piece. `changed` collects the changes of which
    holders are to be told."""

    def __init__(self, total: int, *, share: float = SHARE, changed: deque[Reservation] | None = None) -> None:
        self.total = total
        self.share = int(total * share)
        self.used = 0
        self.windows = 0
        """Bytes of flow-control windows, which are promises: they count in `used` only as they are used."""
        self.num_given_up = 0
        self.changed: deque[Reservation] = deque() if changed is None else changed
        self._groups: dict[Hashable, dict[Hashable, _Use]] = {}

    @property
    def num_waiting(self) -> int:
        return sum(len(use.line) for peers in self._groups.values() for use in peers.values())

    @property
    def num_peers(self) -> int:
        return sum(map(len, self._groups.values()))

    def ask(self, owner: Owner, size: int, call: object = None) -> Reservation:
        """Return room for a message that was announced: granted at once, or as soon as the same peer's earlier ones
        leave its share, which is noted in `changed`.

        Raises: ValueError for more than the whole budget.
        """
        reservation = self._reserve(owner, size, call, asked=True)
        reservation.use.line.append(reservation)
        self._grant(reservation.use)
        if reservation.granted:
            self.changed.pop()  # the caller sees it
        return reservation

    def begin(self, owner: Owner, size: int, call: object = None) -> Reservation:
        """Return room for a message that comes unasked, in a window or as an expected reply. Raises: ValueError."""
        return self._reserve(owner, size, call, asked=False)

    def keep(self, owner: Owner, size: int, call: object = None) -> Reservation | None:
        """Count a message that is here already; None if it is beyond the peer's share, or there is no room."""
        use = self._groups.get(owner.group, {}).get(owner.peer)
        if size > self.total or (use is not None and use.num_bytes and use.num_bytes + size > self.share):
            return None
        reservation = self._reserve(owner, size, call, asked=False)
        if self.add(reservation, size):
            return reservation
        reservation.release()
        return None

    def open_window(self, owner: Owner, size: int) -> bool:
        """Promise a flow-control window, or more of one, unless too many were promised, to all or to this range."""
        use = self._use(owner)
        others = sum(one.windows for one in self._groups[owner.group].values())
        if self.windows + size > self.total or (others and others + size > 2 * self.share):
            self._forget(owner, use)
            return False
        use.windows += size
        self.windows += size
        return True

    def close_window(self, owner: Owner, size: int) -> None:
        if size:
            use = self._use(owner)
            use.windows -= size
            self.windows -= size
            self._forget(owner, use)

    def add(self, reservation: Reservation, more: int) -> bool:
        """Count `more` bytes of it, for which other messages may have to go. False if there is no room: release it."""
        self.used += more
        use = reservation.use
        use.num_bytes += more
        reservation.num_bytes += more
        use.taken[reservation] = None
        while self.used > self.total:
            victim = self._victim()
            if victim is None or victim is reservation:
                return False
            self.num_given_up += 1
            victim.give_up()
        return True

    def leave(self, reservation: Reservation) -> None:
        use = reservation.use
        use.taken.pop(reservation, None)
        use.num_reservations -= 1
        use.num_bytes -= reservation.num_bytes
        self.used -= reservation.num_bytes
        if not reservation.granted:
            use.line.remove(reservation)
        elif reservation.asked:
            use.announced -= reservation.size
            self._grant(use)
        self._forget(reservation.owner, use)

    def _reserve(self, owner: Owner, size: int, call: object, *, asked: bool) -> Reservation:
        if size > self.total:
            raise ValueError(f"{size} bytes never fit a budget of {self.total}")
        use = self._use(owner)
        use.num_reservations += 1
        return Reservation(self, owner, use, size, call, asked=asked)

    def _use(self, owner: Owner) -> _Use:
        peers = self._groups.setdefault(owner.group, {})
        use = peers.get(owner.peer)
        if use is None:
            use = peers[owner.peer] = _Use()
        return use

    def _forget(self, owner: Owner, use: _Use) -> None:
        if not use.num_reservations and not use.windows:
            peers = self._groups[owner.group]
            del peers[owner.peer]
            if not peers:
                del self._groups[owner.group]

    def _victim(self) -> Reservation | None:
        """The newest message that may be given up, of the peer that holds most in the range that holds most."""
        groups = sorted(self._groups.values(), key=lambda peers: -sum(use.num_bytes for use in peers.values()))
        for peers in groups:
            for use in sorted(peers.values(), key=lambda use: -use.num_bytes):
                if use.taken:
                    return next(reversed(use.taken))
        return None

    def _grant(self, use: _Use) -> None:
        while use.line:
            first = use.line[0]
            if use.announced and use.announced + first.size > self.share:
                return
            use.line.popleft()
            use.announced += first.size
            first.granted = True
            self.changed.append(first)


class FairCount:
    """Bytes that cannot be taken back before their time, such as those of calls under way."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._groups: dict[Hashable, int] = {}
        self._peers: dict[Hashable, int] = {}

    def take(self, owner: Owner, num_bytes: int) -> bool:
        free = self.total - self.used - num_bytes
        group = self._groups.get(owner.group, 0) + num_bytes
        peer = self._peers.get(owner.peer, 0) + num_bytes
        if group > free or 2 * peer > free:
            return False
        self._groups[owner.group], self._peers[owner.peer] = group, peer
        self.used += num_bytes
        return True

    def give_back(self, owner: Owner, num_bytes: int) -> None:
        self.used -= num_bytes
        for counts, key in ((self._groups, owner.group), (self._peers, owner.peer)):
            counts[key] = counts.get(key, 0) - num_bytes
            if counts[key] <= 0:
                del counts[key]


class NodeBudgets:
    """The budgets that a node's connections share. Replies get half of `max_receive_bytes`, small calls a quarter."""

    def __init__(self, max_receive_bytes: int) -> None:
        self.changed: deque[Reservation] = deque()
        self.messages = Budget(max_receive_bytes, changed=self.changed)
        """Large messages, half received or being answered."""
        self.replies = Budget(max_receive_bytes // 2, share=1 / 4, changed=self.changed)
        """Replies that wait to be taken."""
        self.small_calls = FairCount(max_receive_bytes // 4)
        """Small calls under way."""
        self.pace = Pace()
        self._delivers = False

    def deliver(self) -> None:
        """Tell holders what has changed. Called at the end of a driver's cycle, also of one that this leads to: the
        first call tells all, so that the stack does not grow with what a peer lets wait."""
        if self._delivers:
            return
        self._delivers = True
        try:
            while self.changed:
                room = self.changed.popleft()
                if room.owner.holder is not None:
                    room.owner.holder.room_changed(room)
        finally:
            self._delivers = False
