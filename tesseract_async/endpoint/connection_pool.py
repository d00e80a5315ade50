"""The connections of a node, and how often dialing its peers has failed. No I/O."""

import random
from collections.abc import Sequence

from tesseract_async.endpoint.connection import Connection
from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU
from tesseract_async.transport.base import PeerAddress


class ConnectionPool:
    """Open connections by peer, and the back-off of peers that could not be dialed."""

    MAX_BACKOFFS = 4096

    def __init__(self, *, backoff_base: float, backoff_max: float, rng: random.Random) -> None:
        self._base = backoff_base
        self._max = backoff_max
        self._rng = rng
        self._by_peer: dict[PeerID, list[Connection]] = {}
        self._by_address: dict[str, PeerID] = {}
        # failed dials in a row, and when the next one may be made
        self._backoffs: LRU[PeerAddress, tuple[int, float]] = LRU(self.MAX_BACKOFFS)

    def find(self, peer: PeerAddress) -> Connection | None:
        """Return an open connection to `peer` that is not retired: the newest one dialed here, else the newest."""
        if peer.peer_id is not None:
            found: Sequence[Connection] = self._by_peer.get(peer.peer_id, ())
        else:
            known = [self._by_address[address] for address in peer.addresses if address in self._by_address]
            found = [connection for peer_id in known for connection in self._by_peer.get(peer_id, ())]
        for connection in found:
            if connection.is_open and not connection.retired:
                return connection
        return None

    def find_session(self, peer_id: PeerID, session: bytes) -> Connection | None:
        for connection in self._by_peer.get(peer_id, ()):
            if connection.session == session and connection.is_open and connection.dialed is None:
                return connection
        return None

    def add(self, connection: Connection) -> None:
        mine = self._by_peer.setdefault(connection.peer_id, [])
        if connection.dialed is None:
            # before older ones: when a NAT forgets its mapping, the peer comes back while its old connection
            # looks alive for some time
            mine.insert(sum(other.dialed is not None for other in mine), connection)
        else:
            mine.insert(0, connection)
            for address in connection.dialed.addresses:
                self._by_address[address] = connection.peer_id

    def remove(self, connection: Connection) -> None:
        mine = self._by_peer.get(connection.peer_id, [])
        if connection in mine:
            mine.remove(connection)
        if not mine:
            self._by_peer.pop(connection.peer_id, None)
        if connection.dialed is not None and not any(other.dialed is not None for other in mine):
            for address in connection.dialed.addresses:
                if self._by_address.get(address) == connection.peer_id:
                    del self._by_address[address]

    def connections(self) -> list[Connection]:
        return [connection for mine in self._by_peer.values() for connection in mine]

    @property
    def num_connections(self) -> int:
        return sum(map(len, self._by_peer.values()))

    def num_connections_with(self, peer_id: PeerID) -> int:
        return sum(connection.dialed is None for connection in self._by_peer.get(peer_id, ()))

    def retry_at(self, peer: PeerAddress) -> float:
        """The time before which this peer should not be dialed there again; 0.0 if there is none."""
        return self._backoffs.get(peer, (0, 0.0))[1]

    def dial_failed(self, peer: PeerAddress, now: float) -> None:
        """Double the wait before the next dial, with jitter, so that a crowd does not come back at once."""
        failures, _ = self._backoffs.get(peer, (0, 0.0))
        wait = min(self._max, self._base * 2**failures)
        self._backoffs[peer] = min(failures + 1, 32), now + wait * self._rng.uniform(0.5, 1.0)

    def dial_succeeded(self, peer: PeerAddress) -> None:
        self._backoffs.pop(peer, None)
